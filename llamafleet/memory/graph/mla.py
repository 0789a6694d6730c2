"""MLA: attention to one compressed head, of all cells or of those that an indexer picks.

Source: src/models/deepseek2.cpp, src/models/deepseek32.cpp, src/models/glm-dsa.cpp at b11434.
"""

from __future__ import annotations

from llamafleet.memory.graph import ggml
from llamafleet.memory.graph.builder import Builder, GraphUnknownError
from llamafleet.memory.graph.ggml import F16, F32, I32, I64, Tensor, apply, concat, mul_mat, new, permute, reshape, view

# Sizes that the lightning indexer operation takes on every backend; with other sizes the scores of all heads are stored
# (ggml/src/ggml-cuda/lightning-indexer.cu, ggml_cuda_lightning_indexer_supported).
INDEXER_SIZE, INDEXER_HEADS = 128, frozenset({4, 32, 64})


def latent_attention(b: Builder, cur: Tensor, positions: Tensor) -> Tensor:
    """MLA with one compressed head as K and V; without both *_mla lengths in the header, with decompressed heads."""
    parts, heads, tokens = b.layers[b.layer], b.shape.heads[b.layer], b.tokens
    rank, rope = b.shape.latent.rank, b.shape.latent.rope
    is_absorbed, size_k, size_v = b.shape.latent.is_absorbed, b.shape.latent.key, b.shape.latent.value
    nope = size_k - rope
    if "attn_q.weight" in parts:
        q = b.linear("attn_q", cur)
    else:
        low_rank_q = b.norm(b.linear("attn_q_a", cur), "attn_q_a_norm")
        if b.shape.indexer.layers[b.layer]:
            b.top_k = _indexer_top_k(b, cur, low_rank_q, positions)
        q = b.linear("attn_q_b", low_rank_q)
    q = reshape(q, size_k, heads, tokens)
    kv_and_rope = b.linear("attn_kv_a_mqa", cur)
    compressed = view(kv_and_rope, (rank, tokens), (kv_and_rope.nb[1],))
    factors = b.rope_factors()
    k_rope = view(kv_and_rope, (rope, 1, tokens), (kv_and_rope.nb[1], kv_and_rope.nb[1]))
    k_rope = apply("rope", k_rope, positions, *factors) if b.shape.uses_rope[b.layer] else k_rope
    compressed = b.norm(compressed, "attn_kv_a_norm")
    if is_absorbed:
        q_rope = view(q, (rope, heads, tokens), (q.nb[1], q.nb[2]))
        q_rope = apply("rope", q_rope, positions, *factors) if b.shape.uses_rope[b.layer] else q_rope
        q_nope = permute(view(q, (nope, heads, tokens), (q.nb[1], q.nb[2])), 0, 2, 1, 3)
        absorbed = permute(mul_mat(b.need("attn_k_b.weight"), q_nope), 0, 2, 1, 3)
        q = concat(absorbed, q_rope, 0)
        compressed = reshape(compressed, rank, 1, tokens)
        k = concat(compressed, k_rope, 0)
        return b.linear("attn_output", _attend(b, q, k, compressed))
    kv = b.linear("attn_kv_b", compressed)
    stride = (nope + size_v) * 4
    k_nope = view(kv, (nope, heads, tokens), (stride, stride * heads))
    v = ggml.cont(view(kv, (size_v, heads, tokens), (stride, stride * heads)))
    k = concat(k_nope, new("repeat", F32, (rope, heads, tokens), k_rope), 0)
    return b.linear("attn_output", b.build_attn(apply("rope", q, positions, *factors), k, v, size_k, size_v))


