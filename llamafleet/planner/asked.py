"""A model with what is loaded beside it, as it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llamafleet.host.backends import TRAITS
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

    def has_room(self, position: int, size: int) -> bool:
        """Would the GPU at this position of the capacity hold so many bytes, and what a process takes on a GPU, with
        nothing else there? The model may be on others, or on the host."""
        taken = size + TRAITS[self.backend].overhead_bytes + self.capacity.gpu_reserves_bytes[position]
        return taken <= self.capacity.gpu_bytes[position]
