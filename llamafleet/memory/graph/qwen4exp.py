"""Qwen3.8-Flash-Next: several residual streams, a delta net or attention to picked blocks, hashed n-gram embeddings.

Source: src/models/qwen4exp.cpp and src/llama-memory-hybrid-idx.cpp at b11434.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from llamafleet.memory.graph import ggml
from llamafleet.memory.graph.builder import Builder, GraphUnknownError
from llamafleet.memory.graph.delta_net import delta_net
from llamafleet.memory.graph.ggml import (
    F16,
    F32,
    I32,
    I64,
    Tensor,
    apply,
    concat,
    cont,
    get_rows,
    mul_mat,
    mul_mat_hadamard,
    new,
    reshape,
    transpose,
    view,
)
from llamafleet.memory.graph.mla import INDEXER_HEADS, INDEXER_SIZE
from llamafleet.memory.graph.recurrent_state import build_conv_state

POOL_PADDING = 64  # kpool_pad


class Pools(NamedTuple):
    """Graph inputs of the pooled keys, which all layers with attention share (llm_graph_input_kpool)."""

    ids: Tensor
    cells: Tensor
    members: Tensor
    mask: Tensor
    tail: Tensor
    new_members: Tensor
    new_cells: Tensor
    new_positions: Tensor


def start(b: Builder, cur: Tensor) -> Tensor:
    """The embeddings, repeated for each residual stream; n-gram embeddings are gathered beside them."""
    streams = b.shape.residual_streams
    if any(b.shape.indexer.layers):
        _pools(b)
    if b.shape.ngrams.heads:
        b.graph.expand(_ngram_embeddings(b))
    cur = new("repeat", F32, (b.embd, streams, b.tokens), reshape(cur, b.embd, 1, b.tokens))
    b.graph.expand(cur)
    return cur


def streams_layer(
    b: Builder, cur: Tensor, positions: Tensor, outputs: Tensor | None, feed_forward: Callable[[Tensor], Tensor]
) -> Tensor:
    """One layer: each part takes one row mixed from the streams, and its result is added to each of them."""
    if b.shape.ngrams.layers[b.layer]:
        cur = _add_ngrams(b, cur)
    mixed, inject = _mix(b, cur, "hc_attn")
    b.graph.expand(mixed)
    result = delta_net(b, mixed) if b.shape.state.layers[b.layer] else _attention(b, mixed, positions)
    if outputs is not None:
        result, inject = get_rows(result, outputs), get_rows(inject, outputs)
        flat = get_rows(reshape(cur, b.embd * cur.ne[1], cur.ne[2]), outputs)
        cur = reshape(flat, b.embd, b.shape.residual_streams, flat.ne[1])
    cur = _combine(cur, result, inject)
    mixed, inject = _mix(b, cur, "hc_ffn")
    return _combine(cur, feed_forward(mixed), inject)


def head(b: Builder, cur: Tensor) -> Tensor:
    """The streams' mean, weighted by gates: it takes the place of the output norm (build_hc_mix without fusion)."""
    rows, gate = _gate(b, cur, "output_hc")
    gated = reshape(apply("mul", rows, apply("unary", gate)), *cur.ne[:3])
    total = cont(view(gated, (b.embd, cur.ne[2]), (gated.nb[2],)))
    for _ in range(1, cur.ne[1]):
        total = apply("add", total, view(gated, (b.embd, cur.ne[2]), (gated.nb[2],)))
    return apply("scale", total)


def _gate(b: Builder, cur: Tensor, part: str) -> tuple[Tensor, Tensor]:
    """The normed streams as one row for each token, and their gates."""
    layer = None if b.layer >= 0 else -1

    def need(name: str) -> Tensor:
        tensor = b.weight(f"{part}_{name}.weight", layer)
        if tensor is None:
            raise GraphUnknownError(f"{b.shape.architecture.name}: no tensor {part}_{name}")
        return tensor

    normed = apply("mul", apply("rms_norm", cur), need("norm"))
    rows = reshape(normed, cur.ne[0] * cur.ne[1], cur.ne[2])
    low_rank = apply("unary", apply("scale", mul_mat(need("down"), rows)))
    return rows, mul_mat(need("up"), low_rank)


