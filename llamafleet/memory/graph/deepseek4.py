"""DeepSeek V4: four residual streams; sliding-window attention plus compressed KV cells, some picked by the indexer.

Source: src/models/deepseek4.cpp and src/llama-kv-cache-dsv4.cpp at b11434.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from llamafleet.memory.graph import ggml
from llamafleet.memory.graph.builder import Builder, GraphUnknownError
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
    new,
    permute,
    reshape,
    view,
)
from llamafleet.memory.graph.mla import INDEXER_HEADS, INDEXER_SIZE, top_k_mask
from llamafleet.memory.kv_cache import CSA_RATIO, HCA_RATIO, compressed_cells, window_cells

STREAMS = 4  # residual streams; build_hc_pre's operation takes exactly four


class CompressionPlan(NamedTuple):
    """Graph inputs for compressed cells of one kind, shared by all layers (dsv4_build_reserve_comp_plan)."""

    positions: Tensor
    kept: Tensor  # tokens of the batch to keep in the state
    kept_at: Tensor  # their rows in the state
    read: Tensor  # rows that are compressed to cells
    written: Tensor  # rows of the cache for these cells
    written_at: Tensor  # positions of these cells
    mask: Tensor
    hadamard: Tensor | None


class Inputs(NamedTuple):
    """Graph inputs that all layers share."""

    ids: Tensor
    mask: Tensor
    hadamard: Tensor | None
    csa: CompressionPlan
    hca: CompressionPlan
    indexer: CompressionPlan


def repeated_streams(b: Builder, cur: Tensor) -> Tensor:
    """The embeddings, repeated for each residual stream."""
    b.graph.expand(_inputs(b).mask)
    return new("repeat", F32, (b.embd, STREAMS, b.tokens), reshape(cur, b.embd, 1, b.tokens))


def hc_head(b: Builder, cur: Tensor, outputs: Tensor) -> Tensor:
    """Weighted sum of the residual streams, for the rows that become logits (build_hc_head)."""
    flat, count = get_rows(reshape(cur, b.embd * STREAMS, b.tokens), outputs), outputs.ne[0]
    cur = reshape(flat, b.embd, STREAMS, count)
    mixes = mul_mat(b.need("output_hc_fn.weight"), apply("rms_norm", reshape(cur, b.embd * STREAMS, count)))
    weights = _hc_affine(mixes, b.need("output_hc_scale.weight"), b.need("output_hc_base.weight"))
    weights = apply("scale", apply("unary", weights))
    total: Tensor | None = None
    for _ in range(STREAMS):
        stream = view(cur, (b.embd, count), (cur.nb[2],))
        stream = apply("mul", stream, view(weights, (1, count), (weights.nb[1],)))
        total = apply("add", total, stream) if total else stream
    assert total is not None
    return total


def hyper_connections_layer(
    b: Builder, cur: Tensor, positions: Tensor, feed_forward: Callable[[Tensor], Tensor]
) -> Tensor:
    """One layer: attention and feed-forward part each take one row mixed from the streams; the result is mixed back."""
    mixed, post, comb = _hc_pre(b, cur, "attn")
    cur = _hc_post(_attention(b, b.norm(mixed, "attn_norm"), positions), cur, post, comb)
    mixed, post, comb = _hc_pre(b, cur, "ffn")
    for tensor in (cur, post, comb):
        b.graph.expand(tensor)
    return _hc_post(feed_forward(b.norm(mixed, "ffn_norm")), cur, post, comb)


def _hc_pre(b: Builder, cur: Tensor, part: str) -> tuple[Tensor, Tensor, Tensor]:
    """One row mixed from four streams, and the two matrices that mix the result back (build_hc_pre)."""
    tokens = cur.ne[2]
    mixes = mul_mat(b.need(f"hc_{part}_fn.weight"), apply("rms_norm", reshape(cur, b.embd * STREAMS, tokens)))
    scale, base = b.need(f"hc_{part}_scale.weight"), b.need(f"hc_{part}_base.weight")
    pre, post = (
        _hc_affine(view(mixes, (STREAMS, tokens), (mixes.nb[1],)), view(scale, (1,)), view(base, (STREAMS,)))
        for _ in range(2)
    )
    pre, post = (apply("scale", apply("unary", gate)) for gate in (pre, post))
    comb = new("hc_comb", F32, (STREAMS, STREAMS, tokens), mixes, scale, base)
    return new("hc_pre", F32, (b.embd, tokens), cur, pre), post, comb


def _hc_post(cur: Tensor, residual: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """The streams after mixing in a part's result (build_hc_post)."""
    return new("hc_post", F32, residual.ne, cur, residual, post, comb)


def _hc_affine(cur: Tensor, scale: Tensor, base: Tensor) -> Tensor:
    return apply("add", apply("mul", cur, scale), base)


def _inputs(b: Builder) -> Inputs:
    return b.once("compressed inputs", lambda: _make_inputs(b))


