"""What `llamafleet plan` is given: the machine, the settings, the changes to them."""

from __future__ import annotations

import ast
import difflib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llamafleet.host import described
from llamafleet.host.machine import Machine, MachineError
from llamafleet.settings import secrets as secret_files
from llamafleet.settings.schema import Instance, Settings

DEFAULTS = Path("inventory/group_data/all.py")
NAME, PORT = "model", 8080  # of the instance that is planned here; nothing is ever served under them


class UsageError(Exception):
    """The command line cannot be used; the message says what it should be."""


def read_machine(named: str) -> described.Described:
    """A machine file, standard input or a description. Raises `UsageError` or `MachineError`."""
    path = Path(named)
    looks_like_path = path.suffix == ".json" or os.sep in named.partition("=")[0]
    if named != "-" and not looks_like_path and not path.is_file():
        try:
            return described.read(named)
        except described.DescriptionError as error:
            raise UsageError(f"--machine: there is no file of that name, and {error}") from error
    text = sys.stdin.read() if named == "-" else read_text(path)
    try:
        return described.Described(Machine.from_json(json.loads(text)))
    except ValueError as error:
        if isinstance(error, MachineError):
            raise
        raise UsageError(f"{named}: is not JSON: {error}") from error


def read_text(path: Path) -> str:
    """The file's text. Raises `UsageError`."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error


def default_data() -> dict[str, Any]:
    """The defaults, from `inventory/group_data/all.py` of this folder's checkout or of the package's."""
    package = Path(__file__).resolve().parent.parent
    for root in (Path.cwd(), package.parent, package):
        if (root / DEFAULTS).is_file():
            values: dict[str, Any] = {}
            code = compile(read_text(root / DEFAULTS), str(root / DEFAULTS), "exec")
            exec(code, values)  # noqa: S102 -- group data is Python, and the operator's own
            return {key: value for key, value in values.items() if not key.startswith("_")}
    raise UsageError(f"{DEFAULTS}: not found here or beside the package: run this in a checkout of llamafleet")


def parse_changes(changes: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE pairs; a value is a Python literal (131072, None, True, ["f16"]) or else a string."""
    parsed = {}
    for change in changes:
        key, mark, text = change.partition("=")
        if not mark or not key.isidentifier():
            raise UsageError(f"--set {change}: should be KEY=VALUE")
        try:
            parsed[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # what literal_eval may raise
            parsed[key] = text
    return parsed


def settings_for(model: str, data: Mapping[str, Any], changes: Mapping[str, Any]) -> Settings:
    """Settings with one instance, the model; each change goes where its key belongs."""
    of_instance = {key: value for key, value in changes.items() if _is_of_instance(key)}
    if clash := of_instance.keys() & {"source"}:
        raise UsageError(f"--set {clash.pop()}: is given by --model")
    of_host = {key: value for key, value in changes.items() if key not in of_instance}
    source = model if ":" in model else str(Path(model).absolute())
    entry = {"name": NAME, "port": PORT, **of_instance, "source": source}
    return Settings.from_data({**data, **of_host, "models": [entry]})


def _is_of_instance(key: str) -> bool:
    """Does the key, or the known one that it resembles most, belong to the model?"""
    host, instance = set(Settings.__dataclass_fields__), set(Instance.__dataclass_fields__)
    near = difflib.get_close_matches(key, host | instance, n=1)
    return key in instance or (key not in host and bool(near) and near[0] in instance)


def hub_token(settings: Settings) -> str | None:
    """The token for gated models, from where the settings say or the environment."""
    return secret_files.hub_token(settings.hub_token_file or None)
