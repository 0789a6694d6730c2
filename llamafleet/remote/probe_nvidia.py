"""NVIDIA's GPUs, as NVML tells them.

Part of probe_gpus.py and under its contract: Python 3.8, the standard library, psutil and pynvml, reads only.

Decision 2: docs/decisions/0002-capacity-is-total-less-what-others-hold.md.
"""

from __future__ import annotations

import contextlib
import importlib
import re
from typing import Any, Callable  # the contract is Python 3.8, whose own Callable is typing's

from probe_files import at, psutil, read
from probe_gpu_common import empty_gpu, is_ours

LIBRARY = "libnvidia-ml.so.1"


def nvidia(problems: list[str]) -> dict[str, Any]:
    """`gpus` and `driver` as NVML tells them, or `no_nvml`."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError as error:
        return {"no_nvml": f"NVIDIA: the Python module pynvml is missing ({error}): install nvidia-ml-py"}
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        problem = init_problem(nvml, error)
        if error.value == nvml.NVML_ERROR_LIBRARY_NOT_FOUND:
            return {"no_nvml": problem}
        problems.append(problem)
        return {}

    def ask(what: str, call: Callable[[], Any]) -> Any:
        """The answer, or None and a named problem."""
        try:
            return call()
        except (nvml.NVMLError, UnicodeDecodeError) as error:
            problems.append(f"NVIDIA: NVML does not tell the {what}: {error}")
            return None

    cuda = ask("CUDA version", nvml.nvmlSystemGetCudaDriverVersion_v2)
    count = ask("number of GPUs", nvml.nvmlDeviceGetCount) or 0
    gpus = [gpu for index in range(count) for gpu in nvidia_gpus(nvml, index, problems)]
    gpus.sort(key=lambda gpu: (gpu["pci_bus_id"] or "~", gpu["index"]))  # "~": without a bus id, last
    for index, gpu in enumerate(gpus):
        gpu["index"] = index
    driver, module = ask("driver version", nvml.nvmlSystemGetDriverVersion), module_version()
    if driver and module and driver != module:
        problems.append(f"NVIDIA: module {module} is loaded but the libraries are {driver}: reboot needed")
    version = f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else None
    return {"gpus": gpus, "driver": {"nvidia": driver or module, "cuda": version}}


def init_problem(nvml: Any, error: Any) -> str:
    """Why NVML could not start, and what to do."""
    module = module_version()
    if error.value == nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
        return (
            f"NVIDIA: the loaded kernel module is {module or 'of another version'} but {LIBRARY} is "
            f"{library_version() or 'of another version'} (upgraded since boot): reboot needed"
        )
    text = {
        nvml.NVML_ERROR_LIBRARY_NOT_FOUND: f"{LIBRARY} is not installed: install the driver",
        nvml.NVML_ERROR_DRIVER_NOT_LOADED: "the driver is installed but its kernel module is not loaded: "
        "modprobe nvidia, and see dmesg (Secure Boot, missing kernel headers)",
        nvml.NVML_ERROR_NO_PERMISSION: "no permission to open /dev/nvidia*: run as root or in its group",
    }.get(error.value, f"NVML could not start: {error}")
    return f"NVIDIA: {text}" + (f"; kernel module {module} is loaded" if module else "")


def module_version() -> str | None:
    """The version of the loaded NVIDIA kernel module, from /proc/driver/nvidia/version."""
    found = re.search(r"^NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s", read(at("/proc/driver/nvidia/version")) + " ", re.M)
    return found.group(1) if found else None


def library_version() -> str | None:
    """The version in the file name of the libnvidia-ml that this process loaded."""
    found = re.search(r"libnvidia-ml\.so\.(\d+\.\d+(\.\d+)?)$", read("/proc/self/maps"), re.M)
    return found.group(1) if found else None


def nvidia_gpus(nvml: Any, index: int, problems: list[str]) -> list[dict[str, Any]]:
    """The GPU at an NVML index; with MIG enabled its instances instead. Lost ones carry a problem."""
    gpu = empty_gpu(index, "nvidia")
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        gpu["pci_bus_id"] = sysfs_bus_id(as_text(nvml.nvmlDeviceGetPciInfo(handle).busId))
        gpu["uuid"] = as_text(nvml.nvmlDeviceGetUUID(handle))
        gpu["name"] = as_text(nvml.nvmlDeviceGetName(handle))
        gpu["compute_capability"] = ".".join(map(str, nvml.nvmlDeviceGetCudaComputeCapability(handle)))
        instances = mig_instances(nvml, handle)
        if instances is None:
            read_memory(nvml, handle, gpu, problems)
    except nvml.NVMLError as error:
        gpu["problem"] = gpu_problem(nvml, error)
        return [gpu]
    for key, call in (
        ("pcie_generation", nvml.nvmlDeviceGetMaxPcieLinkGeneration),
        ("pcie_width", nvml.nvmlDeviceGetMaxPcieLinkWidth),
        ("pcie_generation_now", nvml.nvmlDeviceGetCurrPcieLinkGeneration),  # idle GPUs slow their link down
        ("pcie_width_now", nvml.nvmlDeviceGetCurrPcieLinkWidth),
    ):
        with contextlib.suppress(nvml.NVMLError):  # no PCIe on Jetson and behind NVLink-C2C
            gpu[key] = call(handle)
    if instances is None:
        return [gpu]
    if not instances:
        gpu["problem"] = "MIG is enabled but there is no MIG instance: create one (nvidia-smi mig -cgi) or disable MIG"
        return [gpu]
    return [mig_gpu(nvml, instance, gpu, problems) for instance in instances]


def gpu_problem(nvml: Any, error: Any) -> str:
    advice = {
        nvml.NVML_ERROR_GPU_IS_LOST: "the GPU has fallen off the bus: check dmesg for Xid 79, power and "
        "cables, then reboot",
        nvml.NVML_ERROR_NO_PERMISSION: "no permission to open the device: run as root or in its group",
        nvml.NVML_ERROR_RESET_REQUIRED: "the GPU needs a reset: nvidia-smi --gpu-reset, or reboot",
    }.get(error.value)
    return f"{advice} ({error})" if advice else f"NVML: {error}"


def as_text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def sysfs_bus_id(nvml_bus_id: str) -> str:
    """NVML's "00000000:01:00.0" as sysfs writes it, "0000:01:00.0"."""
    domain, rest = nvml_bus_id.split(":", 1)
    return f"{int(domain, 16):04x}:{rest.lower()}"


