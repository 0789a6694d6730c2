"""Gated delta nets (src/models/delta-net-base.cpp, qwen3next.cpp and kimi-linear.cpp at b11434)."""

from __future__ import annotations

from llamafleet.memory.graph import ggml
from llamafleet.memory.graph.builder import Builder
from llamafleet.memory.graph.ggml import F32, Tensor, concat, cpy, new, reshape, same, transpose, view
from llamafleet.memory.graph.recurrent_state import convolve, convolved, gather


def delta_net(b: Builder, cur: Tensor) -> Tensor:
    """Gated delta net; the fused operation, which every backend here has (llama-context.cpp:209)."""
    parts = b.layers[b.layer]
    inner, state = b.shape.state.inner, b.shape.state.size
    keys, values = b.shape.state.groups, b.shape.state.rank
    size, kernel = inner // values, b.shape.state.kernel
    slots, each, channels = b.context.slots, b.tokens // b.context.slots, inner + 2 * keys * state
    mixed, z = _mixed(b, cur, keys, values, size)
    beta, gate = _decay(b, cur, keys, values)
    columns = convolve(b, mixed, channels, kernel)
    store, before = gather(b, state * inner)
    before = reshape(before, size, size, values, slots)
    out = same("unary", convolved(columns, b.need("ssm_conv1d.weight"), each))
    row = 4 * channels
    q, k = (view(out, (state, keys, each, slots), (4 * state, row, row * each)) for _ in range(2))
    v = view(out, (size, values, each, slots), (4 * size, row, row * each))
    q, k = (same("scale", same("rms_norm", one)) for one in (q, k))
    if keys != values and "ssm_alpha.weight" not in parts:  # repeated only in models/qwen3next.cpp
        q, k = (_repeated(one, values // keys) for one in (q, k))
    result = new("delta_net", F32, (size * values, each * slots + size * slots), q, k, v, gate, beta, before)
    attended = view(result, (size, values, each, slots), (4 * size, 4 * size * values, 4 * size * values * each))
    after = view(result, (size, size, values, slots), (4 * size, 4 * size * size, 4 * size * size * values))
    b.graph.expand(cpy(after, view(store, (state * inner, slots), (store.nb[1],))))
    normed = b.norm(attended, "ssm_norm")
    gated = same("mul", normed, same("unary", reshape(z, size, values, each, slots)))
    return reshape(b.linear("ssm_out", reshape(gated, inner, each, slots)), b.embd, b.tokens)


def kimi_delta(b: Builder, cur: Tensor) -> Tensor:
    """Kimi delta attention (models/kimi-linear.cpp:292): q, k and v convolved one by one, a decay for each channel."""
    size, kernel = b.shape.state.kda_head, b.shape.state.kernel
    heads, slots, each, tokens = b.shape.heads[b.layer], b.context.slots, b.tokens // b.context.slots, b.tokens
    inner = size * heads
    store, before = gather(b, 3 * (kernel - 1) * inner)
    stride = (4 * (kernel - 1), 4 * 3 * (kernel - 1) * inner)

    def projected(part: str) -> Tensor:
        x = reshape(b.linear(f"attn_{part}", cur), inner, each, slots)
        columns = concat(view(before, (kernel - 1, inner, slots), stride), transpose(x), 0)
        last = view(columns, (kernel - 1, inner, slots), (columns.nb[1], columns.nb[2]))
        b.graph.expand(cpy(last, view(store, (kernel - 1, inner, slots), stride)))
        x = convolved(columns, reshape(b.need(f"ssm_conv1d_{part}.weight"), kernel, inner), each)
        return reshape(same("unary", reshape(x, inner, tokens)), size, heads, each, slots)

    q, k, v = (projected(part) for part in "qkv")
    gate = same("add", b.linear("ssm_f_b", b.linear("ssm_f_a", cur)), b.need("ssm_dt.bias"))
    gate = reshape(same("unary", gate), size, heads, tokens)
    gate = reshape(same("mul", gate, reshape(b.need("ssm_a"), 1, heads, 1)), size, heads, each, slots)
    beta = same("unary", reshape(b.linear("ssm_beta", cur), 1, heads, each, slots))
    states, state = gather(b, size * inner)
    state = reshape(state, size, size, heads, slots)
    q, k = (same("scale", same("rms_norm", one)) for one in (q, k))
    result = new("delta_net", F32, (inner, tokens + size * slots), q, k, v, gate, beta, state)
    out = ggml.cont(view(result, (size, heads, each, slots)))
    b.graph.expand(cpy(view(result, (size, size, heads, slots)), view(states, (size * inner * slots,))))
    gate = b.linear("ssm_g_b", b.linear("ssm_g_a", reshape(reshape(cur, b.embd, each, slots), b.embd, tokens)))
    normed = b.norm(reshape(out, size, heads, tokens), "ssm_norm")
    gated = same("mul", normed, same("unary", reshape(gate, size, heads, tokens)))
    return b.linear("attn_output", ggml.cont(gated, inner, tokens))


def _repeated(heads: Tensor, times: int) -> Tensor:
    """Each head that many times, one after the other."""
    size, count, each, slots = heads.ne
    split = reshape(heads, size, 1, count, each * slots)
    return reshape(new("repeat", F32, (size, times, count, each * slots), split), size, count * times, each, slots)


def _mixed(b: Builder, cur: Tensor, keys: int, values: int, size: int) -> tuple[Tensor, Tensor]:
    """q, k, v side by side, and z; from two matrices, or from one whose parts must be put apart first."""
    slots, each, state = b.context.slots, b.tokens // b.context.slots, b.shape.state.size
    if "attn_qkv.weight" in b.layers[b.layer]:
        mixed = b.linear("attn_qkv", cur)
        return reshape(mixed, mixed.ne[0], each, slots), b.linear("attn_gate", cur)
    whole = b.linear("ssm_in", cur)
    whole = reshape(whole, 2 * state + 2 * size * values // keys, keys, each, slots)
    widths = (state, state, size * values // keys, size * values // keys)
    q, k, v, z = (view(whole, (width, keys, each, slots), whole.nb[1:]) for width in widths)
    z = ggml.cont(z)
    q, k, v = (ggml.cont(one, one.ne[0] * keys, each, slots) for one in (q, k, v))
    return concat(concat(q, k, 0), v, 0), z


def _decay(b: Builder, cur: Tensor, keys: int, values: int) -> tuple[Tensor, Tensor]:
    slots, each = b.context.slots, b.tokens // b.context.slots
    parts = b.layers[b.layer]
    if "ssm_alpha.weight" in parts:
        beta = same("unary", reshape(b.linear("ssm_beta", cur), 1, values, each, slots))
        alpha = reshape(b.linear("ssm_alpha", cur), values, each, slots)
    else:
        both = b.linear("ssm_ba", cur)
        ratio = values // keys
        both = reshape(both, 2 * ratio, keys, each, slots)
        beta, alpha = (view(both, (ratio, keys, each, slots), both.nb[1:]) for _ in range(2))
        beta = reshape(same("unary", ggml.cont(beta)), 1, values, each, slots)
        alpha = ggml.cont(alpha, values, each, slots)
    gate = same("mul", same("unary", same("add", alpha, b.need("ssm_dt.bias"))), b.need("ssm_a"))
    return beta, reshape(gate, 1, values, each, slots)
