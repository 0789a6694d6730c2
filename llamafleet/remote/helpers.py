"""Install the helpers: these very programs, with the libraries beside them.

Contract: `helpers.py install KEY`, run from a copy of the helpers that is whole (payload.py compares its sum), copies
its own folder to /opt/llamafleet/helpers/KEY, makes the folders that the other programs need, links the new helpers as
the current ones, and removes those of other versions that nothing uses. Prints a line for each folder that it removes;
the last line of a failure begins with `error: `, on stderr. Exit 0 done, 1 failed. Killed at any point it can be run
again. Root, the host's lock, the standard library; common.py, restore.py and survey.py beside it.

A folder gets its name when its files are on the disk, and the link follows. What a unit names stays: the unit of an
instance, also the one that last passed the gate, calls the helpers that it was made with.
"""

from __future__ import annotations

import compileall
import os
import re
import shutil
import sys
from typing import Iterator, List, Set

import restore
import survey
from common import (
    GOOD,
    HELPERS,
    SUMS,
    UNITS,
    command_line,
    helpers_damage,
    listing,
    make_folder,
    replace_link,
    sync,
)  # fmt: skip


def install(key: str, source: str) -> None:
    """Copy the folder `source`, unless it is there and whole, and link it as the current helpers. Raises OSError."""
    folder, new = f"{HELPERS}/{key}", f"{HELPERS}/{key}.new"
    if os.path.islink(folder):
        os.unlink(folder)
    if helpers_damage(folder) is not None:
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(source, new, ignore=shutil.ignore_patterns("__pycache__", "try"))
        # Compiled once: every survey and gate would otherwise compile the libraries again.
        compileall.compile_dir(new, ddir=folder, quiet=2)
        publish(new)
        if os.path.lexists(folder) and not os.path.isdir(folder):
            os.unlink(folder)
        if os.path.isdir(folder):
            mend(folder, new)
        else:
            os.rename(new, folder)
    replace_link(f"{HELPERS}/current", key)


def mend(folder: str, new: str) -> None:
    """Replace the files of a damaged folder one by one, since units call its programs meanwhile; remove others."""
    wanted = {os.path.relpath(f"{path}/{name}", new) for path, _, names in os.walk(new) for name in names}
    # The sums last: they say that the folder is whole.
    for name in sorted(wanted, key=lambda name: name == SUMS):
        make_folder(os.path.dirname(f"{folder}/{name}"))
        os.replace(f"{new}/{name}", f"{folder}/{name}")
    for path, _, names in os.walk(folder):
        for name in names:
            if os.path.relpath(f"{path}/{name}", folder) not in wanted:
                os.unlink(f"{path}/{name}")
        sync(path)
    shutil.rmtree(new)


def publish(folder: str) -> None:
    """Everybody may read the files and enter the folders, root alone may change them, and the disk has them."""
    for path, _, names in os.walk(folder, topdown=False):
        for name in names:
            os.chmod(f"{path}/{name}", 0o644)
            sync(f"{path}/{name}")
        os.chmod(path, 0o755)  # noqa: S103 -- as every program's folder
        sync(path)


def used() -> Set[str]:
    """The folders of helpers that a unit of ours, a last good unit or a running process names."""
    return set(re.findall(re.escape(HELPERS) + r"/([\w.-]+)/", "\n".join(texts())))


def texts() -> Iterator[str]:
    units = [f"{UNITS}/{name}" for name in listing(UNITS) if survey.is_ours(name)]
    # Those of a switch under way too.
    good = [f"{folder}/{name}" for folder, _, names in os.walk(GOOD) for name in names]
    for path in [*units, *(path for path in good if path.endswith((".service", ".timer")))]:
        try:
            with open(path, errors="replace") as file:
                yield file.read()
        except OSError:  # removed in this moment
            continue
    for pid in filter(str.isdigit, os.listdir("/proc")):
        yield "\n".join(command_line(pid))


def prune(key: str) -> None:
    """Remove what nothing uses: the helpers of other versions, and what a run that was killed left half-done."""
    stay = {*used(), key, "current"}
    for name in listing(HELPERS):
        path = f"{HELPERS}/{name}"
        if name in stay or os.path.islink(path):
            continue
        if os.path.isdir(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)
        print(f"removed {path}", flush=True)


def main(argv: List[str]) -> int:
    _, key = argv
    os.umask(0o022)
    try:
        restore.make_folders()
        install(key, os.path.dirname(os.path.abspath(__file__)))
        prune(key)
    except OSError as error:
        print(f"error: the helpers cannot be installed: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
