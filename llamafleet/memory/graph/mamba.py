"""Mamba, Mamba-2 and what PLaMo-2 makes of it (src/models/mamba-base.cpp, plamo2.cpp at b11434)."""

from __future__ import annotations

from llamafleet.memory.graph import ggml
from llamafleet.memory.graph.builder import Builder
from llamafleet.memory.graph.ggml import F32, Tensor, concat, cpy, mul_mat, new, permute, reshape, same, transpose, view
from llamafleet.memory.graph.recurrent_state import convolved, gather


def mamba(b: Builder, cur: Tensor) -> Tensor:
    inner, state = b.shape.state.inner, b.shape.state.size
    rank, kernel = b.shape.state.rank, b.shape.state.kernel
    slots, each = b.context.slots, b.tokens // b.context.slots
    store, before = gather(b, (kernel - 1) * inner)
    xz = b.linear("ssm_in", reshape(cur, cur.ne[0], each, slots))
    x, z = (view(xz, (inner, each, slots), (xz.nb[1], xz.nb[2])) for _ in range(2))
    columns = concat(reshape(before, kernel - 1, inner, slots), transpose(x), 0)
    last = view(columns, (kernel - 1, inner, slots), (columns.nb[1], columns.nb[2]))
    b.graph.expand(cpy(last, view(store, ((kernel - 1) * inner, slots), (store.nb[1],))))
    x = same("unary", same("add", convolved(columns, b.need("ssm_conv1d.weight"), each), b.need("ssm_conv1d.bias")))
    mixed = mul_mat(b.need("ssm_x.weight"), x)
    step = view(mixed, (rank, each, slots), (mixed.nb[1], mixed.nb[2]))
    inputs, outputs = (view(mixed, (state, 1, each, slots), (4 * state, mixed.nb[1], mixed.nb[2])) for _ in range(2))
    if "ssm_dt_norm.weight" in b.layers[b.layer]:
        step, inputs, outputs = b.norm(step, "ssm_dt_norm"), b.norm(inputs, "ssm_b_norm"), b.norm(outputs, "ssm_c_norm")
    elif b.shape.state.norms_inputs:
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


def plamo_mamba(b: Builder, cur: Tensor) -> Tensor:
    """models/plamo2.cpp: input and gate head by head in one matrix, heads of one decay each."""
    inner, state = b.shape.state.inner, b.shape.state.size
    heads, kernel = b.shape.state.rank, b.shape.state.kernel
    size, rank = inner // heads, max(64, b.embd // 16)
    slots, each = b.context.slots, b.tokens // b.context.slots
    store, before = gather(b, (kernel - 1) * inner)
    zx = permute(b.linear("ssm_in", reshape(cur, cur.ne[0], each, slots)), 0, 2, 1, 3)
    zx = ggml.cont(zx, 2 * size, heads, each, slots)
    z, x = (view(zx, (size, heads, each, slots), zx.nb[1:]) for _ in range(2))
    columns = concat(reshape(before, kernel - 1, inner, slots), transpose(ggml.cont(x, inner, each, slots)), 0)
    last = view(columns, (kernel - 1, inner, slots), (columns.nb[1], columns.nb[2]))
    b.graph.expand(cpy(last, view(store, ((kernel - 1) * inner * slots,))))
    x = same("unary", convolved(columns, b.need("ssm_conv1d.weight"), each))
    mixed = mul_mat(b.need("ssm_x.weight"), x)
    parts = ((state, "ssm_b_norm"), (state, "ssm_c_norm"), (rank, "ssm_dt_norm"))
    views = [view(mixed, (width, each, slots), (mixed.nb[1], mixed.nb[2])) for width, _ in parts]
    inputs, outputs, step = (b.norm(one, norm) for one, (_, norm) in zip(views, parts, strict=True))
    step, decay = b.linear("ssm_dt", step), reshape(b.need("ssm_a"), 1, heads)
    x = view(x, (size, heads, each, slots))
    inputs, outputs = (view(one, (state, 1, each, slots), (4 * state, *one.nb[1:3])) for one in (inputs, outputs))

    def scan(states: Tensor, ids: Tensor) -> Tensor:
        kept = reshape(states, state, size, heads, slots)
        total = inner * each * slots + state * inner * slots
        return new("ssm_scan", F32, (total,), kept, x, step, decay, inputs, outputs, ids)

    states, y = gather(b, state * inner, scan)
    b.graph.expand(cpy(view(y, (state * inner * slots,)), view(states, (state * inner * slots,))))
    out = view(y, (size, heads, each, slots))
    out = same("add", out, same("mul", x, reshape(b.need("ssm_d"), 1, heads)))
    out = new("glu", F32, out.ne, ggml.cont(z), out)
    return reshape(b.linear("ssm_out", view(out, (inner, each, slots), out.nb[2:])), b.embd, b.tokens)


def mamba2(b: Builder, cur: Tensor) -> Tensor:
    inner, state = b.shape.state.inner, b.shape.state.size
    heads, groups = b.shape.state.rank, b.shape.state.groups
    kernel, size, channels = b.shape.state.kernel, inner // heads, inner + 2 * groups * state
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
    mixed = same("unary", same("add", convolved(columns, b.need("ssm_conv1d.weight"), each), b.need("ssm_conv1d.bias")))
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
