"""How much room the disks of this host have, and what lies on them of models.

Contract: a module of survey.py and left.py. `spaces(paths)` gives, by path, {"place": the folder above it that is
there, "device": text that is the same for paths of one file system, "free_bytes": int (without root's reserve),
"mount": where it is mounted, "unmounted": a mount point of /etc/fstab above the path at which nothing is mounted |
null, "read_only": bool}. `model_bytes()` gives the size of each model file, whole or partial, by the path of the whole
one. Changes nothing. Python 3.8, standard library; common.py beside it.
"""

from __future__ import annotations

import os
import re
from typing import Any, Dict, Iterable, List, Optional

import common
from common import listing, read_file

FSTAB, MOUNTS = "/etc/fstab", "/proc/self/mountinfo"
END = ".partial"


def spaces(paths: Iterable[str]) -> Dict[str, Dict[str, Any]]:
    mounted, wanted = mount_points(MOUNTS, 4), mount_points(FSTAB, 1)
    found = {}
    for path in paths:
        real = os.path.realpath(path)
        place = real
        while not os.path.exists(place) and place != "/":
            place = os.path.dirname(place)
        try:
            status, device = os.statvfs(place), os.stat(place).st_dev
        except OSError:
            continue
        missing = above(real, [one for one in wanted if one not in mounted])
        found[path] = {
            "place": place, "device": str(device), "free_bytes": status.f_bavail * status.f_frsize,
            "mount": above(place, mounted) or "/", "unmounted": missing,
            "read_only": bool(status.f_flag & os.ST_RDONLY),
        }  # fmt: skip
    return found


def mount_points(path: str, column: int) -> List[str]:
    """The folders in this column of a table of mounts; a blank in a name is written as an octal number."""
    text = (read_file(path) or b"").decode("utf-8", "replace")
    rows = [line.split() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    named = [row[column] for row in rows if len(row) > column and row[column].startswith("/")]
    return [re.sub(r"\\([0-7]{3})", lambda one: chr(int(one.group(1), 8)), name).rstrip("/") or "/" for name in named]


def above(path: str, folders: Iterable[str]) -> Optional[str]:
    """The nearest of the folders that the path is, or lies in."""
    found = [one for one in folders if one in ("/", path) or path.startswith(one + "/")]
    return max(found, key=len, default=None)


def model_bytes() -> Dict[str, int]:
    found: Dict[str, int] = {}
    for folder in listing(common.MODELS):
        try:
            names = os.listdir(f"{common.MODELS}/{folder}")
        except OSError:
            continue
        for name in names:
            file = name[1 : -len(END)] if name.startswith(".") and name.endswith(END) else name
            if common.is_model_file(file):
                path = f"{common.MODELS}/{folder}/{file}"
                found[path] = max(found.get(path, 0), size_of(f"{common.MODELS}/{folder}/{name}"))
    return found


def size_of(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0
