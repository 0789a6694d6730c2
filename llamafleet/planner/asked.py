"""A model with what is loaded beside it, as it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llamafleet.memory.capacity import Capacity
from llamafleet.memory.weights import Model
from llamafleet.model.gguf import Header
from llamafleet.settings.schema import Instance


@dataclass(frozen=True)
class Asked:
    """A model with its companions, and the host's capacity for them all."""

    backend: str
    capacity: Capacity
    instance: Instance
    model: Model
    context_tokens: int  # of one slot
    companions: Mapping[str, Header]  # by their parts, as in `settings/companions.py`
