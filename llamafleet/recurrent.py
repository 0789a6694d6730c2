"""Layers that keep a state instead of a cache: Mamba, gated delta nets, short convolutions.

After src/models/mamba-base.cpp, qwen3next.cpp, delta-net-base.cpp, lfm2.cpp at b11434.
"""

from __future__ import annotations

from collections.abc import Callable

from . import ggml
from .ggml import F32, Tensor, concat, cpy, get_rows, mul_mat, new, reshape, same, transpose, view
from .graph import Builder, GraphUnknownError
from .kv import number


def recurrent(b: Builder, cur: Tensor) -> Tensor:
    """The state's part of a layer, from its normed input to what is added to the residual."""
    parts = b.layers[b.layer]
    if "shortconv.conv.weight" in parts:
        return _short_convolution(b, cur)
    if "ssm_beta_alpha.weight" in parts or "ssm_ba.weight" in parts or "ssm_alpha.weight" in parts:
        return _delta_net(b, cur)
    if "ssm_x.weight" in parts:
        return _mamba(b, cur)
    if "ssm_conv1d.weight" in parts and number(b.header, "ssm.time_step_rank"):
        return _mamba2(b, cur)
    raise GraphUnknownError(f"the state of {b.header.architecture}, layer {b.layer}")


def gather(b: Builder, width: int, scan: Callable[[Tensor, Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """build_rs: all slots' states, gathered; `scan` reads them from where they are. (the store, the states)."""
    slots = b.context.slots
    store = ggml.cache(F32, (width, slots), b.homes("cache", b.layer))
    ids = b.state_ids()
    b.graph.expand(ggml.inplace("scale", view(store, (0,))))
    gathered = get_rows(store, view(ids, (slots - 1,)) if scan else ids)
    states = scan(store, view(ids, (slots,))) if scan else view(gathered, (width, slots), (gathered.nb[1],))
    b.graph.expand(states)
    b.graph.expand(cpy(view(gathered, (width, 0), (gathered.nb[1],)), view(store, (width, 0), (store.nb[1],))))
    return store, states


def _convolve(b: Builder, cur: Tensor, channels: int, kernel: int) -> Tensor:
    """Put the last columns before the new ones, keep the newest. cur: (channels, tokens of a slot, slots)."""
    slots = b.context.slots
    store, before = gather(b, (kernel - 1) * channels)
    columns = concat(reshape(before, kernel - 1, channels, slots), transpose(cur), 0)
    last = view(columns, (kernel - 1, channels, slots), (columns.nb[1], columns.nb[2]))
    b.graph.expand(cpy(last, view(store, ((kernel - 1) * channels, slots), (store.nb[1],))))
    return columns


def _convolved(columns: Tensor, weight: Tensor, tokens: int) -> Tensor:
    return new("ssm_conv", F32, (columns.ne[1], tokens, columns.ne[2]), columns, weight)


def _mamba(b: Builder, cur: Tensor) -> Tensor:
    inner, state = number(b.header, "ssm.inner_size"), number(b.header, "ssm.state_size")
    rank, kernel = number(b.header, "ssm.time_step_rank"), number(b.header, "ssm.conv_kernel")
    slots, each = b.context.slots, b.tokens // b.context.slots
    store, before = gather(b, (kernel - 1) * inner)
    xz = b.linear("ssm_in", reshape(cur, cur.ne[0], each, slots))
    x, z = (view(xz, (inner, each, slots), (xz.nb[1], xz.nb[2])) for _ in range(2))
    columns = concat(reshape(before, kernel - 1, inner, slots), transpose(x), 0)
    last = view(columns, (kernel - 1, inner, slots), (columns.nb[1], columns.nb[2]))
    b.graph.expand(cpy(last, view(store, ((kernel - 1) * inner, slots), (store.nb[1],))))
    x = same("unary", same("add", _convolved(columns, b.need("ssm_conv1d.weight"), each), b.need("ssm_conv1d.bias")))
    mixed = mul_mat(b.need("ssm_x.weight"), x)
    step = view(mixed, (rank, each, slots), (mixed.nb[1], mixed.nb[2]))
    inputs, outputs = (view(mixed, (state, 1, each, slots), (4 * state, mixed.nb[1], mixed.nb[2])) for _ in range(2))
    if "ssm_dt_norm.weight" in b.layers[b.layer]:
        step, inputs, outputs = b.norm(step, "ssm_dt_norm"), b.norm(inputs, "ssm_b_norm"), b.norm(outputs, "ssm_c_norm")
    elif b.header.get("ssm.dt_b_c_rms"):
        step, inputs, outputs = (same("rms_norm", one) for one in (step, inputs, outputs))
    else:
        step = ggml.cont(step)
    step = b.linear("ssm_dt", step)
    split, decay = reshape(x, 1, inner, each, slots), b.need("ssm_a")

    def scan(states: Tensor, ids: Tensor) -> Tensor:
        size = inner * each * slots + state * inner * slots
        return new(
            "ssm_scan", F32, (size,), reshape(states, state, 1, inner, slots), split, step, decay, inputs, outputs, ids
        )

    states, y = gather(b, state * inner, scan)
    b.graph.expand(cpy(view(y, (state * inner * slots,)), view(states, (state * inner * slots,))))
    out = view(y, (inner, each, slots), (split.nb[2], split.nb[3]))
    out = same("add", out, same("mul", x, b.need("ssm_d")))
    out = new("glu", F32, out.ne, ggml.cont(z), out)
    return reshape(b.linear("ssm_out", out), b.embd, b.tokens)


def _mamba2(b: Builder, cur: Tensor) -> Tensor:
    inner, state = number(b.header, "ssm.inner_size"), number(b.header, "ssm.state_size")
    heads, groups = number(b.header, "ssm.time_step_rank"), number(b.header, "ssm.group_count")
    kernel, size, channels = number(b.header, "ssm.conv_kernel"), inner // heads, inner + 2 * groups * state
    slots, each = b.context.slots, b.tokens // b.context.slots
    store, before = gather(b, (kernel - 1) * channels)
    whole = b.linear("ssm_in", cur)
    whole = reshape(whole, whole.ne[0], each, slots)
    z = view(whole, (size, heads, each, slots), (4 * size, whole.nb[1], whole.nb[2]))
    mixed = view(whole, (channels, each, slots), (whole.nb[1], whole.nb[2]))
    step = view(whole, (heads, each, slots), (whole.nb[1], whole.nb[2]))
    columns = concat(reshape(before, kernel - 1, channels, slots), transpose(mixed), 0)
    last = view(columns, (kernel - 1, channels, slots), (columns.nb[1], columns.nb[2]))
    b.graph.expand(cpy(last, view(store, ((kernel - 1) * channels, slots), (store.nb[1],))))
    mixed = same(
        "unary", same("add", _convolved(columns, b.need("ssm_conv1d.weight"), each), b.need("ssm_conv1d.bias"))
    )
    x = view(mixed, (size, heads, each, slots), (4 * size, mixed.nb[1], mixed.nb[2]))
    inputs, outputs = (
        view(mixed, (state, groups, each, slots), (4 * state, mixed.nb[1], mixed.nb[2])) for _ in range(2)
    )
    step = same("add", ggml.cont(step), b.need("ssm_dt.bias"))
    decay = b.need("ssm_a")

    def scan(states: Tensor, ids: Tensor) -> Tensor:
        total = inner * each * slots + state * inner * slots
        kept = reshape(states, state, size, heads, slots)
        return new("ssm_scan", F32, (total,), kept, x, step, decay, inputs, outputs, ids)

    states, y = gather(b, state * inner, scan)
    rows = view(y, (state * inner, slots, 1), (4 * state * inner, 4 * state * inner * slots))
    b.graph.expand(cpy(rows, view(states, (state * inner, slots, 1), (states.nb[1],))))
    out = view(y, (size, heads, each, slots), (4 * size, 4 * size * heads, 4 * size * heads * each))
    out = same("add", out, same("mul", x, b.need("ssm_d")))
    out = new("glu", F32, out.ne, ggml.cont(z), out)
    if "ssm_norm.weight" in b.layers[b.layer]:
        out = b.norm(reshape(out, inner // groups, groups, each, slots), "ssm_norm")
    return b.linear("ssm_out", reshape(out, inner, b.tokens))


def _delta_net(b: Builder, cur: Tensor) -> Tensor:
    """Gated delta net; the fused operation, which every backend here has (llama-context.cpp:209)."""
    parts = b.layers[b.layer]
    inner, state = number(b.header, "ssm.inner_size"), number(b.header, "ssm.state_size")
    keys, values = number(b.header, "ssm.group_count"), number(b.header, "ssm.time_step_rank")
    size, kernel = inner // values, number(b.header, "ssm.conv_kernel")
    slots, each, channels = b.context.slots, b.tokens // b.context.slots, inner + 2 * keys * state
    mixed, z = _mixed(b, cur, keys, values, size)
    beta, gate = _decay(b, cur, keys, values)
    columns = _convolve(b, mixed, channels, kernel)
    store, before = gather(b, state * inner)
    before = reshape(before, size, size, values, slots)
    out = same("unary", _convolved(columns, b.need("ssm_conv1d.weight"), each))
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


def _repeated(heads: Tensor, times: int) -> Tensor:
    """Each head that many times, one after the other."""
    size, count, each, slots = heads.ne
    split = reshape(heads, size, 1, count, each * slots)
    return reshape(new("repeat", F32, (size, times, count, each * slots), split), size, count * times, each, slots)


def _mixed(b: Builder, cur: Tensor, keys: int, values: int, size: int) -> tuple[Tensor, Tensor]:
    """q, k, v side by side, and z; from two matrices, or from one whose parts must be put apart first."""
    slots, each, state = b.context.slots, b.tokens // b.context.slots, number(b.header, "ssm.state_size")
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


def _short_convolution(b: Builder, cur: Tensor) -> Tensor:
    """models/lfm2.cpp."""
    kernel, embd = number(b.header, "shortconv.l_cache"), b.embd
    slots, each = b.context.slots, b.tokens // b.context.slots
    whole = b.linear("shortconv.in_proj", reshape(cur, embd, each, slots))
    gate_in, gate_out, x = (view(whole, (embd, each, slots), (whole.nb[1], whole.nb[2])) for _ in range(3))
    columns = _convolve(b, same("mul", gate_in, x), embd, kernel)
    out = same("mul", gate_out, _convolved(columns, b.need("shortconv.conv.weight"), each))
    return reshape(b.linear("shortconv.out_proj", out), embd, b.tokens)
