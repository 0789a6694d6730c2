"""What a model that starts on demand needs of the memory that all of them share.

Decision 22: docs/decisions/0022-a-server-starts-when-it-is-asked.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llamafleet.memory.ledger import LedgerRow
from llamafleet.memory.placement import HOST


@dataclass(frozen=True)
class Demand:
    """By device what a model needs, and what there is for all that start on demand, less the reserve, in bytes. Where
    GPU and CPU share their memory, it is the host's."""

    needs_bytes: Mapping[str, int]
    room_bytes: Mapping[str, int]

    @classmethod
    def of(cls, ledger: Sequence[LedgerRow], *, unified: bool) -> Demand:
        """Of a plan that was made with what there is for all of them."""
        if unified:
            needs = sum(row.used_bytes for row in ledger)
            return cls({HOST: needs}, {HOST: needs + min(row.free_bytes for row in ledger)})
        return cls(
            {row.device: row.used_bytes for row in ledger},
            {row.device: row.capacity_bytes - row.reserve_bytes for row in ledger},
        )

    def to_json(self) -> dict[str, Any]:
        """For plan.json."""
        return {"needs_bytes": dict(self.needs_bytes), "room_bytes": dict(self.room_bytes)}


def fit(demands: Sequence[Demand]) -> bool:
    """Whether these models have room at the same time."""
    rooms: dict[str, int] = {}
    for demand in demands:
        for device, size in demand.room_bytes.items():
            rooms[device] = min(size, rooms.get(device, size))
    return all(sum(one.needs_bytes.get(device, 0) for one in demands) <= size for device, size in rooms.items())
