"""The files of an instance: where they are, whether they are whole, and the last ones that passed the gate.

Contract: a module of switch.py, transaction.py, preflight.py and survey.py. An instance's files are a mapping of name
to content: the unit, the units of its liveness check and of its start on demand where it has them, plan.json, and the
credentials that its unit loads. Changes nothing. Python 3.8, standard library; common.py beside it.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any, Dict, List, Optional, Tuple  # the contract is Python 3.8, whose own are typing's

import common

Files = Dict[str, bytes]

PLAN = "plan.json"
MANIFEST = "manifest.json"  # of a folder of last good files: {"schema": 1, "files": {name: SHA-256}}
PASSED = "/.passed"  # in GOOD: files whose switch passed the gate and is being finished; see transaction.py


def places(name: str) -> Dict[str, Tuple[str, int]]:
    """Path and mode of each file, in the order in which they are replaced: a unit never names a file that is missing,
    and the liveness check never asks by another plan than the unit's."""
    folder = f"{common.INSTANCES}/{name}"
    return {
        **{loaded: (f"{folder}/{loaded}", 0o600) for loaded in common.LOADED},
        PLAN: (f"{folder}/{PLAN}", 0o644),
        **{unit: (f"{common.UNITS}/{unit}", 0o644) for unit in units_of(name)},
    }


def units_of(name: str) -> List[str]:
    """All units that an instance may have, its server's last."""
    return [*common.liveness_units(name), *common.demand_units(name), common.unit_of(name)]


def installed(name: str) -> Files:
    """The installed files as they are."""
    return _read({file: path for file, (path, _) in places(name).items()})


def in_folder(name: str, folder: str) -> Files:
    """Those of the instance's files that a folder has."""
    return _read({file: f"{folder}/{file}" for file in places(name)})


def _read(paths: Dict[str, str]) -> Files:
    found = {file: common.read_file(path) for file, path in paths.items()}
    return {file: data for file, data in found.items() if data is not None}


def last_good(name: str) -> Optional[Files]:
    """The files that last passed the gate; None where there are none, or where they are not whole."""
    for folder in (f"{common.GOOD}{PASSED}/{name}/files", f"{common.GOOD}/{name}"):
        files = in_folder(name, folder)
        if files and damage(name, files) is None and _as_listed(name, folder, files):
            return files
    return None


def _as_listed(name: str, folder: str, files: Files) -> bool:
    """Whether no file of the folder's manifest is missing or damaged. Earlier versions wrote no manifest, and replace
    plan.json and the liveness check without it: of these the form is enough."""
    listed = common.read_json(f"{folder}/{MANIFEST}").get("files")
    exact = (common.unit_of(name), *common.LOADED)
    return not isinstance(listed, dict) or all(
        file in files and (file not in exact or common.sha256(files[file]) == digest) for file, digest in listed.items()
    )


def manifest(files: Files) -> bytes:
    listed = {file: common.sha256(data) for file, data in files.items()}
    return (json.dumps({"schema": 1, "files": listed}, indent=1) + "\n").encode()


def previous(name: str) -> Optional[Files]:
    """What a switch that fails goes back to: the last good files, or the installed ones where those are not whole."""
    files = last_good(name)
    if files is None:
        files = installed(name)
    return files if damage(name, files) is None else None


def damage(name: str, files: Files) -> Optional[str]:
    """Why these files are not a whole instance; None where they are."""
    unit = common.unit_of(name)
    for one in units_of(name):
        if one in files and not files[one].startswith(common.MADE_BY.encode()):
            return f"{one} does not begin with {common.MADE_BY!r}"
    if unit not in files:
        return f"{unit} is missing"
    if plan(files) is None:
        return f"{PLAN} is missing, or no JSON object"
    for loaded in credentials(name, files[unit]):
        if not files.get(loaded, b"").strip(b"\0 \n"):
            return f"{loaded}, which the unit loads, is missing or empty"
    return None


def plan(files: Files) -> Optional[Dict[str, Any]]:
    return common.json_object(files.get(PLAN, b""))


def credentials(name: str, unit: bytes) -> List[str]:
    """The names of the files in the instance's folder that a unit loads."""
    text = unit.decode("utf-8", "replace")
    pattern = rf"^LoadCredential=[^:\n]*:{re.escape(common.INSTANCES)}/{re.escape(name)}/([\w-]+)$"
    return re.findall(pattern, text, re.MULTILINE)


def names() -> List[str]:
    """The installed instances: those whose unit we made, and those whose unit is gone while their files are there."""
    ours = [common.instance_of(unit) for unit in units()]
    folders = [name for name in common.listing(common.INSTANCES) if _is_of_instance(name)]
    left = [name for name in folders if not os.path.lexists(f"{common.UNITS}/{common.unit_of(name)}")]
    return sorted({*ours, *left})


def _is_of_instance(name: str) -> bool:
    """Whether a folder in that of the instances is one's, and not somebody's copy of it."""
    kept = os.path.isfile(f"{common.GOOD}/{name}/{common.unit_of(name)}")
    return kept or common.read_json(common.plan_path(name)).get("name") == name


def record(name: str) -> Dict[str, Any]:
    """plan.json of an installed instance; empty where there is none. Where somebody edited or damaged it, its copy
    among the last good files, which was written together with it."""
    path, good = common.plan_path(name), f"{common.GOOD}/{name}"
    found, kept = common.read_json(path), common.read_json(f"{good}/{PLAN}")
    if common.sha256_of(path) == common.sha256_of(f"{good}/{PLAN}") or not common.is_as_written(kept):
        return found
    unit = common.unit_of(name)
    now, then = (common.sha256_of(f"{folder}/{unit}") for folder in (common.UNITS, good))
    # Where both are whole and the units differ, plan.json is of a switch that was cut off.
    return found if now != then and common.is_as_written(found) else kept


def units() -> List[str]:
    """The units of instances that we made. Those of their liveness checks are read together with them."""
    return [name for name in common.listing(common.UNITS)
            if name.startswith(common.PREFIX) and name.endswith(common.SUFFIX) and not name.endswith(common.LIVENESS)
            and is_ours(name)]  # fmt: skip


def is_ours(unit: str, folder: Optional[str] = None) -> bool:
    """Did we make this unit in systemd's folder? Its first line says so; what others made is never touched.

    A power cut can empty a file, and a unit can be masked or replaced by what is no file. Such a unit is ours where the
    instance's folder or its last good files are there.
    """
    path = f"{folder or common.UNITS}/{unit}"
    data = common.read_file(path) if os.path.isfile(path) else None
    if data is not None and data.startswith(common.MADE_BY.encode()):
        return True
    name = _instance_of(unit)
    folders = (f"{common.INSTANCES}/{name}", f"{common.GOOD}/{name}")
    replaced = os.path.lexists(path) if data is None else _is_damaged(data)
    return name is not None and replaced and any(os.path.isdir(folder) for folder in folders)


def _instance_of(unit: str) -> Optional[str]:
    """The instance whose unit this is, also one of its liveness check or of its start on demand."""
    if unit.startswith(common.DEMAND):
        return unit[len(common.DEMAND) :].rpartition(".")[0]
    for end in (*common.LIVENESS, common.SUFFIX):
        if unit.startswith(common.PREFIX) and unit.endswith(end):
            return unit[len(common.PREFIX) : -len(end)]
    return None


def _is_damaged(data: bytes) -> bool:
    """What no unit file looks like: nothing, a part of our first line, or bytes that are no text."""
    left = data.strip(b"\0 \t\n")
    return common.MADE_BY.encode().startswith(left) or b"\0" in left
