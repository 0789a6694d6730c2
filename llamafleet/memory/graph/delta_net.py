"""Gated delta nets (src/models/delta-net-base.cpp, src/models/qwen3next.cpp, src/models/kimi-linear.cpp)."""

from __future__ import annotations

from llamafleet.memory.graph import ggml
from llamafleet.memory.graph.builder import Builder
from llamafleet.memory.graph.ggml import F32, Tensor, apply, concat, cpy, new, reshape, transpose, view
from llamafleet.memory.graph.recurrent_state import build_conv_state, build_rs, ssm_conv


def delta_net(b: Builder, cur: Tensor) -> Tensor:
    """Gated delta net, as the fused operation that all supported backends have (src/llama-context.cpp,
    llm_fused_op_gdn_ch_probe)."""
    parts = b.layers[b.layer]
    inner, state = b.shape.state.inner, b.shape.state.size
    keys, values = b.shape.state.groups, b.shape.state.rank
    size, kernel = inner // values, b.shape.state.kernel
    slots, seq_tokens, channels = b.context.slots, b.tokens // b.context.slots, inner + 2 * keys * state
    qkv, z = _qkvz(b, cur, keys, values, size)
    beta, gate = _beta_and_gate(b, cur, keys, values)
    columns = build_conv_state(b, qkv, channels, kernel)
    store, before = build_rs(b, state * inner)
    before = reshape(before, size, size, values, slots)
    out = apply("unary", ssm_conv(columns, b.need("ssm_conv1d.weight"), seq_tokens))
    row = 4 * channels
    q, k = (view(out, (state, keys, seq_tokens, slots), (4 * state, row, row * seq_tokens)) for _ in range(2))
    v = view(out, (size, values, seq_tokens, slots), (4 * size, row, row * seq_tokens))
    q, k = (apply("scale", apply("rms_norm", x)) for x in (q, k))
    if keys != values and "ssm_alpha.weight" not in parts:  # repeated only in src/models/qwen3next.cpp
        q, k = (_repeat_heads(x, values // keys) for x in (q, k))
    copies = 1 + b.context.rollback
    result = new(
        "delta_net", F32, (size * values, seq_tokens * slots + copies * size * slots), q, k, v, gate, beta, before
    )
    attended = view(
        result, (size, values, seq_tokens, slots), (4 * size, 4 * size * values, 4 * size * values * seq_tokens)
    )
    after = view(result, (size, size, values, slots), (4 * size, 4 * size * size, 4 * size * size * values))
    b.graph.expand(cpy(after, view(store, (state * inner, slots), (store.nb[1],))))
    normed = b.norm(attended, "ssm_norm")
    gated = apply("mul", normed, apply("unary", reshape(z, size, values, seq_tokens, slots)))
    return reshape(b.linear("ssm_out", reshape(gated, inner, seq_tokens, slots)), b.embd, b.tokens)


def kimi_delta_attention(b: Builder, cur: Tensor) -> Tensor:
    """Kimi delta attention (src/models/kimi-linear.cpp, llama_model_kimi_linear::graph): q, k and v convolved
    separately, a decay for each channel."""
    size, kernel = b.shape.state.kda_head, b.shape.state.kernel
    heads, slots, seq_tokens, tokens = b.shape.heads[b.layer], b.context.slots, b.tokens // b.context.slots, b.tokens
    inner = size * heads
    store, before = build_rs(b, 3 * (kernel - 1) * inner)
    stride = (4 * (kernel - 1), 4 * 3 * (kernel - 1) * inner)

    def convolved_projection(part: str) -> Tensor:
        x = reshape(b.linear(f"attn_{part}", cur), inner, seq_tokens, slots)
        columns = concat(view(before, (kernel - 1, inner, slots), stride), transpose(x), 0)
        last = view(columns, (kernel - 1, inner, slots), (columns.nb[1], columns.nb[2]))
        b.graph.expand(cpy(last, view(store, (kernel - 1, inner, slots), stride)))
        x = ssm_conv(columns, reshape(b.need(f"ssm_conv1d_{part}.weight"), kernel, inner), seq_tokens)
        return reshape(apply("unary", reshape(x, inner, tokens)), size, heads, seq_tokens, slots)

    q, k, v = (convolved_projection(part) for part in "qkv")
    gate = apply("add", b.linear("ssm_f_b", b.linear("ssm_f_a", cur)), b.need("ssm_dt.bias"))
    gate = reshape(apply("unary", gate), size, heads, tokens)
    gate = reshape(apply("mul", gate, reshape(b.need("ssm_a"), 1, heads, 1)), size, heads, seq_tokens, slots)
    beta = apply("unary", reshape(b.linear("ssm_beta", cur), 1, heads, seq_tokens, slots))
    states, state = build_rs(b, size * inner)
    state = reshape(state, size, size, heads, slots)
    q, k = (apply("scale", apply("rms_norm", x)) for x in (q, k))
    result = new("delta_net", F32, (inner, tokens + size * slots), q, k, v, gate, beta, state)
    out = ggml.cont(view(result, (size, heads, seq_tokens, slots)))
    b.graph.expand(cpy(view(result, (size, size, heads, slots)), view(states, (size * inner * slots,))))
    gate = b.linear("ssm_g_b", b.linear("ssm_g_a", reshape(reshape(cur, b.embd, seq_tokens, slots), b.embd, tokens)))
    normed = b.norm(reshape(out, size, heads, tokens), "ssm_norm")
    gated = apply("mul", normed, apply("unary", reshape(gate, size, heads, tokens)))
    return b.linear("attn_output", ggml.cont(gated, inner, tokens))


def _repeat_heads(heads: Tensor, times: int) -> Tensor:
    """Each head repeated `times` times, copies next to each other."""
    size, count, seq_tokens, slots = heads.ne
    split = reshape(heads, size, 1, count, seq_tokens * slots)
    return reshape(
        new("repeat", F32, (size, times, count, seq_tokens * slots), split), size, count * times, seq_tokens, slots
    )


def _qkvz(b: Builder, cur: Tensor, keys: int, values: int, size: int) -> tuple[Tensor, Tensor]:
    """q, k and v in one tensor, and z; from two matrices, or from one with all four for each head (build_qkvz)."""
    slots, seq_tokens, state = b.context.slots, b.tokens // b.context.slots, b.shape.state.size
    if "attn_qkv.weight" in b.layers[b.layer]:
        qkv = b.linear("attn_qkv", cur)
        return reshape(qkv, qkv.ne[0], seq_tokens, slots), b.linear("attn_gate", cur)
    qkvz = b.linear("ssm_in", cur)
    qkvz = reshape(qkvz, 2 * state + 2 * size * values // keys, keys, seq_tokens, slots)
    widths = (state, state, size * values // keys, size * values // keys)
    q, k, v, z = (view(qkvz, (width, keys, seq_tokens, slots), qkvz.nb[1:]) for width in widths)
    z = ggml.cont(z)
    q, k, v = (ggml.cont(x, x.ne[0] * keys, seq_tokens, slots) for x in (q, k, v))
    return concat(concat(q, k, 0), v, 0), z


def _beta_and_gate(b: Builder, cur: Tensor, keys: int, values: int) -> tuple[Tensor, Tensor]:
    """Beta and decay gate of each head, from two matrices or from one."""
    slots, seq_tokens = b.context.slots, b.tokens // b.context.slots
    parts = b.layers[b.layer]
    if "ssm_alpha.weight" in parts:
        beta = apply("unary", reshape(b.linear("ssm_beta", cur), 1, values, seq_tokens, slots))
        alpha = reshape(b.linear("ssm_alpha", cur), values, seq_tokens, slots)
    else:
        beta_alpha = b.linear("ssm_ba", cur)
        ratio = values // keys
        beta_alpha = reshape(beta_alpha, 2 * ratio, keys, seq_tokens, slots)
        beta, alpha = (view(beta_alpha, (ratio, keys, seq_tokens, slots), beta_alpha.nb[1:]) for _ in range(2))
        beta = reshape(apply("unary", ggml.cont(beta)), 1, values, seq_tokens, slots)
        alpha = ggml.cont(alpha, values, seq_tokens, slots)
    gate = apply("mul", apply("unary", apply("add", alpha, b.need("ssm_dt.bias"))), b.need("ssm_a"))
    return beta, reshape(gate, 1, values, seq_tokens, slots)
