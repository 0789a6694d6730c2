"""The GPUs of a host that plans may use, and why every other display or accelerator device is left out.

A device is used, left out for a reason that its plans give, or the host is refused: none is passed over in silence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from llamafleet.host import vulkan
from llamafleet.host.machine import Gpu, Machine, PciGpu
from llamafleet.planner.result import Refusal
from llamafleet.settings.gpu_names import DEFAULT
from llamafleet.settings.schema import Instance, Settings

VENDORS_OF = {"cuda": ("nvidia",), "hip": ("amd",)}  # all others' GPUs are Vulkan's alone
NO_DRIVER = "no driver lists it: install or load its driver"  # of a probe that does not say why
BY_KIND = {
    "integrated": 'it is integrated and shares the RAM; backend = "vulkan" uses it',
    "display": "llama.cpp has no backend for this display chip",
    "npu": "llama.cpp uses no NPU",
    "accelerator": "llamafleet builds no backend of llama.cpp for it",
    "virtual": "it is a virtual function, for virtual machines",
}
# Of an integrated Radeon: the two of every desktop Ryzen drive displays, and the processor beside them is faster.
FEWEST_UNITS = 4
FOR_DISPLAYS = "it has {} compute units, for displays: the processor is faster; name it in gpus to use it"
BESIDE_A_CARD = "it is integrated and shares the RAM, beside a card with memory of its own"


def gpus_for(machine: Machine, backend: str, settings: Settings) -> tuple[Gpu, ...]:
    """The GPUs that plans with this backend may use, in bus order."""
    if backend == "cpu":
        return ()
    vendors = VENDORS_OF.get(backend)
    if vendors is None:
        found = vulkan.gpus(machine, settings.vulkan_devices)
    else:
        found = tuple(gpu for gpu in machine.usable_gpus if gpu.vendor in vendors)
    if settings.gpus is not None or (vendors is None and settings.vulkan_devices is not None):
        return tuple(gpu for gpu in found if is_named(gpu, settings))
    return without_integrated(found)


def without_integrated(gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """The cards with memory of their own; where there are none, the GPUs that share the host's."""
    return tuple(gpu for gpu in gpus if not gpu.unified_memory) or tuple(gpus)


def is_for_displays(gpu: Gpu) -> bool:
    """Whether a GPU is too small to choose its backend; one that is asked for uses it."""
    return gpu.unified_memory and gpu.vendor == "amd" and 0 < (gpu.compute_units or FEWEST_UNITS) < FEWEST_UNITS


def is_named(gpu: Gpu | PciGpu, settings: Settings) -> bool:
    """Whether the setting `gpus` leaves this GPU to plans."""
    return is_one_of(gpu, settings.gpus)


def is_one_of(gpu: Gpu | PciGpu, names: Sequence[str] | None) -> bool:
    """Whether one of the names is this GPU's; None: all GPUs."""
    return names is None or not names_of(gpu).isdisjoint(names)


def names_of(gpu: Gpu | PciGpu) -> set[str]:
    """The names that settings may have for a GPU, in the form of `gpu_names.gpu_name`."""
    names = {gpu.pci_bus_id.lower()}
    if isinstance(gpu, Gpu):
        names |= {str(gpu.index), gpu.uuid.lower()}
    return names - {""}


def misnamed(machine: Machine, settings: Settings) -> Refusal | None:
    """A refusal where `gpus`, of the host or of a model, or `gpu_reserve_mib` names a GPU that the host does not
    have."""
    reserve = settings.gpu_reserve_mib
    asked = [("gpus", name) for name in settings.gpus or ()]
    asked += [(f"models: {one.name}: gpus", name) for one in settings.models for name in one.gpus or ()]
    asked += [("gpu_reserve_mib", name) for name in (() if isinstance(reserve, int) else reserve) if name != DEFAULT]
    every: list[Gpu | PciGpu] = [*machine.gpus, *vulkan.only_there(machine), *machine.pci_gpus]
    known = {name for gpu in every for name in names_of(gpu)}
    for key, name in asked:
        if name not in known:
            there = [_listed(gpu) for gpu in every if isinstance(gpu, Gpu)]
            there += [_title(device) for device in _unlisted(machine)]
            return Refusal(
                f"{key}: {machine.hostname} has no GPU {name}; it has {', '.join(there) or 'none'}",
                suggestions=(f"name another one in {key}, or leave it out there",),
            )
    return None


def _listed(gpu: Gpu) -> str:
    names = ", ".join(name for name in (gpu.name, gpu.pci_bus_id, gpu.uuid) if name)
    return f"{gpu.index} ({names})"


def _title(device: PciGpu) -> str:
    return f"{device.name or f'{device.vendor} GPU'} at {device.pci_bus_id}"


def _unlisted(machine: Machine) -> Iterator[PciGpu]:
    """The devices on the PCI bus that no driver and no Vulkan lists."""
    listed = {gpu.pci_bus_id for gpu in machine.gpus} | {device.pci_bus_id for device in machine.vulkan or ()}
    return (device for device in machine.pci_gpus if device.pci_bus_id not in listed)


