"""Upper bound of the compute buffers of models whose graph cannot be built: their widest tensors, all held at once.

Decision 5: docs/decisions/0005-known-or-bound-never-guessed.md.
"""

from __future__ import annotations

from collections.abc import Iterable

from llamafleet.memory.context import Context
from llamafleet.memory.kv_cache import state_bytes
from llamafleet.model.gguf import Tensor
from llamafleet.model.shape import Shape

F32, F16 = 4, 2
HIDDEN_STATES = 16  # held at once: residual, norms, projections, inputs; pipelines hold 14 more
WIDEST_AT_ONCE = 4  # a gated feed-forward part has three such tensors and its output


def bound(shape: Shape, tensors: Iterable[Tensor], context: Context, *, pipelined: bool) -> int:
    """Upper bound, in bytes, of the compute buffer of every backend."""
    tokens, embd = context.batch_tokens, shape.embedding
    row = embd * tokens * F32
    copies = 4 if pipelined else 1
    mask = context.stream_cells * tokens * (F16 if context.flash_attention else F32)
    used = max(1, min(max(shape.experts.used, default=0), shape.experts.count))
    widths = [t.shape[1] * (used if len(t.shape) > 2 else 1) for t in tensors
              if len(t.shape) > 1 and t.name.startswith("blk.")]  # fmt: skip
    widest = WIDEST_AT_ONCE * max(widths, default=0) * tokens * F32 + 2 * used * row
    heads = max(shape.heads, default=1)
    scores = 0 if context.flash_attention else 2 * heads * context.stream_cells * tokens * F32
    key, value = shape.head
    scratch = 0 if context.kv_type == "f16" else (key + value) * heads * context.stream_cells * context.streams * F16
    state = 2 * state_bytes(shape) * context.slots
    logits = shape.vocabulary * context.outputs * F32 if shape.architecture.computes_logits else 0
    return 2 * copies * mask + HIDDEN_STATES * copies * row + widest + scores + scratch + state + logits
