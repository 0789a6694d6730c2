"""Estimated bytes: of the layers on a device, and of the memory that each device and the host have for them.

The search divides a model by these numbers. Compute buffers are estimated from the model's sizes, not laid out as
llama.cpp does it; `refine` checks the chosen candidate against the ledger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llamafleet.host.backends import TRAITS
from llamafleet.memory import flash_attention
from llamafleet.memory.capacity import Capacity
from llamafleet.memory.context import Context, is_quantised
from llamafleet.memory.ledger import Correction, output_bytes
from llamafleet.memory.placement import HOST, Segment
from llamafleet.memory.weights import Model
from llamafleet.model.shape import DENSE, EXPERTS
from llamafleet.planner.roofline import Roofline


def kind_of(segments: Sequence[Segment]) -> str:
    """Which weights are on the host: "none", "spill" (experts, or a dense model's FFN), "layers" (whole front layers)
    or "all"."""
    if segments[-1].device is None:
        return "all"
    if segments[0].device is None:
        return "layers"
    return "spill" if any(segment.keep < segment.hi for segment in segments) else "none"


@dataclass(frozen=True)
class FixedBytes:
    """Bytes of each device and of the host that do not depend on the number of layers on a device."""

    devices: tuple[int, ...]
    host: int


class Budgets:
    """Bytes that the layers of one model need, and bytes that one host has for them."""

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
        self.flash_attention = flash_attention.is_used(model.shape, backend)
        self.input_bytes = model.input_bytes + (model.mapped_bytes if capacity.unified else 0)
        self.movable = [layer for layer in range(model.layers) if model.spill_bytes[layer]]
        self.buffers = BufferEstimate(model)
        self._fixed: dict[tuple[Context, int, str], FixedBytes] = {}
        self._base_costs: dict[Context, list[float]] = {}
        self._full_costs: dict[Context, list[float]] = {}

    def base_costs(self, context: Context) -> list[float]:
        """Bytes of the first n layers on a device, by n: weights that must stay there and KV cache, without experts
        (FFN). The last item adds the output matrix to all layers."""
        if context not in self._base_costs:
            total, sums = 0.0, [0.0]
            cache = self.model.compute.kv_bytes(context)
            for weights, spill, kv in zip(self.model.layer_bytes, self.model.spill_bytes, cache, strict=True):
                total += weights - spill + kv
                sums.append(total)
            self._base_costs[context] = [*sums, total + self.model.output_bytes]
        return self._base_costs[context]

    def full_costs(self, context: Context) -> list[float]:
        """Bytes of the first n layers on a device, by n, their experts (FFN) included."""
        if context not in self._full_costs:
            spill = self.roofline.spill
            base = self.base_costs(context)
            self._full_costs[context] = [cost + spill[min(n, self.model.layers)] for n, cost in enumerate(base)]
        return self._full_costs[context]

    def budgets(self, context: Context, order: tuple[int, ...], kind: str) -> list[float]:
        """Bytes for layers on each device: its memory less compute buffers, staging, overhead, reserve and the memory
        of other processes."""
        fixed, capacity = self.fixed(context, len(order), kind), self.capacity
        budgets = []
        for position, device in enumerate(order):
            extra = self.correction.extra_bytes.get(f"GPU{capacity.gpus[device].index}", 0)
            shared = (fixed.host + self.input_bytes) if capacity.unified else 0
            free = capacity.gpu_bytes[device] - capacity.gpu_reserves_bytes[device]
            budgets.append(float(free - fixed.devices[position] - extra - shared))
        return budgets

    def fixed(self, context: Context, count: int, kind: str) -> FixedBytes:
        """The estimate for `count` devices; `kind` says which weights are on the host (see `kind_of`)."""
        key = (context, count, kind)
        if key not in self._fixed:
            self._fixed[key] = self._estimated(context, count, kind)
        return self._fixed[key]

    def _estimated(self, context: Context, count: int, kind: str) -> FixedBytes:
        traits, pipelined = TRAITS[self.backend], count > 1 and kind == "none"
        inner = self.buffers.compute(context, output=False, pipelined=pipelined) + traits.overhead_bytes
        last = self.buffers.compute(context, output=True, pipelined=pipelined) + traits.overhead_bytes
        staging = self.buffers.staging(kind) if traits.op_offload and context.op_offload else 0
        if context.head:  # the head's own buffers
            last += self.buffers.compute(replace(context, drafted=0), output=True, pipelined=pipelined)
        devices = [inner] * (count - 1) + [last] if count else []
        devices[:1] = [size + staging for size in devices[:1]]
        host = self.buffers.compute(context, output=not count, pipelined=pipelined)
        host += output_bytes(self.model.shape, context) if context.pooling else 0
        host += traits.host_overhead_bytes + self.extra_bytes + self.correction.extra_bytes.get(HOST, 0)
        return FixedBytes(tuple(devices), host)

    def host_short_bytes(self, context: Context, order: tuple[int, ...], segments: Sequence[Segment]) -> int:
        """Bytes of RAM (and swap) that the host lacks for this placement; 0 if it fits."""
        capacity, model = self.capacity, self.model
        kind = kind_of(segments)
        needed = self.fixed(context, len(order), kind).host + self.input_bytes
        for segment in segments:
            offloaded, _ = self.roofline.on_host(segment)
            needed += int(offloaded)
            if segment.device is None:
                base, spill = self.base_costs(context), self.roofline.spill
                needed += int(base[segment.hi] - base[segment.lo] + spill[segment.hi] - spill[segment.lo])
        if not order:
            needed += model.output_bytes - (model.tied_bytes if model.tied_is_shared else 0)
        if capacity.unified:
            base = self.base_costs(context)
            needed += int(base[-1] + self.roofline.spill[-1]) + sum(self.fixed(context, 1, "none").devices)
        return max(0, needed + capacity.host_reserve_bytes - capacity.host_bytes - capacity.swap_bytes)


F32, F16 = 4, 2
PIPELINE_COPIES = 4  # GGML_SCHED_MAX_COPIES: copies of the inputs when devices work as a pipeline
PIPELINE_ROWS = 10  # further hidden states that a pipeline keeps, for each token of the ubatch
ROWS, ROWS_BY_EXPERTS = 6, 4  # hidden states alive at the widest operation: of a dense model, of a mixture of experts


class BufferEstimate:
    """Estimated sizes of one model's compute and staging buffers."""

    def __init__(self, model: Model) -> None:
        shape = model.shape
        self.embedding, self.vocabulary = shape.embedding, shape.vocabulary
        self.computes_logits = shape.architecture.computes_logits
        self.window = max(shape.windows, default=0)
        self.heads = heads = max(1, *shape.heads, 1)
        size = shape.head[0]
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
        """Bytes of a device's compute buffer. `output`: the device computes the logits; `pipelined`: several devices
        work on successive ubatches."""
        tokens = context.batch_tokens
        cells = context.stream_cells + (min(context.cells, self.window + tokens + 256) if self.window else 0)
        mask, row = cells * tokens * (F16 if context.flash_attention else F32), self.embedding * tokens * F32
        scores = 0 if context.flash_attention else self.heads * context.stream_cells * tokens * F32
        inputs = mask + row
        if pipelined:
            inputs += (PIPELINE_COPIES - 1) * mask + PIPELINE_ROWS * row
        logits = self.vocabulary * context.outputs * F32 if output and self.computes_logits else 0
        scratch = 2 * self.cache_row * context.stream_cells * F16 if is_quantised(context.kv_type) else 0
        return inputs + max(self.widest * tokens * F32 + self.rows * row, logits, scores + self.rows * row) + scratch

    def staging(self, kind: str) -> int:
        """Bytes that op-offload adds: the largest tensor on the host, of experts (FFN) or of whole layers."""
        return {"spill": self.largest_spill, "layers": self.largest}.get(kind, 0)
