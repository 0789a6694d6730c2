"""What NVML tells the gate of memory on NVIDIA's GPUs.

Part of gate.py and status.py and under their contracts: Python 3.8, pynvml, the standard library; common.py beside it.
"""

from __future__ import annotations

from typing import Any, Dict, Iterator, Optional, Sequence, Tuple, Union  # Python 3.8's own are not generic

from common import sees_all_processes

Held = Union[Dict[str, Optional[int]], str]


def held_by(pid: int) -> Held:
    """Bytes that the process holds, by UUID of the GPU or MIG instance; None where NVML does not tell: it lists the
    process without its memory, lists no processes, or this is a container, whose process ids are not NVML's. A text
    with the error if NVML fails. A GPU that does not answer is left out."""
    sees_pids = sees_all_processes()

    def held(pynvml: Any, device: Any) -> Optional[int]:
        try:
            processes = pynvml.nvmlDeviceGetComputeRunningProcesses(device)
        except pynvml.NVMLError_NotSupported:
            return None
        mine = [process.usedGpuMemory for process in processes if process.pid == pid]
        # A process that NVML lists has a context there, so 0 bytes is what some containers tell for "not known".
        return None if not sees_pids else (mine[0] or None) if mine else 0

    return by_uuid(held)


def in_use_on_all() -> Dict[str, int]:
    """Bytes in use by all processes and the driver, by UUID; without the GPUs of which NVML does not tell them."""

    def in_use(pynvml: Any, device: Any) -> Optional[int]:
        try:
            memory = pynvml.nvmlDeviceGetMemoryInfo(device)
        except pynvml.NVMLError_NotSupported:
            return None
        return int(memory.total - memory.free)

    found = by_uuid(in_use)
    return {} if isinstance(found, str) else {uuid: size for uuid, size in found.items() if size is not None}


def used_by_others(uuids: Sequence[str]) -> Dict[str, int]:
    """Percent of the last second in which each of these GPUs computed, by UUID, while our server did not; without those
    of which NVML does not tell it, as of MIG instances."""

    def used(pynvml: Any, device: Any) -> Optional[int]:
        return int(pynvml.nvmlDeviceGetUtilizationRates(device).gpu)

    found = by_uuid(used)
    found = {} if isinstance(found, str) else found
    return {uuid: percent for uuid in uuids if (percent := found.get(uuid)) is not None}


def by_uuid(ask: Any) -> Held:
    """What `ask` finds of each GPU or MIG instance; a text with the error if NVML fails as a whole."""
    import pynvml  # type: ignore[import-untyped]  # nvidia-ml-py ships no types

    found: Dict[str, Optional[int]] = {}
    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError as error:
        return f"NVML: {error}"
    for index in range(count):
        try:
            for uuid, device in devices(pynvml, pynvml.nvmlDeviceGetHandleByIndex(index)):
                found[uuid] = ask(pynvml, device)
        except pynvml.NVMLError:
            continue
    return found


def devices(pynvml: Any, gpu: Any) -> Iterator[Tuple[str, Any]]:
    """The GPU itself, or its MIG instances if MIG is enabled: CUDA then sees only the instances."""
    for device in instances(pynvml, gpu):
        uuid = pynvml.nvmlDeviceGetUUID(device)
        yield (uuid.decode() if isinstance(uuid, bytes) else uuid), device


def instances(pynvml: Any, gpu: Any) -> Iterator[Any]:
    try:
        has_mig = pynvml.nvmlDeviceGetMigMode(gpu)[0] == pynvml.NVML_DEVICE_MIG_ENABLE
    except pynvml.NVMLError:  # a GPU without MIG
        has_mig = False
    if not has_mig:
        yield gpu
        return
    for index in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(gpu)):
        try:
            instance = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, index)
        except pynvml.NVMLError:  # a place without an instance
            continue
        yield instance
