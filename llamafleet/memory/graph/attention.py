"""Attention of every kind: what goes into the cache, and what is asked of it."""

from __future__ import annotations

from llamafleet.memory.graph import ggml
from llamafleet.memory.graph.builder import Builder
from llamafleet.memory.graph.ggml import F16, F32, Tensor, reshape, same, view
from llamafleet.memory.graph.minimax_m3 import attend_blocks, is_sparse
from llamafleet.model.architecture import Cache

Heads = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]  # q, k, v, a gate


def attention(b: Builder, cur: Tensor, positions: Tensor) -> Tensor:
    """Heads with K and V of their own or shared in groups; q and k normed where there are tensors for it."""
    parts = b.layers[b.layer]
    size_k, size_v = b.head_sizes()
    q, k, v, gate = _fused(b, cur) if "attn_qkv.weight" in parts else _apart(b, cur)
    if _norms_heads(b) is True:
        q, k = b.norm(q, "attn_q_norm"), b.norm(k, "attn_k_norm") if k else None
    if v and b.shape.architecture.normed_values:
        v = same("rms_norm", v)
    if b.shape.uses_rope[b.layer]:
        factors = b.position_factors()
        q, k = same("rope", q, positions, *factors), same("rope", k, positions, *factors) if k else None
    elif b.shape.architecture.scales_unrotated_queries:
        q = same("mul", q, b.query_scales())
    if k and v and b.shape.architecture.cache is Cache.NONE:
        attended = _attend_batch(b, q, k, v)
    elif k and v and is_sparse(b):
        attended = attend_blocks(b, cur, q, k, v, positions)
    else:
        attended = b.attend(q, k, v, size_k, size_v)
    if gate is not None:
        attended = same("mul", attended, same("unary", ggml.cont(gate, attended.ne[0], b.tokens)))
    elif "attn_gate.weight" in parts:
        attended = _gated(attended, b.linear("attn_gate", cur), b.tokens)
    return b.linear("attn_output", b.norm(attended, "attn_sub_norm"))


def _norms_heads(b: Builder) -> bool | None:
    """Are q and k normed head by head, or whole? None: not at all."""
    scale = b.layers[b.layer].get("attn_q_norm.weight")
    return None if scale is None else scale.shape[0] == b.head_sizes()[0]


def _fused(b: Builder, cur: Tensor) -> Heads:
    """q, k and v of one matrix."""
    fused, heads_kv = b.linear("attn_qkv", cur), b.shape.kv_heads[b.layer]
    size_k, size_v = b.head_sizes()
    heads = ((size_k, b.shape.heads[b.layer]), (size_k, heads_kv), (size_v, heads_kv))
    q, k, v = (view(fused, (size, count, b.tokens), (size * 4, fused.nb[1])) for size, count in heads)
    return q, k, v, None


def _apart(b: Builder, cur: Tensor) -> Heads:
    """q, k and v of three matrices; of fewer where K is V too, or the cache is an earlier layer's."""
    parts, heads, heads_kv = b.layers[b.layer], b.shape.heads[b.layer], b.shape.kv_heads[b.layer]
    size_k, size_v = b.head_sizes()
    q, k, v, gate = b.linear("attn_q", cur), None, None, None
    if b.shape.cache_owners[b.layer] == b.layer:
        k = b.linear("attn_k", cur)
        v = b.linear("attn_v", cur) if "attn_v.weight" in parts else k
        v = reshape(v, size_v, heads_kv, b.tokens)
    if q.ne[0] == 2 * size_k * heads:  # the other half is a gate (models/qwen3next.cpp)
        whole = reshape(q, 2 * size_k, heads, b.tokens)
        q, gate = (view(whole, (size_k, heads, b.tokens), (whole.nb[1], whole.nb[2])) for _ in range(2))
    else:
        if _norms_heads(b) is False:
            q, k = b.norm(q, "attn_q_norm"), b.norm(k, "attn_k_norm") if k else None
        q = reshape(q, size_k, q.ne[0] // size_k, b.tokens)
    return q, reshape(k, size_k, heads_kv, b.tokens) if k else None, v, gate


def _attend_batch(b: Builder, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every token of the batch attends to all of it (llm_graph_input_attn_no_cache)."""
    kind = F16 if b.context.flash_attention else F32
    mask = b.once("batch mask", lambda: ggml.graph_input(kind, b.tokens, b.tokens))
    for tensor in (q, k, v):
        b.graph.expand(tensor)
    return b.attend_cached(q, k, v, mask, None)


def _gated(attended: Tensor, gate: Tensor, tokens: int) -> Tensor:
    if gate.ne[0] == attended.ne[0]:
        return same("mul", attended, same("unary", gate))
    heads = gate.ne[0]  # one gate for each head (models/step35.cpp)
    split = reshape(attended, attended.ne[0] // heads, heads, tokens)
    return reshape(same("mul", split, reshape(same("unary", gate), 1, heads, tokens)), attended.ne[0], tokens)