def _make_inputs(b: Builder) -> Inputs:
    window, slots = b.shape.sliding_window, b.context.slots
    kind = F16 if b.context.flash_attention else F32
    size, seq_tokens = b.head_sizes()[0], b.tokens // slots
    indexer = b.shape.indexer.key
    if indexer != INDEXER_SIZE or b.shape.indexer.heads not in INDEXER_HEADS:
        raise GraphUnknownError(f"indexer with {b.shape.indexer.heads} heads of {indexer} elements")
    if b.shape.residual_streams != STREAMS:
        raise GraphUnknownError(f"{b.shape.residual_streams} residual streams, {STREAMS} expected")

    def plan(ratio: int, kind: str, hadamard: Tensor | None) -> CompressionPlan:
        blocks, overlap = b.tokens // ratio + slots, 2 if ratio == CSA_RATIO else 1
        new_states = min(b.tokens, overlap * ratio * slots)
        counts = (b.tokens, new_states, new_states, overlap * ratio * blocks, blocks)
        positions, kept_from, kept_at, read, written_at = (ggml.graph_input(I32, count) for count in counts)
        return CompressionPlan(
            positions,
            kept_from,
            kept_at,
            read,
            ggml.graph_input(I64, blocks),
            written_at,
            ggml.graph_input(kind, compressed_cells(b.context, ratio), seq_tokens, 1, slots),
            hadamard,
        )

    hadamards = [b.hadamard("k", size, True), *(_own_hadamard(b, size) for _ in range(2))]
    return Inputs(
        ggml.graph_input(I64, b.tokens),
        ggml.graph_input(kind, window_cells(b.context, window), seq_tokens, 1, slots),
        hadamards[0],
        plan(CSA_RATIO, kind, hadamards[1]),
        plan(HCA_RATIO, kind, hadamards[2]),
        plan(CSA_RATIO, F16, ggml.graph_input(F32, indexer, indexer)),
    )


def _own_hadamard(b: Builder, size: int) -> Tensor | None:
    """Another Hadamard matrix of the size of the window cache's matrix; None if that cache has none."""
    of_window = b.hadamard("k", size, True)
    return None if of_window is None else ggml.graph_input(F32, *of_window.ne[:2])


def _mul_hadamard(cur: Tensor, hadamard: Tensor | None) -> Tensor:
    return cur if hadamard is None else ggml.mul_mat_hadamard(cur, hadamard)


def _attention(b: Builder, cur: Tensor, positions: Tensor) -> Tensor:
    inputs, size, heads, tokens = _inputs(b), b.head_sizes()[0], b.shape.heads[b.layer], b.tokens
    low_rank_q = b.norm(b.linear("attn_q_a", cur), "attn_q_a_norm")
    q = apply("rope", apply("rms_norm", reshape(b.linear("attn_q_b", low_rank_q), size, heads, tokens)), positions)
    k = b.norm(b.linear("attn_kv", cur), "attn_kv_a_norm")
    k = apply("rope", reshape(k, size, 1, tokens), positions)
    ratio = b.shape.compress_ratios[b.layer]
    keys, mask = None, inputs.mask
    if ratio == CSA_RATIO:
        keys = _compressed_kv(b, cur, inputs.csa, "attn_compressor", CSA_RATIO, size)
        indexer_keys = _compressed_kv(b, cur, inputs.indexer, "indexer_compressor", CSA_RATIO, INDEXER_SIZE)
        top_k = _lid_top_k(b, cur, low_rank_q, positions, indexer_keys)
        mask = top_k_mask(inputs.csa.mask, top_k, inputs.csa.mask.type)
    elif ratio == HCA_RATIO:
        keys, mask = _compressed_kv(b, cur, inputs.hca, "attn_compressor", HCA_RATIO, size), inputs.hca.mask
    q, k = _mul_hadamard(q, inputs.hadamard), _mul_hadamard(k, inputs.hadamard)
    b.graph.expand(q)
    b.graph.expand(k)
    read = _write_and_read_cache(b, k, inputs.ids, size, inputs.mask.ne[0])
    if keys is not None:
        read, mask = concat(read, keys, 2), concat(inputs.mask, mask, 0)
    out = _mul_hadamard(b.build_attn_mha(q, read, read, mask, None), inputs.hadamard)
    out = apply("rope", reshape(out, size, heads, tokens), positions)
    return _output(b, out, size * heads)


