"""The backend of a host, the GPUs that the backend can use, and the unit's variables that select these GPUs."""

from __future__ import annotations

from collections.abc import Sequence

from llamafleet.host import vulkan
from llamafleet.host.backends import BACKEND_OF_VENDOR, TRAITS
from llamafleet.host.machine import Gpu, Machine
from llamafleet.memory.capacity import Capacity
from llamafleet.planner.devices import is_for_displays, is_named, misnamed, reserve_mib, unusable
from llamafleet.planner.result import Refusal
from llamafleet.settings.schema import Settings
from llamafleet.units import MIB


def resolve_backend(machine: Machine, settings: Settings) -> str | Refusal:
    """The backend to build and plan for. A refusal if a setting names a GPU that the host does not have, if its GPUs
    cannot be used, or if usable cards are of several vendors.
    """
    if refusal := misnamed(machine, settings):
        return refusal
    return _by_gpus(machine, settings) if settings.backend == "auto" else settings.backend


def _by_gpus(machine: Machine, settings: Settings) -> str | Refusal:
    """The backend of the usable cards; an integrated GPU counts where the host has no card at all."""
    usable = [gpu for gpu in machine.usable_gpus if is_named(gpu, settings)]
    if settings.gpus is None:
        usable = [gpu for gpu in usable if not is_for_displays(gpu)]
    cards = [gpu for gpu in usable if not gpu.unified_memory]
    if not cards and any(is_named(gpu, settings) for gpu in vulkan.only_there(machine) if not gpu.unified_memory):
        return "vulkan"  # Intel's cards
    problems = unusable(machine, settings)
    if problems and not cards:
        return Refusal(
            f"{machine.hostname} has a GPU that cannot be used: {'; '.join(problems)}",
            suggestions=('set backend = "cpu" to use no GPU, or name the GPUs to use in gpus',),
        )
    vendors = sorted({gpu.vendor for gpu in cards or usable})
    if len(vendors) > 1:
        return Refusal(
            f"{machine.hostname} has usable GPUs of several vendors ({', '.join(vendors)})",
            device=f"GPU{usable[0].index}",
            suggestions=('set backend to "cuda", "hip" or "vulkan", or name the GPUs to use in gpus',),
        )
    return BACKEND_OF_VENDOR.get(vendors[0], "vulkan") if vendors else "cpu"


def no_gpu(machine: Machine, backend: str, settings: Settings) -> Refusal:
    """The refusal of a host that has no GPU for the backend that was asked for."""
    problems = "; ".join(unusable(machine, settings, backend))
    return Refusal(
        f"backend is {backend!r} but {machine.hostname} has no GPU that this backend can use"
        f"{f': {problems}' if problems else ''}",
        suggestions=(*(vulkan.advice(machine) if backend == "vulkan" else ()), 'set backend = "auto" or "cpu"'),
    )


def capacity_of(machine: Machine, gpus: Sequence[Gpu], settings: Settings) -> Capacity:
    """The host's memory for all its models, with the reserves and the swap that the settings give."""
    return Capacity.of(
        machine,
        gpus,
        gpu_reserves_bytes=[reserve_mib(gpu, settings) * MIB for gpu in gpus],
        host_reserve_bytes=settings.ram_reserve_mib * MIB,
        allow_swap=settings.allow_swap,
    )


def environment(backend: str, gpus: Sequence[Gpu], machine: Machine) -> dict[str, str]:
    """Environment variables for the unit that make llama.cpp's device N the N-th GPU of the plan."""
    if backend == "cuda":
        uuids = ",".join(gpu.uuid or str(gpu.index) for gpu in gpus)
        return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": uuids}
    variable = TRAITS[backend].visible_variable
    # HIP counts AMD's GPUs alone, which come last in the host's order.
    others = [gpu for gpu in machine.gpus if gpu.vendor != "amd"] if backend == "hip" else []
    numbers = [gpu.index - len(others) if gpu.vulkan_index is None else gpu.vulkan_index for gpu in gpus]
    return {variable: ",".join(map(str, numbers))} if variable else {}
