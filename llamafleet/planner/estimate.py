"""What layers cost on a device, and what each device and the host have left for them, by the sketch.

The search (`choose`) cuts a model by these numbers. They are estimates: what is chosen is checked by the ledger
(`settle`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llamafleet.memory.adjust import Adjustment
from llamafleet.memory.capacity import Room
from llamafleet.memory.ledger import HOST, TRAITS, Model
from llamafleet.model.shape import Context
from llamafleet.planner.roofline import Roofline, Segment
from llamafleet.planner.sketch import Sketch


def kind_of(order: Sequence[int], segments: Sequence[Segment]) -> str:
    """What is on the host: "none", "spill" (experts or FFN), "layers" (whole ones) or "all"."""
    if not order:
        return "all"
    if segments[0].device is None:
        return "layers"
    return "spill" if any(one.keep < one.hi for one in segments) else "none"


@dataclass(frozen=True)
class Fixed:
    """Bytes that do not depend on how many layers a device gets: of each device, and of the host."""

    devices: tuple[int, ...]
    host: int


class Budgets:
    """What one model's layers cost, and what one room has for them."""

    def __init__(
        self, model: Model, room: Room, backend: str, extra_bytes: int, adjustment: Adjustment, roofline: Roofline
    ) -> None:
        self.model, self.room, self.backend = model, room, backend
        self.extra_bytes, self.adjustment, self.roofline = extra_bytes, adjustment, roofline
        self.movable = [layer for layer in range(model.layers) if model.spill_bytes[layer]]
        self.sketch = Sketch(model)
        self._fixed: dict[tuple[Context, int, str], Fixed] = {}
        self._base: dict[Context, list[float]] = {}
        self._all: dict[Context, list[float]] = {}

    def costs(self, context: Context) -> list[float]:
        """Bytes of the first n layers on a device, without what may be spilled; last, with the output."""
        if context not in self._base:
            total, sums = 0.0, [0.0]
            cache = self.model.compute.kv_bytes(context)
            for whole, spill, kept in zip(self.model.layer_bytes, self.model.spill_bytes, cache, strict=True):
                total += whole - spill + kept
                sums.append(total)
            self._base[context] = [*sums, total + self.model.output_bytes]
        return self._base[context]

    def whole(self, context: Context) -> list[float]:
        """The same with everything on the device."""
        if context not in self._all:
            spill = self.roofline.spill
            base = self.costs(context)
            self._all[context] = [cost + spill[min(n, self.model.layers)] for n, cost in enumerate(base)]
        return self._all[context]

    def budgets(self, context: Context, order: tuple[int, ...], kind: str) -> list[float]:
        """Bytes for layers on each device: what compute, staging, overhead, reserve and others leave."""
        fixed, room = self.fixed(context, len(order), kind), self.room
        budgets = []
        for position, device in enumerate(order):
            extra = self.adjustment.extra_bytes.get(f"GPU{room.gpus[device].index}", 0)
            shared = (fixed.host + self.model.input_bytes) if room.unified else 0
            budgets.append(
                float(room.gpu_bytes[device] - room.gpu_reserve_bytes - fixed.devices[position] - extra - shared)
            )
        return budgets

    def fixed(self, context: Context, count: int, kind: str) -> Fixed:
        """By the sketch, for that many devices with that on the host."""
        key = (context, count, kind)
        if key not in self._fixed:
            self._fixed[key] = self._sketched(context, count, kind)
        return self._fixed[key]

    def _sketched(self, context: Context, count: int, kind: str) -> Fixed:
        traits, pipelined = TRAITS[self.backend], count > 1 and kind == "none"
        inner = self.sketch.compute(context, output=False, pipelined=pipelined) + traits.overhead_bytes
        last = self.sketch.compute(context, output=True, pipelined=pipelined) + traits.overhead_bytes
        staging = self.sketch.staging(kind) if traits.op_offload else 0
        devices = [inner] * (count - 1) + [last] if count else []
        devices[:1] = [size + staging for size in devices[:1]]
        host = self.sketch.compute(context, output=not count, pipelined=pipelined)
        host += traits.host_overhead_bytes + self.extra_bytes + self.adjustment.extra_bytes.get(HOST, 0)
        return Fixed(tuple(devices), host)

    def host_short(self, context: Context, order: tuple[int, ...], segments: Sequence[Segment]) -> int:
        """Bytes of RAM that are missing with that placement."""
        room, model = self.room, self.model
        kind = kind_of(order, segments)
        needed = self.fixed(context, len(order), kind).host + model.input_bytes
        for one in segments:
            moved, _ = self.roofline.moved(one)
            needed += int(moved)
            if one.device is None:
                base, spill = self.costs(context), self.roofline.spill
                needed += int(base[one.hi] - base[one.lo] + spill[one.hi] - spill[one.lo])
        if not order:
            needed += model.output_bytes - (model.tied_bytes if model.tied_is_shared else 0)
        if room.unified:
            base = self.costs(context)
            needed += int(base[-1] + self.roofline.spill[-1]) + sum(self.fixed(context, 1, "none").devices)
        return max(0, needed + room.host_reserve_bytes - room.host_bytes - room.swap_bytes)
