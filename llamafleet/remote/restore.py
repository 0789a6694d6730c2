"""Make folders of ours, and give files and folders of ours their mode and owner again, while services run on.

Contract: `restore.py PLACES`, a JSON list of {"path", "kind": "file" | "folder", "mode": int}, folders before what is
in them. A folder that is missing is made, and of a file that is there mode and owner are set. What lies in the way is
set aside as `.NAME.rejected`, and a link is removed, unless the folder may lie on another disk: whoever installs a file
then writes it. What a link leads to is neither changed nor copied: somebody else may have made it. Only paths below our
folders, and our units, are touched. Prints a line for each place; the last line of a failure begins with `error: `, on
stderr. Exit 0 done, 1 failed. Can be run again. Root, the host's lock, the standard library; common.py and
instance_files.py beside it.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, Dict, List

import common
import instance_files
from common import make_way


class Failed(Exception):
    """What is asked for is not ours; the text is for the operator."""


def make_folders() -> None:
    """All our folders, with their modes."""
    for path, mode in common.FOLDERS.items():
        folder(path, mode)


def folder(path: str, mode: int) -> None:
    """Let this be a folder of root's with that mode. Raises OSError."""
    if os.path.islink(path) and not (common.may_lead_elsewhere(path) and os.path.isdir(path)):
        os.unlink(path)
    elif os.path.lexists(path) and not os.path.isdir(path):
        common.set_aside(path)
    common.make_folder(path, mode)
    own(path, mode)


def file(path: str, mode: int) -> None:
    """Let a file that is there be root's with that mode, and nothing else lie there. Raises OSError."""
    make_way(path)
    if os.path.lexists(path) and (os.path.islink(path) or not os.path.isfile(path)):
        os.unlink(path)  # a link, a pipe or a socket
    if os.path.lexists(path):
        own(path, mode)


def own(path: str, mode: int) -> None:
    try:
        os.chown(path, os.geteuid(), os.getegid())
    except PermissionError:  # a network mount may not let root own files
        print(f"note: {path} cannot be given to root", flush=True)
    os.chmod(path, mode)


def is_ours(path: str) -> bool:
    """Whether a path may be changed: below our folders, without a way out of them, or a unit that we made."""
    if os.path.normpath(path) != path:
        return False
    if os.path.dirname(path) == common.UNITS:
        return instance_files.is_ours(os.path.basename(path))
    roots = (common.OPT, common.ETC, common.VAR, common.RUN)
    return any(path == root or path.startswith(root + "/") for root in roots)


def restore(places: List[Dict[str, Any]]) -> None:
    """Each place in turn. Raises Failed and OSError."""
    for place in places:
        path, mode = place["path"], int(place["mode"])
        if not is_ours(path):
            raise Failed(f"{path} is not llamafleet's: it stays as it is")
        (folder if place["kind"] == "folder" else file)(path, mode)
        print(
            f"{path} is root's, mode {mode:04o}" if os.path.lexists(path) else f"{path} is out of the way", flush=True
        )


def main(argv: List[str]) -> int:
    os.umask(0o022)
    try:
        restore(json.loads(argv[0]))
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}; correct that, then run again", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
