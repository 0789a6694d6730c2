"""What the readers of NVIDIA's and AMD's GPUs share: whose a process and its memory are, and a GPU's keys.

Part of probe_gpus.py and under its contract: Python 3.8, the standard library, reads only.

Drivers tell process ids of the whole machine. In a container they are not those of its /proc, so they say nothing of
whose a process is; then what our servers' own logs say of their devices counts, which the gate has kept.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Dict, Iterator, Tuple

from common import INSTANCES, PREFIX, RUN, read_json, sees_all_processes, unit_of
from probe_files import at, read

# Memory held by these units is our own and must not shrink the next plan.
OUR_UNITS = re.compile(rf"/({PREFIX}[^/]+\.service|llamafleet-[^/]+\.(service|scope))(/|$)", re.M)


def is_ours(pid: int | str) -> bool:
    """Does the process belong to one of our units?"""
    return bool(OUR_UNITS.search(read(at(f"/proc/{pid}/cgroup"))))


def sees_pids() -> bool:
    """Whether the process ids that drivers tell are those of this host's /proc."""
    return sees_all_processes(str(at("/proc/self/ns/pid")))


def own_processes() -> Iterator[Tuple[Path, str]]:
    """The folder in /proc of each process of our units, and its unit."""
    for folder in at("/proc").glob("[0-9]*"):
        found = OUR_UNITS.search(read(folder / "cgroup"))
        if found:
            yield folder, found[1]


def own_by_logs(uuid: str, used: int) -> int:
    """Of `used` bytes of this GPU those that our running servers hold, by their own logs, with what their plans count
    beside them for the driver's context. 0 where no log tells, or where less is used than was logged: a server that
    sleeps has given its memory back."""
    running = {unit for _, unit in own_processes()}
    held = contexts = 0
    for folder in at(INSTANCES).glob("*"):
        unit = unit_of(folder.name)
        plan = read_json(str(folder / "plan.json")) if unit in running else {}
        for device, overhead in planned_on(plan, uuid):
            sizes = logged(unit).get(device)
            if isinstance(sizes, dict) and sizes:
                held += sum(int(size) for size in sizes.values() if isinstance(size, (int, float)))
                contexts += overhead
    return min(used, held + contexts) if held <= used else 0


def planned_on(plan: Dict[str, Any], uuid: str) -> Iterator[Tuple[str, int]]:
    """llama.cpp's name of the GPU in this plan, and the bytes of the driver's context there; nothing if it has none."""
    try:
        rows = plan["plan"]["ledger"]
        for position, gpu in enumerate(plan["gate"]["gpus"]):
            if gpu["uuid"] == uuid:
                yield gpu["device"], int(rows[position]["overhead_bytes"])
    except (KeyError, TypeError, IndexError, ValueError):  # another version's, or damaged
        return


def logged(unit: str) -> Dict[str, Any]:
    """What gate_devices.py kept of the log of the unit's present start: by device bytes by part."""
    kept = read_json(str(at(f"{RUN}/devices-{unit}.json")))
    try:
        start = os.readlink(at(f"/run/systemd/units/invocation:{unit}"))
    except OSError:
        return {}
    devices = kept.get("devices")
    return devices if isinstance(devices, dict) and kept.get("start") == start else {}


def empty_gpu(index: int, vendor: str) -> dict[str, Any]:
    """All keys of a GPU. `problem` set means: do not plan on it; `busy`: others hold much of it."""
    return {
        "index": index,
        "vendor": vendor,
        "uuid": "",
        "name": "",
        "compute_capability": None,
        "memory_total_bytes": 0,
        "memory_used_by_others_bytes": 0,
        "pci_bus_id": "",
        "pcie_generation": None,
        "pcie_width": None,
        "unified_memory": False,
        "problem": None,
        "busy": None,
    }
