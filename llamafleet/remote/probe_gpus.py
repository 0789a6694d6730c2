"""Ask the drivers of this host about its GPUs, and print one JSON object.

Contract: runs on the host with any Python >= 3.8, the standard library, psutil and pynvml (nvidia-ml-py), and beside it
`common.py`, `probe_files.py`, `probe_gpu_common.py`, `probe_amd.py`, `probe_nvidia.py`, `probe_nvidia_memory.py` and
`probe_tegra.py`; imports nothing else of ours. Reads only.
A part of `probe.py`, and a program of its own because a driver can hang for ever on a sick GPU: the probe
runs it with a deadline. Prints

    {"gpus": [...], "driver": {"nvidia": "580.159.04", "cuda": "13.0"}, "problems": [...], "notes": [...],
     "no_nvml": null | "why NVML is not there at all, which is right for a host without NVIDIA's GPUs"}

with NVIDIA's GPUs in PCI bus order, then AMD's. What is wrong becomes text in `problems`, or in the GPU's `problem`,
which means: do not plan on this GPU; `notes` has what is as it should be and worth knowing.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from typing import Any

from probe_amd import amd_gpus
from probe_files import below
from probe_nvidia import module_version, nvidia

# The probe gives up on us after 20 s; were it killed itself, we still end.
LIFETIME_SECONDS = 120


def main() -> int:
    parser = argparse.ArgumentParser(description="print this host's GPUs (JSON)")
    parser.add_argument("--root", default="/", help="for tests: read /proc and /sys below this folder")
    below(parser.parse_args().root)
    signal.alarm(LIFETIME_SECONDS)  # ends the process even inside a library's call
    problems: list[str] = []
    notes: list[str] = []
    found: dict[str, Any] = {
        "gpus": [],
        "driver": {"nvidia": module_version(), "cuda": None},
        "no_nvml": None,
    }
    found.update(nvidia(problems, notes))
    found["gpus"] += amd_gpus(len(found["gpus"]), notes)
    json.dump(dict(found, problems=problems, notes=notes), sys.stdout)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