def _mix(b: Builder, cur: Tensor, part: str) -> tuple[Tensor, Tensor]:
    """One row mixed from the streams, and the weights by which the result is added to them (build_hc_mix)."""
    rows, gate = _gate(b, cur, part)
    mixed = new("hc_pre", F32, (b.embd, cur.ne[2]), reshape(rows, *cur.ne[:3]), reshape(gate, *cur.ne[:3]))
    return mixed, mul_mat(b.need(f"{part}_inject.weight"), rows)


def _combine(cur: Tensor, result: Tensor, inject: Tensor) -> Tensor:
    """The streams with a part's result added to each (build_hc_combine)."""
    weights = apply("scale", apply("unary", apply("scale", inject)))
    return new("hc_post", F32, cur.ne, result, cur, weights)


# Attention


def _attention(b: Builder, cur: Tensor, positions: Tensor) -> Tensor:
    """Attention with a gate, to the blocks that the indexer picks (build_layer_attn)."""
    size, heads, kv_heads = b.head_sizes()[0], b.shape.heads[b.layer], b.shape.kv_heads[b.layer]
    kind = F16 if b.context.flash_attention else F32
    mask = b.once("mask", lambda: ggml.graph_input(kind, b.context.stream_cells, b.tokens // b.streams, 1, b.streams))
    selected = _selected(b, cur, positions, mask) if b.shape.indexer.layers[b.layer] else mask
    both = b.linear("attn_q", cur)
    strides = (4 * 2 * size, 4 * 2 * size * heads)
    q, gate = (view(both, (size, heads, b.tokens), strides) for _ in range(2))
    q = apply("rope", b.norm(q, "attn_q_norm"), positions)
    k = b.norm(reshape(b.linear("attn_k", cur), size, kv_heads, b.tokens), "attn_k_norm")
    k = apply("rope", k, positions)
    v = reshape(b.linear("attn_v", cur), size, kv_heads, b.tokens)
    attended = _attend(b, q, k, v, selected)
    gate = apply("unary", cont(gate, size * heads, b.tokens))
    return b.linear("attn_output", apply("mul", attended, gate))


def _attend(b: Builder, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Store K and V, and attend to the cells that the mask leaves (build_attn_qsa)."""
    size, kv_heads, cells, flash = k.ne[0], k.ne[1], b.context.stream_cells, b.context.flash_attention
    hadamard_k, hadamard_v = b.hadamard("k", size, False), b.hadamard("v", size, False)
    if hadamard_k is not None:
        q, k = mul_mat_hadamard(q, hadamard_k), mul_mat_hadamard(k, hadamard_k)
    v = mul_mat_hadamard(v, hadamard_v) if hadamard_v is not None else v
    for tensor in (q, v, k):
        b.graph.expand(tensor)
    home, (_, kind_v) = b.backend_of("cache", b.layer), b.cache_kinds
    width = size * kv_heads
    k_ids = b.once("k ids", lambda: ggml.graph_input(I64, b.tokens))
    v_ids = b.once("v ids", lambda: ggml.graph_input(I64, b.tokens * (1 if flash else width)))
    stored_k, stored_v = (ggml.cache(kind, (width, cells, b.streams), home) for kind in b.cache_kinds)
    b.store(stored_k, k, k_ids)
    (b.store if flash else b.store_transposed)(stored_v, v, v_ids)
    read_v = b.read_cache(stored_v, size, kv_heads, cells)
    if not flash:
        line = ggml.row_bytes(kind_v, cells)
        read_v = view(stored_v, (cells, kv_heads, size, b.streams), (line * size, line, line * width))
    mask = reshape(mask, *mask.ne)
    cur = b.build_attn_mha(q, b.read_cache(stored_k, size, kv_heads, cells), read_v, mask, None)
    return cur if hadamard_v is None else mul_mat_hadamard(cur, hadamard_v)


def _pools(b: Builder) -> Pools:
    return b.once("pools", lambda: _make_pools(b))


def _make_pools(b: Builder) -> Pools:
    size, heads, pool = b.shape.indexer.key, b.shape.indexer.heads, max(b.shape.compress_ratios, default=0)
    if size != INDEXER_SIZE or heads not in INDEXER_HEADS or pool < 2:
        raise GraphUnknownError(f"indexer with {heads} heads of {size} elements, blocks of {pool}")
    count = b.context.stream_cells // pool * b.context.slots
    padded = max(POOL_PADDING, -(-(count + 1) // POOL_PADDING) * POOL_PADDING)
    fresh = max(count, 1)
    pools = Pools(
        ggml.graph_input(I64, b.tokens),
        ggml.graph_input(I32, padded),
        ggml.graph_input(I32, pool, padded),
        ggml.graph_input(F16, padded, b.tokens),
        ggml.graph_input(I32, pool - 1, b.tokens),
        ggml.graph_input(I32, pool, fresh),
        ggml.graph_input(I64, fresh),
        ggml.graph_input(I32, 4 * fresh),
    )
    for tensor in (pools.cells, pools.members, pools.mask, pools.tail):
        b.graph.expand(tensor)
    return pools


def _selected(b: Builder, cur: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """The mask with all cells closed but those of the top blocks and of the incomplete last one (build_qsa_sel)."""
    pools, tokens = _pools(b), b.tokens
    members, count = pools.members.ne[0], pools.cells.ne[0]
    score = _scores(b, cur, positions, pools)
    top = min(count, b.shape.indexer.top // members)
    top_k = new("top_k", I32, (top, tokens), score)
    ids = reshape(get_rows(pools.members, reshape(top_k, top * tokens)), members * top, tokens)
    ids = concat(ids, pools.tail, 0)
    picked, cells = ids.ne[0], mask.ne[0]
    b.graph.expand(ids)
    closed = _repeated(_filled(mask.type, cells + picked), tokens)
    zeros = _repeated(_filled(mask.type, picked), tokens)
    live = _live(pools, score, top_k, members, tokens)
    dump = apply("scale", new("cumsum", F32, live.ne, apply("fill", live)))
    chosen = new("cast", F32, ids.ne, ids)
    chosen = apply("add", apply("mul", apply("sub", chosen, dump), live), dump)
    chosen = new("cast", I32, chosen.ne, chosen)
    opened = ggml.set_rows(closed, zeros, reshape(chosen, picked, tokens, 1))
    row = opened.nb[2]
    opened = view(opened, mask.ne, (row, row * mask.ne[1], row * mask.ne[1] * mask.ne[2]))
    return apply("add", opened, mask)


def _scores(b: Builder, cur: Tensor, positions: Tensor, pools: Pools) -> Tensor:
    """Each block's score for each token; the keys of the batch are stored, and pooled where a block is complete."""
    size, heads, tokens, cells = b.shape.indexer.key, b.shape.indexer.heads, b.tokens, b.context.stream_cells
    members, fresh = pools.new_members.ne[:2]
    raw = b.linear("indexer.k_proj", cur)
    packed = reshape(concat(raw, _filled(F32, size, tokens), 0), 2 * size, 1, tokens)
    stored = ggml.cache(b.cache_kinds[0], (2 * size, cells, b.streams), b.backend_of("cache", b.layer))
    b.store(stored, packed, pools.ids)
    raw_keys, pooled_keys = (view(stored, (size, cells * b.streams), (stored.nb[1],)) for _ in range(2))
    rows = reshape(get_rows(raw_keys, reshape(pools.new_members, members * fresh)), size, members, fresh)
    mean = cont(view(rows, (size, fresh), (rows.nb[2],)))
    for _ in range(1, members):
        mean = apply("add", mean, view(rows, (size, fresh), (rows.nb[2],)))
    mean = reshape(b.norm(apply("scale", mean), "indexer.k_norm"), size, 1, fresh)
    mean = reshape(apply("rope", mean, pools.new_positions), size, fresh)
    b.graph.expand(ggml.set_rows(pooled_keys, mean, pools.new_cells))
    keys = reshape(get_rows(pooled_keys, pools.cells), size, 1, pools.cells.ne[0])
    q = b.norm(reshape(b.linear("indexer.q_proj", cur), size, heads, tokens), "indexer.q_norm")
    q = apply("rope", q, positions)
    return new("lightning_indexer", F32, (pools.cells.ne[0], tokens), q, keys, _filled(F32, heads, tokens), pools.mask)


def _live(pools: Pools, score: Tensor, top_k: Tensor, members: int, tokens: int) -> Tensor:
    """Which of the picked cells are there: 1, else 0."""
    top = top_k.ne[0]
    scores = get_rows(reshape(score, 1, score.ne[0], tokens), top_k)
    of_pools = apply("clamp", apply("scale", scores))
    of_pools = reshape(new("repeat", F32, (members, top, tokens), of_pools), members * top, tokens)
    of_tail = apply("clamp", apply("scale", new("cast", F32, pools.tail.ne, pools.tail)))
    return concat(of_pools, of_tail, 0)


def _filled(kind: str, *ne: int) -> Tensor:
    """A tensor of one value (ggml_fill of a new tensor)."""
    shape = (*ne, 1, 1, 1)[:4]
    return apply("fill", Tensor("none", kind, (shape[0], shape[1], shape[2], shape[3])))


def _repeated(row: Tensor, tokens: int) -> Tensor:
    """The row for each token, one element for each row."""
    repeated = new("repeat", row.type, (row.ne[0], tokens), row)
    return reshape(repeated, 1, row.ne[0], tokens)


# Embeddings of n-grams


def _ngram_embeddings(b: Builder) -> Tensor:
    """Rows of a table by the hash of each token's n-grams, one row for each head (build_inp_ple)."""

    def make() -> Tensor:
        table, heads = b.weight("per_layer_token_embd.weight", -1), b.shape.ngrams.heads
        if table is None:
            raise GraphUnknownError(f"{b.shape.architecture.name}: no tensor per_layer_token_embd.weight")
        rows = get_rows(table, ggml.graph_input(I32, heads * b.tokens))
        return reshape(rows, table.ne[0] * heads, b.tokens)

    return b.once("n-grams", make)


def _add_ngrams(b: Builder, cur: Tensor) -> Tensor:
    """Add the n-grams' values to the streams, gated and convolved over earlier tokens (build_ple)."""
    streams, tokens, slots = b.shape.residual_streams, b.tokens, b.context.slots
    width, seq_tokens = b.embd * streams, tokens // slots

    def grouped_norm(x: Tensor, part: str) -> Tensor:
        split = reshape(x, b.embd, streams, tokens)
        return apply("mul", apply("rms_norm", split), b.need(f"{part}.weight"))

    rows = _ngram_embeddings(b)
    key = grouped_norm(b.linear("ple_key", rows), "ple_norm_key")
    query = grouped_norm(cur, "ple_norm_query")
    similar = apply("scale", new("sum_rows", F32, (1, streams, tokens), apply("mul", key, query)))
    size = apply("sqrt", apply("clamp", apply("unary", similar)))
    gate = apply("unary", apply("mul", apply("unary", similar), size))
    value = reshape(b.linear("ple_value", rows), b.embd, 1, tokens)
    gated = apply("mul", new("repeat", F32, (b.embd, streams, tokens), value), gate)
    normed = reshape(grouped_norm(reshape(gated, width, tokens), "ple_norm_conv"), width, tokens)
    kernel = b.need("ple_conv1d.weight")
    padded = build_conv_state(b, reshape(normed, width, seq_tokens, slots), width, b.shape.ngrams.history + 1)
    total: Tensor | None = None
    for _ in range(kernel.ne[0]):
        shifted = cont(transpose(view(padded, (seq_tokens, width, slots), (padded.nb[1], padded.nb[2]))))
        column = reshape(cont(view(kernel, (1, width), (kernel.nb[1],))), width)
        column = column if column.type == F32 else new("cast", F32, column.ne, column)
        term = apply("mul", shifted, column)
        total = apply("add", total, term) if total else term
    assert total is not None  # a kernel has at least one column
    convolved = reshape(cont(apply("unary", total)), b.embd, streams, tokens)
    return apply("add", cur, apply("add", gated, convolved))
