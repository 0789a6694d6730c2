"""The operator's records of tunes: `tuned/HOST.json` beside the inventory, by instance; they may be committed.

Decision 23: docs/decisions/0023-tuned-by-measurement.md.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from click.exceptions import ClickException, Exit
from pyinfra_cli.cli import cli

from llamafleet.host.answers import AnswerError, json_value
from llamafleet.tuning.record import record_text
from llamafleet.tuning.records import Kept
from tasks.lib import lookups

FOLDER = "tuned"
END = ".json"
# What characters of a host's name a file's name has as they are.
PLAIN = "@"

# The inventory of this process, where it is no pyinfra run.
_inventory: Path | None = None


def of_inventory(inventory: Path) -> None:
    """Take the records beside this inventory."""
    global _inventory  # noqa: PLW0603 -- one process, one inventory
    _inventory = inventory


def folder() -> Path:
    """Where the records of this run's inventory lie; of one that is no file, in the current folder."""
    inventory = _inventory or _of_run(tuple(sys.argv[1:]))
    return (inventory.resolve().parent if inventory and inventory.is_file() else Path.cwd()) / FOLDER


@cache
def _of_run(words: tuple[str, ...]) -> Path | None:
    """The inventory that pyinfra was started with, read as pyinfra reads its command line."""
    try:
        with cli.make_context("pyinfra", list(words), resilient_parsing=True) as context:
            inventory = context.params.get("inventory")
    except (ClickException, Exit):
        return None
    return Path(inventory) if inventory else None


def kept() -> Kept:
    """All records of the folder, read once a run."""
    there = folder()
    return lookups.once(("records", there), lambda: Kept.of(read(there)))


def read(there: Path) -> dict[str, tuple[str, Any]]:
    """By host, the path of its file and the JSON value in it; None where it cannot be read."""
    files = sorted(there.glob(f"*{END}")) if there.is_dir() else []
    return {unquote(path.name[: -len(END)]): (str(path), _value(path)) for path in files}


def _value(path: Path) -> Any:
    try:
        return json_value(path.read_text(encoding="utf-8"), str(path))
    except (OSError, ValueError, AnswerError):
        return None


def path_of(host: str, there: Path) -> Path:
    """The file of a host's records."""
    return there / f"{quote(host, safe=PLAIN)}{END}"


def keep(host: str, instance: str, record: Mapping[str, Any]) -> Path:
    """Add a record to the host's file, in place of an earlier one of the instance; the file is replaced at once. A file
    that is damaged is set aside. Returns its path; raises OSError."""
    there = folder()
    there.mkdir(exist_ok=True)
    path = path_of(host, there)
    before = _value(path) if path.exists() else {}
    if not isinstance(before, dict):
        os.replace(path, path.with_name(f"{path.name}.damaged"))
        before = {}
    replace_file(path, record_text({**before, instance: dict(record)}))
    return path


def replace_file(path: Path, text: str) -> None:
    """Give the file this text; a reader sees the old one or the new one. Raises OSError."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=".", delete=False) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
