"""MiniMax-M3: each group of heads attends to blocks that an indexer picks (src/models/minimax-m3.cpp at b11434)."""

from __future__ import annotations

from typing import NamedTuple

from llamafleet.memory.graph import ggml
from llamafleet.memory.graph.builder import Builder
from llamafleet.memory.graph.ggml import (
    F16,
    F32,
    I32,
    I64,
    Tensor,
    cont,
    get_rows,
    mul_mat,
    new,
    permute,
    reshape,
    rotated,
    same,
    transpose,
    view,
)

POSITIONS = 256  # that the graph is reserved for: none are in the cache yet (llama_kv_cache_msa_context::get_n_pos)


class Inputs(NamedTuple):
    """One of each for all layers."""

    ids: Tensor  # where the indexer's keys go
    bias: Tensor  # of the blocks that are always attended to
    visible: Tensor  # by position
    cells: Tensor  # of positions
    blocks: Tensor  # of cells
    mask: Tensor


def is_sparse(b: Builder) -> bool:
    """Does this layer pick blocks? Not without flash attention, nor where slots share a cache: it is dense then."""
    alone = b.context.slots == 1 or not b.context.unified
    return "indexer.q_proj.weight" in b.layers[b.layer] and b.context.flash_attention and alone


def attend_blocks(b: Builder, cur: Tensor, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """What build_attn does in dense layers: store K, V and the indexer's keys, attend."""
    size, count = b.shape.indexer.key, b.shape.indexer.heads
    inputs, cells, kind = _inputs(b), b.context.stream_cells, b.context.kv_type.upper()
    k_ids, v_ids, _ = b.attention_inputs(False)
    query = b.norm(reshape(b.linear("indexer.q_proj", cur), size, count, b.tokens), "indexer.q_norm")
    key = b.norm(reshape(b.linear("indexer.k_proj", cur), size, 1, b.tokens), "indexer.k_norm")
    query, key = same("rope", query, positions), same("rope", key, positions)
    home = b.homes("cache", b.layer)
    keys = ggml.cache(kind, (size, cells, b.streams), home)
    b.store(keys, key, inputs.ids)
    size_k, size_v, heads = k.ne[0], v.ne[0], k.ne[1]
    turn_k, turn_v = b.rotation("k", size_k, False), b.rotation("v", size_v, False)
    if turn_k is not None:
        q, k = rotated(q, turn_k), rotated(k, turn_k)
    v = rotated(v, turn_v) if turn_v is not None else v
    for tensor in (q, k, v):
        b.graph.expand(tensor)
    stored_k = ggml.cache(kind, (size_k * heads, cells, b.streams), home)
    stored_v = ggml.cache(kind, (size_v * heads, cells, b.streams), home)
    b.store(stored_k, k, k_ids)
    b.store(stored_v, v, v_ids)
    cached = b.cached(keys, size, 1, cells), b.cached(stored_k, size_k, heads, cells)
    read_v, out = b.cached(stored_v, size_v, heads, cells), None
    for _ in range(b.streams):
        one = _stream(b, inputs, query, q, *cached, read_v)
        out = one if out is None else ggml.concat(out, one, 1)
    assert out is not None  # there is one stream at least
    return out if turn_v is None else rotated(out, turn_v)


def _inputs(b: Builder) -> Inputs:
    return b.once("block inputs", lambda: _make_inputs(b))


def _make_inputs(b: Builder) -> Inputs:
    block, cells = b.shape.indexer.block, b.context.stream_cells
    width = -(-POSITIONS // block) * block
    _, _, mask = b.attention_inputs(False)
    return Inputs(
        ggml.graph_input(I64, b.tokens),
        ggml.graph_input(F32, width // block, b.tokens),
        ggml.graph_input(F32, width, b.tokens),
        ggml.graph_input(I32, width, b.streams),
        ggml.graph_input(I32, cells, b.streams),
        new("cast", F32, mask.ne, mask),
    )


def _stream(b: Builder, inputs: Inputs, query: Tensor, q: Tensor, keys: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One slot's tokens: scores of blocks, the best of them, a mask of these, attention group by group."""
    each, cells, (size, groups) = b.tokens // b.streams, b.context.stream_cells, query.ne[:2]
    blocks, width = inputs.bias.ne[0], inputs.visible.ne[0]
    query = view(query, (size, groups, each), query.nb[1:3])
    bias = view(inputs.bias, (blocks, 1, each), (inputs.bias.nb[1], inputs.bias.nb[1]))
    visible = view(inputs.visible, (width, 1, each), (inputs.visible.nb[1], inputs.visible.nb[1]))
    at_positions = get_rows(view(keys, (size, cells), (keys.nb[2],)), view(inputs.cells, (width,)))
    scores = reshape(mul_mat(at_positions, reshape(query, size, groups * each)), width, groups, each)
    scores = ggml.inplace("add", scores, visible)
    scores = same("add", new("pool", F32, (blocks, groups, each), scores), bias)
    best = min(b.shape.indexer.top, blocks)
    chosen = new("top_k", I32, (best, groups, each), scores)
    closed = new("cast", F16, bias.ne, same("scale", bias))
    closed = new("repeat", F16, (blocks, groups, each), closed)
    zeros = same("scale", new("cast", F32, chosen.ne, chosen))
    opened = ggml.set_rows(
        reshape(closed, 1, blocks, groups * each),
        reshape(zeros, 1, best, groups * each),
        reshape(chosen, best, groups * each),
    )
    opened = cont(permute(reshape(opened, blocks, groups, each), 0, 2, 1, 3))
    across = cont(transpose(reshape(opened, blocks, each * groups)))
    of_cells = cont(transpose(get_rows(across, view(inputs.blocks, (cells,)))))
    mask = view(inputs.mask, (cells, each, 1), (inputs.mask.nb[1], inputs.mask.nb[3]))
    mask = reshape(ggml.inplace("add", reshape(of_cells, cells, each, groups), mask), cells, each, 1, groups)
    mask = new("cast", F16, mask.ne, mask)
    q = view(q, (q.ne[0], q.ne[1], each), q.nb[1:3])
    k, v = (permute(view(one, one.ne[:3], one.nb[1:]), 0, 3, 1, 2) for one in (k, v))
    return _attend(b, q, k, v, mask)


def _attend(b: Builder, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """build_attn_msa_fa: the groups of heads take the place of slots."""
    size, heads, tokens, groups = q.ne[0], q.ne[1], q.ne[2], k.ne[3]
    q = permute(reshape(q, size, heads // groups, groups, tokens), 0, 2, 3, 1)
    out = ggml.flash_attn(q, k, v, mask, None)
    if b.scratch and k.type != F16:
        out.bytes += (ggml.elements(k) + ggml.elements(v)) * 2
    out = permute(out, 0, 1, 3, 2)
    if tokens > 1 and groups > 1:
        out = cont(out)
    return reshape(out, size * heads, tokens)
