"""NVIDIA's GPUs, as NVML tells them.

Part of probe_gpus.py and under its contract: Python 3.8, the standard library, psutil and pynvml, reads only.
"""

from __future__ import annotations

import contextlib
import importlib
import re
from typing import Any, Callable  # the contract is Python 3.8, whose own Callable is typing's

import probe_tegra
from probe_files import at, read, tegra
from probe_gpu_common import empty_gpu, is_ours, sees_pids
from probe_nvidia_memory import gpu_processes, read_memory

LIBRARY = "libnvidia-ml.so.1"


def nvidia(problems: list[str], notes: list[str]) -> dict[str, Any]:
    """`gpus` and `driver` as NVML tells them, or a Jetson's device tree where NVML does not, or `no_nvml`."""
    found = by_nvml(problems, notes)
    if found.get("gpus"):
        return found
    jetson = probe_tegra.tegra_gpu()
    if jetson is None:
        return found
    driver = found.get("driver") or {}
    version = driver.get("cuda") or probe_tegra.cuda_version()
    release = driver.get("nvidia") or probe_tegra.release()
    return {"gpus": [jetson], "driver": {"nvidia": release, "cuda": version}}


def by_nvml(problems: list[str], notes: list[str]) -> dict[str, Any]:
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
        if tegra() is None:
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
    gpus = [gpu for index in range(count) for gpu in nvidia_gpus(nvml, index, notes)]
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


def nvidia_gpus(nvml: Any, index: int, notes: list[str]) -> list[dict[str, Any]]:
    """The GPU at an NVML index; with MIG enabled its instances instead. Lost ones carry a problem."""
    gpu = empty_gpu(index, "nvidia")
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        gpu.update(identity(nvml, handle))
        instances = mig_instances(nvml, handle)
        if instances is None:
            read_memory(nvml, handle, gpu, notes)
            gpu["problem"] = compute_mode_problem(nvml, handle)
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
    return [mig_gpu(nvml, instance, gpu, notes) for instance in instances]


def identity(nvml: Any, handle: Any) -> dict[str, Any]:
    """Bus id, UUID, name and compute capability. Jetson and GB10 are on no PCI bus, and their drivers do not support
    every one of these calls. Raises NVMLError where a call fails in another way."""
    untold = (nvml.NVML_ERROR_NOT_SUPPORTED, nvml.NVML_ERROR_FUNCTION_NOT_FOUND, nvml.NVML_ERROR_NOT_FOUND)

    def told(call: Callable[[Any], Any]) -> Any:
        try:
            return call(handle)
        except nvml.NVMLError as error:
            if error.value not in untold:
                raise
            return None

    pci, capability = told(nvml.nvmlDeviceGetPciInfo), told(nvml.nvmlDeviceGetCudaComputeCapability)
    chip = tegra()
    return {
        "pci_bus_id": sysfs_bus_id(as_text(pci.busId)) if pci else "",
        "uuid": as_text(told(nvml.nvmlDeviceGetUUID) or ""),
        "name": as_text(told(nvml.nvmlDeviceGetName) or "") or (probe_tegra.model() if chip else "NVIDIA GPU"),
        "compute_capability": ".".join(map(str, capability)) if capability
        else probe_tegra.CAPABILITIES.get(chip or ""),
    }  # fmt: skip


def compute_mode_problem(nvml: Any, handle: Any) -> str | None:
    """Whether the GPU's compute mode keeps a server of ours from it."""
    try:
        mode = nvml.nvmlDeviceGetComputeMode(handle)
    except nvml.NVMLError:
        return None
    if mode == nvml.NVML_COMPUTEMODE_PROHIBITED:
        return "its compute mode is Prohibited, so that no process may use it: nvidia-smi --compute-mode=0"
    strangers = [pid for pid in gpu_processes(nvml, handle) or () if not is_ours(pid)]
    if mode == nvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS and strangers and sees_pids():
        return (
            f"it is busy: its compute mode is Exclusive_Process, and process {strangers[0]} uses it: end that process, "
            "or nvidia-smi --compute-mode=0"
        )
    return None


def gpu_problem(nvml: Any, error: Any) -> str:
    advice = {
        nvml.NVML_ERROR_GPU_IS_LOST: "the GPU has fallen off the bus: check dmesg for Xid 79, power and "
        "cables, then reboot",
        nvml.NVML_ERROR_NO_PERMISSION: "no permission to open the device: run as root or in its group",
        nvml.NVML_ERROR_IN_USE: "the GPU is busy: a process or a virtual machine holds it alone: see nvidia-smi and "
        "fuser /dev/nvidia*",
        nvml.NVML_ERROR_RESET_REQUIRED: "the GPU needs a reset: nvidia-smi --gpu-reset, or reboot",
    }.get(error.value)
    return f"{advice} ({error})" if advice else f"NVML: {error}"


def as_text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def sysfs_bus_id(nvml_bus_id: str) -> str:
    """NVML's "00000000:01:00.0" as sysfs writes it, "0000:01:00.0"; empty where it is none."""
    found = re.fullmatch(r"([0-9a-f]{4,8}):([0-9a-f]{2}:[0-9a-f]{2}\.[0-7])", nvml_bus_id.lower())
    return f"{int(found[1], 16):04x}:{found[2]}" if found else ""


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


def mig_gpu(nvml: Any, handle: Any, parent: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """A MIG instance as a device of its own: its memory and UUID, the rest its GPU's."""
    gpu = dict(parent, mig=True)
    try:
        gpu["uuid"] = as_text(nvml.nvmlDeviceGetUUID(handle))
        gpu["name"] = as_text(nvml.nvmlDeviceGetName(handle))
        read_memory(nvml, handle, gpu, notes)
    except nvml.NVMLError as error:
        gpu["problem"] = gpu_problem(nvml, error)
    return gpu
