"""The GPU of a Jetson, which is on no PCI bus, as the device tree and CUDA's library tell it where NVML does not.

Part of probe_gpus.py and under its contract: Python 3.8, the standard library and psutil, reads only.
"""

from __future__ import annotations

import ctypes
import re
from typing import Any, Dict, Optional

from probe_files import at, psutil, read, tegra
from probe_gpu_common import empty_gpu, own_by_logs

# By chip: the compute capability (NVIDIA's list of CUDA GPUs, Jetson products).
CAPABILITIES = {"tegra210": "5.3", "tegra186": "6.2", "tegra194": "7.2", "tegra234": "8.7", "tegra264": "11.0"}
# Opened by every CUDA process there: nvhost by JetPack 6 and earlier, nvidia0 from then on.
NODES = ("/dev/nvhost-gpu", "/dev/nvhost-ctrl-gpu", "/dev/nvgpu/igpu0/ctrl", "/dev/nvidia0")


def tegra_gpu() -> Optional[Dict[str, Any]]:
    """The GPU, whose memory is the host's; None where this is no Jetson."""
    chip = tegra()
    if chip is None:
        return None
    ram = psutil().virtual_memory()
    gpu = empty_gpu(0, "nvidia")
    used = ram.total - ram.available
    gpu.update(
        name=model(),
        compute_capability=CAPABILITIES.get(chip),
        unified_memory=True,
        memory_total_bytes=ram.total,
        memory_used_by_others_bytes=used - own_by_logs("", used),
    )
    if not any(at(node).exists() for node in NODES):
        gpu["problem"] = (
            "the device nodes of its driver are missing: on the host install NVIDIA's packages of JetPack "
            "(nvidia-l4t-cuda), in a container give it the devices (Docker: --runtime nvidia)"
        )
    elif gpu["compute_capability"] is None:
        gpu["problem"] = f'the compute capability of {chip} is not known: set backend = "vulkan" or "cpu"'
    return gpu


def model() -> str:
    """Such as "NVIDIA Jetson AGX Orin Developer Kit"."""
    return read(at("/proc/device-tree/model")).strip("\0") or f"NVIDIA {tegra()}"


def release() -> Optional[str]:
    """The version of Jetson Linux, which is its driver's: "36.4.0"."""
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", read(at("/etc/nv_tegra_release")))
    return f"{found[1]}.{found[2]}" if found else None


def cuda_version() -> Optional[str]:
    """The newest CUDA version that the driver runs, as its library tells without starting it."""
    version = ctypes.c_int(0)
    try:
        told = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}" if told == 0 and version.value else None
