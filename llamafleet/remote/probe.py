"""Look at this host and print what it is as one JSON object, the machine file (schema 1).

Contract: runs on the host with any Python >= 3.8, as any user, with the standard library, psutil, and beside it
`common.py`, `packages.py`, `gpu_nodes.py` and the other `probe_*.py`; imports nothing else of ours. Reads only, leaves
nothing behind. Prints exactly one JSON object on stdout and exits 0: what is wrong with the host is text in `problems`,
each with the way out, what limits it is text in `notes`, never a crash. Exit 2 is bad usage.

    probe.py [--paths PATH...] [--driver-seconds 20] [--vulkan] [--root DIR]
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import platform
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Iterator  # the contract is Python 3.8, whose own Iterator is typing's

import gpu_nodes
import packages
import probe_cpu
import probe_files
import probe_pci
from probe_files import at, cgroup_folders, container, number, psutil, read, tegra

# Of a cgroup, v2 or not: the files of its limits and its use, and its droppable cache in memory.stat.
CGROUP_FILES = {
    True: (("memory.max", "memory.high"), "memory.current", "inactive_file"),
    False: (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description="print this host's machine file (JSON)")
    parser.add_argument("--paths", nargs="+", default=["/var/lib/llamafleet"], metavar="PATH")
    parser.add_argument("--driver-seconds", type=float, default=20.0)
    parser.add_argument("--vulkan", action="store_true", help="list Vulkan's devices too")
    parser.add_argument("--root", default="/", help="for tests: read /proc, /sys and /etc below this folder")
    arguments = parser.parse_args()
    probe_files.below(arguments.root)
    json.dump(machine(arguments.paths, arguments.driver_seconds, arguments.vulkan), sys.stdout)
    print()
    return 0


def machine(paths: list[str], driver_seconds: float, vulkan: bool = False) -> dict[str, Any]:
    """The whole machine file; Vulkan's loader is asked where it is wanted, and where a card of Intel's needs it."""
    notes: list[str] = []
    pci = probe_pci.pci_gpus()
    answers = driver_answers(driver_seconds) if has_gpu_driver(pci) else no_answers()
    gpus, problems = probe_pci.without_withheld(answers["gpus"], pci), answers["problems"]
    has_nvidia = answers["driver"]["nvidia"] or has_card(pci, "nvidia") or at("/dev/dxg").exists()  # WSL has no PCI
    if not has_nvidia:  # without NVIDIA's hardware nothing is wrong, such as with an image that has its driver
        problems = [text for text in problems if not text.startswith("NVIDIA: ")]
    elif answers["no_nvml"]:
        problems.append(answers["no_nvml"])
    probe_pci.name_lost_gpus(gpus, pci)
    lost = probe_pci.explain_missing(gpus, pci, [text for text in problems if text.startswith(("NVIDIA", "GPU driv"))])
    for gpu in gpus:
        if why := gpu["problem"] or gpu["busy"]:
            problems.append(f"GPU {gpu['pci_bus_id'] or 'without a bus id'}: {why}")
    problems += lost
    wanted = vulkan or has_card(pci, "intel")
    listed = answers_of("probe_vulkan.py", driver_seconds) if wanted else {"devices": None, "problems": []}
    problems += [*listed["problems"], *node_problems(gpus, pci)]
    return {
        "schema": 1,
        "hostname": platform.node(),
        "python": platform.python_version(),
        "os": operating_system(),
        "container": container(),
        "package_manager": package_manager(),
        "cpu": probe_cpu.cpu(notes),
        "memory": memory(notes),
        "gpus": gpus,
        "pci_gpus": pci,
        "driver": answers["driver"],
        "vulkan": listed.get("devices"),
        "disks": [disk(path) for path in paths],
        "problems": problems,
        "notes": [*answers["notes"], *notes],
    }


# --- system ----------------------------------------------------------------------------------


def operating_system() -> dict[str, Any]:
    pairs = re.findall(
        r"^(\w+)=[\"']?(.*?)[\"']?$", read(at("/etc/os-release")) or read(at("/usr/lib/os-release")), re.M
    )
    release = dict(pairs)
    return {
        "id": release.get("ID", "unknown"),
        "id_like": release.get("ID_LIKE", "").split(),
        "version": release.get("VERSION_ID", ""),  # rolling distributions have none
        "version_codename": release.get("VERSION_CODENAME") or None,
        "base_codename": release.get("UBUNTU_CODENAME") or release.get("DEBIAN_CODENAME") or None,
        "arch": platform.machine(),
        "libc": libc_version(),
        "kernel": platform.release(),
    }


def libc_version() -> str:
    """glibc's version, "2.41"; empty on musl and others."""
    with contextlib.suppress(ValueError, OSError):
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").split()[-1]
    return platform.libc_ver()[1]


def package_manager() -> str | None:
    manager = packages.detect()
    return manager.name if manager else None


def disk(path: str) -> dict[str, Any]:
    """Free bytes for a service's user (root's reserve left out) where `path` is, or will be made."""
    place = Path(os.path.abspath(path))
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        status = os.statvfs(place)
    except OSError as error:
        return {"path": path, "free_bytes": 0, "found": str(place), "problem": str(error)}
    return {"path": path, "free_bytes": status.f_bavail * status.f_frsize, "found": str(place)}


