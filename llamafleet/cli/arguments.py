"""The arguments of `llamafleet plan`: the machine, the default settings, and the changes of `--set`."""

from __future__ import annotations

import ast
import difflib
import functools
import json
import os
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llamafleet.cli import beside
from llamafleet.cli.errors import UsageError
from llamafleet.host import described
from llamafleet.host.machine import Machine, MachineError
from llamafleet.hub.network import Network
from llamafleet.settings import defaults, secrets
from llamafleet.settings.copies import MOST_COPIES
from llamafleet.settings.other_names import LLAMA_CPP_NAMES
from llamafleet.settings.schema import Instance, Settings
from llamafleet.validation import shown

# Of a machine file, which has some 10 kB; a model, such as of swapped --machine and --model, has gigabytes.
MOST_CHARACTERS = 2**24
GGUF = b"GGUF"  # begins a model
NAME, PORT = "model", 8080  # name and port of the planned instance; nothing is served under them


def read_machine(argument: str) -> described.Described:
    """The machine of `--machine`: a machine file, "-" for standard input, or a description in words.

    Raises `UsageError` or `MachineError`.
    """
    path = Path(argument)
    if argument.startswith("hf:") or path.suffix == ".gguf":
        raise UsageError(
            f"--machine: {shown(argument)} names a model: give it with --model, and with --machine a machine file or a "
            "description such as rtx4090,ram=64GB,cores=10"
        )
    looks_like_path = path.suffix == ".json" or os.sep in argument.partition("=")[0]
    if argument != "-" and not looks_like_path and not _is_file(path):
        try:
            return described.read(argument)
        except described.DescriptionError as error:
            raise UsageError(f"--machine: there is no file {shown(argument)}, and as a description: {error}") from error
    text = sys.stdin.read(MOST_CHARACTERS + 1) if argument == "-" else _read_machine_file(path)
    if len(text) > MOST_CHARACTERS:
        raise UsageError(
            f"--machine: {shown(argument)} has more than {MOST_CHARACTERS} characters, and no machine file is so long"
        )
    try:
        return described.Described(Machine.from_json(json.loads(text)))
    except (ValueError, RecursionError) as error:
        if isinstance(error, MachineError):
            raise
        raise UsageError(f"{argument}: should be JSON: {error}") from error


def _read_machine_file(path: Path) -> str:
    """The beginning of the file. Raises `UsageError` for a model, too."""
    try:
        with path.open("rb") as file:
            if file.read(len(GGUF)) == GGUF:
                raise UsageError(
                    f"--machine: {shown(str(path))} is a model (GGUF), no machine file: give it with --model, and with "
                    "--machine a machine file or a description such as rtx4090,ram=64GB,cores=10"
                )
        with path.open() as file:
            return file.read(MOST_CHARACTERS + 1)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or has a zero byte
        return False


def read_text(path: Path) -> str:
    """The file's text. Raises `UsageError` if it cannot be read as UTF-8."""
    try:
        return path.read_text()
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError | ValueError) -> UsageError:
    """A ValueError: no UTF-8, or a zero byte in the path."""
    return UsageError(f"{shown(str(path))}: cannot be read: {getattr(error, 'strerror', None) or error}")


def default_data() -> dict[str, Any]:
    """The default settings, those that this package brings: a file of the current folder, which may be a stranger's,
    does not count. Raises `UsageError` where they are missing."""
    try:
        return defaults.defaults()
    except defaults.DefaultsError as error:
        raise UsageError(str(error)) from error


