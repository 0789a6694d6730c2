"""Bytes of a model's context: the KV cache, layer by layer, and recurrent state.

The rules are llama.cpp's at b11434: src/llama-kv-cache*.cpp and src/llama-memory-recurrent.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from llamafleet.memory.context import PAD_CELLS, Context, cache_cells, types_of
from llamafleet.model.architecture import Cache, Indexer, Recurrence
from llamafleet.model.ggml_types import GGML_TYPES
from llamafleet.model.shape import Shape

STATE_BYTES = 4  # recurrent state is f32
BLOCKS = {name.lower(): (block, size) for name, block, size in GGML_TYPES.values()}
# Tokens that one compressed cell stands for (src/llama-kv-cache-dsv4.cpp, DSV4_CSA_RATIO, DSV4_HCA_RATIO).
CSA_RATIO, HCA_RATIO = 4, 128


def kv_bytes(shape: Shape, context: Context) -> tuple[int, ...]:
    """Bytes of each layer's KV cache and recurrent state, summed over all slots; with the cache of a draft head that
    has a context (`Context.head`)."""
    sizes = _trunk_bytes(shape, context)
    if not context.head:
        return sizes
    return tuple(own + head for own, head in zip(sizes, head_bytes(shape, context), strict=True))


def head_bytes(shape: Shape, context: Context) -> tuple[int, ...]:
    """Bytes of each layer's cache in the context of a draft head: K and V of its layers alone (src/llama-model.cpp,
    create_memory, LLAMA_CONTEXT_TYPE_MTP)."""
    row_of = _rows(shape, context)
    has_indexer = shape.architecture.indexer is Indexer.BESIDE_STATE
    return tuple(
        row_of(window > 0, shape.kv_heads[layer], has_indexer) * cache_cells(context, window) * context.streams
        if layer >= shape.trunk_layers else 0
        for layer, window in enumerate(shape.windows)
    )  # fmt: skip


def _trunk_bytes(shape: Shape, context: Context) -> tuple[int, ...]:
    if shape.cache is Cache.COMPRESSED:
        # Each slot has its own cache, also with --kv-unified.
        return tuple(sum(parts) * context.slots for parts in compressed_layers(shape, context))
    # Upper bound where the rules are unknown: every layer has whole K and V, an indexer's keys and a recurrent state.
    unknown = shape.cache is Cache.UNKNOWN
    copies = context.slots * (1 + context.rollback)
    state = state_bytes(shape) * copies
    row_of = _rows(shape, context)
    sizes = []
    for layer, window in enumerate(shape.windows):
        size = state if (shape.state.layers[layer] or unknown) and layer < shape.trunk_layers else 0
        size += ngram_bytes(shape) * copies if shape.ngrams.layers[layer] else 0
        if layer < shape.cache_layers and attends(shape, layer):
            row = row_of(window > 0, shape.kv_heads[layer], unknown or shape.indexer.layers[layer])
            size += row * cache_cells(context, window) * context.streams
        sizes.append(size)
    return tuple(sizes)


def _rows(shape: Shape, context: Context) -> Callable[[bool, int, bool], int]:
    """A function that gives the bytes of one cell of a layer: row(has a window, KV heads, has an indexer)."""
    key_type, value_type = context.key_type, context.value_type
    latent = shape.latent.is_absorbed and shape.cache is not Cache.UNKNOWN
    indexer = row_bytes(shape.architecture.indexer_rows * shape.indexer.key, key_type)
    indexer += row_bytes(shape.head[1], value_type) if shape.architecture.indexer_keeps_values else 0
    widest = 0
    # V is transposed, and padded to the widest layer's (src/llama-kv-cache.cpp, n_embd_v_gqa_max).
    if not context.flash_attention:
        pairs = set(zip(shape.windows, shape.kv_heads, strict=True))
        widest = max((shape.head_sizes(window > 0)[1] * heads for window, heads in pairs), default=0)

    @cache  # a model has a few kinds of layers
    def row(window: bool, heads: int, has_indexer: bool) -> int:
        key, value = (size * heads for size in shape.head_sizes(window))
        values = 0 if latent else row_bytes(max(value, widest), value_type)
        return row_bytes(key, key_type) + (indexer if has_indexer else 0) + values

    return row


def attends(shape: Shape, layer: int) -> bool:
    """Does this layer compute attention?"""
    recurrent = shape.state.layers[layer]
    if shape.architecture.one_part_layers:
        return not recurrent and shape.feed_forward[layer] == 0
    return not recurrent or shape.architecture.recurrence is Recurrence.BESIDE_ATTENTION


def state_bytes(shape: Shape) -> int:
    """Bytes of one layer's recurrent state for one slot: src/llama-hparams.cpp, n_embd_r and n_embd_s."""
    embd, state = shape.embedding, shape.state
    if size := state.wkv_head:
        return (state.token_shifts + size) * embd * STATE_BYTES
    if state.short_cells:
        return embd * (state.short_cells - 1) * STATE_BYTES
    if size := state.kda_head:
        return (3 * (state.kernel - 1 if state.kernel else 3) + size) * size * shape.heads[0] * STATE_BYTES
    rows = max(0, state.kernel - 1) * (state.inner + 2 * state.groups * state.size)
    return (rows + state.size * state.inner) * STATE_BYTES


