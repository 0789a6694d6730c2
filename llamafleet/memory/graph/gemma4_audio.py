"""The graph of Gemma 4's encoder of sound: convolutions, then layers of attention within blocks and of convolution.

Source: tools/mtmd/models/gemma4a.cpp, clip_graph_gemma4a at b11434.
"""

from __future__ import annotations

from llamafleet.memory.graph import ggml
from llamafleet.memory.graph.ggml import F32, Tensor, apply, cont, mul_mat, new, permute, reshape, view
from llamafleet.memory.graph.tower import LAYER, RMS, Tower, conv_2d

BLOCK, PAST = 12, 12  # positions of a block, and before it, that are attended to
SEEN = BLOCK + PAST
RELATIVE = PAST + 1  # relative positions
PADDING = 4  # of the convolution in a layer


def gemma4_audio(t: Tower) -> Tensor:
    """From the spectrum of a sound to embeddings."""
    cur = _halved_twice(t)
    count = cur.ne[1]
    blocks = -(-count // BLOCK)
    places = ggml.graph_input(F32, t.encoder.heads * t.encoder.head, RELATIVE)
    mask = ggml.graph_input(F32, SEEN, BLOCK, blocks)
    for layer in range(t.encoder.layers):
        name = f"a.blk.{layer}"
        cur = _half_step(t, name, cur, "")
        cur = apply("add", cur, _attention(t, name, cur, places, mask, blocks))
        cur = apply("add", cur, _convolution(t, name, cur))
        cur = _half_step(t, name, cur, "_1")
        if f"{name}.ln2.weight" in t.tensors:
            cur = t.scaled(f"{name}.ln2.weight", apply(RMS, cur))
    if "a.pre_encode.out.weight" in t.tensors:
        cur = t.linear("a.pre_encode.out", cur)
    cur = t.scaled("mm.a.soft_emb_norm.weight", apply(RMS, cur))
    return t.multiply("mm.a.input_projection.weight", cur) if "mm.a.input_projection.weight" in t.tensors else cur


def _halved_twice(t: Tower) -> Tensor:
    """Two convolutions, each to half of the frames and bins, and a projection."""
    cur = cont(ggml.transpose(t.raw_input(1)))
    for number in range(2):
        part = f"a.conv1d.{number}"
        cur = t.added(f"{part}.bias", conv_2d(t.need(f"{part}.weight"), cur, 2, 1))
        if f"{part}.norm.weight" in t.tensors:
            cur = apply(LAYER, cont(permute(cur, 1, 2, 0, 3)))
            cur = apply("mul", cur, t.need(f"{part}.norm.weight"))
            cur = cont(permute(cur, 2, 0, 1, 3))
        cur = apply("unary", cur)
    cur = cont(permute(cur, 1, 2, 0, 3))
    return t.linear("a.input_projection", reshape(cur, cur.ne[0] * cur.ne[1], cur.ne[2]))


def _half_step(t: Tower, name: str, inputs: Tensor, which: str) -> Tensor:
    """A feed-forward part whose result counts half. `which`: "" before attention, "_1" behind the convolution."""
    cur = t.scaled(f"{name}.ffn_norm{which}.weight", apply(RMS, inputs))
    cur = apply("unary", t.multiply(f"{name}.ffn_up{which}.weight", cur))
    cur = t.multiply(f"{name}.ffn_down{which}.weight", cur)
    post = f"{name}.ffn_post_norm{which}.weight"
    if post in t.tensors:
        cur = t.scaled(post, apply(RMS, cur))
    return apply("add", inputs, apply("scale", cur))


def _attention(t: Tower, name: str, inputs: Tensor, places: Tensor, mask: Tensor, blocks: int) -> Tensor:
    one, count = t.encoder, inputs.ne[1]
    size, heads = one.head, one.heads
    norm = f"{name}.attn_pre_norm.weight" if f"{name}.attn_pre_norm.weight" in t.tensors else f"{name}.ln1.weight"
    cur = t.scaled(norm, apply(RMS, inputs)) if norm in t.tensors else inputs
    q, k, v = (reshape(t.multiply(f"{name}.attn_{part}.weight", cur), size, heads, count) for part in "qkv")
    q, k = _scaled(t, f"{name}.per_dim_scale.weight", q), _scaled(t, f"{name}.per_dim_k_scale.weight", k)
    q = reshape(new("pad", F32, (size, heads, blocks * BLOCK), q), size, heads, BLOCK, blocks)
    q = cont(permute(q, 0, 3, 1, 2))
    k = cont(permute(_windows(k, blocks), 0, 3, 1, 2))
    v = cont(permute(_windows(v, blocks), 1, 3, 0, 2))
    scores = mul_mat(k, q)
    relative = t.weight(f"{name}.attn_k_rel.weight")
    if relative is not None:
        scores = apply("add", scores, _shifted(t, relative, places, q, blocks))
    scores = apply("scale", apply("unary", apply("scale", scores)))
    scores = apply("soft_max", apply("add", scores, mask))
    cur = cont(permute(mul_mat(v, scores), 0, 2, 3, 1))
    cur = cont(cur, size * heads, blocks * BLOCK)
    if blocks * BLOCK > count:
        cur = cont(view(cur, (size * heads, count), (cur.nb[1],)))
    cur = t.linear(f"{name}.attn_out", cur)
    post = f"{name}.attn_post_norm.weight"
    return t.scaled(post, apply(RMS, cur)) if post in t.tensors else cur


def _scaled(t: Tower, name: str, cur: Tensor) -> Tensor:
    scale = t.weight(name)
    cur = apply("scale", cur)
    return cur if scale is None else apply("mul", cur, reshape(scale, scale.ne[0], 1, 1))


def _windows(cur: Tensor, blocks: int) -> Tensor:
    """What each block sees: windows that overlap."""
    size, heads = cur.ne[0], cur.ne[1]
    padded = new("pad", F32, (size, heads, SEEN * blocks), cur)
    strides = (padded.nb[1], padded.nb[2], BLOCK * padded.nb[2])
    return cont(view(padded, (size, heads, SEEN, blocks), strides))


def _shifted(t: Tower, relative: Tensor, places: Tensor, q: Tensor, blocks: int) -> Tensor:
    """The scores of relative positions, each row shifted to its own."""
    size, heads = t.encoder.head, t.encoder.heads
    keys = cont(permute(reshape(mul_mat(relative, places), size, heads, RELATIVE), 0, 2, 1, 3))
    cur = mul_mat(keys, reshape(q, size, BLOCK * blocks, heads))
    cur = reshape(cur, RELATIVE, BLOCK, blocks, heads)
    cur = reshape(new("pad", F32, (SEEN + 1, BLOCK, blocks, heads), cur), (SEEN + 1) * BLOCK, blocks, heads)
    cur = cont(view(cur, (BLOCK * SEEN, blocks, heads), (cur.nb[1], cur.nb[2])))
    return reshape(cur, SEEN, BLOCK, blocks, heads)


def _convolution(t: Tower, name: str, inputs: Tensor) -> Tensor:
    """A gated convolution over time. Files have its two norms under each other's name (tools/mtmd/clip.cpp,
    load_tensors)."""
    first = f"{name}.conv_norm.weight"
    cur = t.scaled(first, apply(RMS, inputs)) if first in t.tensors else apply(RMS, inputs)
    cur = t.multiply(f"{name}.conv_pw1.weight", cur)
    half = cur.ne[0] // 2
    gate = apply("unary", cont(view(cur, (half, cur.ne[1]), (cur.nb[1],))))
    cur = apply("mul", view(cur, (half, cur.ne[1]), (cur.nb[1],)), gate)
    cur = cont(ggml.transpose(cur))
    cur = new("pad", F32, (cur.ne[0] + PADDING, cur.ne[1]), cur)
    kernel = t.need(f"{name}.conv_dw.weight")
    cur = new("ssm_conv", F32, (kernel.ne[1], cur.ne[0] - kernel.ne[0] + 1, cur.ne[2]), cur, kernel)
    cur = t.added(f"{name}.conv_dw.bias", cur)
    if f"{name}.norm_conv.weight" in t.tensors:
        cur = apply("mul", apply(RMS, cur), t.need(f"{name}.norm_conv.weight"))
    return t.multiply(f"{name}.conv_pw2.weight", apply("unary", cur))
