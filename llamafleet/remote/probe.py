"""Look at this host and print what it is as one JSON object, the machine file (schema 1).

Contract: runs on the host with any Python >= 3.8, as any user, with the standard library, psutil, and
beside it `common.py`, `packages.py`, `probe_files.py`, `probe_cpu.py`, `probe_gpus.py` and `probe_vulkan.py`;
imports nothing else of ours. Reads only, leaves nothing behind. Prints exactly one JSON object on stdout and exits 0:
what is odd about the host is text in `problems`, never a crash. Exit 2 is bad usage.

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
from typing import Any

import packages
import probe_cpu
import probe_files
from probe_files import at, cgroup_folders, number, psutil, read

VENDORS = {"0x10de": "nvidia", "0x1002": "amd", "0x8086": "intel"}
# Of a cgroup, v2 or not: the files of its limit and its use, and its droppable cache in memory.stat.
CGROUP_FILES = {
    True: ("memory.max", "memory.current", "inactive_file"),
    False: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
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
    """The whole machine file; Vulkan's loader is asked only where it is wanted."""
    pci = pci_gpus()
    answers = driver_answers(driver_seconds) if has_gpu_driver(pci) else no_answers()
    gpus, problems = answers["gpus"], answers["problems"]
    if answers["no_nvml"] and (answers["driver"]["nvidia"] or any(gpu["vendor"] == "nvidia" for gpu in pci)):
        problems.append(answers["no_nvml"])  # without NVIDIA's hardware nothing is wrong
    name_lost_gpus(gpus, pci)
    for gpu in gpus:
        if gpu["problem"]:
            problems.append(f"GPU {gpu['pci_bus_id'] or 'without a bus id'}: {gpu['problem']}")
    problems += missing_gpus(gpus, pci)
    listed = answers_of("probe_vulkan.py", driver_seconds) if vulkan else {"devices": None, "problems": []}
    problems += listed["problems"]
    return {
        "schema": 1,
        "hostname": platform.node(),
        "python": platform.python_version(),
        "os": operating_system(),
        "package_manager": package_manager(),
        "cpu": probe_cpu.cpu(problems),
        "memory": memory(problems),
        "gpus": gpus,
        "pci_gpus": pci,
        "driver": answers["driver"],
        "vulkan": listed.get("devices"),
        "disks": [disk(path) for path in paths],
        "problems": problems,
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


def memory(problems: list[str]) -> dict[str, Any]:
    """RAM in bytes; a container's limit counts as the total where it is lower."""
    total, available = ram()
    info = {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+)", read(at("/proc/meminfo")), re.M)}
    limit, used = cgroup_memory()
    if limit is not None and limit < total:
        problems.append(f"memory: a cgroup limits this host to {limit} of {total} bytes; the limit counts")
        total, available = limit, max(0, min(available, limit - used))
    return {
        "total_bytes": total,
        "available_bytes": available,
        "swap_total_bytes": info.get("SwapTotal", 0) * 1024,
        "cgroup_limit_bytes": limit,
        "hugepages_bytes": info.get("HugePages_Total", 0) * info.get("Hugepagesize", 0) * 1024,
    }


def ram() -> tuple[int, int]:
    """MemTotal and MemAvailable, bytes."""
    memory_now = psutil().virtual_memory()
    return int(memory_now.total), int(memory_now.available)


def cgroup_memory() -> tuple[int | None, int]:
    """The lowest memory limit that a service here lives under, and its use without page cache; bytes.

    v2: `memory.max`, "max" is none; v1: `memory.limit_in_bytes`, where a number of the order of 2^63 is none.
    """
    lowest: tuple[int | None, int] = (None, 0)
    for unified, folder in cgroup_folders("memory"):
        limit_name, use_name, cache_name = CGROUP_FILES[unified]
        limit = number(folder / limit_name)
        if limit is None or limit >= 2**60 or (lowest[0] is not None and limit >= lowest[0]):
            continue
        cache = re.search(rf"^{cache_name} (\d+)$", read(folder / "memory.stat"), re.M)
        lowest = limit, max(0, (number(folder / use_name) or 0) - int(cache.group(1) if cache else 0))
    return lowest


# --- GPUs ------------------------------------------------------------------------------------


def pci_gpus() -> list[dict[str, Any]]:
    """Display controllers (class 03xx) by bus id, driver or not: a GPU without one is still seen."""
    found = []
    for folder in sorted(at("/sys/bus/pci/devices").glob("*")):
        vendor = VENDORS.get(read(folder / "vendor"))
        if vendor and read(folder / "class").startswith("0x03"):
            found.append({"pci_bus_id": folder.name, "vendor": vendor, "device_id": read(folder / "device")})
    return found


def missing_gpus(gpus: list[dict[str, Any]], pci: list[dict[str, Any]]) -> list[str]:
    """PCI GPUs that no driver lists. Intel's are listed by PCI only, so they are no problem."""
    listed = {gpu["pci_bus_id"] for gpu in gpus}
    return [
        "{} GPU {} (device {}) is on the PCI bus, but no driver lists it: install or load the driver, "
        "or set the backend to cpu".format(gpu["vendor"], gpu["pci_bus_id"], gpu["device_id"])
        for gpu in pci
        if gpu["vendor"] != "intel" and gpu["pci_bus_id"] not in listed
    ]


def name_lost_gpus(gpus: list[dict[str, Any]], pci: list[dict[str, Any]]) -> None:
    """NVIDIA devices without a handle get their bus id by elimination, where that is unambiguous."""
    listed = {gpu["pci_bus_id"] for gpu in gpus}
    free = [gpu["pci_bus_id"] for gpu in pci if gpu["vendor"] == "nvidia" and gpu["pci_bus_id"] not in listed]
    nameless = [gpu for gpu in gpus if gpu["vendor"] == "nvidia" and not gpu["pci_bus_id"]]
    if len(free) == len(nameless):
        for gpu, bus_id in zip(nameless, free):  # noqa: B905 -- zip(strict=) needs Python 3.10; lengths checked
            gpu["pci_bus_id"] = bus_id


def has_gpu_driver(pci: list[dict[str, Any]]) -> bool:
    """Is there a GPU to ask a driver about? Asking takes a process of its own, on every host and run."""
    if any(gpu["vendor"] != "intel" for gpu in pci) or at("/proc/driver/nvidia").exists():
        return True
    try:
        ctypes.CDLL("libnvidia-ml.so.1")  # GPUs that are on no PCI bus: Jetson, GB10
    except OSError:
        return False
    return True


def no_answers() -> dict[str, Any]:
    return {"gpus": [], "driver": {"nvidia": None, "cuda": None}, "problems": [], "no_nvml": None}


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
