"""How much of an NVIDIA GPU's memory processes other than our servers hold, as NVML tells it.

Part of probe_gpus.py and under its contract: Python 3.8, the standard library, psutil and pynvml, reads only.

Decision 2: docs/decisions/0002-capacity-is-total-less-what-others-hold.md.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Optional, Tuple  # the contract is Python 3.8, whose own are typing's

from probe_files import at, psutil, read
from probe_gpu_common import is_ours, own_by_logs, sees_pids

MIB = 1024**2


def read_memory(nvml: Any, handle: Any, gpu: Dict[str, Any], notes: List[str]) -> None:
    """Total, and what others hold.

    Used is total - free everywhere: v1's `used` includes the driver's reserve on newer drivers and
    v2's does not (NVML API, nvmlMemory_v2_t), while `free` means the same in both. The reserve
    belongs to nobody's process, so it always counts as others'.
    """
    reserved = 0
    try:
        try:
            answer = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
            reserved = answer.reserved
        except (
            nvml.NVMLError_FunctionNotFound,
            nvml.NVMLError_ArgumentVersionMismatch,
            nvml.NVMLError_InvalidArgument,
        ):
            answer = nvml.nvmlDeviceGetMemoryInfo(handle)  # drivers before 510
        total, used = answer.total, answer.total - answer.free
    except nvml.NVMLError_NotSupported:
        gpu["unified_memory"] = True  # GB10, Jetson: the GPU's memory is the host's
        ram = psutil().virtual_memory()
        total, used = ram.total, ram.total - ram.available
    processes, mine = gpu_processes(nvml, handle), max(0, used - reserved)
    if sees_pids() and processes is not None:
        own, doubt = own_bytes(processes, mine, is_ours, own_by_logs(gpu["uuid"], mine))
    else:
        own = own_by_logs(gpu["uuid"], mine)
        doubt = "whose process is whose cannot be seen here (a container, or a driver that lists none): " + (
            f"{own} of {mine} bytes count as ours, by our servers' own logs"
            if own
            else f"{mine} bytes count as others'"
        )
        doubt = doubt if mine else None
    if doubt:
        notes.append("NVIDIA: GPU {}: {}".format(gpu["pci_bus_id"] or gpu["name"], doubt))
    gpu["memory_total_bytes"] = total
    gpu["memory_used_by_others_bytes"] = used - own
    gpu["busy"] = busy_with(processes or {}, total) if sees_pids() else None


def busy_with(processes: Dict[int, Optional[int]], total: int) -> Optional[str]:
    """The other processes that hold half of a GPU's memory or more, the largest first, with the way out; None where
    they hold less."""
    foreign = sorted(((size, pid) for pid, size in processes.items() if size and not is_ours(pid)), reverse=True)
    held = sum(size for size, _ in foreign)
    if held * 2 < total:
        return None
    names = ", ".join(
        f"{read(at(f'/proc/{pid}/comm')) or 'process'} {pid}: {size // MIB} MiB" for size, pid in foreign[:3]
    )
    return (
        f"it is busy: other processes hold {held // MIB} of {total // MIB} MiB ({names}): stop them, or leave the GPU "
        "to them by the setting gpus"
    )


def gpu_processes(nvml: Any, handle: Any) -> Optional[Dict[int, Optional[int]]]:
    """Bytes by pid, None where the driver does not tell. A pid can be in both lists: once only. None where the driver
    has no such lists (Jetson, WSL)."""
    found: Dict[int, Optional[int]] = {}
    has_lists = False
    for call in (nvml.nvmlDeviceGetComputeRunningProcesses_v3, nvml.nvmlDeviceGetGraphicsRunningProcesses_v3):
        try:
            processes = call(handle)
        except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):
            continue
        except nvml.NVMLError:
            processes = []
        has_lists = True
        for process in processes:
            known = [size for size in (found.get(process.pid), process.usedGpuMemory) if size is not None]
            found[process.pid] = max(known) if known else None
    return found if has_lists else None


def own_bytes(
    processes: Dict[int, Optional[int]], used: int, ours: Callable[[int], bool], logged: int = 0
) -> Tuple[int, Optional[str]]:
    """Of `used` bytes, those held by our units, and a doubt in words where that is partly a guess.

    A process that uses a GPU holds memory there, so 0 bytes are not told either. Where the driver does not tell the
    memory of a process of ours: if all foreign processes are known, the rest is ours; if a foreign one is unknown too,
    `logged` counts, what our servers' own logs say. So never more than `used`, and foreign memory is overestimated
    rather than underestimated.
    """
    own = {pid: size for pid, size in processes.items() if ours(pid)}
    foreign = [size for pid, size in processes.items() if pid not in own]
    known = min(used, sum(size or 0 for size in own.values()))
    if all(own.values()):
        return known, None
    if None not in foreign:
        rest = max(known, used - sum(size or 0 for size in foreign))
        return (
            rest,
            "the driver does not tell the memory of our own process: what no other process holds counts as ours",
        )
    if logged > known:
        return logged, "the driver does not tell the memory of our own process: its log counts"
    return known, "NVML tells neither our own processes' memory nor others': unknown use counts as others'"
