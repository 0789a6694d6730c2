"""What the binary itself said of a plan, as a correction of the ledger.

The ledger is made from the header alone; llama-server, asked with the planned flags, tells what it would
really allocate. Where the two disagree the binary is right: its difference goes into the next plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from llamafleet.memory.ledger import Usage


@dataclass(frozen=True)
class Adjustment:
    """Bytes that the binary allocates beyond the ledger's, by the ledger's device name ("GPU0", "host");
    negative where it takes less."""

    extra_bytes: Mapping[str, int] = field(default_factory=dict)

    def applied(self, device: str, use: Usage) -> Usage:
        """The device's usage with the difference counted as compute, the part that is estimated."""
        return replace(use, compute_bytes=use.compute_bytes + self.extra_bytes.get(device, 0))

    def plus(self, more: Mapping[str, int]) -> Adjustment:
        """With further differences added."""
        devices = {**self.extra_bytes, **more}
        return Adjustment({one: self.extra_bytes.get(one, 0) + more.get(one, 0) for one in devices})


NO_ADJUSTMENT = Adjustment()
