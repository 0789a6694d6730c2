"""RWKV's layers, versions 6 and 7 (src/models/rwkv6.cpp, rwkv6-base.cpp, rwkv7.cpp, rwkv7-base.cpp at b11434)."""

from __future__ import annotations

from llamafleet.memory.graph import ggml
from llamafleet.memory.graph.builder import Builder
from llamafleet.memory.graph.ggml import F32, Tensor, concat, cpy, get_rows, mul_mat, new, permute, reshape, same, view
from llamafleet.memory.graph.recurrent_state import gather


def rwkv_layer(
    b: Builder, inputs: Tensor, outputs: Tensor | None, first: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """One whole layer; also the first layer's values, which the later ones mix in."""
    slots, embd = b.context.slots, b.embd
    each = b.tokens // slots
    inputs = reshape(inputs, embd, each, slots)
    store, shift = gather(b, 2 * embd)
    shift = reshape(shift, embd, 2, slots)
    before = [view(shift, (embd, 1, slots), (shift.nb[1], shift.nb[2])) for _ in range(2)]
    normed = b.norm(inputs, "attn_norm")
    previous = _previous(before[0], normed)
    if "time_mix_first.weight" in b.layers[b.layer]:
        cur = _time_mix_6(b, normed, previous)
    else:
        cur, first = _time_mix_7(b, normed, previous, first)
    residual = same("add", cur, inputs)
    second = b.norm(residual, "attn_norm_2")
    previous = _previous(before[1], second)
    last = [view(one, (embd, 1, slots), (one.nb[1], one.nb[2])) for one in (normed, second)]
    after = view(concat(last[0], last[1], 1), (2 * embd * slots,))
    b.graph.expand(cpy(after, view(store, (2 * embd * slots,))))
    residual, second, previous = (reshape(one, embd, b.tokens) for one in (residual, second, previous))
    if outputs is not None:
        residual, second, previous = (get_rows(one, outputs) for one in (residual, second, previous))
    return same("add", _channel_mix(b, second, previous), residual), first


def _previous(before: Tensor, cur: Tensor) -> Tensor:
    """Each token's predecessor, the first one's from the state."""
    return concat(before, view(cur, (cur.ne[0], cur.ne[1] - 1, cur.ne[2]), (cur.nb[1], cur.nb[2])), 1)


def _channel_mix(b: Builder, cur: Tensor, previous: Tensor) -> Tensor:
    change = same("sub", previous, cur)
    key = b.linear("channel_mix_key", _mixed(b, "channel_mix_lerp_k", cur, change))
    key = same("sqr", same("unary", key))
    if "channel_mix_receptance.weight" not in b.layers[b.layer]:
        return b.linear("channel_mix_value", key)
    gate = b.linear("channel_mix_receptance", _mixed(b, "channel_mix_lerp_r", cur, change))
    return same("mul", same("unary", gate), b.linear("channel_mix_value", key))


def _mixed(b: Builder, part: str, cur: Tensor, change: Tensor) -> Tensor:
    return same("add", same("mul", change, b.need(f"{part}.weight")), cur)


def _low_rank(b: Builder, part: str, cur: Tensor, between: bool) -> Tensor:
    low = mul_mat(b.need(f"time_mix_{part}1.weight"), cur)
    return mul_mat(b.need(f"time_mix_{part}2.weight"), same("unary", low) if between else low)


def _time_mix_6(b: Builder, cur: Tensor, previous: Tensor) -> Tensor:
    size, slots, embd, tokens = b.shape.state.wkv_head, b.context.slots, b.embd, b.tokens
    heads = embd // size
    change, cur = (reshape(one, embd, tokens) for one in (same("sub", previous, cur), cur))
    low = same("unary", b.linear("time_mix_w1", _mixed(b, "time_mix_lerp_x", cur, change)))
    low = ggml.cont(permute(reshape(low, low.ne[0] // 5, 1, 5, tokens), 0, 1, 3, 2))
    second = b.need("time_mix_w2.weight")
    mixed = mul_mat(reshape(second, second.ne[0], second.ne[1], 1, 5), low)
    fused = b.weight("time_mix_lerp_fused.weight")
    if fused is not None:
        change, cur = (reshape(one, embd, 1, tokens) for one in (change, cur))
        mixed = same("add", same("mul", same("add", mixed, fused), change), cur)
    each = [view(mixed, (embd, tokens), (mixed.nb[1],)) for _ in range(5)]
    if fused is None:
        lerps = [b.need(f"time_mix_lerp_{part}.weight") for part in "wkvrg"]
        each = [
            same("add", same("mul", same("add", one, lerp), change), cur) for one, lerp in zip(each, lerps, strict=True)
        ]
    xw, xk, xv, xr, xg = each
    r, k, v = (b.linear(f"time_mix_{part}", x) for part, x in (("receptance", xr), ("key", xk), ("value", xv)))
    gate = same("unary", b.linear("time_mix_gate", xg))
    r, k, v = (reshape(one, size, heads, tokens) for one in (r, k, v))
    decay = b.linear("time_mix_decay_w2", same("unary", b.linear("time_mix_decay_w1", xw)))
    decay = same("add", decay, b.need("time_mix_decay.weight"))
    for _ in range(3):  # exp, neg, exp
        decay = same("unary", decay)
    store, state = gather(b, embd * size)
    inputs = (k, v, r, b.need("time_mix_first.weight"), reshape(decay, size, heads, tokens), state)
    out = new("wkv", F32, (embd, tokens + size * slots), *inputs)
    cur = view(out, (embd * tokens,))
    b.graph.expand(cpy(view(out, (embd * size * slots,)), view(store, (embd * size * slots,))))
    cur = reshape(same("norm", reshape(cur, size, heads, tokens)), embd, tokens)
    cur = same("add", same("mul", cur, b.need("time_mix_ln.weight")), b.need("time_mix_ln.bias"))
    return reshape(b.linear("time_mix_output", same("mul", cur, gate)), embd, tokens // slots, slots)


def _time_mix_7(b: Builder, cur: Tensor, previous: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
    size, slots, embd, tokens = b.shape.state.wkv_head, b.context.slots, b.embd, b.tokens
    heads, gated = embd // size, "time_mix_g1.weight" in b.layers[b.layer]
    count = 6 if gated else 5
    moved = new("repeat", F32, (embd, tokens // slots, slots, count), same("sub", previous, cur))
    mixed = same("add", same("mul", moved, b.need("time_mix_lerp_fused.weight")), cur)
    xr, xw, xk, xv, xa, *xg = (view(mixed, (embd, tokens), (mixed.nb[1],)) for _ in range(count))
    r = b.linear("time_mix_receptance", xr)
    w = same("add", _low_rank(b, "w", xw, True), b.need("time_mix_w0.weight"))
    w = same("unary", same("scale", same("unary", w)))
    k, v = b.linear("time_mix_key", xk), b.linear("time_mix_value", xv)
    if first is None:
        first = v
    else:
        share = same("unary", same("add", _low_rank(b, "v", xv, False), b.need("time_mix_v0.weight")))
        v = same("add", v, same("mul", same("sub", first, v), share))
    g = _low_rank(b, "g", xg[0], True) if gated else None
    a = same("unary", same("add", _low_rank(b, "a", xa, False), b.need("time_mix_a0.weight")))
    kk = same("l2_norm", reshape(same("mul", k, b.need("time_mix_k_k.weight")), size, heads, tokens))
    ka = same("mul", k, b.need("time_mix_k_a.weight"))
    k = same("add", k, same("sub", same("mul", a, ka), ka))
    r, w, k, v3, a = (reshape(one, size, heads, tokens) for one in (r, w, k, v, a))
    store, state = gather(b, embd * size)
    out = new("wkv", F32, (embd, tokens + size * slots), r, w, k, v3, same("unary", kk), same("mul", kk, a), state)
    cur = view(out, (embd * tokens,))
    b.graph.expand(cpy(view(out, (embd * size * slots,)), view(store, (embd * size * slots,))))
    if "time_mix_ln.weight" in b.layers[b.layer]:
        cur = reshape(same("norm", reshape(cur, size, heads, tokens)), embd, tokens)
        cur = same("add", same("mul", cur, b.need("time_mix_ln.weight")), b.need("time_mix_ln.bias"))
    else:
        cur = reshape(cur, embd, tokens)
    weights = reshape(b.need("time_mix_r_k.weight"), size, heads)
    rk = new("sum_rows", F32, (1, heads, tokens), same("mul", same("mul", k, r), weights))
    cur = same("add", cur, reshape(same("mul", v3, rk), embd, tokens))
    cur = same("mul", cur, g) if g is not None else cur
    return reshape(b.linear("time_mix_output", cur), embd, tokens // slots, slots), first
