"""How much of the host's RAM a context checkpoint takes: what llama-server copies to go back in a conversation.

The rules are llama.cpp's at b11434: create_checkpoint in tools/server/server-context.cpp, and state_write, with
LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY, of the memories in src/. Measured: bench/results/checkpoints.csv.
"""

from __future__ import annotations

from dataclasses import replace

from llamafleet.memory.context import Context, cache_cells
from llamafleet.memory.kv_cache import COMPRESSED, compressed_layers, kv_bytes, window_cells
from llamafleet.model.gguf import Header
from llamafleet.model.shape import (
    UNKNOWN_CACHES,
    is_known,
    number,
    recurrent_layers,
    state_bytes,
    trunk_layers,
    windows,
)

# What is noted beside the copied rows, at most: of a token its position, its slot and its place in an image
# (llama-kv-cache.cpp:2217), of a layer types and lengths (:2250), of a slot how many tokens there are.
CELL_NOTE_BYTES, LAYER_NOTE_BYTES, SLOT_NOTE_BYTES = 24, 24, 4
HEAD_BYTES = 64


def checkpoint_bytes(header: Header, context: Context) -> int:
    """At most what one context checkpoint of one slot takes; 0 where llama-server makes none.

    It copies what cannot be rolled back: recurrent state (llama-memory-hybrid.cpp:191), and of layers with a window
    (llama-kv-cache-iswa.cpp:259) the tokens inside it, however many cells their cache has (llama-kv-cache.cpp:2100).
    """
    one = replace(context, slots=1)
    window = min(max(_windows(header), default=0), one.cells)
    states = sum(recurrent_layers(header)[: trunk_layers(header)])
    if header.architecture == COMPRESSED:  # its window and what is not compressed yet (llama-kv-cache-dsv4.cpp:1597)
        parts, cells = compressed_layers(header, one), window_cells(one, window)
        copied = sum(-(-inside * window // cells) + state for inside, _, state in parts)
    elif header.architecture in UNKNOWN_CACHES:  # all there is, which is more than any can copy
        window, copied = one.cells, sum(kv_bytes(header, one))
    elif window or states:
        copied = state_bytes(header) * states + _window_bytes(header, one, window)
    else:
        return 0
    notes = CELL_NOTE_BYTES * window + LAYER_NOTE_BYTES * number(header, "block_count")
    return copied + notes + SLOT_NOTE_BYTES * context.slots + HEAD_BYTES


def _window_bytes(header: Header, one: Context, tokens: int) -> int:
    """Bytes of that many tokens in the caches of all layers with a window."""
    total = 0
    for cache, known, size in zip(kv_bytes(header, one), windows(header), _windows(header), strict=True):
        total += -(-cache * tokens // cache_cells(one, known)) if size else 0
    return total


def _windows(header: Header) -> tuple[int, ...]:
    """Each layer's window; where nobody knows which layers have one, all might."""
    window = number(header, "attention.sliding_window")
    return windows(header) if is_known(header) else (window,) * number(header, "block_count")