def unusable(machine: Machine, settings: Settings, backend: str = "auto") -> tuple[str, ...]:
    """Sentences about the GPUs that plans with this backend would use, if nothing was wrong with them."""
    vendors = VENDORS_OF.get(backend)

    def wanted(gpu: Gpu | PciGpu) -> bool:
        return (vendors is None or gpu.vendor in vendors) and is_named(gpu, settings)

    broken = [f"GPU{gpu.index} ({gpu.name or gpu.vendor}): {gpu.problem}" for gpu in machine.gpus
              if gpu.problem and wanted(gpu)]  # fmt: skip
    lost = [f"{_title(device)}: {_why_unlisted(device, machine)}" for device in _unlisted(machine)
            if device.kind == "gpu" and wanted(device)]  # fmt: skip
    return (*broken, *lost)


def _why_unlisted(device: PciGpu, machine: Machine) -> str:
    if device.withheld or device.problem:
        return device.withheld or device.problem or ""
    if device.vendor == "intel":
        if machine.vulkan is None:
            return f"it needs Vulkan, which is not installed: {vulkan.INSTALL}"
        return f"Vulkan does not list it: {vulkan.INSTALL}"
    return NO_DRIVER


def withheld(instance: Instance, usable: Sequence[Gpu], machine: Machine, backend: str, settings: Settings) -> str:
    """Why a GPU that the instance names is none that plans use; empty where all are. `usable` are those that are."""
    named = [gpu for gpu in (*machine.gpus, *vulkan.only_there(machine)) if is_one_of(gpu, instance.gpus or ())]
    known = {name for gpu in usable for name in names_of(gpu)}
    for name in instance.gpus or ():
        if name not in known:
            ours = [gpu for gpu in named if name in names_of(gpu)]
            has_card = any(not gpu.unified_memory for gpu in usable)
            why = _why_not(ours[0], has_card, backend, settings) if ours else NO_DRIVER
            return f"gpus: GPU {name} of {machine.hostname} cannot be used: {why}"
    return ""


def left_out(machine: Machine, backend: str, settings: Settings) -> tuple[str, ...]:
    """A sentence for each device of the host that plans with this backend do not use."""
    used = gpus_for(machine, backend, settings)
    indices, buses = {gpu.index for gpu in used}, {gpu.pci_bus_id for gpu in used}
    every = (*machine.gpus, *vulkan.only_there(machine))
    rest = [gpu for gpu in every if gpu.index not in indices and gpu.vendor != vulkan.SOFTWARE]
    has_card = any(not gpu.unified_memory for gpu in used)
    sentences = [f"GPU{gpu.index} ({gpu.name or gpu.vendor}) is not used: {_why_not(gpu, has_card, backend, settings)}"
                 for gpu in rest]  # fmt: skip
    told = buses | {gpu.pci_bus_id for gpu in rest}
    sentences += [f"{_title(device)} is not used: {_why_left_out(device, machine, backend, settings)}"
                  for device in machine.pci_gpus if device.pci_bus_id not in told]  # fmt: skip
    return tuple(sentences)


def _why_not(gpu: Gpu, has_card: bool, backend: str, settings: Settings) -> str:
    if gpu.problem:
        return gpu.problem
    if has_card and gpu.unified_memory and is_named(gpu, settings):
        return BESIDE_A_CARD
    if settings.gpus is None and is_for_displays(gpu):
        return FOR_DISPLAYS.format(gpu.compute_units)
    return _why_not_chosen(gpu, backend, settings) or f"Vulkan does not list it: {vulkan.INSTALL}"


def _why_left_out(device: PciGpu, machine: Machine, backend: str, settings: Settings) -> str:
    by_kind = BY_KIND.get(device.kind) or device.withheld
    return by_kind or _why_not_chosen(device, backend, settings) or _why_unlisted(device, machine)


def _why_not_chosen(gpu: Gpu | PciGpu, backend: str, settings: Settings) -> str:
    """The setting because of which it is not used; empty where it is another reason."""
    if not is_named(gpu, settings):
        return "gpus does not name it"
    if backend == "cpu":
        return 'the backend is "cpu"'
    if gpu.vendor not in VENDORS_OF.get(backend, (gpu.vendor,)):
        return f'the backend "{backend}" does not use it'
    if backend == "vulkan" and settings.vulkan_devices is not None:
        return "vulkan_devices does not name it"
    return ""


def only_used(machine: Machine, backend: str, settings: Settings) -> Machine:
    """The machine with the GPUs alone that plans may use: what is compiled is for these."""
    return replace(machine, gpus=gpus_for(machine, backend, settings)) if backend in VENDORS_OF else machine


def reserve_mib(gpu: Gpu, settings: Settings) -> int:
    """Memory of this GPU that plans leave free, MiB."""
    reserve = settings.gpu_reserve_mib
    if isinstance(reserve, int):
        return reserve
    return next((reserve[name] for name in sorted(names_of(gpu)) if name in reserve), reserve[DEFAULT])
