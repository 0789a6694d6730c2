"""Report what is installed and running on this host, together with the probe's machine file.

Contract: one argument, a JSON object {"packages": {name of a package manager: what is needed, see packages.py},
"build_cache": path | null, "toolkits": [paths], "paths": [paths], "vulkan": bool, "addresses": [texts],
"bandwidth": bool (measure the memory, unless a plan.json has it), "left": what left.py is asked}; prints one JSON
object {"machine": the probe's output, "found": {...}} on stdout. Changes nothing. Python 3.8, standard library and
psutil; its siblings common.py, addresses.py, boot.py, disks.py, gpu_nodes.py, instance_files.py, learned.py, left.py,
places.py, probe.py, toolkits.py, lock.py, ground.py, packages.py, releases.py and rocm.py lie in the same folder.
"""

from __future__ import annotations

import grp
import json
import os
import pwd
import re
import subprocess
import sys
from typing import Any, Iterable  # the contract is Python 3.8, whose own Iterable is typing's

import common
import inherited
import instance_files
from common import (
    CURRENT,
    GOOD,
    HELPERS,
    INSTANCES,
    LIVENESS,
    LOADED,
    MODELS,
    PREFIX,
    RELEASES,
    SUFFIX,
    TUNED,
    UNITS,
    USER,
    demand_units,
    listing,
    liveness_units,
    plan_path,
    read_json,
    sha256_of,
)  # fmt: skip

CREDENTIALS = "/run/credentials"  # systemd's: by unit the credentials that the running service was given
DRIVER_SECONDS = 20.0  # a driver that does not answer in this time hangs

# The number of the planner's best in a tune, PLANNED_NUMBER of llamafleet/tuning/candidates.py, and what is told of its
# trials.
PLANNED = 1
OF_TRIALS = ("candidate", "prompt_tokens_per_s", "decode_tokens_per_s", "drafted")


def main(argv: list[str]) -> None:
    import boot
    import gpu_nodes
    import ground
    import learned
    import left
    import lock
    import packages
    import probe
    import rocm
    import toolkits

    asked = json.loads(argv[0])
    machine = probe.machine(asked["paths"], DRIVER_SECONDS, asked["vulkan"])
    manager = machine.get("package_manager")
    found = {
        "euid": os.geteuid(),
        "user": has_user(USER),
        "missing_packages": packages.missing(packages.by_name(manager), asked["packages"].get(manager, {})),
        "helpers": current_helpers(),
        "lock": lock.read(),
        "jobs": sorted(common.running_jobs()),
        "releases": releases(),
        "current": link_name(CURRENT),
        "release_digests": release_digests(),
        "cached_builds": cached_builds(asked["build_cache"]),
        "models": verified_models(),
        "instances": instances(),
        "paths": paths(),
        "listeners": listeners(),
        "device_classes": device_classes(),
        "ground": ground.ground(),
        "boot_units": boot.enabled_units(),
        "nvidia_minors": boot.minors(),
        "gpu_groups": list(
            dict.fromkeys([*filter(has_group, ("render", "video")), *gpu_nodes.groups(gpu_nodes.OTHERS)])
        ),
        "nvidia_groups": gpu_nodes.groups(gpu_nodes.NVIDIA),
        "foreign_units": [unit for unit in units() if not is_ours(unit)],
        "toolkits": toolkits.find(extra=asked["toolkits"]),
        "rocm": rocm.find(),
        "compiler": toolkits.gcc_version("gcc"),
        "tools": {"g++": toolkits.gcc_version("c++"), "cmake": toolkits.cmake_version()},
        "bandwidth": learned.bandwidth(machine) if asked.get("bandwidth") else None,
        "gate_speeds": learned.gate_speeds(),
        "gated": learned.gated(),
        "unbindable": unbindable(asked.get("addresses", [])),
        "left": left.left(asked.get("left", {})),
        "tuned": tuned(),
    }
    print(json.dumps({"machine": machine, "found": found}))


