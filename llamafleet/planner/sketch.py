"""A quick estimate of what a device holds besides weights and cache, for a search that looks at many placements.

The ledger lays out llama.cpp's graph, which is exact and takes milliseconds; this takes microseconds, and comes within
a quarter of it for most models. What is chosen is then checked and filled by the ledger (`settle`): an error here costs
no memory, only a little order.
"""

from __future__ import annotations

from llamafleet.memory.compute import DENSE, EXPERTS, vocabulary
from llamafleet.memory.ledger import Model
from llamafleet.model.shape import Context, number, per_layer, windows

F32, F16 = 4, 2
PIPELINE_COPIES = 4  # GGML_SCHED_MAX_COPIES: copies of the inputs when devices work as a pipeline
PIPELINE_ROWS = 10  # hidden states that such a pipeline keeps besides
ROWS, ROWS_BY_EXPERTS = 6, 4  # hidden states alive at the widest place


class Sketch:
    """One model's sizes, as far as buffers depend on them."""

    def __init__(self, model: Model) -> None:
        header = model.header
        self.embedding = number(header, "embedding_length")
        self.window = max(windows(header), default=0)
        self.vocabulary = vocabulary(header)
        heads = max(1, max(per_layer(header, "attention.head_count", 1), default=1))
        size = number(header, "attention.key_length", self.embedding // heads)
        self.cache_row = per_layer(header, "attention.head_count_kv", heads)[0] * size if heads else 0
        used = number(header, "expert_used_count")
        width = number(header, "expert_feed_forward_length", number(header, "feed_forward_length"))
        dense = 2 * number(header, "feed_forward_length")
        routed = used * (2 * width + self.embedding) if used else 0
        self.rows = ROWS_BY_EXPERTS if used else ROWS
        self.widest = max(dense, routed, 3 * heads * size)  # elements of one token
        layers = [tensor for tensor in header.tensors if tensor.name.startswith("blk.")]
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
