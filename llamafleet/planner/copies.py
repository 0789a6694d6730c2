"""The copies that are one for each GPU: known once the host's GPUs are."""

from __future__ import annotations

from dataclasses import replace

from llamafleet.host.machine import Gpu, Machine
from llamafleet.planner.backend import resolve_backend
from llamafleet.planner.devices import gpus_for, is_one_of, names_of
from llamafleet.planner.result import Refusal
from llamafleet.settings.copies import PER_GPU
from llamafleet.settings.schema import Settings


def with_copies(settings: Settings, machine: Machine) -> Settings | Refusal:
    """The settings with an instance for each GPU where they ask for that: NAME-1 on the first GPU in bus order that the
    instance may use, NAME-2 on the second, each on its GPU alone.

    The settings as they are where no backend can be chosen: planning says why.
    """
    asked = [one for one in settings.models if one.copies == PER_GPU]
    backend = resolve_backend(machine, settings) if asked else ""
    if not asked or isinstance(backend, Refusal):
        return settings
    usable = gpus_for(machine, backend, settings)
    cards = {one.name: [gpu for gpu in usable if is_one_of(gpu, one.gpus)] for one in asked}
    for name, found in cards.items():
        if not found:
            return Refusal(
                f"{name}: copies is {PER_GPU!r}, and {machine.hostname} has no GPU that it may use",
                suggestions=("give a number of copies, or leave it out",),
                instance=name,
            )
    counts = {name: len(found) for name, found in cards.items()}
    if clash := next(settings.clashes(counts), None):
        key, sentence = clash
        return Refusal(
            f"{key}: {sentence}", suggestions=("give the models other names or ports",), instance=asked[0].name
        )
    alone = {
        f"{name}-{number}": (name_of(gpu),) for name, found in cards.items() for number, gpu in enumerate(found, 1)
    }
    expanded = settings.with_copies(counts)
    models = [replace(one, gpus=alone[one.name]) if one.name in alone else one for one in expanded.models]
    return replace(expanded, models=tuple(models))


def name_of(gpu: Gpu) -> str:
    """The name by which a copy's `gpus` has its GPU: the one that stays the same when cards are added or removed."""
    return next((name for name in (gpu.uuid.lower(), gpu.pci_bus_id.lower()) if name), None) or min(names_of(gpu))
