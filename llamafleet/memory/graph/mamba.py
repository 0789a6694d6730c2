"""Mamba, Mamba-2 and PLaMo-2's Mamba layers (src/models/mamba-base.cpp, src/models/plamo2.cpp at b11434)."""

from __future__ import annotations

from llamafleet.memory.graph import ggml
from llamafleet.memory.graph.builder import Builder
from llamafleet.memory.graph.ggml import (
    F32,
    Tensor,
    apply,
    concat,
    cpy,
    mul_mat,
    new,
    permute,
    reshape,
    transpose,
    view,
)
from llamafleet.memory.graph.recurrent_state import build_rs, ssm_conv


def mamba(b: Builder, cur: Tensor) -> Tensor:
    """Mamba (build_mamba_layer)."""
    inner, state = b.shape.state.inner, b.shape.state.size
    rank, kernel = b.shape.state.rank, b.shape.state.kernel
    slots, seq_tokens = b.context.slots, b.tokens // b.context.slots
    store, before = build_rs(b, (kernel - 1) * inner)
    xz = b.linear("ssm_in", reshape(cur, cur.ne[0], seq_tokens, slots))
    x, z = (view(xz, (inner, seq_tokens, slots), (xz.nb[1], xz.nb[2])) for _ in range(2))
    columns = concat(reshape(before, kernel - 1, inner, slots), transpose(x), 0)
    last = view(columns, (kernel - 1, inner, slots), (columns.nb[1], columns.nb[2]))
    b.graph.expand(cpy(last, view(store, ((kernel - 1) * inner, slots), (store.nb[1],))))
    x = apply(
        "unary", apply("add", ssm_conv(columns, b.need("ssm_conv1d.weight"), seq_tokens), b.need("ssm_conv1d.bias"))
    )
    x_dbc = mul_mat(b.need("ssm_x.weight"), x)
    dt = view(x_dbc, (rank, seq_tokens, slots), (x_dbc.nb[1], x_dbc.nb[2]))
    ssm_b, ssm_c = (view(x_dbc, (state, 1, seq_tokens, slots), (4 * state, x_dbc.nb[1], x_dbc.nb[2])) for _ in range(2))
    if "ssm_dt_norm.weight" in b.layers[b.layer]:
        dt, ssm_b, ssm_c = b.norm(dt, "ssm_dt_norm"), b.norm(ssm_b, "ssm_b_norm"), b.norm(ssm_c, "ssm_c_norm")
    elif b.shape.state.norms_inputs:
        dt, ssm_b, ssm_c = (apply("rms_norm", tensor) for tensor in (dt, ssm_b, ssm_c))
    else:
        dt = ggml.cont(dt)
    dt = b.linear("ssm_dt", dt)
    split, decay = reshape(x, 1, inner, seq_tokens, slots), b.need("ssm_a")

    def scan(states: Tensor, ids: Tensor) -> Tensor:
        size = inner * seq_tokens * slots + state * inner * slots
        return new(
            "ssm_scan", F32, (size,), reshape(states, state, 1, inner, slots), split, dt, decay, ssm_b, ssm_c, ids
        )

    states, y = build_rs(b, state * inner, scan)
    b.graph.expand(cpy(view(y, (state * inner * slots,)), view(states, (state * inner * slots,))))
    out = view(y, (inner, seq_tokens, slots), (split.nb[2], split.nb[3]))
    out = apply("add", out, apply("mul", x, b.need("ssm_d")))
    out = new("glu", F32, out.ne, ggml.cont(z), out)
    return reshape(b.linear("ssm_out", out), b.embd, b.tokens)


