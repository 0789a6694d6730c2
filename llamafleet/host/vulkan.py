"""Choose the GPUs to plan for among the devices that Vulkan lists.

Vulkan counts its devices in the loader's order, not by PCI bus, and lists software renderers too. The kernel's drivers
report a GPU's memory, and what others hold of it, better than Vulkan: a device at the bus address of such a GPU takes
the driver's figures. Only Vulkan lists Intel's GPUs, with Vulkan's figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from llamafleet.host.machine import Gpu, Machine, VulkanDevice

# Kinds of devices that llama.cpp uses where GGML_VK_VISIBLE_DEVICES names none (ggml_vk_instance_init).
TAKEN = ("discrete", "integrated")
INSTALL = (
    "install Vulkan's loader and the GPU's driver (apt: libvulkan1 mesa-vulkan-drivers; dnf: vulkan-loader "
    "mesa-vulkan-drivers), and run again"
)
SOFTWARE = "software"  # `vendor` of a software renderer, such as Mesa's llvmpipe


def gpus(machine: Machine, numbers: tuple[int, ...] | None) -> tuple[Gpu, ...]:
    """The GPUs to plan for, in bus order. With `numbers`, only Vulkan's devices with these numbers, of any kind.

    If Vulkan's loader is not installed yet, these are the kernel's GPUs in bus order, which is usually Vulkan's order.
    """
    if machine.vulkan is None:
        return machine.usable_gpus
    return tuple(sorted(_matched(machine, numbers), key=lambda gpu: gpu.index))


def _matched(machine: Machine, numbers: tuple[int, ...] | None) -> Iterator[Gpu]:
    known = {gpu.pci_bus_id: gpu for gpu in machine.gpus}
    seen: set[str] = set()
    for device in machine.vulkan or ():
        if device.kind not in TAKEN if numbers is None else device.index not in numbers:
            continue
        name = device.pci_bus_id or device.uuid
        if name in seen:  # another driver of a GPU that is listed already
            continue
        seen.add(name)
        gpu = known.get(name) or _of(device, len(machine.gpus))
        if gpu.usable:
            yield replace(gpu, vulkan_index=device.index)


def only_there(machine: Machine) -> tuple[Gpu, ...]:
    """The hardware that Vulkan alone lists, one for each bus address: Intel's GPUs."""
    known = {gpu.pci_bus_id for gpu in machine.gpus if gpu.pci_bus_id}
    found = {device.pci_bus_id or device.uuid: device for device in reversed(machine.vulkan or ())
             if device.kind in TAKEN and device.pci_bus_id not in known}  # fmt: skip
    gpus = (replace(_of(device, len(machine.gpus)), vulkan_index=device.index) for device in found.values())
    return tuple(sorted(gpus, key=lambda gpu: gpu.index))


def _of(device: VulkanDevice, first: int) -> Gpu:
    """A GPU that only Vulkan lists. The memory that other processes use is unknown: the reserve has to cover it."""
    return Gpu(
        index=first + device.index, uuid=device.uuid, name=device.name, compute_capability=None,
        memory_total_bytes=device.memory_total_bytes, memory_used_by_others_bytes=0,
        pci_bus_id=device.pci_bus_id or "", pcie_generation=None, pcie_width=None,
        # An integrated GPU and a software renderer use the host's memory.
        unified_memory=device.kind in ("integrated", "cpu"), vendor=SOFTWARE if device.kind == "cpu" else "vulkan",
    )  # fmt: skip


def advice(machine: Machine) -> tuple[str, ...]:
    """Suggestions for a refusal: the devices that Vulkan lists; empty if the survey did not read them."""
    if machine.vulkan is None:
        return ()
    if not machine.vulkan:
        return ("install a Vulkan driver for the GPU (mesa-vulkan-drivers): Vulkan lists no device",)
    listed = ", ".join(f"{device.index} ({device.name}, {device.kind})" for device in machine.vulkan)
    return (f"name devices in vulkan_devices: Vulkan lists {listed}",)
