"""The processors of this host: cores, which of them are fast, NUMA nodes, instruction sets.

Part of probe.py and under its contract: Python 3.8, the standard library and psutil, reads only. `cpu` gives the
machine file's `cpu` and adds what limits it to `notes`.
"""

from __future__ import annotations

import os
import platform
import re
from typing import Any, Dict, Iterable, List, Set, Tuple

from probe_files import at, cgroup_folders, number, psutil, read

CPU_FLAGS = re.compile(
    r"^(sse4_2|avx|avx2|avx_vnni|avx512\w*|amx_\w+|f16c|fma|bmi2|neon|asimd\w*|sve\w*|i8mm|bf16|svei8mm)$"
)
# A core counts as a performance core from this share of the strongest core's capacity or clock:
# favoured cores differ by some 10 %, efficiency cores by 40 % and more.
PERFORMANCE_SHARE = 0.75

Place = Tuple[str, str]  # (package, core)


def cpu(notes: list[str]) -> dict[str, Any]:
    """The machine file's `cpu`; where a container has some CPUs only, these, and no more cores than its quota lets it
    use at once."""
    info = read(at("/proc/cpuinfo"))
    places = {n: core_place(n) for n in cpus(notes)}
    logical = len(places) or psutil().cpu_count(logical=True) or os.cpu_count() or 1
    cores = set(places.values())
    physical = len(cores) or psutil().cpu_count(logical=False) or logical
    fast = performance_cpus(places)
    nodes = numa_nodes()
    performance = len({places[n] for n in fast}) or physical
    quota = cpu_quota()
    if quota is not None and quota < physical:
        notes.append(f"processor: a cgroup limits this host to {quota:g} of {physical} cores (CPU quota); it counts")
        physical = max(1, int(quota))
        logical, performance = min(logical, max(1, int(quota))), min(performance, physical)
    return {
        "model": cpu_model(info),
        "sockets": len({package for package, _ in cores}) or 1,
        "physical_cores": physical,
        "logical_cores": logical,
        "performance_cores": performance,
        "performance_cpus": cpu_list(fast) if len(fast) < len(places) else "",
        "numa_nodes": len(nodes) or 1,
        "numa_node_list": cpu_list(nodes),
        "flags": sorted({f for f in cpu_features(info) if CPU_FLAGS.match(f)}),
    }


def cpu_model(info: str) -> str:
    found = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", info, re.M)
    return (
        found.group(1).strip()
        if found
        else read(at("/sys/firmware/devicetree/base/model")).rstrip("\0") or platform.machine()
    )


def cpu_features(info: str) -> list[str]:
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.M)
    return found.group(1).split() if found else []


def cpu_numbers(text: str) -> list[int]:
    """Linux' list format, "0-3,8", as numbers."""
    numbers: list[int] = []
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", text):
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def cpu_list(numbers: Iterable[int]) -> str:
    """Numbers in Linux' list format."""
    runs: List[List[int]] = []
    for one in sorted(numbers):
        if runs and one == runs[-1][1] + 1:
            runs[-1][1] = one
        else:
            runs.append([one, one])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def cpu_quota() -> float | None:
    """CPUs' worth of time that a service here may have, by the tightest of the cgroups above it; None without a limit.

    v2: `cpu.max` has quota and period, "max" is none; v1: two files, -1 is none.
    """
    quotas = []
    for unified, folder in cgroup_folders("cpu"):
        if unified:
            quota, _, period = read(folder / "cpu.max").partition(" ")
        else:
            quota, period = read(folder / "cpu.cfs_quota_us"), read(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def cpus(notes: list[str]) -> list[int]:
    """The logical CPUs that a service here can run on: those online, less what a container's cpuset leaves out."""
    online = cpu_numbers(read(at("/sys/devices/system/cpu/online")))
    allowed = cpuset()
    usable = [n for n in online if n in allowed]
    if not usable or len(usable) == len(online):
        return online
    notes.append(
        f"processor: a cgroup limits this host to CPUs {cpu_list(usable)} of {cpu_list(online)}; the limit counts"
    )
    return usable


def cpuset() -> Set[int]:
    """The CPUs that the innermost cgroup above us has, as the kernel counts them; empty where none tells."""
    for unified, folder in cgroup_folders("cpuset"):
        allowed = read(folder / ("cpuset.cpus.effective" if unified else "cpuset.effective_cpus"))
        if allowed:
            return set(cpu_numbers(allowed))
    return set()


def core_place(cpu_number: int) -> Place:
    """(package, core) of a logical CPU, from the lowest of its siblings: core ids repeat across dies."""
    folder = at(f"/sys/devices/system/cpu/cpu{cpu_number}/topology")
    siblings = read(folder / "core_cpus_list") or read(folder / "thread_siblings_list") or str(cpu_number)
    return read(folder / "physical_package_id", "0"), re.split("[-,]", siblings)[0]


def performance_cpus(places: Dict[int, Place]) -> list[int]:
    """The logical CPUs of performance cores: Intel's own list, else those near the strongest."""
    listed = [n for n in cpu_numbers(read(at("/sys/devices/cpu_core/cpus"))) if n in places]
    if listed:
        return listed
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        strength = {n: number(at(f"/sys/devices/system/cpu/cpu{n}/{name}")) or 0 for n in places}
        if strength and min(strength.values()) > 0:
            least = PERFORMANCE_SHARE * max(strength.values())
            return [n for n, value in strength.items() if value >= least]
    return list(places)


def numa_nodes() -> list[int]:
    """Nodes that have processors and memory. Others are memory alone: a GPU's (GH200) or behind CXL."""
    folder = at("/sys/devices/system/node")
    with_memory = set(cpu_numbers(read(folder / "has_memory")))
    return [n for n in cpu_numbers(read(folder / "has_cpu")) if n in with_memory]
