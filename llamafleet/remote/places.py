"""What lies at the places of ours on this host: kind, mode and owner of each file, folder and link.

Contract: a module of survey.py. `found` gives, by path, {"kind": "file" | "folder" | "link" | "other", "mode": int,
"uid": int, "gid": int, "target": text | null}; a path where nothing lies is left out. A link is not followed, but for a
folder that may lie on another disk, of which the folder is described. Changes nothing. Python 3.8, standard library;
common.py and instance_files.py beside it.
"""

from __future__ import annotations

import os
import stat
from typing import Any, Dict, Iterable, Iterator, Optional

import common
import instance_files
from common import listing


def found(instances: Iterable[str]) -> Dict[str, Dict[str, Any]]:
    """All places of ours, with those of these instances."""
    described = {path: describe(path) for path in paths(instances)}
    return {path: one for path, one in described.items() if one is not None}


def paths(instances: Iterable[str]) -> Iterator[str]:
    yield from (*common.FOLDERS, common.BUILD, common.SOURCE, f"{common.GATES}/liveness")
    for link in (common.CURRENT, f"{common.HELPERS}/current"):
        yield link
    for key in listing(common.HELPERS):
        yield f"{common.HELPERS}/{key}"
    for key in listing(common.RELEASES):
        folder = f"{common.RELEASES}/{key}"
        yield from (folder, f"{folder}/release.json", f"{folder}/bin")
        yield from (f"{folder}/bin/{name}" for name in listing(f"{folder}/bin"))
    for model in listing(common.MODELS):
        yield f"{common.MODELS}/{model}"
        names = [name for name in listing(f"{common.MODELS}/{model}") if common.is_model_file(name)]
        yield from (f"{common.MODELS}/{model}/{name}{end}" for name in names for end in ("", ".verified"))
    for name in instances:
        good = f"{common.GOOD}/{name}"
        yield from (f"{common.INSTANCES}/{name}", good, f"{good}/{instance_files.MANIFEST}")
        for file, (path, _) in instance_files.places(name).items():
            yield from (path, f"{good}/{file}")


def describe(path: str) -> Optional[Dict[str, Any]]:
    """What lies there; None where nothing does."""
    try:
        status, target = os.lstat(path), None
        if stat.S_ISLNK(status.st_mode):
            target = os.readlink(path)
            if common.may_lead_elsewhere(path) and os.path.isdir(path):
                status = os.stat(path)
    except OSError:
        return None
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "link"}
    return {"kind": kinds.get(stat.S_IFMT(status.st_mode), "other"), "mode": stat.S_IMODE(status.st_mode),
            "uid": status.st_uid, "gid": status.st_gid, "target": target}  # fmt: skip
