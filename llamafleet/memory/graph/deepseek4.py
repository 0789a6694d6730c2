"""DeepSeek V4: four streams of rows, attention to a window and to compressed cells, some of them picked by an indexer.

After src/models/deepseek4.cpp and src/llama-kv-cache-dsv4.cpp at b11434.
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
    concat,
    cont,
    get_rows,
    mul_mat,
    new,
    permute,
    reshape,
    same,
    view,
)
from llamafleet.memory.graph.mla import INDEXER_HEADS, INDEXER_SIZE, narrowed
from llamafleet.memory.kv_cache import FEW, MANY, compressed_cells, window_cells

STREAMS = 4  # of rows; the operation for them is made for four (build_hc_pre)


class Plan(NamedTuple):
    """What is told of cells of one kind; one of each for all layers (dsv4_build_reserve_comp_plan)."""

    positions: Tensor
    kept: Tensor  # tokens that go to the state
    kept_at: Tensor
    read: Tensor
    written: Tensor
    written_at: Tensor
    mask: Tensor
    turn: Tensor | None


class Inputs(NamedTuple):
    """One of each for all layers."""

    ids: Tensor
    mask: Tensor
    turn: Tensor | None
    few: Plan
    many: Plan
    indexer: Plan


def first_streams(b: Builder, cur: Tensor) -> Tensor:
    """The embeddings, once for each stream."""
    b.graph.expand(_inputs(b).mask)
    return new("repeat", F32, (b.embd, STREAMS, b.tokens), reshape(cur, b.embd, 1, b.tokens))


def last_streams(b: Builder, cur: Tensor, outputs: Tensor) -> Tensor:
    """The streams' sum for the rows that become logits (build_hc_head)."""
    flat, count = get_rows(reshape(cur, b.embd * STREAMS, b.tokens), outputs), outputs.ne[0]
    cur = reshape(flat, b.embd, STREAMS, count)
    mixes = mul_mat(b.need("output_hc_fn.weight"), same("rms_norm", reshape(cur, b.embd * STREAMS, count)))
    weights = _affine(mixes, b.need("output_hc_scale.weight"), b.need("output_hc_base.weight"))
    weights = same("scale", same("unary", weights))
    total: Tensor | None = None
    for _ in range(STREAMS):
        one = view(cur, (b.embd, count), (cur.nb[2],))
        one = same("mul", one, view(weights, (1, count), (weights.nb[1],)))
        total = same("add", total, one) if total else one
    assert total is not None
    return total


def streams_layer(b: Builder, cur: Tensor, positions: Tensor, feed_forward: Callable[[Tensor], Tensor]) -> Tensor:
    """One layer: before both parts the streams are mixed to one row, behind them its result is mixed with them."""
    mixed, post, comb = _mixed(b, cur, "attn")
    cur = _unmixed(_attention(b, b.norm(mixed, "attn_norm"), positions), cur, post, comb)
    mixed, post, comb = _mixed(b, cur, "ffn")
    for tensor in (cur, post, comb):
        b.graph.expand(tensor)
    return _unmixed(feed_forward(b.norm(mixed, "ffn_norm")), cur, post, comb)


def _mixed(b: Builder, cur: Tensor, part: str) -> tuple[Tensor, Tensor, Tensor]:
    """One row of four, and how its result goes back to them (build_hc_pre)."""
    tokens = cur.ne[2]
    mixes = mul_mat(b.need(f"hc_{part}_fn.weight"), same("rms_norm", reshape(cur, b.embd * STREAMS, tokens)))
    scale, base = b.need(f"hc_{part}_scale.weight"), b.need(f"hc_{part}_base.weight")
    pre, post = (
        _affine(view(mixes, (STREAMS, tokens), (mixes.nb[1],)), view(scale, (1,)), view(base, (STREAMS,)))
        for _ in range(2)
    )
    pre, post = (same("scale", same("unary", one)) for one in (pre, post))
    comb = new("hc_comb", F32, (STREAMS, STREAMS, tokens), mixes, scale, base)
    return new("hc_pre", F32, (b.embd, tokens), cur, pre), post, comb


