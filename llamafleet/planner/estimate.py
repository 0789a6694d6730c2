"""What layers cost on a device, and what each device and the host have left for them, by the sketch.

The search (`choose`) cuts a model by these numbers. They are estimates: what is chosen is checked by the ledger
(`settle`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llamafleet.host.backends import TRAITS
from llamafleet.memory.capacity import Capacity
from llamafleet.memory.context import Context
from llamafleet.memory.ledger import Correction
from llamafleet.memory.placement import HOST, Segment
from llamafleet.memory.weights import Model
from llamafleet.model.shape import DENSE, EXPERTS
from llamafleet.planner.roofline import Roofline


def kind_of(segments: Sequence[Segment]) -> str:
    """What is on the host: "none", "spill" (experts or FFN), "layers" (whole ones) or "all"."""
    if segments[-1].device is None:
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
    """What one model's layers cost, and what a host has left for them."""

    def __init__(
        self,
        model: Model,
        capacity: Capacity,
        backend: str,
        extra_bytes: int,
        correction: Correction,
        roofline: Roofline,
    ) -> None:
        self.model, self.capacity, self.backend = model, capacity, backend
        self.extra_bytes, self.correction, self.roofline = extra_bytes, correction, roofline
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
        fixed, capacity = self.fixed(context, len(order), kind), self.capacity
        budgets = []
        for position, device in enumerate(order):
            extra = self.correction.extra_bytes.get(f"GPU{capacity.gpus[device].index}", 0)
            shared = (fixed.host + self.model.input_bytes) if capacity.unified else 0
            budgets.append(
                float(
                    capacity.gpu_bytes[device] - capacity.gpu_reserve_bytes - fixed.devices[position] - extra - shared
                )
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
        host += traits.host_overhead_bytes + self.extra_bytes + self.correction.extra_bytes.get(HOST, 0)
        return Fixed(tuple(devices), host)

    def host_short(self, context: Context, order: tuple[int, ...], segments: Sequence[Segment]) -> int:
        """Bytes of RAM that are missing with that placement."""
        capacity, model = self.capacity, self.model
        kind = kind_of(segments)
        needed = self.fixed(context, len(order), kind).host + model.input_bytes
        for one in segments:
            moved, _ = self.roofline.moved(one)
            needed += int(moved)
            if one.device is None:
                base, spill = self.costs(context), self.roofline.spill
                needed += int(base[one.hi] - base[one.lo] + spill[one.hi] - spill[one.lo])
        if not order:
            needed += model.output_bytes - (model.tied_bytes if model.tied_is_shared else 0)
        if capacity.unified:
            base = self.costs(context)
            needed += int(base[-1] + self.roofline.spill[-1]) + sum(self.fixed(context, 1, "none").devices)
        return max(0, needed + capacity.host_reserve_bytes - capacity.host_bytes - capacity.swap_bytes)


F32, F16 = 4, 2
PIPELINE_COPIES = 4  # GGML_SCHED_MAX_COPIES: copies of the inputs when devices work as a pipeline
PIPELINE_ROWS = 10  # hidden states that such a pipeline keeps besides
ROWS, ROWS_BY_EXPERTS = 6, 4  # hidden states alive at the widest place


class Sketch:
    """One model's sizes, as far as buffers depend on them."""

    def __init__(self, model: Model) -> None:
        shape = model.shape
        self.embedding, self.vocabulary = shape.embedding, shape.vocabulary
        self.window = max(shape.windows, default=0)
        heads, size = max(1, *shape.heads, 1), shape.head[0]
        self.cache_row = shape.kv_heads[0] * size if shape.kv_heads else 0
        used, dense = max(shape.experts.used, default=0), 2 * max(shape.feed_forward, default=0)
        routed = used * (2 * shape.experts.feed_forward + self.embedding) if used else 0
        self.rows = ROWS_BY_EXPERTS if used else ROWS
        self.widest = max(dense, routed, 3 * heads * size)  # elements of one token
        layers = [tensor for tensor in model.header.tensors if tensor.name.startswith("blk.")]
        movable = EXPERTS if model.is_moe else DENSE
        self.largest = max((tensor.bytes for tensor in layers), default=0)
        self.largest_spill = max((tensor.bytes for tensor in layers if movable.search(tensor.name)), default=0)

    def compute(self, context: Context, *, output: bool, pipelined: bool) -> int:
        """Bytes of a device's compute buffer."""
        tokens = context.batch_tokens
        cells = context.stream_cells + (min(context.cells, self.window + tokens + 256) if self.window else 0)
        mask, row = cells * tokens * F16, self.embedding * tokens * F32
        inputs = mask + row
        if pipelined:
            inputs += (PIPELINE_COPIES - 1) * mask + PIPELINE_ROWS * row
        logits = self.vocabulary * context.outputs * F32 if output else 0
        scratch = 0 if context.kv_type in ("f16", "bf16", "f32") else 2 * self.cache_row * context.stream_cells * F16
        return inputs + max(self.widest * tokens * F32 + self.rows * row, logits) + scratch

    def staging(self, kind: str) -> int:
        """What op-offload adds with experts (FFN) or whole layers on the host: the largest such tensor."""
        return {"spill": self.largest_spill, "layers": self.largest}.get(kind, 0)
