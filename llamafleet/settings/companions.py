"""The files that an instance loads beside its model: projector, draft model, adapters."""

from __future__ import annotations

from dataclasses import replace

from llamafleet.settings.kinds import Companion
from llamafleet.settings.schema import Instance

PROJECTOR, DRAFT = "projector", "draft"


def adapter(number: int) -> str:
    """The part of the adapter with this number, from 1 on."""
    return f"adapter-{number}"


def companions(instance: Instance) -> dict[str, Companion]:
    """The companions by their parts."""
    found = {PROJECTOR: instance.projector, DRAFT: instance.draft}
    adapters = {adapter(number): one for number, one in enumerate(instance.adapters, 1)}
    return {part: one for part, one in {**found, **adapters}.items() if one is not None}


def as_instances(instance: Instance) -> dict[str, Instance]:
    """Each companion as an instance with its source, sums and mirrors, so that it is looked up as a model is. The name
    is for messages."""
    return {
        part: replace(
            instance, name=f"{instance.name}: {part}", source=one.source, sha256=one.sha256, mirrors=one.mirrors,
            projector=None, draft=None, adapters=(),
        )
        for part, one in companions(instance).items()
    }  # fmt: skip
