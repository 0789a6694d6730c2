"""Make a release the current one, and remove the oldest others.

Contract: `releases.py KEY KEEP` links /opt/llamafleet/current to releases/KEY and then removes all
but the KEEP newest other releases; never one that a unit names or a process runs from. Prints what
was removed. Standard library; common.py beside it.

Decision 19: docs/decisions/0019-units-name-the-release-folder.md.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
from typing import Any, Iterator  # the contract is Python 3.8, whose own Iterator is typing's

from common import (
    GOOD,
    OPT,
    PREFIX,
    RELEASE_SCHEMA,
    SUFFIX,
    UNITS,
    later_schema,
    read_file,
    read_json,
    replace_link,
    sha256_of,
)


def record_of(folder: str) -> dict[str, Any] | None:
    """The record of a release that is whole: its form is known, every file that it names is there, in its size and as
    it was written, and no other file."""
    record = read_json(f"{folder}/release.json")
    files, sizes = record.get("files"), record.get("sizes", {})
    if later_schema(record, RELEASE_SCHEMA) or not isinstance(files, dict) or not isinstance(sizes, dict):
        return None
    if any(map(os.path.islink, (folder, f"{folder}/bin", f"{folder}/release.json"))):
        return None
    try:
        if set(os.listdir(f"{folder}/bin")) != set(files):
            return None
        written = written_at(folder)
        whole = all(is_whole(f"{folder}/bin/{name}", sizes.get(name), files[name], written) for name in files)
    except (OSError, ValueError, TypeError):
        return None
    return record if whole else None


def written_at(folder: str) -> int:
    """When release.json was written, in nanoseconds; 0 where it may have been changed since. A release gets its name
    after that, which changes its folder."""
    note, named = os.stat(f"{folder}/release.json").st_ctime_ns, os.stat(folder).st_ctime_ns
    return note if note < named else 0


def is_whole(path: str, size: Any, digest: Any, written: int) -> bool:
    """Whether a file has this size (None: any) and this SHA-256. A file is read only where its content, mode or owner
    changed after `written`: any such change sets its ctime, which no program can set back. Links lead to neighbours."""
    found = os.lstat(path)
    if stat.S_ISLNK(found.st_mode):
        if os.sep in os.readlink(path):
            return False
        found = os.stat(path)
    if not stat.S_ISREG(found.st_mode) or found.st_size != (found.st_size if size is None else size):
        return False
    return found.st_ctime_ns <= written or digest == sha256_of(path)


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
