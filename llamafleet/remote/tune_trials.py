"""The trials of a tune on this host: a file with a line for each, which a crash or a power cut leaves readable.

A module of tune.py: `/var/lib/llamafleet/tune/NAME/trials.jsonl`, whose first line names the key of the tune: a file of
another key is set aside. Python 3.8, standard library; common.py lies beside it.
"""

from __future__ import annotations

import json
import os
from typing import Any, Dict, List

import common

SCHEMA = 1


def folder(name: str) -> str:
    return f"{common.VAR}/tune/{name}"


def path(name: str) -> str:
    return f"{folder(name)}/trials.jsonl"


def read(name: str, key: str) -> List[Dict[str, Any]]:
    """The trials of this tune, in order; none where the file is another tune's. A torn last line is left out."""
    try:
        with open(path(name), encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, ValueError):
        return []
    found = [value for line in lines if (value := _object(line))]
    if not found or found[0].get("key") != key or found[0].get("schema") != SCHEMA:
        return []
    return found[1:]


def _object(line: str) -> Dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def begin(name: str, key: str) -> None:
    """Make the file of this tune, unless it is there; set one of another tune aside."""
    common.make_folder(folder(name), 0o700)
    first = json.dumps({"schema": SCHEMA, "key": key})
    there = common.read_file(path(name))
    if there is not None and there.split(b"\n", 1)[0].decode("utf-8", "replace") == first:
        _mend(name, there)
        return
    if there is not None:
        common.set_aside(path(name))
    common.replace_file(path(name), (first + "\n").encode(), 0o600)


def _mend(name: str, there: bytes) -> None:
    """Cut off a torn last line, to which the next one would be joined."""
    whole = there[: there.rfind(b"\n") + 1]
    if whole != there:
        common.replace_file(path(name), whole, 0o600)


def append(name: str, trial: Dict[str, Any]) -> None:
    """Add a trial, on the disk when this returns."""
    with open(path(name), "ab") as file:
        file.write((json.dumps(trial) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())