def _output(b: Builder, out: Tensor, width: int) -> Tensor:
    """The output projection: two matrices, of which the first is applied to each group of heads."""
    groups, rank = b.shape.output_groups, b.shape.output_rank
    wide = b.layers[b.layer]["attn_output_a.weight"]
    first = ggml.weight(wide.type, (width // groups, rank, groups, 1), b.backend_of("attn_output_a.weight", b.layer))
    out = permute(reshape(out, width // groups, groups, b.tokens), 0, 2, 1, 3)
    out = permute(mul_mat(first, out), 0, 2, 1, 3)
    return b.linear("attn_output_b", cont(out, rank * groups, b.tokens))


def _write_and_read_cache(b: Builder, rows: Tensor, ids: Tensor, size: int, cells: int) -> Tensor:
    """Write rows of K to the layer's cache; returns a view of the whole cache."""
    slots = b.context.slots
    store = ggml.cache(b.cache_kinds[0], (size, cells, slots), b.backend_of("cache", b.layer))
    target = store if slots == 1 else reshape(store, size, cells * slots)
    b.graph.expand(ggml.set_rows(target, view(rows, (size, rows.ne[2]), (rows.nb[2],)), ids))
    return view(store, (size, 1, cells, slots))


def _compressed_kv(b: Builder, cur: Tensor, plan: CompressionPlan, part: str, ratio: int, size: int) -> Tensor:
    """The cache of compressed cells: weighted sums of the batch's tokens and of earlier tokens in the state."""
    overlap, slots = 2 if ratio == CSA_RATIO else 1, b.context.slots
    rows, home = overlap * ratio * slots, b.backend_of("cache", b.layer)
    values = b.linear(f"{part}_kv", cur)
    scores = apply("add", b.linear(f"{part}_gate", cur), get_rows(b.need(f"{part}_ape.weight"), plan.positions))
    states = [ggml.cache(F32, (overlap * size, overlap * ratio, slots), home) for _ in range(2)]
    kept = [view(state, (overlap * size, rows), (state.nb[1],)) for state in states]
    pair = [concat(view(old, (overlap * size, rows), (old.nb[1],)), new_rows, 1)
            for old, new_rows in zip(kept, (values, scores), strict=True)]  # fmt: skip
    cells = _overlap_compressed(pair, plan, ratio, size) if ratio == CSA_RATIO else _softmax_weighted_sum(
        [reshape(get_rows(x, plan.read), size, ratio, plan.written.ne[0]) for x in pair]
    )  # fmt: skip
    cells = apply("rope", b.norm(cells, f"{part}_norm"), plan.written_at)
    read = _write_and_read_cache(b, _mul_hadamard(cells, plan.hadamard), plan.written, size, plan.mask.ne[0])
    last = [get_rows(x, plan.kept) for x in (values, scores)]
    for new_rows, state in zip(last, kept, strict=True):
        b.graph.expand(ggml.set_rows(state, new_rows, plan.kept_at))
    return read


def _overlap_compressed(pair: list[Tensor], plan: CompressionPlan, ratio: int, size: int) -> Tensor:
    """Cells that overlap: each sums the first half of the previous tokens' rows and the second half of its own tokens'.

    `pair`: values and scores.
    """
    blocks = plan.written.ne[0]
    pair = [concat(x, reshape(apply("scale", view(x, (x.ne[0],))), x.ne[0], 1), 1) for x in pair]
    rows = [get_rows(x, plan.read) for x in pair]
    halves = [[reshape(cont(view(x, (size, ratio * blocks), (x.nb[1],))), size, ratio, blocks) for x in rows]
              for _ in range(2)]  # fmt: skip
    return _softmax_weighted_sum([concat(old, own, 1) for old, own in zip(*halves, strict=True)])


def _softmax_weighted_sum(pair: list[Tensor]) -> Tensor:
    """Sum of values, weighted by the softmax of their scores. `pair`: values and scores."""
    values, scores = (cont(permute(x, 1, 0, 2, 3)) for x in pair)
    total = apply("mul", values, apply("soft_max", scores))
    total = new("sum_rows", F32, (1, total.ne[1], total.ne[2]), total)
    return cont(permute(total, 1, 0, 2, 3))


def _lid_top_k(b: Builder, cur: Tensor, low_rank_q: Tensor, positions: Tensor, keys: Tensor) -> Tensor:
    """Numbers of the compressed cells that the lightning indexer picks (build_lid_top_k)."""
    inputs, tokens, slots = _inputs(b), b.tokens, b.context.slots
    heads, seq_tokens = b.shape.indexer.heads, tokens // slots
    q = apply("rope", reshape(b.linear("indexer.attn_q_b", low_rank_q), INDEXER_SIZE, heads, tokens), positions)
    q = _mul_hadamard(q, inputs.indexer.hadamard)
    weights = apply("scale", b.linear("indexer.proj", cur))
    weights = view(weights, (heads, seq_tokens, 1, slots), (weights.nb[1], *(n // slots for n in weights.nb[2:])))
    q = view(q, (INDEXER_SIZE, heads, seq_tokens, slots), (q.nb[1], q.nb[2], q.nb[3] // slots))
    mask = inputs.indexer.mask
    score = new("lightning_indexer", F32, (mask.ne[0], seq_tokens, 1, slots), q, keys, weights, mask)
    count = min(mask.ne[0], b.shape.indexer.top)
    return cont(new("top_k", I32, (count, seq_tokens, 1, slots), score))