def mig_instances(nvml: Any, handle: Any) -> list[Any] | None:
    """Handles of the MIG instances; None where MIG is off or unknown to the GPU."""
    try:
        if nvml.nvmlDeviceGetMigMode(handle)[0] != nvml.NVML_DEVICE_MIG_ENABLE:
            return None
    except nvml.NVMLError:
        return None
    handles = []
    for number_ in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        with contextlib.suppress(nvml.NVMLError):  # NOT_FOUND: numbers have gaps
            handles.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number_))
    return handles


def mig_gpu(nvml: Any, handle: Any, parent: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """A MIG instance as a device of its own: its memory and UUID, the rest its GPU's."""
    gpu = dict(parent, mig=True)
    try:
        gpu["uuid"] = as_text(nvml.nvmlDeviceGetUUID(handle))
        gpu["name"] = as_text(nvml.nvmlDeviceGetName(handle))
        read_memory(nvml, handle, gpu, problems)
    except nvml.NVMLError as error:
        gpu["problem"] = gpu_problem(nvml, error)
    return gpu


def read_memory(nvml: Any, handle: Any, gpu: dict[str, Any], problems: list[str]) -> None:
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
    own, doubt = own_bytes(gpu_processes(nvml, handle), max(0, used - reserved), is_ours)
    if doubt:
        problems.append("NVIDIA: GPU {}: {}".format(gpu["pci_bus_id"], doubt))
    gpu["memory_total_bytes"] = total
    gpu["memory_used_by_others_bytes"] = used - own


def gpu_processes(nvml: Any, handle: Any) -> dict[int, int | None]:
    """Bytes by pid, None where the driver does not tell. A pid can be in both lists: once only."""
    found: dict[int, int | None] = {}
    for call in (nvml.nvmlDeviceGetComputeRunningProcesses_v3, nvml.nvmlDeviceGetGraphicsRunningProcesses_v3):
        with contextlib.suppress(nvml.NVMLError):
            for process in call(handle):
                known = [size for size in (found.get(process.pid), process.usedGpuMemory) if size is not None]
                found[process.pid] = max(known) if known else None
    return found


def own_bytes(processes: dict[int, int | None], used: int, ours: Callable[[int], bool]) -> tuple[int, str | None]:
    """Of `used` bytes, those held by our units, and a doubt in words where that is partly a guess.

    Where the driver does not tell a process' memory: if all foreign processes are known, the rest is
    ours; if a foreign one is unknown too, only what is known to be ours counts as ours. So never
    more than `used`, and foreign memory is overestimated rather than underestimated.
    """
    own = {pid: size for pid, size in processes.items() if ours(pid)}
    foreign = [size for pid, size in processes.items() if pid not in own]
    known = min(used, sum(size or 0 for size in own.values()))
    if None not in own.values():
        return known, None
    if None in foreign:
        return (
            known,
            "NVML tells neither our own processes' memory nor others': unknown use counts as others'",
        )
    rest = max(known, used - sum(size or 0 for size in foreign))
    return (
        rest,
        "the driver does not tell the memory of our own process: what no other process holds counts as ours",
    )
