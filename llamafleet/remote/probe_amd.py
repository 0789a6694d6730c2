"""AMD's GPUs, as the drivers amdgpu and amdkfd show them in sysfs.

Part of probe_gpus.py and under its contract: Python 3.8, the standard library, reads only.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from probe_files import at, number, read
from probe_gpu_common import empty_gpu, is_ours, own_by_logs, own_processes, sees_pids

# An integrated AMD GPU sets aside a little memory, usually 0.5 GiB, and borrows the rest from RAM (GTT).
# Cards with so little memory of their own are too old for ROCm.
APU_VRAM_BYTES = 2 * 1024**3


def amd_gpus(first_index: int, notes: list[str]) -> list[dict[str, Any]]:
    """AMD GPUs as the amdgpu driver shows them in sysfs, by bus id."""
    folders = {}
    for card in at("/sys/class/drm").glob("card[0-9]*"):
        device = card / "device"
        if card.name[4:].isdigit() and read(device / "vendor") == "0x1002":
            folders[device.resolve().name] = device
    # Index after NVIDIA's, so that it is unique on the host.
    return [amd_gpu(first_index + n, bus, folders[bus], notes) for n, bus in enumerate(sorted(folders))]


def amd_gpu(index: int, bus_id: str, device: Path, notes: list[str]) -> dict[str, Any]:
    vram, gtt = number(device / "mem_info_vram_total"), number(device / "mem_info_gtt_total") or 0
    gpu = empty_gpu(index, "amd")
    unique = read(device / "unique_id")
    gpu.update(
        uuid="GPU-" + unique if unique else "PCI-" + bus_id,
        name=read(device / "product_name") or "AMD GPU " + read(device / "device"),
        pci_bus_id=bus_id,
        pcie_width=number(device / "max_link_width"),
        pcie_generation=pcie_generation(read(device / "max_link_speed")),
    )
    if vram is None:
        gpu["problem"] = (
            "amdgpu tells no memory size (mem_info_vram_total): another driver holds the GPU, or amdgpu could not "
            "start it: see dmesg, then load amdgpu (modprobe amdgpu) or reboot"
        )
        return gpu
    node, gpu["gfx"], gpu["compute_units"], count = kfd_node(bus_id)
    if count > 1:
        gpu["problem"] = (
            f"it is divided into {count} compute partitions, which are not planned for: join them (amd-smi set "
            "--compute-partition SPX)"
        )
    used = number(device / "mem_info_vram_used") or 0
    if vram <= APU_VRAM_BYTES and gtt > vram:
        gpu["unified_memory"] = True
        vram, used = vram + gtt, used + (number(device / "mem_info_gtt_used") or 0)
        notes.append(f"GPU {bus_id} shares the host's RAM: {vram} bytes are VRAM and GTT together")
    own = min(used, own_bytes(bus_id, node, gpu, used))
    gpu.update(memory_total_bytes=vram, memory_used_by_others_bytes=used - own)
    return gpu


def own_bytes(bus_id: str, node: str, gpu: dict[str, Any], used: int) -> int:
    """Of `used` bytes of the GPU those that our servers hold: by amdkfd, which knows ROCm's processes, by amdgpu, which
    knows all and tells them in the /proc of the process itself, or else by their logs."""
    by_kfd = 0
    if sees_pids():
        files = at("/sys/class/kfd/kfd/proc").glob(f"*/vram_{node}")
        by_kfd = sum(number(path) or 0 for path in files if is_ours(path.parent.name))
    regions = ("vram", "gtt") if gpu["unified_memory"] else ("vram",)
    return max(by_kfd, own_by_fdinfo(bus_id, regions)) or own_by_logs(gpu["uuid"], used)


def own_by_fdinfo(bus_id: str, regions: tuple[str, ...]) -> int:
    """Bytes of our processes in these regions, as the kernel's documentation has them (gpu/drm-usage-stats)."""
    clients: dict[str, int] = {}
    for folder, _ in own_processes():
        for file in folder.glob("fdinfo/*"):
            values = dict(re.findall(r"^(drm-[\w-]+):\s*(.+)$", read(file), re.M))
            if values.get("drm-pdev") == bus_id:
                sizes = [re.match(r"(\d+) KiB", values.get(f"drm-memory-{region}", "")) for region in regions]
                clients[values.get("drm-client-id", str(file))] = sum(int(size[1]) * 1024 for size in sizes if size)
    return sum(clients.values())


def pcie_generation(speed: str) -> int | None:
    """The generation of a link speed as sysfs writes it, "16.0 GT/s PCIe"."""
    rates = {"2.5": 1, "5.0": 2, "8.0": 3, "16.0": 4, "32.0": 5, "64.0": 6}
    return rates.get(speed.partition(" ")[0])


def kfd_node(bus_id: str) -> tuple[str, str | None, int | None, int]:
    """AMD's compute driver's id of a GPU, its LLVM target such as "gfx1100", its compute units, and how many devices it
    is to HIP."""
    domain, bus, device, function = (int(part, 16) for part in re.split("[:.]", bus_id))
    location = bus << 8 | device << 3 | function
    found = []
    for node in sorted(at("/sys/class/kfd/kfd/topology/nodes").glob("*")):
        values = dict(re.findall(r"^(\w+) (\d+)$", read(node / "properties"), re.M))
        if int(values.get("location_id", -1)) == location and int(values.get("domain", 0)) == domain:
            target = int(values.get("gfx_target_version", 0))  # 110000 is 11.0.0; the last two are hex digits
            name = f"gfx{target // 10000}{target // 100 % 100:x}{target % 100:x}"
            units = int(values.get("simd_count", 0)) // max(1, int(values.get("simd_per_cu", 1)))
            found.append((read(node / "gpu_id"), name if target else None, units or None))
    return (*found[0], len(found)) if found else ("", None, None, 0)
