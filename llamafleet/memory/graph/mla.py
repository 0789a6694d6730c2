"""MLA: attention over one compressed head, whole or to what an indexer picks (src/models/deepseek2.cpp, deepseek32.cpp,
glm-dsa.cpp at b11434).
"""

from __future__ import annotations

from llamafleet.memory.graph import ggml
from llamafleet.memory.graph.builder import Builder, GraphUnknownError
from llamafleet.memory.graph.ggml import F16, F32, I32, I64, Tensor, concat, mul_mat, new, permute, reshape, same, view

# Sizes that every backend's own operation for the indexer takes; with others the scores of all heads are kept
# (ggml_cuda_lightning_indexer_supported).
INDEXER_SIZE, INDEXER_HEADS = 128, frozenset({4, 32, 64})


def latent_attention(b: Builder, cur: Tensor, positions: Tensor) -> Tensor:
    """K is one compressed head that serves as V too; or, without both *_mla lengths, ordinary heads that are
    decompressed first.
    """
    parts, heads, tokens = b.layers[b.layer], b.shape.heads[b.layer], b.tokens
    rank, rope = b.shape.latent.rank, b.shape.latent.rope
    latent, size_k, size_v = b.shape.latent.is_absorbed, b.shape.latent.key, b.shape.latent.value
    plain = size_k - rope
    if "attn_q.weight" in parts:
        q = b.linear("attn_q", cur)
    else:
        low = b.norm(b.linear("attn_q_a", cur), "attn_q_a_norm")
        if b.shape.indexer.layers[b.layer]:
            b.chosen = _indexer(b, cur, low, positions)
        q = b.linear("attn_q_b", low)
    q = reshape(q, size_k, heads, tokens)
    both = b.linear("attn_kv_a_mqa", cur)
    compressed = view(both, (rank, tokens), (both.nb[1],))
    factors = b.position_factors()
    k_rope = view(both, (rope, 1, tokens), (both.nb[1], both.nb[1]))
    k_rope = same("rope", k_rope, positions, *factors) if b.shape.uses_rope[b.layer] else k_rope
    compressed = b.norm(compressed, "attn_kv_a_norm")
    if latent:
        q_rope = view(q, (rope, heads, tokens), (q.nb[1], q.nb[2]))
        q_rope = same("rope", q_rope, positions, *factors) if b.shape.uses_rope[b.layer] else q_rope
        q_plain = permute(view(q, (plain, heads, tokens), (q.nb[1], q.nb[2])), 0, 2, 1, 3)
        absorbed = permute(mul_mat(b.need("attn_k_b.weight"), q_plain), 0, 2, 1, 3)
        q = concat(absorbed, q_rope, 0)
        compressed = reshape(compressed, rank, 1, tokens)
        k = concat(compressed, k_rope, 0)
        return b.linear("attn_output", _attend(b, q, k, compressed))
    kv = b.linear("attn_kv_b", compressed)
    stride = (plain + size_v) * 4
    k_plain = view(kv, (plain, heads, tokens), (stride, stride * heads))
    v = ggml.cont(view(kv, (size_v, heads, tokens), (stride, stride * heads)))
    k = concat(k_plain, new("repeat", F32, (rope, heads, tokens), k_rope), 0)
    return b.linear("attn_output", b.attend(same("rope", q, positions, *factors), k, v, size_k, size_v))


def _attend(b: Builder, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """build_attn with the compressed head read as K and, its first part, as V (llm_graph_input_attn_k)."""
    size, rank, cells = k.ne[0], v.ne[0], b.context.stream_cells
    k_ids, mask = _inputs(b, False, F16 if b.context.flash_attention else F32)
    for tensor in (q, v, k):
        b.graph.expand(tensor)
    stored = ggml.cache(b.context.kv_type.upper(), (size, cells, b.streams), b.homes("cache", b.layer))
    b.store(stored, k, k_ids)
    if b.chosen is not None:
        mask = narrowed(mask, b.chosen, F32)
    read = b.cached(stored, size, 1, cells)
    values = view(read, (rank, *read.ne[1:]), read.nb[1:])
    return b.attend_cached(q, read, values, mask, b.need("attn_v_b.weight"))


def _inputs(b: Builder, indexer: bool, kind: str) -> tuple[Tensor, Tensor]:
    """Where rows go, and the mask; one of each for all layers."""

    def make() -> tuple[Tensor, Tensor]:
        mask = ggml.graph_input(kind, b.context.stream_cells, b.tokens // b.streams, 1, b.streams)
        return ggml.graph_input(I64, b.tokens), mask

    return b.once(("latent inputs", indexer), make)


def _indexer(b: Builder, cur: Tensor, low: Tensor, positions: Tensor) -> Tensor:
    """The cells that this layer, and those behind it without an indexer, attend to (models/deepseek32.cpp:222)."""
    size, heads = b.shape.indexer.key, b.shape.indexer.heads
    if size != INDEXER_SIZE or heads not in INDEXER_HEADS:
        raise GraphUnknownError(f"an indexer of {heads} heads of {size}")
    tokens, streams, cells = b.tokens, b.streams, b.context.stream_cells
    turn = b.once("indexer rotation", lambda: ggml.graph_input(F32, size, size))
    ids, mask = _inputs(b, True, F16)
    q = same("rope", reshape(b.linear("indexer.attn_q_b", low), size, heads, tokens), positions)
    k = b.norm(b.linear("indexer.attn_k", cur), "indexer.k_norm")
    k = same("rope", reshape(k, size, 1, tokens), positions)
    q, k = mul_mat(turn, q), mul_mat(turn, k)
    stored = ggml.cache(b.context.kv_type.upper(), (size, cells, streams), b.homes("cache", b.layer))
    b.store(stored, k, ids)
    each = tokens // streams
    weights = b.linear("indexer.proj", cur)
    weights = view(weights, (heads, each, 1, streams), (weights.nb[1], *(n // streams for n in weights.nb[2:])))
    q = view(q, (size, heads, each, streams), (q.nb[1], q.nb[2], q.nb[3] // streams))
    scores = (q, b.cached(stored, size, 1, cells), same("scale", weights), mask)
    score = new("lightning_indexer", F32, (cells, each, 1, streams), *scores)
    count = min(cells, b.shape.indexer.top)
    return ggml.cont(new("top_k", I32, (count, each, 1, streams), score))


def narrowed(mask: Tensor, chosen: Tensor, kind: str) -> Tensor:
    """The mask, open where cells are chosen; rows of one element are set in one that is closed."""
    cells, each, _, streams = mask.ne
    closed = same("fill", mask)
    closed = view(closed, (1, cells, each, streams), (closed.nb[0], closed.nb[1], closed.nb[2]))
    ids = view(chosen, (chosen.ne[0], each, streams), (chosen.nb[1], chosen.nb[2]))
    zeros = same("fill", Tensor("none", kind, (1, chosen.ne[0], each, streams)))
    opened = ggml.set_rows(closed, zeros, ids)
    return same("add", view(opened, (cells, each, 1, streams), (opened.nb[2], opened.nb[3], opened.nb[3])), mask)
