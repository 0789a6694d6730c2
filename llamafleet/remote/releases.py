"""Make a release the current one, and remove the oldest others.

Contract: `releases.py KEY KEEP` links /opt/llamafleet/current to releases/KEY and then removes all
but the KEEP newest other releases; never one that a unit names or a process runs from. Prints what
was removed. Standard library; common.py beside it.

Decision 19: docs/decisions/0019-units-name-the-release-folder.md.
"""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any, Iterator  # the contract is Python 3.8, whose own Iterator is typing's

from common import GOOD, OPT, PREFIX, RELEASE_SCHEMA, SUFFIX, UNITS, later_schema, read_file, read_json, replace_link


def record_of(folder: str) -> dict[str, Any] | None:
    """The record of a release that is whole: its form is known, and every file that it names is there, in its size."""
    record = read_json(f"{folder}/release.json")
    files, sizes = record.get("files"), record.get("sizes", {})
    if later_schema(record, RELEASE_SCHEMA) or not isinstance(files, dict) or not isinstance(sizes, dict):
        return None
    try:
        for name in files:
            size = os.stat(f"{folder}/bin/{name}").st_size
            if size != sizes.get(name, size):
                return None
    except (OSError, ValueError):
        return None
    return record


def main(argv: list[str]) -> int:
    key, keep = argv[0], int(argv[1])
    if record_of(f"{OPT}/releases/{key}") is None:
        why = later_schema(read_json(f"{OPT}/releases/{key}/release.json"), RELEASE_SCHEMA)
        why = f"release.json: {why}" if why else "is not a complete release"
        print(f"error: {OPT}/releases/{key} {why}", file=sys.stderr)
        return 1
    replace_link(f"{OPT}/current", f"releases/{key}")
    for name in os.listdir(f"{OPT}/releases"):
        if name.endswith(".partial") and name != f".{key}.partial":
            shutil.rmtree(f"{OPT}/releases/{name}")
    others = [name for name in os.listdir(f"{OPT}/releases") if name != key and not name.startswith(".")]
    others.sort(key=lambda name: os.stat(f"{OPT}/releases/{name}").st_mtime, reverse=True)
    for name in others[keep:]:
        if not is_used(name):
            shutil.rmtree(f"{OPT}/releases/{name}")
            print(f"removed the old release {name}")
    return 0


def is_used(key: str) -> bool:
    """Does an installed unit, a last good unit or a running process use this release?"""
    return any(key in text for text in unit_texts()) or any(f"/releases/{key}/" in exe for exe in running())


def unit_texts() -> Iterator[str]:
    for folder, _, names in [(UNITS, None, os.listdir(UNITS)), *os.walk(GOOD)]:
        for name in names:
            if name.startswith(PREFIX) and name.endswith(SUFFIX):
                yield (read_file(f"{folder}/{name}") or b"").decode("utf-8", "replace")


def running() -> Iterator[str]:
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            yield os.readlink(f"/proc/{pid}/exe")
        except OSError:
            continue


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
