"""Attention with K and V for each head or group of heads (MHA, GQA): projections, norms, RoPE, gates."""

from __future__ import annotations

from llamafleet.memory.graph import ggml
from llamafleet.memory.graph.builder import Builder
from llamafleet.memory.graph.ggml import F16, F32, Tensor, apply, reshape, view
from llamafleet.memory.graph.minimax_m3 import attend_blocks, is_sparse

Heads = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]  # q, k, v, gate


def attention(b: Builder, cur: Tensor, positions: Tensor) -> Tensor:
    """The result of a layer's attention for its normed input; norms and gates where the layer has tensors for them."""
    parts = b.layers[b.layer]
    size_k, size_v = b.head_sizes()
    q, k, v, gate = _split_qkv(b, cur) if "attn_qkv.weight" in parts else _separate_qkv(b, cur)
    if _norm_is_per_head(b) is True:
        q, k = b.norm(q, "attn_q_norm"), b.norm(k, "attn_k_norm") if k else None
    if v and b.shape.architecture.normed_values:
        v = apply("rms_norm", v)
    if b.shape.uses_rope[b.layer]:
        factors = b.rope_factors()
        q, k = apply("rope", q, positions, *factors), apply("rope", k, positions, *factors) if k else None
    elif b.shape.architecture.scales_unrotated_queries:
        q = apply("mul", q, b.query_scales())
    if k and v and b.shape.architecture.attends_to_batch:
        attended = _attend_batch(b, q, k, v)
    elif k and v and is_sparse(b):
        attended = attend_blocks(b, cur, q, k, v, positions)
    else:
        attended = b.build_attn(q, k, v, size_k, size_v)
    if gate is not None:
        attended = apply("mul", attended, apply("unary", ggml.cont(gate, attended.ne[0], b.tokens)))
    elif "attn_gate.weight" in parts:
        attended = _apply_gate(attended, b.linear("attn_gate", cur), b.tokens)
    return b.linear("attn_output", b.norm(attended, "attn_sub_norm"))


def _norm_is_per_head(b: Builder) -> bool | None:
    """Is the norm of q and k computed for each head (True) or for all heads together (False)? None: no norm."""
    scale = b.layers[b.layer].get("attn_q_norm.weight")
    return None if scale is None else scale.shape[0] == b.head_sizes()[0]


def _split_qkv(b: Builder, cur: Tensor) -> Heads:
    """q, k and v from one matrix (attn_qkv)."""
    qkv, heads_kv = b.linear("attn_qkv", cur), b.shape.kv_heads[b.layer]
    size_k, size_v = b.head_sizes()
    heads = ((size_k, b.shape.heads[b.layer]), (size_k, heads_kv), (size_v, heads_kv))
    q, k, v = (view(qkv, (size, count, b.tokens), (size * 4, qkv.nb[1])) for size, count in heads)
    return q, k, v, None


def _separate_qkv(b: Builder, cur: Tensor) -> Heads:
    """q, k and v from separate matrices; V is K without attn_v; no k and v where an earlier layer's cache is read."""
    parts, heads, heads_kv = b.layers[b.layer], b.shape.heads[b.layer], b.shape.kv_heads[b.layer]
    size_k, size_v = b.head_sizes()
    q, k, v, gate = b.linear("attn_q", cur), None, None, None
    if b.shape.cache_owners[b.layer] == b.layer:
        k = b.linear("attn_k", cur)
        v = b.linear("attn_v", cur) if "attn_v.weight" in parts else k
        v = reshape(v, size_v, heads_kv, b.tokens)
    if q.ne[0] == 2 * size_k * heads:  # q and a gate in one matrix (src/models/qwen3next.cpp)
        q_and_gate = reshape(q, 2 * size_k, heads, b.tokens)
        q, gate = (view(q_and_gate, (size_k, heads, b.tokens), (q_and_gate.nb[1], q_and_gate.nb[2])) for _ in range(2))
    else:
        if _norm_is_per_head(b) is False:
            q, k = b.norm(q, "attn_q_norm"), b.norm(k, "attn_k_norm") if k else None
        q = reshape(q, size_k, q.ne[0] // size_k, b.tokens)
    return q, reshape(k, size_k, heads_kv, b.tokens) if k else None, v, gate


def _attend_batch(b: Builder, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention among the tokens of the batch, without a cache (llm_graph_input_attn_no_cache)."""
    kind = F16 if b.context.flash_attention else F32
    window = b.windows[b.layer] > 0
    mask = b.once(("batch mask", window), lambda: ggml.graph_input(kind, b.tokens, b.tokens))
    for tensor in (q, k, v):
        b.graph.expand(tensor)
    return b.build_attn_mha(q, k, v, mask, None)


def _apply_gate(attended: Tensor, gate: Tensor, tokens: int) -> Tensor:
    if gate.ne[0] == attended.ne[0]:
        return apply("mul", attended, apply("unary", gate))
    heads = gate.ne[0]  # one gate for each head (src/models/step35.cpp)
    per_head = reshape(attended, attended.ne[0] // heads, heads, tokens)
    return reshape(apply("mul", per_head, reshape(apply("unary", gate), 1, heads, tokens)), attended.ne[0], tokens)
