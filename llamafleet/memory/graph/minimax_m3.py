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
    apply,
    cont,
    get_rows,
    mul_mat,
    mul_mat_hadamard,
    new,
    permute,
    reshape,
    transpose,
    view,
)

# Of the reserved graph, where the cache is empty (src/llama-kv-cache-msa.cpp, llama_kv_cache_msa_context::get_n_pos).
POSITIONS = 256


class Inputs(NamedTuple):
    """Graph inputs that all layers share."""

    ids: Tensor  # cells to write the indexer's keys to
    bias: Tensor  # selects the blocks that are always attended to
    visible: Tensor  # mask by position
    cells: Tensor  # the cell of each position
    blocks: Tensor  # the block of each cell
    mask: Tensor  # attention mask as f32


def is_sparse(b: Builder) -> bool:
    """Does this layer attend to picked blocks only? Only with flash attention and one cache for each slot."""
    separate_caches = b.context.slots == 1 or not b.context.unified
    return "indexer.q_proj.weight" in b.layers[b.layer] and b.context.flash_attention and separate_caches


def attend_blocks(b: Builder, cur: Tensor, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """Store K, V and the indexer's keys, and attend to the blocks that the indexer picks."""
    size, count = b.shape.indexer.key, b.shape.indexer.heads
    inputs, cells, (kind_k, kind_v) = _inputs(b), b.context.stream_cells, b.cache_kinds
    k_ids, v_ids, _ = b.attention_inputs(False)
    query = b.norm(reshape(b.linear("indexer.q_proj", cur), size, count, b.tokens), "indexer.q_norm")
    key = b.norm(reshape(b.linear("indexer.k_proj", cur), size, 1, b.tokens), "indexer.k_norm")
    query, key = apply("rope", query, positions), apply("rope", key, positions)
    home = b.backend_of("cache", b.layer)
    keys = ggml.cache(kind_k, (size, cells, b.streams), home)
    b.store(keys, key, inputs.ids)
    size_k, size_v, heads = k.ne[0], v.ne[0], k.ne[1]
    hadamard_k, hadamard_v = b.hadamard("k", size_k, False), b.hadamard("v", size_v, False)
    if hadamard_k is not None:
        q, k = mul_mat_hadamard(q, hadamard_k), mul_mat_hadamard(k, hadamard_k)
    v = mul_mat_hadamard(v, hadamard_v) if hadamard_v is not None else v
    for tensor in (q, k, v):
        b.graph.expand(tensor)
    stored_k = ggml.cache(kind_k, (size_k * heads, cells, b.streams), home)
    stored_v = ggml.cache(kind_v, (size_v * heads, cells, b.streams), home)
    b.store(stored_k, k, k_ids)
    b.store(stored_v, v, v_ids)
    cached = b.read_cache(keys, size, 1, cells), b.read_cache(stored_k, size_k, heads, cells)
    read_v, out = b.read_cache(stored_v, size_v, heads, cells), None
    for _ in range(b.streams):
        attended = _attend_stream(b, inputs, query, q, *cached, read_v)
        out = attended if out is None else ggml.concat(out, attended, 1)
    assert out is not None  # there is at least one stream
    return out if hadamard_v is None else mul_mat_hadamard(out, hadamard_v)


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


def _attend_stream(b: Builder, inputs: Inputs, query: Tensor, q: Tensor, keys: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one slot's tokens: score blocks, mask all but the top blocks, attend in each group of heads."""
    seq_tokens, cells, (size, groups) = b.tokens // b.streams, b.context.stream_cells, query.ne[:2]
    blocks, width = inputs.bias.ne[0], inputs.visible.ne[0]
    query = view(query, (size, groups, seq_tokens), query.nb[1:3])
    bias = view(inputs.bias, (blocks, 1, seq_tokens), (inputs.bias.nb[1], inputs.bias.nb[1]))
    visible = view(inputs.visible, (width, 1, seq_tokens), (inputs.visible.nb[1], inputs.visible.nb[1]))
    keys_by_position = get_rows(view(keys, (size, cells), (keys.nb[2],)), view(inputs.cells, (width,)))
    scores = reshape(mul_mat(keys_by_position, reshape(query, size, groups * seq_tokens)), width, groups, seq_tokens)
    scores = ggml.inplace("add", scores, visible)
    scores = apply("add", new("pool", F32, (blocks, groups, seq_tokens), scores), bias)
    top_k = min(b.shape.indexer.top, blocks)
    top_blocks = new("top_k", I32, (top_k, groups, seq_tokens), scores)
    masked = new("cast", F16, bias.ne, apply("scale", bias))
    masked = new("repeat", F16, (blocks, groups, seq_tokens), masked)
    zeros = apply("scale", new("cast", F32, top_blocks.ne, top_blocks))
    block_mask = ggml.set_rows(
        reshape(masked, 1, blocks, groups * seq_tokens),
        reshape(zeros, 1, top_k, groups * seq_tokens),
        reshape(top_blocks, top_k, groups * seq_tokens),
    )
    block_mask = cont(permute(reshape(block_mask, blocks, groups, seq_tokens), 0, 2, 1, 3))
    by_block = cont(transpose(reshape(block_mask, blocks, seq_tokens * groups)))
    cell_mask = cont(transpose(get_rows(by_block, view(inputs.blocks, (cells,)))))
    mask = view(inputs.mask, (cells, seq_tokens, 1), (inputs.mask.nb[1], inputs.mask.nb[3]))
    mask = ggml.inplace("add", reshape(cell_mask, cells, seq_tokens, groups), mask)
    mask = reshape(mask, cells, seq_tokens, 1, groups)
    mask = new("cast", F16, mask.ne, mask)
    q = view(q, (q.ne[0], q.ne[1], seq_tokens), q.nb[1:3])
    k, v = (permute(view(x, x.ne[:3], x.nb[1:]), 0, 3, 1, 2) for x in (k, v))
    return _attn_msa_fa(b, q, k, v, mask)


def _attn_msa_fa(b: Builder, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Flash attention with groups of heads in the dimension of streams (build_attn_msa_fa)."""
    size, heads, tokens, groups = q.ne[0], q.ne[1], q.ne[2], k.ne[3]
    q = permute(reshape(q, size, heads // groups, groups, tokens), 0, 2, 3, 1)
    out = ggml.flash_attn(q, k, v, mask, None)
    out.bytes += b.converted_bytes(k, v)
    out = permute(out, 0, 1, 3, 2)
    if tokens > 1 and groups > 1:
        out = cont(out)
    return reshape(out, size * heads, tokens)
