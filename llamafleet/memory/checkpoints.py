"""RAM of a context checkpoint: the copy that llama-server keeps to return to an earlier point of a conversation.

The rules are llama.cpp's at b11434: tools/server/server-context.cpp, create_checkpoint; and state_write, with
LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY, of the memories in src/. Measured: bench/results/checkpoints.csv.
"""

from __future__ import annotations

from dataclasses import replace

from llamafleet.memory.context import Context, cache_cells
from llamafleet.memory.kv_cache import compressed_layers, kv_bytes, ngram_bytes, state_bytes, window_cells
from llamafleet.model.architecture import Cache
from llamafleet.model.shape import Shape

# Bytes written beside the copied rows, at most: for a token its position, its slot and its place in an image
# (src/llama-kv-cache.cpp, state_write_meta), for a layer types and lengths (state_write_data), for a slot its tokens.
CELL_RECORD_BYTES, LAYER_RECORD_BYTES, SLOT_RECORD_BYTES = 24, 24, 4
HEAD_BYTES = 64


def checkpoint_bytes(shape: Shape, context: Context) -> int:
    """Upper bound, in bytes, of one context checkpoint of one slot; 0 where llama-server makes none.

    A checkpoint copies the state that cannot be rolled back: recurrent state (src/llama-memory-hybrid.cpp,
    llama_memory_hybrid::state_write), and for layers with a sliding window (src/llama-kv-cache-iswa.cpp,
    llama_kv_cache_iswa::state_write) the tokens inside the window, however many cells their cache has
    (src/llama-kv-cache.cpp, llama_kv_cache::state_write).
    """
    one_slot = replace(context, slots=1, rollback=0, head=False)
    window = min(max(_windows(shape), default=0), one_slot.cells)
    states = sum(shape.state.layers[: shape.trunk_layers])
    # Window and tokens not yet compressed (src/llama-kv-cache-dsv4.cpp, llama_kv_cache_dsv4::state_write).
    if shape.cache is Cache.COMPRESSED:
        parts, cells = compressed_layers(shape, one_slot), window_cells(one_slot, window)
        copied = sum(-(-window_bytes * window // cells) + state for window_bytes, _, state in parts)
    elif shape.cache is Cache.UNKNOWN:  # the whole cache: no checkpoint copies more
        window, copied = one_slot.cells, sum(kv_bytes(shape, one_slot))
    elif window or states:
        ngrams = ngram_bytes(shape) * sum(shape.ngrams.layers)
        copied = state_bytes(shape) * states + ngrams + _window_bytes(shape, one_slot, window)
    else:
        return 0
    records = CELL_RECORD_BYTES * window + LAYER_RECORD_BYTES * shape.layers
    return copied + records + SLOT_RECORD_BYTES * context.slots + HEAD_BYTES


def _window_bytes(shape: Shape, one_slot: Context, tokens: int) -> int:
    """Bytes that `tokens` tokens take in the caches of all layers with a window."""
    total = 0
    for cache, cache_window, window in zip(kv_bytes(shape, one_slot), shape.windows, _windows(shape), strict=True):
        total += -(-cache * tokens // cache_cells(one_slot, cache_window)) if window else 0
    return total


def _windows(shape: Shape) -> tuple[int, ...]:
    """Each layer's window in tokens; every layer gets one where it is unknown which layers have it."""
    window = shape.sliding_window
    return shape.windows if shape.cache_is_exact else (window,) * shape.layers
