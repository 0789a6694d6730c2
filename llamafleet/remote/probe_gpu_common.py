"""What the readers of NVIDIA's and AMD's GPUs share: whose a process is, and a GPU's keys.

Part of probe_gpus.py and under its contract: Python 3.8, the standard library, reads only.
"""

from __future__ import annotations

import re
from typing import Any

from common import PREFIX
from probe_files import at, read

# Memory held by these units is our own and must not shrink the next plan.
OUR_UNITS = re.compile(rf"/({PREFIX}[^/]+\.service|llamafleet-[^/]+\.(service|scope))(/|$)", re.M)


def is_ours(pid: int | str) -> bool:
    """Does the process belong to one of our units?"""
    return bool(OUR_UNITS.search(read(at(f"/proc/{pid}/cgroup"))))


def empty_gpu(index: int, vendor: str) -> dict[str, Any]:
    """All keys of a GPU. `problem` set means: do not plan on it."""
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
    }