def ngram_bytes(shape: Shape) -> int:
    """Bytes of the tokens that a layer with n-gram embeddings keeps for one slot (src/llama-hparams.cpp,
    ple_conv_state)."""
    return shape.ngrams.history * shape.residual_streams * shape.embedding * STATE_BYTES


def takes_cache_of(shape: Shape, kv_type: str) -> bool:
    """Does llama-server accept this cache type? The block size must divide the head sizes, a quantised V needs flash
    attention, and MLA has one type for K and V (src/llama-context.cpp, llama_init_from_model)."""
    types = types_of(kv_type)
    if types[0] != types[1] and has_one_type(shape):
        return False
    if BLOCKS[types[1]][0] > 1 and not shape.architecture.flash_attention:
        return False
    sizes = {shape.head_sizes(window > 0) for window in set(shape.windows)}
    return not any(size % BLOCKS[kind][0] for pair in sizes for size, kind in zip(pair, types, strict=True))


def has_one_type(shape: Shape) -> bool:
    """Does llama-server demand the same type for K and V? (src/llama-context.cpp, llama_init_from_model)"""
    return shape.latent.is_absorbed or shape.cache is Cache.COMPRESSED


def row_bytes(elements: int, kv_type: str) -> int:
    """Bytes of a row of this cache type; a partial last block counts as a whole block."""
    block, size = BLOCKS[kv_type]
    return -(-elements // block) * size


def compressed_cells(context: Context, ratio: int) -> int:
    """Compressed cells of a slot, where each stands for `ratio` tokens."""
    return -(-context.stream_cells // (ratio * PAD_CELLS)) * PAD_CELLS


def window_cells(context: Context, window: int) -> int:
    """Cells of one slot's sliding-window cache, for a unified cache too."""
    return min(context.stream_cells, -(-(window + context.ubatch) // PAD_CELLS) * PAD_CELLS)


def compressed_layers(shape: Shape, context: Context) -> list[tuple[int, int, int]]:
    """For each layer, bytes of one slot: (K of the window, K of compressed cells with the indexer's keys, state of
    tokens that are not compressed yet in f32). The layers of a draft head have caches too, but no state.
    """
    size, indexer = shape.head[0], shape.indexer.key
    row = row_bytes(size, context.key_type)
    window = row * window_cells(context, shape.sliding_window)
    csa = (row + row_bytes(indexer, context.key_type)) * compressed_cells(context, CSA_RATIO)
    cells = {CSA_RATIO: csa, HCA_RATIO: row * compressed_cells(context, HCA_RATIO)}
    # Keys and their scores; overlapping cells (CSA) have rows twice as wide, for twice as many tokens.
    copies = 1 + context.rollback
    states = {
        CSA_RATIO: copies * 2 * CSA_RATIO * 2 * (size + indexer) * 2 * STATE_BYTES,
        HCA_RATIO: copies * HCA_RATIO * size * 2 * STATE_BYTES,
    }
    return [
        (window, cells.get(ratio, 0), states.get(ratio, 0) if layer < shape.trunk_layers else 0)
        for layer, ratio in enumerate(shape.compress_ratios)
    ]