def has_user(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


def has_group(name: str) -> bool:
    try:
        grp.getgrnam(name)
    except KeyError:
        return False
    return True


def link_name(path: str) -> str | None:
    """The last part of a link's target, or None."""
    try:
        return os.path.basename(os.readlink(path))
    except OSError:
        return None


def current_helpers() -> str | None:
    """The version of the helpers that are current; None where there are none, or where a file of them is damaged."""
    key = link_name(HELPERS + "/current")
    return key if key and common.helpers_damage(f"{HELPERS}/{key}") is None else None


def releases() -> dict[str, Any]:
    """Finished builds that are whole: key to their release.json."""
    from releases import record_of

    return {key: record for key in listing(RELEASES) if (record := record_of(f"{RELEASES}/{key}"))}


def release_digests() -> dict[str, str]:
    """The SHA-256 of each release.json: by it other hosts may take the release from a build cache."""
    found = {key: sha256_of(f"{RELEASES}/{key}/release.json") for key in listing(RELEASES)}
    return {key: digest for key, digest in found.items() if digest}


def cached_builds(directory: str | None) -> dict[str, list[str]]:
    """The digests of the builds in a cache, by key, as the names of the archives say."""
    found: dict[str, list[str]] = {}
    for name in listing(directory) if directory else []:
        match = re.fullmatch(r"([0-9a-f]{16})-([0-9a-f]{64})\.tar", name)
        if match:
            found.setdefault(match[1], []).append(match[2])
    return found


def verified_models() -> dict[str, dict[str, Any]]:
    """Model files whose checksum was verified and that have not changed since, by path."""
    found = {}
    for folder in listing(MODELS):
        for name in listing(f"{MODELS}/{folder}"):
            path = f"{MODELS}/{folder}/{name}"
            record = read_json(path + ".verified") if common.is_model_file(name) else {}
            if not re.fullmatch("[0-9a-f]{64}", str(record.get("sha256"))):
                continue  # of another program, or damaged: the file is verified again
            if common.is_as_verified(path, record):
                found[path] = {"size_bytes": record["size_bytes"], "sha256": record["sha256"]}
    return found


def instances() -> dict[str, dict[str, Any]]:
    """Every installed instance by name: its files' hashes, and its running process."""
    return {name: instance(name) for name in names()}


def names() -> list[str]:
    """The installed instances."""
    return instance_files.names()


def paths() -> dict[str, dict[str, Any]]:
    """What lies at the places of ours, see places.py."""
    import places

    return places.found(names())


def units() -> list[str]:
    """The units of instances. Those of their liveness checks are read together with them."""
    return [name for name in listing(UNITS)
            if name.startswith(PREFIX) and name.endswith(SUFFIX) and not name.endswith(LIVENESS)]  # fmt: skip


def is_ours(unit: str) -> bool:
    return instance_files.is_ours(unit, UNITS)


def instance(name: str) -> dict[str, Any]:
    unit, record = common.unit_of(name), instance_files.record(name)
    timer = show(liveness_units(name)[1], "ActiveState", "UnitFileState")
    on_demand = common.is_on_demand(name)
    socket = show(demand_units(name)[0], "ActiveState", "UnitFileState") if on_demand else {}
    shown = show(unit, "ActiveState", "SubState", "UnitFileState", "MainPID", "NRestarts", "DropInPaths",
                 "NeedDaemonReload")  # fmt: skip
    pid = int(shown.get("MainPID") or 0)
    return {
        "unit_sha256": sha256_of(f"{UNITS}/{unit}"),
        "plan_sha256": sha256_of(plan_path(name)),
        "secrets": hashes(f"{INSTANCES}/{name}", LOADED),
        "preflight": record.get("preflight"),
        "good_sha256": sha256_of(f"{GOOD}/{name}/{unit}"),
        "liveness_sha256": hashes(UNITS, liveness_units(name)),
        "good_liveness_sha256": hashes(f"{GOOD}/{name}", liveness_units(name)),
        "liveness": timer.get("ActiveState"),
        "liveness_enabled": timer.get("UnitFileState"),
        "liveness_drop_ins": [path for one in liveness_units(name) for path in common.drop_ins(one)],
        "demand_sha256": hashes(UNITS, demand_units(name)),
        "good_demand_sha256": hashes(f"{GOOD}/{name}", demand_units(name)),
        "demand_drop_ins": [path for one in demand_units(name) for path in common.drop_ins(one)],
        "socket": socket.get("ActiveState"),
        "socket_enabled": socket.get("UnitFileState"),
        "active": shown.get("ActiveState"),
        "sub": shown.get("SubState"),
        "enabled": shown.get("UnitFileState"),
        "restarts": int(shown.get("NRestarts") or 0),
        "drop_ins": (shown.get("DropInPaths") or "").split(),
        "unread_drop_ins": common.drop_ins(unit),
        "stale": shown.get("NeedDaemonReload") == "yes",
        "pid": pid,
        "argv": common.command_line(pid),
        "exe": exe_of(pid),
        "record": record or None,
        "unit_core_sha256": core_sha256(f"{UNITS}/{unit}"),
        "good_core_sha256": core_sha256(f"{GOOD}/{name}/{unit}"),
        "good_plan_sha256": sha256_of(f"{GOOD}/{name}/plan.json"),
        "good_is_whole": has_good_files(name),
        "loaded": hashes(f"{CREDENTIALS}/{unit}", LOADED),
        "deleted": deleted_files(pid),
        "inherited": inherited.of_process(pid),
    }


def hashes(folder: str, names: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of these files of a folder that are there."""
    return {name: found for name in names if (found := sha256_of(f"{folder}/{name}"))}


def has_good_files(name: str) -> bool:
    """Whether the files that last passed the gate are whole, with the list that says so."""
    listed = read_json(f"{GOOD}/{name}/{instance_files.MANIFEST}").get("files")
    return instance_files.last_good(name) is not None and isinstance(listed, dict)


def deleted_files(pid: int) -> list[str]:
    """The files of our releases that a process runs from although they were removed or replaced."""
    try:
        with open(f"/proc/{pid}/maps", errors="replace") as file:
            lines = [line.rstrip("\n") for line in file]
    except OSError:
        return []
    gone = " (deleted)"
    mapped = {line[line.index("/") :] for line in lines if line.endswith(gone) and "/" in line}
    return sorted(path[: -len(gone)] for path in mapped if path.startswith(RELEASES + "/"))


def core_sha256(unit: str) -> str | None:
    """Of a unit file the hash of what a running server depends on; None where it cannot be read."""
    data = common.read_file(unit)
    return None if data is None else common.sha256(common.core_of_unit(data.decode("utf-8", "replace")).encode())


def show(unit: str, *properties: str) -> dict[str, str]:
    """Properties of a unit; empty where systemd does not answer."""
    try:
        return common.show(unit, *properties, seconds=30.0)
    except (OSError, subprocess.SubprocessError):
        return {}


def exe_of(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return None


def listeners() -> list[dict[str, Any]]:
    """TCP ports that a process of this host listens on."""
    import psutil

    found = []
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr:
            pid = connection.pid or 0
            found.append({"address": connection.laddr.ip, "port": connection.laddr.port, "pid": pid,
                          "process": process_name(pid), "unit": unit_of(pid)})  # fmt: skip
    return found


def tuned() -> dict[str, dict[str, Any]]:
    """The records of tunes by instance; an empty object of a damaged file. Of the trials those of the planner's best
    alone, as far as they tell the host's rates (llamafleet/tuning/rates.py)."""
    found = {name[: -len(".json")]: read_json(f"{TUNED}/{name}") for name in listing(TUNED) if name.endswith(".json")}
    told = {}
    for name, record in found.items():
        trials = record.pop("trials", None)
        planned = [{key: one.get(key) for key in OF_TRIALS} for one in (trials if isinstance(trials, list) else ())
                   if isinstance(one, dict) and one.get("candidate") == PLANNED]  # fmt: skip
        told[name] = {**record, "trials": planned} if planned else record
    return told


def unbindable(addresses: list[str]) -> dict[str, str]:
    """Those of the addresses at which no server of this host can listen, with the reason."""
    from addresses import cannot_bind

    return {one: why for one in addresses if (why := cannot_bind(one))}


def process_name(pid: int) -> str | None:
    """Its owner gives it any bytes, and the kernel cuts them in mid-character."""
    try:
        with open(f"/proc/{pid}/comm", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return None


def unit_of(pid: int) -> str | None:
    """The systemd unit a process belongs to, from its cgroup; None outside any."""
    try:
        with open(f"/proc/{pid}/cgroup", errors="replace") as file:
            return service_in(file.read())
    except OSError:
        return None


def service_in(cgroups: str) -> str | None:
    """The innermost service of the system in a process's cgroups. Below a user's own manager the user names services,
    also like ours."""
    found = None
    for line in cgroups.splitlines():
        for part in line.split(":", 2)[-1].split("/"):
            found = part if part.endswith(SUFFIX) else found
            if part.startswith("user@"):
                break
    return found


def device_classes() -> list[str]:
    """Character device classes of GPUs, as /proc/devices names them on this very driver."""
    try:
        with open("/proc/devices") as file:
            names = [
                line.split()[1] for line in file.read().split("Block devices:")[0].splitlines()[1:] if line.strip()
            ]
    except OSError:
        return []
    return sorted({name for name in names if name.startswith(("nvidia", "drm", "kfd"))})


if __name__ == "__main__":
    main(sys.argv[1:])
