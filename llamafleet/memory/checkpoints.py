"""How much of the host's RAM a context checkpoint takes: what llama-server copies to go back in a conversation.

The rules are llama.cpp's at b11434: create_checkpoint in tools/server/server-context.cpp, and state_write, with
LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY, of the memories in src/. Measured: bench/results/checkpoints.csv.
"""

from __future__ import annotations

from dataclasses import replace

from llamafleet.memory.context import Context, cache_cells
from llamafleet.memory.kv_cache import compressed_layers, kv_bytes, state_bytes, window_cells
from llamafleet.model.architecture import Cache
from llamafleet.model.shape import Shape

# What is noted beside the copied rows, at most: of a token its position, its slot and its place in an image
# (llama-kv-cache.cpp:2217), of a layer types and lengths (:2250), of a slot how many tokens there are.
CELL_NOTE_BYTES, LAYER_NOTE_BYTES, SLOT_NOTE_BYTES = 24, 24, 4
HEAD_BYTES = 64


def checkpoint_bytes(shape: Shape, context: Context) -> int:
    """At most what one context checkpoint of one slot takes; 0 where llama-server makes none.

    It copies what cannot be rolled back: recurrent state (llama-memory-hybrid.cpp:191), and of layers with a window
    (llama-kv-cache-iswa.cpp:259) the tokens inside it, however many cells their cache has (llama-kv-cache.cpp:2100).
    """
    one = replace(context, slots=1)
    window = min(max(_windows(shape), default=0), one.cells)
    states = sum(shape.state.layers[: shape.trunk_layers])
    if shape.cache is Cache.COMPRESSED:  # its window and what is not compressed yet (llama-kv-cache-dsv4.cpp:1597)
        parts, cells = compressed_layers(shape, one), window_cells(one, window)
        copied = sum(-(-inside * window // cells) + state for inside, _, state in parts)
    elif shape.cache is Cache.UNKNOWN:  # all there is, which is more than any can copy
        window, copied = one.cells, sum(kv_bytes(shape, one))
    elif window or states:
        copied = state_bytes(shape) * states + _window_bytes(shape, one, window)
    else:
        return 0
    notes = CELL_NOTE_BYTES * window + LAYER_NOTE_BYTES * shape.layers
    return copied + notes + SLOT_NOTE_BYTES * context.slots + HEAD_BYTES


def _window_bytes(shape: Shape, one: Context, tokens: int) -> int:
    """Bytes of that many tokens in the caches of all layers with a window."""
    total = 0
    for cache, known, size in zip(kv_bytes(shape, one), shape.windows, _windows(shape), strict=True):
        total += -(-cache * tokens // cache_cells(one, known)) if size else 0
    return total


def _windows(shape: Shape) -> tuple[int, ...]:
    """Each layer's window; where nobody knows which layers have one, all might."""
    window = shape.sliding_window
    return shape.windows if shape.cache_is_exact else (window,) * shape.layers
