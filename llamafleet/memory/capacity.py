"""Free memory of a host's devices, and the ledger of one model placed on them.

Decision 2: docs/decisions/0002-capacity-is-total-less-what-others-hold.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from llamafleet.host.machine import Gpu, Machine
from llamafleet.memory.context import Context
from llamafleet.memory.ledger import NO_CORRECTION, Buffers, Correction, LedgerRow, Usage, buffers, usage
from llamafleet.memory.placement import HOST, Placement
from llamafleet.memory.weights import X86_TYPES, Model, repacked_types


@dataclass(frozen=True)
class Capacity:
    """Bytes of a host that the next instance may use; its reserves are not yet subtracted."""

    gpus: tuple[Gpu, ...]
    gpu_bytes: tuple[int, ...]
    host_bytes: int
    swap_bytes: int
    gpu_reserves_bytes: tuple[int, ...]  # of each GPU
    host_reserve_bytes: int
    unified: bool
    repacked: Mapping[str, int]  # weight types that the CPU repacks, with the rows that must divide a tensor's

    @classmethod
    def of(
        cls,
        machine: Machine,
        gpus: Sequence[Gpu],
        *,
        gpu_reserves_bytes: Sequence[int],
        host_reserve_bytes: int,
        allow_swap: bool,
    ) -> Capacity:
        """Capacity of an empty host; `gpu_reserves_bytes` has a reserve for each GPU. Where GPU and CPU share one
        memory, the host's reserve applies to both."""
        unified = any(gpu.unified_memory for gpu in gpus)
        total = machine.memory.total_bytes
        return cls(
            gpus=tuple(gpus),
            gpu_bytes=tuple(min(gpu.capacity_bytes, total) if unified else gpu.capacity_bytes for gpu in gpus),
            host_bytes=total,
            swap_bytes=machine.memory.swap_total_bytes if allow_swap else 0,
            gpu_reserves_bytes=(host_reserve_bytes,) * len(gpus) if unified else tuple(gpu_reserves_bytes),
            host_reserve_bytes=host_reserve_bytes,
            unified=unified,
            repacked=repacked_types(machine.cpu.flags) if machine.cpu.flags else X86_TYPES,
        )

    def without(self, ledger: Sequence[LedgerRow]) -> Capacity:
        """Capacity that is left after the plan with this ledger is placed."""
        used = {row.device: row.used_bytes for row in ledger}
        host_used = sum(used.values()) if self.unified else used.get(HOST, 0)
        return replace(
            self,
            gpu_bytes=tuple(
                size - (host_used if self.unified else used.get(f"GPU{gpu.index}", 0))
                for gpu, size in zip(self.gpus, self.gpu_bytes, strict=True)
            ),
            host_bytes=self.host_bytes - host_used,
        )

    def only(self, order: Sequence[int]) -> Capacity:
        """Capacity with only these GPUs, in this order: llama.cpp's device N is the N-th of them."""
        return replace(
            self,
            gpus=tuple(self.gpus[device] for device in order),
            gpu_bytes=tuple(self.gpu_bytes[device] for device in order),
            gpu_reserves_bytes=tuple(self.gpu_reserves_bytes[device] for device in order),
        )

    def ledger(self, used: Mapping[int, Usage], host: Usage) -> tuple[LedgerRow, ...]:
        """One ledger row for each device in use, then the row of the host."""
        rows = [
            _row(f"GPU{self.gpus[device].index}", use, self.gpu_bytes[device], self.gpu_reserves_bytes[device])
            for device, use in sorted(used.items())
        ]
        capacity = self.host_bytes + self.swap_bytes
        if self.unified:
            capacity -= sum(use.total_bytes for use in used.values())
        return (*rows, _row(HOST, host, capacity, self.host_reserve_bytes))


def _row(device: str, use: Usage, capacity: int, reserve: int) -> LedgerRow:
    return LedgerRow(
        device=device,
        weights_bytes=use.weights_bytes,
        kv_bytes=use.kv_bytes,
        compute_bytes=use.compute_bytes,
        staging_bytes=use.staging_bytes,
        overhead_bytes=use.overhead_bytes,
        capacity_bytes=capacity,
        free_bytes=capacity - use.total_bytes - reserve,
        reserve_bytes=reserve,
    )


@dataclass(frozen=True)
class Case:
    """One model with its context, and the capacity of the host that it is placed on."""

    model: Model
    context: Context
    capacity: Capacity
    backend: str
    host_extra_bytes: int  # RAM of the prompt cache and of context checkpoints
    correction: Correction = NO_CORRECTION  # what llama-server allocated beyond an earlier plan's ledger

    def buffers(self, placement: Placement, *, roughly: bool) -> Buffers:
        """Bytes of the compute buffers, with staging counted as compute. `roughly`: as in `ledger.buffers`."""
        return buffers(self.model, self.context, placement, self.backend, separate_staging=False, roughly=roughly)

    def rows(self, placement: Placement, compute_buffers: Buffers | None = None) -> tuple[LedgerRow, ...]:
        """The corrected ledger of a placement. `compute_buffers`: their sizes; None: they are computed here."""
        used, host = usage(
            self.model,
            self.context,
            placement,
            self.backend,
            self.host_extra_bytes,
            self.capacity.repacked,
            compute_buffers,
            is_unified=self.capacity.unified,
        )
        corrected = {
            device: self.correction.applied(f"GPU{self.capacity.gpus[device].index}", use)
            for device, use in used.items()
        }
        return self.capacity.ledger(corrected, self.correction.applied(HOST, host))
