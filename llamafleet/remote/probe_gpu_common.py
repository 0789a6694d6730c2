"""What the readers of NVIDIA's and AMD's GPUs share: the root folder, whose a process is, and a GPU's keys.

Part of probe_gpus.py and under its contract: Python 3.8, the standard library, reads only.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from probe_files import read

# Memory held by these units is our own and must not shrink the next plan.
OUR_UNITS = re.compile(r"/(llama-server-[^/]+\.service|llamafleet-[^/]+\.(service|scope))(/|$)", re.M)

ROOT = Path("/")


def read_below(root: str) -> None:
    """For tests: /proc and /sys are read below this folder. Said once, before anything is read."""
    global ROOT  # noqa: PLW0603
    ROOT = Path(root)


def at(path: str) -> Path:
    """An absolute path, below --root."""
    return ROOT / path.lstrip("/")


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
