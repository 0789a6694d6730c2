"""An estimate of llama.cpp's compute buffers, meant to stay above what it allocates.

The graph allocator (ggml-alloc.c) reuses memory, so the peak is not a sum over the graph but its
widest place: a feed-forward block or an attention block, over the inputs that live all the time.
"""

from __future__ import annotations

from .gguf import Header, LongArray
from .kv import Context, number, row_bytes, windows

MIB = 1024**2
F32, F16 = 4, 2
BASE_BYTES = 16 * MIB  # small tensors, padding of the allocator
PIPELINE_COPIES = 4  # GGML_SCHED_MAX_COPIES: copies of the inputs when devices work as a pipeline
# Hidden states that such a pipeline keeps at once; llama-server allocates 12 of them more on the
# first device and 7 on the second for Llama-3.3-70B over two RPC devices.
PIPELINE_ROWS = 14


def compute_bytes(header: Header, context: Context, *, output: bool, pipelined: bool) -> int:
    """Bytes of one device's compute buffer; `output`: it holds the output layer too."""
    tokens = min(context.ubatch_tokens, context.cells * context.slots)
    embedding = number(header, "embedding_length")
    mask, row = _mask_bytes(header, context, tokens), embedding * tokens * F32
    inputs = mask + 2 * row
    if pipelined:
        inputs += (PIPELINE_COPIES - 1) * mask + PIPELINE_ROWS * row
    widest = max(_feed_forward(header, tokens), _attention(header, context, tokens))
    logits = (vocabulary(header) + 2 * embedding) * context.slots * F32 if output else 0
    return BASE_BYTES + inputs + 3 * row + max(widest, logits)


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


def _mask_bytes(header: Header, context: Context, tokens: int) -> int:
    """Attention masks, f16 with flash attention: one over the whole context, one over the window."""
    window = max(windows(header), default=0)
    cells = context.cells + (min(context.cells, window + context.ubatch_tokens + 256) if window else 0)
    return cells * tokens * F16


def _feed_forward(header: Header, tokens: int) -> int:
    embedding = number(header, "embedding_length")
    dense = 3 * number(header, "feed_forward_length") * tokens * F32
    used = number(header, "expert_used_count")
    if not used:
        return dense
    width = number(header, "expert_feed_forward_length", number(header, "feed_forward_length"))
    experts = used * tokens * F32 * (3 * width + 2 * embedding)
    routing = 4 * number(header, "expert_count") * tokens * F32
    return max(dense, experts + routing)


def _attention(header: Header, context: Context, tokens: int) -> int:
    heads = number(header, "attention.head_count", 1)
    embedding = number(header, "embedding_length")
    size = number(header, "attention.key_length", embedding // max(1, heads))
    kv_heads = number(header, "attention.head_count_kv", heads)
    projections = (3 * heads + 4 * kv_heads) * size * tokens * F32
    if context.kv_type in ("f16", "bf16", "f32"):
        return projections
    scratch = 2 * row_bytes(kv_heads * size, "f16") * context.cells  # a quantised layer, as f16
    return projections + scratch
