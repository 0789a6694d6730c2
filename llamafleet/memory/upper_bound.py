"""A bound for the compute buffers of models whose graph is not known here: widest tensors, all at once."""

from __future__ import annotations

from llamafleet.memory.context import Context
from llamafleet.model.gguf import Header
from llamafleet.model.gguf_cursor import LongArray
from llamafleet.model.shape import head_sizes, number, per_layer, state_bytes

F32, F16 = 4, 2
STREAMS_OF_HIDDEN_STATES = 16  # at once: residual, norms, projections, inputs; pipelines keep 14 more
WIDEST_AT_ONCE = 4  # a gated feed-forward part has three, and what comes out


def bound(header: Header, context: Context, *, pipelined: bool) -> int:
    """Bytes that no buffer of any backend should exceed."""
    tokens, embd = context.batch_tokens, number(header, "embedding_length")
    row = embd * tokens * F32
    copies = 4 if pipelined else 1
    mask = context.stream_cells * tokens * (F16 if context.flash_attention else F32)
    used = max(1, min(number(header, "expert_used_count"), number(header, "expert_count")))
    widths = [t.shape[1] * (used if len(t.shape) > 2 else 1) for t in header.tensors
              if len(t.shape) > 1 and t.name.startswith("blk.")]  # fmt: skip
    widest = WIDEST_AT_ONCE * max(widths, default=0) * tokens * F32 + 2 * used * row
    heads = max(per_layer(header, "attention.head_count", 1), default=1)
    scores = 0 if context.flash_attention else 2 * heads * context.stream_cells * tokens * F32
    key, value = head_sizes(header, False)
    scratch = 0 if context.kv_type == "f16" else (key + value) * heads * context.stream_cells * context.streams * F16
    state = 2 * state_bytes(header) * context.slots
    logits = vocabulary(header) * context.outputs * F32
    return 2 * copies * mask + STREAMS_OF_HIDDEN_STATES * copies * row + widest + scores + scratch + state + logits


def vocabulary(header: Header) -> int:
    """Tokens of the vocabulary."""
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, LongArray):
        return tokens.length
    if isinstance(tokens, tuple):
        return len(tokens)
    by_name = {tensor.name: tensor for tensor in header.tensors}
    embedding = by_name.get("output.weight") or by_name.get("token_embd.weight")
    return embedding.shape[-1] if embedding and embedding.shape else number(header, "vocab_size")
