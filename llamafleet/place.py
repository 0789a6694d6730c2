"""Where layers may go: the room on a host, and the placements to try, fastest first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from .adjust import NO_ADJUSTMENT, Adjustment
from .kv import Context, kv_bytes
from .ledger import HOST, MIB, LedgerRow, Model, Placement, Usage, usage
from .machine import Gpu, Machine
from .settings import Settings

BALANCE_STEPS = 24  # halvings of the fill level: the devices' fills then differ by less than a layer


@dataclass(frozen=True)
class Room:
    """What is left on a host for the next instance, reserves not yet taken off."""

    gpus: tuple[Gpu, ...]
    gpu_bytes: tuple[int, ...]
    host_bytes: int
    swap_bytes: int
    gpu_reserve_bytes: int
    host_reserve_bytes: int
    unified: bool

    @classmethod
    def of(cls, machine: Machine, gpus: Sequence[Gpu], settings: Settings) -> Room:
        """The whole host's."""
        unified = any(gpu.unified_memory for gpu in gpus)
        reserve = (settings.ram_reserve_mib if unified else settings.gpu_reserve_mib) * MIB
        total = machine.memory.total_bytes
        return cls(
            gpus=tuple(gpus),
            gpu_bytes=tuple(min(gpu.capacity_bytes, total) if unified else gpu.capacity_bytes for gpu in gpus),
            host_bytes=total,
            swap_bytes=machine.memory.swap_total_bytes if settings.allow_swap else 0,
            gpu_reserve_bytes=reserve,
            host_reserve_bytes=settings.ram_reserve_mib * MIB,
            unified=unified,
        )

    def without(self, ledger: Sequence[LedgerRow]) -> Room:
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
    )


@dataclass(frozen=True)
class Case:
    """One model with its context on what room there is."""

    model: Model
    context: Context
    room: Room
    backend: str
    host_extra_bytes: int  # RAM besides the model's: the prompt cache
    adjustment: Adjustment = NO_ADJUSTMENT  # what the binary said of an earlier plan

    def rows(self, placement: Placement) -> tuple[LedgerRow, ...]:
        """The ledger of a placement."""
        return self.room.ledger(*self.usage(placement))

    def usage(self, placement: Placement) -> tuple[dict[int, Usage], Usage]:
        """What each device in use and the host hold, corrected by what the binary said."""
        used, host = usage(self.model, self.context, placement, self.backend, self.host_extra_bytes)
        adjusted = {
            device: self.adjustment.applied(f"GPU{self.room.gpus[device].index}", use) for device, use in used.items()
        }
        return adjusted, self.adjustment.applied(HOST, host)


def choose(case: Case) -> Placement:
    """The fastest placement that the GPUs hold; all on the CPU if they hold not even one layer.

    Whether the host's part fits is for the caller to see in the placement's rows: what does not
    fit on the GPUs has no other place to go.
    """
    everywhere = case.model.layers + 1
    if not case.room.gpus:
        return Placement((None,) * everywhere)
    for front, spilled in _stages(case.model, may_spill=not case.room.unified):
        if placement := _fit(case, front, spilled):
            return placement
    return Placement(((0,) if case.room.unified else (None,)) * everywhere)


def _stages(model: Model, *, may_spill: bool) -> Iterator[tuple[int, frozenset[int]]]:
    """Numbers of front layers wholly on the host, with the layers whose experts are there too."""
    yield 0, frozenset()
    if not may_spill:
        return
    layers = range(model.layers)
    with_experts = [layer for layer in layers if model.spill_bytes[layer]]
    if model.is_moe:
        for count in range(1, len(with_experts) + 1):
            yield 0, frozenset(with_experts[-count:])
    spilled = frozenset(with_experts) if model.is_moe else frozenset()
    for front in range(1, model.layers + 1):
        yield front, frozenset(layer for layer in spilled if layer >= front)


def _fit(case: Case, front: int, spilled: frozenset[int]) -> Placement | None:
    """Share layers out by bytes, in bus order, every device about equally full; None if they do not fit."""
    model, room = case.model, case.room
    cache = kv_bytes(model.header, case.context)
    costs = [
        model.layer_bytes[layer] - (model.spill_bytes[layer] if layer in spilled else 0) + cache[layer]
        for layer in range(front, model.layers)
    ]
    costs.append(model.output_bytes)
    for count in range(_fewest(costs, room), min(len(room.gpus), len(costs)) + 1):
        chosen = _largest(room, count)
        holders = [chosen[min(position, count - 1)] for position in range(len(costs))]
        counts = share_out(costs, _budgets(case, Placement((*(None,) * front, *holders), spilled)))
        if counts:
            shared = [device for device, n in zip(chosen, counts, strict=True) for _ in range(n)]
            return Placement((*(None,) * front, *shared), spilled)
    return None


def _fewest(costs: Sequence[int], room: Room) -> int:
    """The smallest number of GPUs that could hold the bytes: fewer GPUs, fewer hops."""
    total, sizes = sum(costs), sorted(room.gpu_bytes, reverse=True)
    return next((n for n in range(1, len(sizes)) if sum(sizes[:n]) >= total), len(sizes))


def _largest(room: Room, count: int) -> tuple[int, ...]:
    by_size = sorted(range(len(room.gpus)), key=lambda device: (-room.gpu_bytes[device], device))
    return tuple(sorted(by_size[:count]))


def _budgets(case: Case, placement: Placement) -> list[int]:
    """Bytes for layers on each device in use: what compute, staging, overhead and reserve leave.

    They depend on who holds the output and whether anything is on the host, which the placement
    says; not on how many layers a device gets.
    """
    used, host = case.usage(placement)
    shared = host.total_bytes if case.room.unified else 0
    return [
        case.room.gpu_bytes[device]
        - case.room.gpu_reserve_bytes
        - shared
        - (use.compute_bytes + use.staging_bytes + use.overhead_bytes)
        for device, use in sorted(used.items())
    ]


def share_out(costs: Sequence[int], budgets: Sequence[int]) -> tuple[int, ...] | None:
    """Cut a row of layers into one piece for each device, with the lowest common fill level that works.

    None if even full devices do not hold them. Every device gets one layer at least.
    """
    if _cut(costs, budgets, 1.0) is None:
        return None
    low, high = 0.0, 1.0
    for _ in range(BALANCE_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if _cut(costs, budgets, middle) else (middle, high)
    return _cut(costs, budgets, high)


def _cut(costs: Sequence[int], budgets: Sequence[int], level: float) -> tuple[int, ...] | None:
    counts = [0] * len(budgets)
    device, filled = 0, 0
    for position, cost in enumerate(costs):
        waiting = len(budgets) - 1 - device  # devices that still need a layer
        left = len(costs) - position
        if counts[device] and (filled + cost > budgets[device] * level or left <= waiting):
            device, filled = device + 1, 0
        if device == len(budgets) or filled + cost > budgets[device] * level:
            return None
        counts[device] += 1
        filled += cost
    return tuple(counts) if all(counts) else None