# --- memory ----------------------------------------------------------------------------------


def memory(notes: list[str]) -> dict[str, Any]:
    """RAM in bytes; a container's limit counts as the total where it is lower."""
    total, available = ram()
    info = {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+)", read(at("/proc/meminfo")), re.M)}
    limit, used = cgroup_memory()
    if limit is not None and limit < total:
        notes.append(f"memory: a cgroup limits this host to {limit} of {total} bytes; the limit counts")
        total, available = limit, max(0, min(available, limit - used))
    return {
        "total_bytes": total,
        "available_bytes": available,
        "swap_total_bytes": min([info.get("SwapTotal", 0) * 1024, *swap_limits()]),
        "cgroup_limit_bytes": limit,
        "hugepages_bytes": info.get("HugePages_Total", 0) * info.get("Hugepagesize", 0) * 1024,
    }


def swap_limits() -> Iterator[int]:
    """What cgroups of v2 let a service here have of the swap, bytes."""
    for unified, folder in cgroup_folders("memory"):
        limit = number(folder / "memory.swap.max") if unified else None
        if limit is not None:
            yield limit


def ram() -> tuple[int, int]:
    """MemTotal and MemAvailable, bytes."""
    memory_now = psutil().virtual_memory()
    return int(memory_now.total), int(memory_now.available)


def cgroup_memory() -> tuple[int | None, int]:
    """The lowest memory limit that a service here lives under, and its use without page cache; bytes.

    v2: `memory.max`, and `memory.high`, above which the kernel slows a service down, "max" is none; v1:
    `memory.limit_in_bytes`, where a number of the order of 2^63 is none.
    """
    lowest: tuple[int | None, int] = (None, 0)
    for unified, folder in cgroup_folders("memory"):
        limit_names, use_name, cache_name = CGROUP_FILES[unified]
        limit = min(
            (one for one in map(number, (folder / name for name in limit_names)) if one is not None), default=None
        )
        if limit is None or limit >= 2**60 or (lowest[0] is not None and limit >= lowest[0]):
            continue
        cache = re.search(rf"^{cache_name} (\d+)$", read(folder / "memory.stat"), re.M)
        lowest = limit, max(0, (number(folder / use_name) or 0) - int(cache.group(1) if cache else 0))
    return lowest


# --- GPUs ------------------------------------------------------------------------------------


def has_gpu_driver(pci: list[dict[str, Any]]) -> bool:
    """Is there a GPU to ask a driver about? Asking takes a process of its own, on every host and run."""
    if any(has_card(pci, vendor) for vendor in ("nvidia", "amd")) or at("/proc/driver/nvidia").exists() or tegra():
        return True
    try:
        ctypes.CDLL("libnvidia-ml.so.1")  # GPUs that are on no PCI bus: Jetson, GB10
    except OSError:
        return False
    return True


def has_card(pci: list[dict[str, Any]], vendor: str) -> bool:
    """Whether the PCI bus has a GPU of this vendor that is no integrated one of Intel's."""
    return any(one["vendor"] == vendor and one["kind"] == "gpu" for one in pci)


def node_problems(gpus: list[dict[str, Any]], pci: list[dict[str, Any]]) -> list[str]:
    """Device nodes of this host's GPUs that no service can open."""
    nvidia = gpu_nodes.NVIDIA if any(gpu["vendor"] == "nvidia" for gpu in gpus) else ()
    others = gpu_nodes.OTHERS if has_card(pci, "amd") or has_card(pci, "intel") else ()
    return gpu_nodes.problems((*nvidia, *others))


def no_answers() -> dict[str, Any]:
    return {"gpus": [], "driver": {"nvidia": None, "cuda": None}, "problems": [], "notes": [], "no_nvml": None}


def driver_answers(seconds: float) -> dict[str, Any]:
    """What `probe_gpus.py` prints."""
    return {**no_answers(), **answers_of("probe_gpus.py", seconds, "--root", str(at("/")))}


def answers_of(name: str, seconds: float, *arguments: str) -> dict[str, Any]:
    """Run a program that asks a driver, and return the JSON that it prints. A program that hangs in the kernel is
    abandoned, since a kill may not end it."""
    program = os.path.join(os.path.dirname(os.path.abspath(__file__)), name)
    command = [sys.executable, "-s", "-E", "-B", program, *arguments]
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    stop_child_on_signals(child)
    problem = ""
    try:
        output, errors = child.communicate(timeout=seconds)
        return dict(json.loads(output))
    except subprocess.TimeoutExpired:
        child.kill()
        problem = f"no answer within {seconds:g} s: see dmesg (Xid), a reboot is likely needed"
    except ValueError:
        last = errors.decode("utf-8", "replace").strip().splitlines()[-1:]
        problem = f"the GPU reader ended with code {child.returncode}: {' '.join(last)}"
    return {"problems": [f"GPU drivers: {problem}"]}


def stop_child_on_signals(child: subprocess.Popen[bytes]) -> None:
    """Kill the child when a signal ends us: it has a session of its own and would go on."""

    def stop(number: int, _frame: Any) -> None:
        child.kill()
        os._exit(128 + number)

    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(name, stop)


if __name__ == "__main__":
    sys.exit(main())
