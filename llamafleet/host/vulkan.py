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
SOFTWARE = "software"  # vendor of a device that is none, such as Mesa's llvmpipe


def gpus(machine: Machine, asked: tuple[int, ...] | None) -> tuple[Gpu, ...]:
    """The GPUs to plan for, in bus order. With `asked`, only the devices of these numbers, of whatever kind.

    Before Vulkan's loader is installed, the kernel's GPUs in bus order: it usually lists them so.
    """
    if machine.vulkan is None:
        return machine.usable_gpus
    return tuple(sorted(_matched(machine, asked), key=lambda gpu: gpu.index))


def _matched(machine: Machine, asked: tuple[int, ...] | None) -> Iterator[Gpu]:
    known = {gpu.pci_bus_id: gpu for gpu in machine.gpus}
    seen: set[str] = set()
    for device in machine.vulkan or ():
        if device.kind not in TAKEN if asked is None else device.index not in asked:
            continue
        name = device.pci_bus_id or device.uuid
        if name in seen:  # a second driver for the same GPU
            continue
        seen.add(name)
        gpu = known.get(name) or _of(device, len(machine.gpus))
        if gpu.usable:
            yield replace(gpu, vulkan_index=device.index)


def _of(device: VulkanDevice, first: int) -> Gpu:
    """A GPU that only Vulkan lists. What others hold of it is unknown: the reserve has to cover it."""
    return Gpu(
        index=first + device.index, uuid=device.uuid, name=device.name, compute_capability=None,
        memory_total_bytes=device.memory_total_bytes, memory_used_by_others_bytes=0,
        pci_bus_id=device.pci_bus_id or "", pcie_generation=None, pcie_width=None,
        # An integrated GPU's memory is the host's, and so is a software device's.
        unified_memory=device.kind in ("integrated", "cpu"), vendor=SOFTWARE if device.kind == "cpu" else "vulkan",
    )  # fmt: skip


def advice(machine: Machine) -> tuple[str, ...]:
    """For a refusal: the devices that Vulkan lists; nothing where the survey did not ask Vulkan."""
    if machine.vulkan is None:
        return ()
    if not machine.vulkan:
        return ("install a Vulkan driver for the GPU (mesa-vulkan-drivers): Vulkan lists no device",)
    shown = ", ".join(f"{one.index} ({one.name}, {one.kind})" for one in machine.vulkan)
    return (f"name devices in vulkan_devices: Vulkan lists {shown}",)
