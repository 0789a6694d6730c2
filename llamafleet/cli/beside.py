"""What `llamafleet plan` loads beside a model: its flags, the values of `--set`, and the headers."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamafleet.cli.errors import UsageError
from llamafleet.hub import source
from llamafleet.hub.network import Network
from llamafleet.hub.source import ModelFiles
from llamafleet.model.gguf import Header
from llamafleet.printable import err
from llamafleet.service.companions import with_companions
from llamafleet.settings.companions import companions
from llamafleet.settings.kinds import AUTO
from llamafleet.settings.schema import Instance

# The flags, each with its setting, and what it takes.
FLAGS = {
    "--projector": ("projector", "SRC", "the projector (mmproj) of a vision model: a source as of --model, or auto"),
    "--draft": ("draft", "SRC", "the draft model; with --speculation draft, if that is not given"),
    "--speculation": ("speculation", "KIND", "ngram, mtp, draft, eagle3, dflash or dspark"),
    "--adapter": ("adapters", "SRC[:SCALE]", "a LoRA adapter, with its scale if that is not 1; may be repeated"),
}
# Before a value: of which model of --together it is.
_NUMBERED = re.compile(r"([1-9][0-9]{0,2})\.(?=(hf:|https?:|[./~]|auto$|[a-z0-9]+$))(.+)")
_SCALED = re.compile(r"(.+):(-?[0-9]*\.?[0-9]+(?:[eE]-?[0-9]+)?)")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `llamafleet plan`."""
    for flag, (setting, value, what) in FLAGS.items():
        parser.add_argument(flag, action="append", default=[], metavar=value, dest=setting,
                            help=f"{what}; with --together 2.{value} is of the second model")  # fmt: skip


def changes(options: argparse.Namespace, others: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the flags give, by keys as of `--set`, whose own are `others`. Raises `UsageError`."""
    found: dict[str, Any] = {}
    for flag, (setting, _, _) in FLAGS.items():
        for text in getattr(options, setting):
            match = _NUMBERED.fullmatch(text)
            key, value = (f"{match[1]}.{setting}", match[3]) if match else (setting, text)
            if key in others:
                raise UsageError(f"{flag} {text}: --set {key} says it too")
            if setting == "adapters":
                found.setdefault(key, []).append(value)
            elif key in found:
                raise UsageError(f"{flag}: given twice")
            else:
                found[key] = value
    for key in [one for one in found if one.rpartition(".")[2] == "draft"]:
        kind = key.replace("draft", "speculation")
        if kind not in {**found, **others} and "speculation" not in {**found, **others}:
            found[kind] = "draft"
    return found


def value(key: str, given: Any) -> Any:
    """The value of a setting that names files beside the model, with paths from the current folder."""
    if key == "adapters":
        items = given.split(",") if isinstance(given, str) else given
        return [_adapter(item) for item in items] if isinstance(items, list | tuple) else items
    return _with_path(given) if key in ("projector", "draft") else given


def _adapter(given: Any) -> Any:
    match = _SCALED.fullmatch(given.strip()) if isinstance(given, str) else None
    if match:
        return {"source": _with_path(match[1]), "scale": float(match[2])}
    return _with_path(given.strip() if isinstance(given, str) else given)


def _with_path(given: Any) -> Any:
    if isinstance(given, Mapping):
        return {key: _with_path(one) if key == "source" else one for key, one in given.items()}
    if not isinstance(given, str) or ":" in given or given in (AUTO.source, ""):
        return given
    return str(Path(given).absolute())


def read(instance: Instance, endpoint: str, token: str | None, network: Network) -> ModelFiles:
    """The headers of the model and of what is loaded beside it. Raises `SourceError` and `GgufError`."""

    def look_up(one: Instance) -> ModelFiles:
        model = source.read_model(one.source, endpoint=endpoint, token=token, mirrors=one.mirrors,
                                  sha256=one.sha256 or (), network=network)  # fmt: skip
        if chosen := model.files[0].chosen:
            err(f"{one.source}: {chosen} is taken, as llama-server -hf would")
        return model

    def projector_of(model: str) -> str:
        found = source.projector_of(model, endpoint=endpoint, token=token, network=network)
        err(f"projector: {found} is taken, as llama-server -hf would")
        return found

    return with_companions(instance, look_up, projector_of)


def headers(model: ModelFiles) -> dict[str, Header]:
    """The headers of what is loaded beside a model, by part."""
    return {part: one.header for part, one in model.companions.items()}


def sources(instance: Instance) -> tuple[str, ...]:
    """What an instance is read from: its model's source, and those of its companions by part."""
    return (instance.source, *(f"{part} {one.source}" for part, one in companions(instance).items()))


def to_json(instance: Instance, files: ModelFiles) -> dict[str, Any]:
    """The key `companions` of a plan's JSON: by part its source, name and bytes. Empty where there are none."""
    named = companions(instance)
    told = {
        part: {"source": named[part].source, "name": one.header.name, "file_bytes": one.header.file_bytes_total}
        for part, one in files.companions.items()
    }
    return {"companions": told} if told else {}
