"""What a host has left for the next instance, and the ledger of one model on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from llamafleet.host.machine import Gpu, Machine
from llamafleet.memory.context import Context
from llamafleet.memory.ledger import NO_ADJUSTMENT, Adjustment, Buffers, LedgerRow, Usage, buffers, usage
from llamafleet.memory.placement import HOST, Placement
from llamafleet.memory.weights import X86_TYPES, Model, repacked_types


@dataclass(frozen=True)
class Capacity:
    """What is left on a host for the next instance, reserves not yet taken off."""

    gpus: tuple[Gpu, ...]
    gpu_bytes: tuple[int, ...]
    host_bytes: int
    swap_bytes: int
    gpu_reserve_bytes: int
    host_reserve_bytes: int
    unified: bool
    repacked: Mapping[str, int]  # types that the CPU repacks

    @classmethod
    def of(
        cls,
        machine: Machine,
        gpus: Sequence[Gpu],
        *,
        gpu_reserve_bytes: int,
        host_reserve_bytes: int,
        allow_swap: bool,
    ) -> Capacity:
        """The whole host's. Where GPU and CPU share one memory, the host's reserve is the GPU's too."""
        unified = any(gpu.unified_memory for gpu in gpus)
        total = machine.memory.total_bytes
        return cls(
            gpus=tuple(gpus),
            gpu_bytes=tuple(min(gpu.capacity_bytes, total) if unified else gpu.capacity_bytes for gpu in gpus),
            host_bytes=total,
            swap_bytes=machine.memory.swap_total_bytes if allow_swap else 0,
            gpu_reserve_bytes=host_reserve_bytes if unified else gpu_reserve_bytes,
            host_reserve_bytes=host_reserve_bytes,
            unified=unified,
            repacked=repacked_types(machine.cpu.flags) if machine.cpu.flags else X86_TYPES,
        )

    def without(self, ledger: Sequence[LedgerRow]) -> Capacity:
        """What is left once a plan has its share."""
        used = {row.device: row.used_bytes for row in ledger}
        taken = sum(used.values()) if self.unified else used.get(HOST, 0)
        return replace(
            self,
            gpu_bytes=tuple(
                size - (taken if self.unified else used.get(f"GPU{gpu.index}", 0))
                for gpu, size in zip(self.gpus, self.gpu_bytes, strict=True)
            ),
            host_bytes=self.host_bytes - taken,
        )

    def only(self, order: Sequence[int]) -> Capacity:
        """The same host with these of its GPUs, in this order: llama.cpp's device N is the N-th."""
        return replace(
            self,
            gpus=tuple(self.gpus[device] for device in order),
            gpu_bytes=tuple(self.gpu_bytes[device] for device in order),
        )

    def ledger(self, used: Mapping[int, Usage], host: Usage) -> tuple[LedgerRow, ...]:
        """A row for each device in use and, last, the host's."""
        rows = [
            _row(f"GPU{self.gpus[device].index}", use, self.gpu_bytes[device], self.gpu_reserve_bytes)
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
    """One model with its context, and the capacity that it has."""

    model: Model
    context: Context
    capacity: Capacity
    backend: str
    host_extra_bytes: int  # RAM besides the model's: the prompt cache
    adjustment: Adjustment = NO_ADJUSTMENT  # what the binary said of an earlier plan

    def buffers(self, placement: Placement, *, roughly: bool) -> Buffers:
        """What is computed in, staging not told apart."""
        return buffers(self.model, self.context, placement, self.backend, apart=False, roughly=roughly)

    def rows(self, placement: Placement, known: Buffers | None = None) -> tuple[LedgerRow, ...]:
        """The ledger of a placement, corrected by what the binary said. `known`: the buffers, if they are."""
        used, host = usage(
            self.model, self.context, placement, self.backend, self.host_extra_bytes, self.capacity.repacked, known
        )
        adjusted = {
            device: self.adjustment.applied(f"GPU{self.capacity.gpus[device].index}", use)
            for device, use in used.items()
        }
        return self.capacity.ledger(adjusted, self.adjustment.applied(HOST, host))
