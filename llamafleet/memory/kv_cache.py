"""How much memory a model's context takes: the KV cache, layer by layer, and recurrent state.

The rules are llama.cpp's at b11434: src/llama-kv-cache*.cpp and src/llama-memory-recurrent.cpp.
"""

from __future__ import annotations

from functools import cache

from llamafleet.memory.context import PAD_CELLS, Context, cache_cells
from llamafleet.model.ggml_types import GGML_TYPES
from llamafleet.model.gguf import Header
from llamafleet.model.shape import (
    NO_FLASH,
    PARALLEL_HYBRIDS,
    STATE_BYTES,
    UNKNOWN_CACHES,
    head_sizes,
    indexer_layers,
    is_latent,
    layers_with_cache,
    number,
    per_layer,
    recurrent_layers,
    state_bytes,
    trunk_layers,
    windows,
)

COMPRESSED = "deepseek4"
FEW, MANY = 4, 128  # tokens that one compressed cell stands for (llama-kv-cache-dsv4.cpp)


def kv_bytes(header: Header, context: Context) -> tuple[int, ...]:
    """Bytes of each layer's KV cache and recurrent state, all slots together."""
    if header.architecture == COMPRESSED:
        return tuple(sum(parts) * context.slots for parts in compressed_layers(header, context))  # never shared
    layers = number(header, "block_count")
    kv_heads = per_layer(header, "attention.head_count_kv", number(header, "attention.head_count", 1))
    recurrent, state = recurrent_layers(header), state_bytes(header)
    # Caches of unknown rules: K and V whole, an indexer's keys and a state in every layer, which is more than any has.
    unknown = header.architecture in UNKNOWN_CACHES
    latent = is_latent(header) and not unknown
    # An indexer's cache has one head; MiniMax-M3's has values too, which nobody reads (llama_kv_cache_msa).
    indexer = [number(header, "attention.indexer.key_length")]
    indexer += [head_sizes(header, False)[1]] if header.architecture == "minimax-m3" else []
    indexed = (True,) * layers if unknown else indexer_layers(header)
    owners, sizes = layers_with_cache(header, layers), windows(header)
    widest = 0
    if not context.flash_attention:  # V is stored across, all layers as wide as the widest (llama-kv-cache.cpp:210)
        pairs = set(zip(sizes, kv_heads, strict=True))
        widest = max((head_sizes(header, size > 0)[1] * n for size, n in pairs), default=0)

    @cache  # a model has a few kinds of layers
    def cache_bytes(window: int, heads: int, has_indexer: bool) -> int:
        key, value = (size * heads for size in head_sizes(header, window > 0))
        row = row_bytes(key, context.kv_type)
        row += sum(row_bytes(size, context.kv_type) for size in indexer) if has_indexer else 0
        row += 0 if latent else row_bytes(max(value, widest), context.kv_type)
        return row * cache_cells(context, window) * context.streams

    trunk = trunk_layers(header)
    total = []
    for layer, window in enumerate(sizes):
        kept = state * context.slots if (recurrent[layer] or unknown) and layer < trunk else 0
        if layer < owners and _attends(header, layer, recurrent[layer]):
            kept += cache_bytes(window, kv_heads[layer], indexed[layer])
        total.append(kept)
    return tuple(total)


def _attends(header: Header, layer: int, is_recurrent: bool) -> bool:
    if header.architecture in ("nemotron_h", "nemotron_h_moe"):  # a layer is attention, state or feed-forward
        return not is_recurrent and per_layer(header, "feed_forward_length")[layer] == 0
    return not is_recurrent or header.architecture in PARALLEL_HYBRIDS


def row_bytes(elements: int, kv_type: str) -> int:
    """Bytes of a row of a cache type; a last, partial block counts whole."""
    block, size = BLOCKS[kv_type]
    return -(-elements // block) * size


def compressed_cells(context: Context, ratio: int) -> int:
    """Cells of a slot that stand for `ratio` tokens each."""
    return -(-context.stream_cells // (ratio * PAD_CELLS)) * PAD_CELLS


def window_cells(context: Context, window: int) -> int:
    """Cells of a slot's window, whether slots share a cache or not."""
    return min(context.stream_cells, -(-(window + context.ubatch) // PAD_CELLS) * PAD_CELLS)


def compressed_layers(header: Header, context: Context) -> list[tuple[int, int, int]]:
    """DeepSeek V4: of each layer and one slot, K of a window, of compressed cells with an indexer's, and what is not
    compressed yet (f32). A draft head's layers have caches that nobody uses.
    """
    size, indexer = head_sizes(header, False)[0], number(header, "attention.indexer.key_length")
    row = row_bytes(size, context.kv_type)
    window = row * window_cells(context, number(header, "attention.sliding_window"))
    few = (row + row_bytes(indexer, context.kv_type)) * compressed_cells(context, FEW)
    cells = {FEW: few, MANY: row * compressed_cells(context, MANY)}
    # Of keys and of their scores; where cells overlap twice as wide and for twice as many tokens.
    states = {FEW: 2 * FEW * 2 * (size + indexer) * 2 * STATE_BYTES, MANY: MANY * size * 2 * STATE_BYTES}
    trunk = trunk_layers(header)
    ratios = enumerate(per_layer(header, "attention.compress_ratios"))
    return [(window, cells.get(ratio, 0), states.get(ratio, 0) if layer < trunk else 0) for layer, ratio in ratios]


BLOCKS = {name.lower(): (block, size) for name, block, size in GGML_TYPES.values()}


def takes_cache_of(header: Header, kv_type: str) -> bool:
    """Does llama-server start with caches of this type? Blocks must divide heads (llama-context.cpp:3854)."""
    block = BLOCKS[kv_type][0]
    sizes = {size for kind in {window > 0 for window in windows(header)} for size in head_sizes(header, kind)}
    return block == 1 or (header.architecture not in NO_FLASH and not any(size % block for size in sizes))