def parse_changes(changes: Sequence[str]) -> dict[str, Any]:
    """Values by key from KEY=VALUE texts; a value is a Python literal (131072, None, True, ["f16"]) or else a string.

    Raises `UsageError`.
    """
    parsed = {}
    for change in changes:
        key, mark, text = change.partition("=")
        key = key.strip().lstrip("-").replace("-", "_")  # as a flag's name, too
        if not mark or not re.fullmatch(r"([1-9][0-9]{0,2}\.)?[^\W\d]\w*", key):
            raise UsageError(f"--set {change}: should be KEY=VALUE")
        try:
            parsed[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # all that literal_eval raises
            parsed[key] = text
    return parsed


def settings_for(model: str, data: Mapping[str, Any], changes: Mapping[str, Any]) -> Settings:
    """Settings with one instance that serves `model`; each change is applied to the instance or to the host by its key.

    Raises `UsageError` or `SettingsError`.
    """
    if numbered := [key for key in changes if "." in key]:
        raise UsageError(f"--set {numbered[0]}: a setting of one of several models needs --together")
    return settings_for_all([model], data, changes)


def settings_for_all(models: Sequence[str], data: Mapping[str, Any], changes: Mapping[str, Any]) -> Settings:
    """Settings with an instance for each model. A change whose key is "2.KEY" is of the second model alone, another of
    all models or of the host.

    Raises `UsageError` or `SettingsError`.
    """
    of_host: dict[str, Any] = {}
    entries = _entries(len(models))
    for key, value in sorted(changes.items(), key=lambda change: "." in change[0]):  # what is of one model wins
        which, _, own = key.rpartition(".")
        if own == "source":
            raise UsageError("--set source: give the model with --model instead")
        if which and not (int(which) <= len(models) and _is_of_instance(own)):
            raise UsageError(f"--set {key}: should be a setting of a model, of 1 to {len(models)}")
        # A key that both have is the host's, unless it is said of which model.
        if _is_of_instance(own) and (which or own not in Settings.__dataclass_fields__):
            for entry in entries if not which else [entries[int(which) - 1]]:
                entry[own] = _items(own, value)
        else:
            of_host[own] = _items(own, value)
    for entry, model in zip(entries, models, strict=True):
        entry["source"] = model if ":" in model else str(Path(model).absolute())
    return Settings.from_data({**data, **of_host, "models": entries})


def labels(models: Sequence[str], settings: Settings) -> list[str]:
    """The models as they were given, one for each instance of `settings_for_all`, with the number of a copy."""
    given = {entry["name"]: model for entry, model in zip(_entries(len(models)), models, strict=True)}
    found = []
    for one in settings.models:
        name, _, number = one.name.rpartition("-")
        found.append(given[one.name] if one.name in given else f"{given[name]}, copy {number}")
    return found


def _entries(count: int) -> list[dict[str, Any]]:
    """The name and the port of each of so many models, with ports between for copies."""
    names = [NAME] if count == 1 else [f"{NAME}{number}" for number in range(1, count + 1)]
    return [{"name": name, "port": PORT + MOST_COPIES * number} for number, name in enumerate(names)]


def _items(key: str, value: Any) -> Any:
    """The value; for a setting that is a list, a single word or words with commas between are a list: "f16,q8_0"."""
    if key in ("projector", "draft", "adapters"):
        return beside.value(key, value)
    if key not in _lists():
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]
    if not isinstance(value, str):
        return value
    return [item.strip() for item in value.split(",") if item.strip()]


@functools.cache
def _lists() -> frozenset[str]:
    """The settings of a host or model that are lists, by their types."""
    hints = {**typing.get_type_hints(Settings), **typing.get_type_hints(Instance)}
    return frozenset(key for key, kind in hints.items() if _is_list(kind))


def _is_list(kind: Any) -> bool:
    """Whether a type is a list, or a list or nothing."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return any(_is_list(one) for one in typing.get_args(kind))
    return typing.get_origin(kind) is tuple


def _is_of_instance(key: str) -> bool:
    """Is the key, or for an unknown key the nearest known key, a setting of a model?"""
    host, instance = set(Settings.__dataclass_fields__), set(Instance.__dataclass_fields__)
    nearest = difflib.get_close_matches(key, host | instance, n=1)
    return key in instance or key in LLAMA_CPP_NAMES or (key not in host and bool(nearest) and nearest[0] in instance)


def network(settings: Settings) -> Network:
    """The way out that the settings name."""
    return Network(settings.proxy, settings.no_proxy, settings.ca_file)


def hub_token(settings: Settings) -> str | None:
    """The token for gated models, from the file that the settings name or from the environment; None if there is none.

    Raises `SecretError`.
    """
    return secrets.hub_token(settings.hub_token_file or None, settings.hub_endpoint)