def _attend(b: Builder, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """build_attn with the compressed head as K and its first part as V (llm_graph_input_attn_k)."""
    size, rank, cells = k.ne[0], v.ne[0], b.context.stream_cells
    k_ids, mask = _inputs(b, False, F16 if b.context.flash_attention else F32)
    for tensor in (q, v, k):
        b.graph.expand(tensor)
    stored = ggml.cache(b.cache_kinds[0], (size, cells, b.streams), b.backend_of("cache", b.layer))
    b.store(stored, k, k_ids)
    if b.top_k is not None:
        mask = top_k_mask(mask, b.top_k, F32)
    cached_k = b.read_cache(stored, size, 1, cells)
    cached_v = view(cached_k, (rank, *cached_k.ne[1:]), cached_k.nb[1:])
    return b.build_attn_mha(q, cached_k, cached_v, mask, b.need("attn_v_b.weight"))


def _inputs(b: Builder, indexer: bool, kind: str) -> tuple[Tensor, Tensor]:
    """Cells to write to, and the mask; shared by all layers. `indexer`: those of the indexer's cache."""

    def make() -> tuple[Tensor, Tensor]:
        mask = ggml.graph_input(kind, b.context.stream_cells, b.tokens // b.streams, 1, b.streams)
        return ggml.graph_input(I64, b.tokens), mask

    return b.once(("latent inputs", indexer), make)


def _indexer_top_k(b: Builder, cur: Tensor, low_rank_q: Tensor, positions: Tensor) -> Tensor:
    """Cells that this layer, and later layers without an indexer, attend to (src/models/deepseek32.cpp,
    llama_model_deepseek32::graph)."""
    size, heads = b.shape.indexer.key, b.shape.indexer.heads
    if size != INDEXER_SIZE or heads not in INDEXER_HEADS:
        raise GraphUnknownError(f"indexer with {heads} heads of {size} elements")
    tokens, streams, cells = b.tokens, b.streams, b.context.stream_cells
    hadamard = b.once("indexer rotation", lambda: ggml.graph_input(F32, size, size))
    ids, mask = _inputs(b, True, F16)
    q = apply("rope", reshape(b.linear("indexer.attn_q_b", low_rank_q), size, heads, tokens), positions)
    k = b.norm(b.linear("indexer.attn_k", cur), "indexer.k_norm")
    k = apply("rope", reshape(k, size, 1, tokens), positions)
    q, k = mul_mat(hadamard, q), mul_mat(hadamard, k)
    stored = ggml.cache(b.cache_kinds[0], (size, cells, streams), b.backend_of("cache", b.layer))
    b.store(stored, k, ids)
    seq_tokens = tokens // streams
    weights = b.linear("indexer.proj", cur)
    weights = view(weights, (heads, seq_tokens, 1, streams), (weights.nb[1], *(n // streams for n in weights.nb[2:])))
    q = view(q, (size, heads, seq_tokens, streams), (q.nb[1], q.nb[2], q.nb[3] // streams))
    scores = (q, b.read_cache(stored, size, 1, cells), apply("scale", weights), mask)
    score = new("lightning_indexer", F32, (cells, seq_tokens, 1, streams), *scores)
    count = min(cells, b.shape.indexer.top)
    return ggml.cont(new("top_k", I32, (count, seq_tokens, 1, streams), score))


def top_k_mask(mask: Tensor, top_k: Tensor, kind: str) -> Tensor:
    """The mask with all cells closed but the top k (build_top_k_mask). `kind`: type of the zeros that open cells."""
    cells, seq_tokens, _, streams = mask.ne
    filled = apply("fill", mask)
    filled = view(filled, (1, cells, seq_tokens, streams), (filled.nb[0], filled.nb[1], filled.nb[2]))
    ids = view(top_k, (top_k.ne[0], seq_tokens, streams), (top_k.nb[1], top_k.nb[2]))
    zeros = apply("fill", Tensor("none", kind, (1, top_k.ne[0], seq_tokens, streams)))
    rows_set = ggml.set_rows(filled, zeros, ids)
    top_k_only = view(rows_set, (cells, seq_tokens, 1, streams), (rows_set.nb[2], rows_set.nb[3], rows_set.nb[3]))
    return apply("add", top_k_only, mask)
