"""The backend of a host, the GPUs that the backend can use, and the unit's variables that select these GPUs."""

from __future__ import annotations

from collections.abc import Sequence

from llamafleet.host import vulkan
from llamafleet.host.backends import BACKEND_OF_VENDOR, TRAITS
from llamafleet.host.machine import Gpu, Machine
from llamafleet.memory.capacity import Capacity
from llamafleet.planner.result import Refusal
from llamafleet.settings.schema import Settings
from llamafleet.units import MIB


def resolve_backend(machine: Machine, settings: Settings) -> str | Refusal:
    """The backend to build and plan for; a refusal if the only GPUs are unusable or the GPUs are of several vendors.

    A GPU that is present but unusable is never ignored silently.
    """
    if settings.backend != "auto":
        return settings.backend
    broken = [gpu for gpu in machine.gpus if gpu.problem]
    usable = machine.usable_gpus
    listed = {gpu.pci_bus_id for gpu in machine.gpus}
    lost = [gpu for gpu in machine.pci_gpus if gpu.vendor in BACKEND_OF_VENDOR and gpu.pci_bus_id not in listed]
    if not usable and (broken or lost):
        problems = "; ".join(
            [f"GPU{gpu.index} ({gpu.name}): {gpu.problem}" for gpu in broken]
            + [f"{gpu.vendor} GPU at {gpu.pci_bus_id}: no driver lists it" for gpu in lost]
        )
        return Refusal(
            f"{machine.hostname} has a GPU that cannot be used: {problems}",
            device=f"GPU{broken[0].index}" if broken else lost[0].pci_bus_id,
            suggestions=(
                "repair the driver (the probe's output lists the problems)",
                'or set backend = "cpu" to use no GPU',
            ),
        )
    vendors = {gpu.vendor for gpu in usable}
    if len(vendors) > 1:
        return Refusal(
            f"{machine.hostname} has usable GPUs of several vendors ({', '.join(sorted(vendors))})",
            device=f"GPU{usable[0].index}",
            suggestions=('set backend to "cuda", "hip" or "vulkan"',),
        )
    return BACKEND_OF_VENDOR.get(next(iter(vendors)), "vulkan") if vendors else "cpu"


def gpus_for(machine: Machine, backend: str, settings: Settings) -> tuple[Gpu, ...]:
    """The GPUs that this backend can use."""
    if backend == "vulkan":
        return vulkan.gpus(machine, settings.vulkan_devices)
    if backend == "cpu":
        return ()
    vendors = {"cuda": {"nvidia"}, "hip": {"amd"}}.get(backend)
    return tuple(gpu for gpu in machine.usable_gpus if vendors is None or gpu.vendor in vendors)


def capacity_of(machine: Machine, gpus: Sequence[Gpu], settings: Settings) -> Capacity:
    """The host's memory for all its models, with the reserves and the swap that the settings give."""
    return Capacity.of(
        machine,
        gpus,
        gpu_reserve_bytes=settings.gpu_reserve_mib * MIB,
        host_reserve_bytes=settings.ram_reserve_mib * MIB,
        allow_swap=settings.allow_swap,
    )


def environment(backend: str, gpus: Sequence[Gpu]) -> dict[str, str]:
    """Environment variables for the unit that make llama.cpp's device N the N-th GPU of the plan."""
    if backend == "cuda":
        uuids = ",".join(gpu.uuid or str(gpu.index) for gpu in gpus)
        return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": uuids}
    variable = TRAITS[backend].visible_variable
    numbers = [gpu.index if gpu.vulkan_index is None else gpu.vulkan_index for gpu in gpus]
    return {variable: ",".join(map(str, numbers))} if variable else {}