def plamo2_mamba(b: Builder, cur: Tensor) -> Tensor:
    """PLaMo-2: one matrix holds input and gate of each head, and each head has one decay.

    Source: src/models/plamo2.cpp.
    """
    inner, state = b.shape.state.inner, b.shape.state.size
    heads, kernel = b.shape.state.rank, b.shape.state.kernel
    size, rank = inner // heads, max(64, b.embd // 16)
    slots, seq_tokens = b.context.slots, b.tokens // b.context.slots
    store, before = build_rs(b, (kernel - 1) * inner)
    zx = permute(b.linear("ssm_in", reshape(cur, cur.ne[0], seq_tokens, slots)), 0, 2, 1, 3)
    zx = ggml.cont(zx, 2 * size, heads, seq_tokens, slots)
    z, x = (view(zx, (size, heads, seq_tokens, slots), zx.nb[1:]) for _ in range(2))
    columns = concat(reshape(before, kernel - 1, inner, slots), transpose(ggml.cont(x, inner, seq_tokens, slots)), 0)
    last = view(columns, (kernel - 1, inner, slots), (columns.nb[1], columns.nb[2]))
    b.graph.expand(cpy(last, view(store, ((kernel - 1) * inner * slots,))))
    x = apply("unary", ssm_conv(columns, b.need("ssm_conv1d.weight"), seq_tokens))
    x_bcdt = mul_mat(b.need("ssm_x.weight"), x)
    parts = ((state, "ssm_b_norm"), (state, "ssm_c_norm"), (rank, "ssm_dt_norm"))
    views = [view(x_bcdt, (width, seq_tokens, slots), (x_bcdt.nb[1], x_bcdt.nb[2])) for width, _ in parts]
    ssm_b, ssm_c, dt = (b.norm(x, norm) for x, (_, norm) in zip(views, parts, strict=True))
    dt, decay = b.linear("ssm_dt", dt), reshape(b.need("ssm_a"), 1, heads)
    x = view(x, (size, heads, seq_tokens, slots))
    ssm_b, ssm_c = (view(x, (state, 1, seq_tokens, slots), (4 * state, *x.nb[1:3])) for x in (ssm_b, ssm_c))

    def scan(states: Tensor, ids: Tensor) -> Tensor:
        states_4d = reshape(states, state, size, heads, slots)
        total = inner * seq_tokens * slots + state * inner * slots
        return new("ssm_scan", F32, (total,), states_4d, x, dt, decay, ssm_b, ssm_c, ids)

    states, y = build_rs(b, state * inner, scan)
    b.graph.expand(cpy(view(y, (state * inner * slots,)), view(states, (state * inner * slots,))))
    out = view(y, (size, heads, seq_tokens, slots))
    out = apply("add", out, apply("mul", x, reshape(b.need("ssm_d"), 1, heads)))
    out = new("glu", F32, out.ne, ggml.cont(z), out)
    return reshape(b.linear("ssm_out", view(out, (inner, seq_tokens, slots), out.nb[2:])), b.embd, b.tokens)


def mamba2(b: Builder, cur: Tensor) -> Tensor:
    """Mamba-2 (build_mamba2_layer)."""
    inner, state = b.shape.state.inner, b.shape.state.size
    heads, groups = b.shape.state.rank, b.shape.state.groups
    kernel, size, channels = b.shape.state.kernel, inner // heads, inner + 2 * groups * state
    slots, seq_tokens = b.context.slots, b.tokens // b.context.slots
    store, before = build_rs(b, (kernel - 1) * channels)
    zx_bcdt = b.linear("ssm_in", cur)
    zx_bcdt = reshape(zx_bcdt, zx_bcdt.ne[0], seq_tokens, slots)
    z = view(zx_bcdt, (size, heads, seq_tokens, slots), (4 * size, zx_bcdt.nb[1], zx_bcdt.nb[2]))
    x_bc = view(zx_bcdt, (channels, seq_tokens, slots), (zx_bcdt.nb[1], zx_bcdt.nb[2]))
    dt = view(zx_bcdt, (heads, seq_tokens, slots), (zx_bcdt.nb[1], zx_bcdt.nb[2]))
    columns = concat(reshape(before, kernel - 1, channels, slots), transpose(x_bc), 0)
    last = view(columns, (kernel - 1, channels, slots), (columns.nb[1], columns.nb[2]))
    b.graph.expand(cpy(last, view(store, ((kernel - 1) * channels, slots), (store.nb[1],))))
    x_bc = apply(
        "unary", apply("add", ssm_conv(columns, b.need("ssm_conv1d.weight"), seq_tokens), b.need("ssm_conv1d.bias"))
    )
    x = view(x_bc, (size, heads, seq_tokens, slots), (4 * size, x_bc.nb[1], x_bc.nb[2]))
    ssm_b, ssm_c = (
        view(x_bc, (state, groups, seq_tokens, slots), (4 * state, x_bc.nb[1], x_bc.nb[2])) for _ in range(2)
    )
    dt = apply("add", ggml.cont(dt), b.need("ssm_dt.bias"))
    decay = b.need("ssm_a")

    def scan(states: Tensor, ids: Tensor) -> Tensor:
        total = inner * seq_tokens * slots + (1 + b.context.rollback) * state * inner * slots
        states_4d = reshape(states, state, size, heads, slots)
        return new("ssm_scan", F32, (total,), states_4d, x, dt, decay, ssm_b, ssm_c, ids)

    states, y = build_rs(b, state * inner, scan)
    rows = view(y, (state * inner, slots, 1), (4 * state * inner, 4 * state * inner * slots))
    b.graph.expand(cpy(rows, view(states, (state * inner, slots, 1), (states.nb[1],))))
    out = view(y, (size, heads, seq_tokens, slots), (4 * size, 4 * size * heads, 4 * size * heads * seq_tokens))
    out = apply("add", out, apply("mul", x, b.need("ssm_d")))
    out = new("glu", F32, out.ne, ggml.cont(z), out)
    if "ssm_norm.weight" in b.layers[b.layer]:
        out = b.norm(reshape(out, inner // groups, groups, seq_tokens, slots), "ssm_norm")
    return b.linear("ssm_out", reshape(out, inner, b.tokens))