def _unmixed(cur: Tensor, residual: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """build_hc_post."""
    return new("hc_post", F32, residual.ne, cur, residual, post, comb)


def _affine(cur: Tensor, scale: Tensor, base: Tensor) -> Tensor:
    return same("add", same("mul", cur, scale), base)


def _inputs(b: Builder) -> Inputs:
    return b.once("compressed inputs", lambda: _make_inputs(b))


def _make_inputs(b: Builder) -> Inputs:
    window, slots = b.shape.sliding_window, b.context.slots
    kind = F16 if b.context.flash_attention else F32
    size, each = b.head_sizes()[0], b.tokens // slots
    indexer = b.shape.indexer.key
    if indexer != INDEXER_SIZE or b.shape.indexer.heads not in INDEXER_HEADS:
        raise GraphUnknownError(f"an indexer with heads of {indexer}")
    if b.shape.residual_streams != STREAMS:
        raise GraphUnknownError("another number of streams")

    def plan(ratio: int, kind: str, turn: Tensor | None) -> Plan:
        blocks, overlap = b.tokens // ratio + slots, 2 if ratio == FEW else 1
        kept = min(b.tokens, overlap * ratio * slots)
        counts = (b.tokens, kept, kept, overlap * ratio * blocks, blocks)
        positions, kept_from, kept_at, read, written_at = (ggml.graph_input(I32, count) for count in counts)
        return Plan(
            positions,
            kept_from,
            kept_at,
            read,
            ggml.graph_input(I64, blocks),
            written_at,
            ggml.graph_input(kind, compressed_cells(b.context, ratio), each, 1, slots),
            turn,
        )

    turns = [b.rotation("k", size, True), *(_turn(b, size) for _ in range(2))]
    return Inputs(
        ggml.graph_input(I64, b.tokens),
        ggml.graph_input(kind, window_cells(b.context, window), each, 1, slots),
        turns[0],
        plan(FEW, kind, turns[1]),
        plan(MANY, kind, turns[2]),
        plan(FEW, F16, ggml.graph_input(F32, indexer, indexer)),
    )


def _turn(b: Builder, size: int) -> Tensor | None:
    """A matrix as the window's cache has one, of its own."""
    like = b.rotation("k", size, True)
    return None if like is None else ggml.graph_input(F32, *like.ne[:2])


def _turned(cur: Tensor, turn: Tensor | None) -> Tensor:
    return cur if turn is None else ggml.rotated(cur, turn)


def _attention(b: Builder, cur: Tensor, positions: Tensor) -> Tensor:
    inputs, size, heads, tokens = _inputs(b), b.head_sizes()[0], b.shape.heads[b.layer], b.tokens
    low = b.norm(b.linear("attn_q_a", cur), "attn_q_a_norm")
    q = same("rope", same("rms_norm", reshape(b.linear("attn_q_b", low), size, heads, tokens)), positions)
    k = b.norm(b.linear("attn_kv", cur), "attn_kv_a_norm")
    k = same("rope", reshape(k, size, 1, tokens), positions)
    ratio = b.shape.compress_ratios[b.layer]
    keys, mask = None, inputs.mask
    if ratio == FEW:
        keys = _compress(b, cur, inputs.few, "attn_compressor", FEW, size)
        indexed = _compress(b, cur, inputs.indexer, "indexer_compressor", FEW, INDEXER_SIZE)
        mask = narrowed(inputs.few.mask, _chosen(b, cur, low, positions, indexed), inputs.few.mask.type)
    elif ratio == MANY:
        keys, mask = _compress(b, cur, inputs.many, "attn_compressor", MANY, size), inputs.many.mask
    q, k = _turned(q, inputs.turn), _turned(k, inputs.turn)
    b.graph.expand(q)
    b.graph.expand(k)
    read = _stored(b, k, inputs.ids, size, inputs.mask.ne[0])
    if keys is not None:
        read, mask = concat(read, keys, 2), concat(inputs.mask, mask, 0)
    out = _turned(b.attend_cached(q, read, read, mask, None), inputs.turn)
    out = same("rope", reshape(out, size, heads, tokens), positions)
    return _output(b, out, size * heads)


def _output(b: Builder, out: Tensor, width: int) -> Tensor:
    """Two matrices, the first of them group by group of heads."""
    groups, rank = b.shape.output_groups, b.shape.output_rank
    wide = b.layers[b.layer]["attn_output_a.weight"]
    first = ggml.weight(wide.type, (width // groups, rank, groups, 1), b.homes("attn_output_a.weight", b.layer))
    out = permute(reshape(out, width // groups, groups, b.tokens), 0, 2, 1, 3)
    out = permute(mul_mat(first, out), 0, 2, 1, 3)
    return b.linear("attn_output_b", cont(out, rank * groups, b.tokens))


def _stored(b: Builder, rows: Tensor, ids: Tensor, size: int, cells: int) -> Tensor:
    """Put rows of K into a cache of the layer and read all of it."""
    slots = b.context.slots
    store = ggml.cache(b.context.kv_type.upper(), (size, cells, slots), b.homes("cache", b.layer))
    target = store if slots == 1 else reshape(store, size, cells * slots)
    b.graph.expand(ggml.set_rows(target, view(rows, (size, rows.ne[2]), (rows.nb[2],)), ids))
    return view(store, (size, 1, cells, slots))


def _compress(b: Builder, cur: Tensor, plan: Plan, part: str, ratio: int, size: int) -> Tensor:
    """Tokens and what is left of those before, weighed and summed to cells; the cache of these."""
    overlap, slots = 2 if ratio == FEW else 1, b.context.slots
    rows, home = overlap * ratio * slots, b.homes("cache", b.layer)
    values = b.linear(f"{part}_kv", cur)
    scores = same("add", b.linear(f"{part}_gate", cur), get_rows(b.need(f"{part}_ape.weight"), plan.positions))
    states = [ggml.cache(F32, (overlap * size, overlap * ratio, slots), home) for _ in range(2)]
    kept = [view(state, (overlap * size, rows), (state.nb[1],)) for state in states]
    both = [concat(view(old, (overlap * size, rows), (old.nb[1],)), one, 1)
            for old, one in zip(kept, (values, scores), strict=True)]  # fmt: skip
    cells = _overlapped(both, plan, ratio, size) if ratio == FEW else _summed(
        [reshape(get_rows(one, plan.read), size, ratio, plan.written.ne[0]) for one in both]
    )  # fmt: skip
    cells = same("rope", b.norm(cells, f"{part}_norm"), plan.written_at)
    read = _stored(b, _turned(cells, plan.turn), plan.written, size, plan.mask.ne[0])
    last = [get_rows(one, plan.kept) for one in (values, scores)]
    for one, state in zip(last, kept, strict=True):
        b.graph.expand(ggml.set_rows(state, one, plan.kept_at))
    return read


def _overlapped(both: list[Tensor], plan: Plan, ratio: int, size: int) -> Tensor:
    """Each cell of the tokens before and of its own: two halves of the rows."""
    blocks = plan.written.ne[0]
    both = [concat(one, reshape(same("scale", view(one, (one.ne[0],))), one.ne[0], 1), 1) for one in both]
    rows = [get_rows(one, plan.read) for one in both]
    halves = [[reshape(cont(view(one, (size, ratio * blocks), (one.nb[1],))), size, ratio, blocks) for one in rows]
              for _ in range(2)]  # fmt: skip
    return _summed([concat(old, own, 1) for old, own in zip(*halves, strict=True)])


def _summed(both: list[Tensor]) -> Tensor:
    """Values by the softmax of their scores."""
    values, scores = (cont(permute(one, 1, 0, 2, 3)) for one in both)
    total = same("mul", values, same("soft_max", scores))
    total = new("sum_rows", F32, (1, total.ne[1], total.ne[2]), total)
    return cont(permute(total, 1, 0, 2, 3))


def _chosen(b: Builder, cur: Tensor, low: Tensor, positions: Tensor, keys: Tensor) -> Tensor:
    """The compressed cells that the indexer picks (build_lid_top_k)."""
    inputs, tokens, slots = _inputs(b), b.tokens, b.context.slots
    heads, each = b.shape.indexer.heads, tokens // slots
    q = same("rope", reshape(b.linear("indexer.attn_q_b", low), INDEXER_SIZE, heads, tokens), positions)
    q = _turned(q, inputs.indexer.turn)
    weights = same("scale", b.linear("indexer.proj", cur))
    weights = view(weights, (heads, each, 1, slots), (weights.nb[1], *(n // slots for n in weights.nb[2:])))
    q = view(q, (INDEXER_SIZE, heads, each, slots), (q.nb[1], q.nb[2], q.nb[3] // slots))
    mask = inputs.indexer.mask
    score = new("lightning_indexer", F32, (mask.ne[0], each, 1, slots), q, keys, weights, mask)
    count = min(mask.ne[0], b.shape.indexer.top)
    return cont(new("top_k", I32, (count, each, 1, slots), score))
