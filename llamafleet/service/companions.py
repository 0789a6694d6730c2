"""Look up the files that an instance loads beside its model, as the model itself is looked up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from llamafleet.hub.source import ModelFiles
from llamafleet.settings.companions import as_instances
from llamafleet.settings.kinds import AUTO, Companion
from llamafleet.settings.schema import Instance


def with_companions(
    instance: Instance, look_up: Callable[[Instance], ModelFiles], projector_of: Callable[[str], str]
) -> ModelFiles:
    """The model with its companions. `look_up` finds the files of an instance's `source`, `projector_of` the projector
    for a model by its source."""
    model = look_up(instance)
    if instance.projector == AUTO:
        source = projector_of(model.files[0].chosen or instance.source)
        instance = replace(instance, projector=Companion(source))
    companions = {part: look_up(one) for part, one in as_instances(instance).items()}
    return replace(model, companions=companions) if companions else model
