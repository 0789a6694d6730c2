"""Layers of RWKV 6 and 7 (src/models/rwkv6.cpp, src/models/rwkv6-base.cpp, src/models/rwkv7.cpp,
src/models/rwkv7-base.cpp at b11434)."""

from __future__ import annotations

from llamafleet.memory.graph import ggml
from llamafleet.memory.graph.builder import Builder
from llamafleet.memory.graph.ggml import F32, Tensor, apply, concat, cpy, get_rows, mul_mat, new, permute, reshape, view
from llamafleet.memory.graph.recurrent_state import build_rs


def rwkv_layer(
    b: Builder, inputs: Tensor, outputs: Tensor | None, first_values: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The result of one layer, and the first layer's values, which later layers mix in (version 7)."""
    slots, embd = b.context.slots, b.embd
    seq_tokens = b.tokens // slots
    inputs = reshape(inputs, embd, seq_tokens, slots)
    store, shift = build_rs(b, 2 * embd)
    shift = reshape(shift, embd, 2, slots)
    before = [view(shift, (embd, 1, slots), (shift.nb[1], shift.nb[2])) for _ in range(2)]
    attn_norm = b.norm(inputs, "attn_norm")
    previous = _token_shift(before[0], attn_norm)
    if "time_mix_first.weight" in b.layers[b.layer]:
        cur = _time_mix_6(b, attn_norm, previous)
    else:
        cur, first_values = _time_mix_7(b, attn_norm, previous, first_values)
    residual = apply("add", cur, inputs)
    ffn_norm = b.norm(residual, "attn_norm_2")
    previous = _token_shift(before[1], ffn_norm)
    last = [view(tensor, (embd, 1, slots), (tensor.nb[1], tensor.nb[2])) for tensor in (attn_norm, ffn_norm)]
    after = view(concat(last[0], last[1], 1), (2 * embd * slots,))
    b.graph.expand(cpy(after, view(store, (2 * embd * slots,))))
    residual, ffn_norm, previous = (reshape(tensor, embd, b.tokens) for tensor in (residual, ffn_norm, previous))
    if outputs is not None:
        residual, ffn_norm, previous = (get_rows(tensor, outputs) for tensor in (residual, ffn_norm, previous))
    return apply("add", _channel_mix(b, ffn_norm, previous), residual), first_values


def _token_shift(before: Tensor, cur: Tensor) -> Tensor:
    """Each token's previous token; for the first token it comes from the state."""
    return concat(before, view(cur, (cur.ne[0], cur.ne[1] - 1, cur.ne[2]), (cur.nb[1], cur.nb[2])), 1)


def _channel_mix(b: Builder, cur: Tensor, previous: Tensor) -> Tensor:
    change = apply("sub", previous, cur)
    key = b.linear("channel_mix_key", _lerp(b, "channel_mix_lerp_k", cur, change))
    key = apply("sqr", apply("unary", key))
    if "channel_mix_receptance.weight" not in b.layers[b.layer]:
        return b.linear("channel_mix_value", key)
    gate = b.linear("channel_mix_receptance", _lerp(b, "channel_mix_lerp_r", cur, change))
    return apply("mul", apply("unary", gate), b.linear("channel_mix_value", key))


def _lerp(b: Builder, part: str, cur: Tensor, change: Tensor) -> Tensor:
    """Interpolate between the current and the previous token. `change`: their difference."""
    return apply("add", apply("mul", change, b.need(f"{part}.weight")), cur)


def _lora(b: Builder, part: str, cur: Tensor, has_activation: bool) -> Tensor:
    low = mul_mat(b.need(f"time_mix_{part}1.weight"), cur)
    return mul_mat(b.need(f"time_mix_{part}2.weight"), apply("unary", low) if has_activation else low)


def _time_mix_6(b: Builder, cur: Tensor, previous: Tensor) -> Tensor:
    size, slots, embd, tokens = b.shape.state.wkv_head, b.context.slots, b.embd, b.tokens
    heads = embd // size
    change, cur = (reshape(x, embd, tokens) for x in (apply("sub", previous, cur), cur))
    low = apply("unary", b.linear("time_mix_w1", _lerp(b, "time_mix_lerp_x", cur, change)))
    low = ggml.cont(permute(reshape(low, low.ne[0] // 5, 1, 5, tokens), 0, 1, 3, 2))
    w2 = b.need("time_mix_w2.weight")
    mixed = mul_mat(reshape(w2, w2.ne[0], w2.ne[1], 1, 5), low)
    fused = b.weight("time_mix_lerp_fused.weight")
    if fused is not None:
        change, cur = (reshape(x, embd, 1, tokens) for x in (change, cur))
        mixed = apply("add", apply("mul", apply("add", mixed, fused), change), cur)
    mixes = [view(mixed, (embd, tokens), (mixed.nb[1],)) for _ in range(5)]
    if fused is None:
        lerps = [b.need(f"time_mix_lerp_{part}.weight") for part in "wkvrg"]
        mixes = [
            apply("add", apply("mul", apply("add", x, lerp), change), cur) for x, lerp in zip(mixes, lerps, strict=True)
        ]
    xw, xk, xv, xr, xg = mixes
    r, k, v = (b.linear(f"time_mix_{part}", x) for part, x in (("receptance", xr), ("key", xk), ("value", xv)))
    gate = apply("unary", b.linear("time_mix_gate", xg))
    r, k, v = (reshape(x, size, heads, tokens) for x in (r, k, v))
    decay = b.linear("time_mix_decay_w2", apply("unary", b.linear("time_mix_decay_w1", xw)))
    decay = apply("add", decay, b.need("time_mix_decay.weight"))
    for _ in range(3):  # exp, neg, exp
        decay = apply("unary", decay)
    store, state = build_rs(b, embd * size)
    inputs = (k, v, r, b.need("time_mix_first.weight"), reshape(decay, size, heads, tokens), state)
    out = new("wkv", F32, (embd, tokens + size * slots), *inputs)
    cur = view(out, (embd * tokens,))
    b.graph.expand(cpy(view(out, (embd * size * slots,)), view(store, (embd * size * slots,))))
    cur = reshape(apply("norm", reshape(cur, size, heads, tokens)), embd, tokens)
    cur = apply("add", apply("mul", cur, b.need("time_mix_ln.weight")), b.need("time_mix_ln.bias"))
    return reshape(b.linear("time_mix_output", apply("mul", cur, gate)), embd, tokens // slots, slots)


def _time_mix_7(b: Builder, cur: Tensor, previous: Tensor, first_values: Tensor | None) -> tuple[Tensor, Tensor]:
    size, slots, embd, tokens = b.shape.state.wkv_head, b.context.slots, b.embd, b.tokens
    heads, has_gate = embd // size, "time_mix_g1.weight" in b.layers[b.layer]
    count = 6 if has_gate else 5
    moved = new("repeat", F32, (embd, tokens // slots, slots, count), apply("sub", previous, cur))
    mixed = apply("add", apply("mul", moved, b.need("time_mix_lerp_fused.weight")), cur)
    xr, xw, xk, xv, xa, *xg = (view(mixed, (embd, tokens), (mixed.nb[1],)) for _ in range(count))
    r = b.linear("time_mix_receptance", xr)
    w = apply("add", _lora(b, "w", xw, True), b.need("time_mix_w0.weight"))
    w = apply("unary", apply("scale", apply("unary", w)))
    k, v = b.linear("time_mix_key", xk), b.linear("time_mix_value", xv)
    if first_values is None:
        first_values = v
    else:
        share = apply("unary", apply("add", _lora(b, "v", xv, False), b.need("time_mix_v0.weight")))
        v = apply("add", v, apply("mul", apply("sub", first_values, v), share))
    g = _lora(b, "g", xg[0], True) if has_gate else None
    a = apply("unary", apply("add", _lora(b, "a", xa, False), b.need("time_mix_a0.weight")))
    kk = apply("l2_norm", reshape(apply("mul", k, b.need("time_mix_k_k.weight")), size, heads, tokens))
    ka = apply("mul", k, b.need("time_mix_k_a.weight"))
    k = apply("add", k, apply("sub", apply("mul", a, ka), ka))
    r, w, k, v3, a = (reshape(x, size, heads, tokens) for x in (r, w, k, v, a))
    store, state = build_rs(b, embd * size)
    out = new("wkv", F32, (embd, tokens + size * slots), r, w, k, v3, apply("unary", kk), apply("mul", kk, a), state)
    cur = view(out, (embd * tokens,))
    b.graph.expand(cpy(view(out, (embd * size * slots,)), view(store, (embd * size * slots,))))
    if "time_mix_ln.weight" in b.layers[b.layer]:
        cur = reshape(apply("norm", reshape(cur, size, heads, tokens)), embd, tokens)
        cur = apply("add", apply("mul", cur, b.need("time_mix_ln.weight")), b.need("time_mix_ln.bias"))
    else:
        cur = reshape(cur, embd, tokens)
    weights = reshape(b.need("time_mix_r_k.weight"), size, heads)
    rk = new("sum_rows", F32, (1, heads, tokens), apply("mul", apply("mul", k, r), weights))
    cur = apply("add", cur, reshape(apply("mul", v3, rk), embd, tokens))
    cur = apply("mul", cur, g) if g is not None else cur
    return reshape(b.linear("time_mix_output", cur), embd, tokens // slots, slots), first_values
