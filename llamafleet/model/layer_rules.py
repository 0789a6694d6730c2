"""Properties of each layer, from the architecture's row and the header's numbers.

The rules are llama.cpp's at b11434: src/llama-hparams.cpp, src/llama-model.cpp (load_hparams) and `load_arch_hparams`
in src/models/*.cpp. A tuple has one value for each layer. `layers`: their number; `trunk`: without a draft head's.
"""

from __future__ import annotations

from llamafleet.model.architecture import Architecture, Cache, Indexer, Recurrence, Rope
from llamafleet.model.gguf_cursor import LongArray
from llamafleet.model.keys import Keys

ROPE_PERIOD = 4  # one layer of this many applies no RoPE (src/llama-hparams.h, n_no_rope_layer_step)
POOLINGS = ("none", "mean", "cls", "last", "rank")  # include/llama.h, llama_pooling_type, by number
DEFAULT_ATTENTION_INTERVAL = 4  # src/models/qwen3next.cpp, load_arch_hparams


def windows(row: Architecture, keys: Keys, layers: int, trunk: int) -> tuple[int, ...]:
    """Sliding window of each layer in tokens; 0 for attention to all cells, as in a draft head's layers unless the
    header lists them (src/llama-hparams.cpp, set_swa_pattern)."""
    window = keys.number("attention.sliding_window", row.window_default)
    pattern = keys.get("attention.sliding_window_pattern")
    has_no_windows = row.window_only_with_layers and row.window_only_with_layers != layers
    if window == 0 or row.ignores_windows or has_no_windows or not row.verified:
        return (0,) * layers
    window = row.window_fixed or window
    if isinstance(pattern, tuple) and len(pattern) >= layers:
        return tuple(window if item else 0 for item in pattern[:layers])
    period = pattern if isinstance(pattern, int) else row.window_period if row.window_period is not None else 1
    if not period:
        return (window,) * layers
    full_attention = 0 if row.window_dense_first else period - 1
    return tuple(0 if layer % period == full_attention or layer >= trunk else window for layer in range(layers))


def cache_is_exact(row: Architecture, keys: Keys) -> bool:
    """Are the cache's rules known? Otherwise its bytes are an upper bound."""
    if row.cache is Cache.NONE:
        return True
    if not row.verified or row.cache is Cache.UNKNOWN:
        return False
    if keys.number("attention.sliding_window") == 0 or row.ignores_windows or row.window_period is not None:
        return True
    return isinstance(keys.get("attention.sliding_window_pattern"), tuple | int | LongArray)


def cache_layers(row: Architecture, keys: Keys, layers: int, trunk: int) -> int:
    """Number of the first layers that own a cache (src/llama-hparams.cpp, has_kv)."""
    if row.cache is Cache.NONE:
        return 0
    if row.cache_layers:
        return min(layers, row.cache_layers)
    without = keys.number("attention.shared_kv_layers") if row.shares_caches else 0
    return min(layers - min(layers, without), trunk)


def cache_owners(row: Architecture, windows: tuple[int, ...], owners: int) -> tuple[int, ...]:
    """The layer whose cache each layer reads: itself, or its kind's last owner (src/llama-model.cpp, create_memory)."""
    layers = len(windows)
    if not (row.cache_layers or row.shares_caches) or owners == layers:
        return tuple(range(layers))
    return tuple(n if n < owners else max(0, owners - (2 if windows[n] else 1)) for n in range(layers))


def uses_rope(row: Architecture, keys: Keys, windows: tuple[int, ...]) -> tuple[bool, ...]:
    """Which layers apply RoPE to Q and K."""
    layers = range(len(windows))
    off = row.rope is Rope.UNLESS_SWITCHED_OFF and keys.get("rope.scaling.finetuned") is False
    if row.rope is Rope.NEVER or off:
        return (False,) * len(windows)
    if row.rope_without_windows and not any(windows):
        return (True,) * len(windows)
    if row.rope in (Rope.WITH_WINDOW, Rope.WITH_WINDOW_OR_DENSE):
        dense = keys.number("leading_dense_block_count") if row.rope is Rope.WITH_WINDOW_OR_DENSE else 0
        return tuple(layer < dense or windows[layer] > 0 for layer in layers)
    without = {Rope.ALL_BUT_LAST_OF_FOUR: ROPE_PERIOD - 1, Rope.ALL_BUT_FIRST_OF_FOUR: 0}.get(row.rope)
    return tuple(layer % ROPE_PERIOD != without for layer in layers)


def indexer_layers(row: Architecture, keys: Keys, layers: int, trunk: int) -> tuple[bool, ...]:
    """Which layers have an indexer."""
    if row.indexer is Indexer.NONE:
        return (False,) * layers
    if row.indexer is Indexer.BESIDE_STATE:
        recurrent = recurrent_layers(row, keys, layers, trunk)
        return tuple(layer < trunk and not recurrent[layer] for layer in range(layers))
    if row.indexer is Indexer.BEHIND_DENSE:
        dense = keys.number("leading_dense_block_count")
        return tuple(layer >= dense for layer in range(layers))
    if row.indexer is Indexer.BY_TYPES:
        types = keys.get("attention.indexer.types")
        if isinstance(types, tuple) and len(types) >= trunk:
            return (*(bool(kind) for kind in types[:trunk]), *(False,) * (layers - trunk))
        if types is None and keys.number("context_length") >= row.indexer_shared_from:
            return tuple(layer < 2 or layer % 4 == 2 for layer in range(layers))
    return (True,) * layers


def recurrent_layers(row: Architecture, keys: Keys, layers: int, trunk: int) -> tuple[bool, ...]:
    """Which layers keep a recurrent state."""
    if row.recurrence in (Recurrence.EVERY_LAYER, Recurrence.BESIDE_ATTENTION):
        return (True,) * layers
    if row.recurrence is Recurrence.BY_INTERVAL:
        given = keys.get("attention.recurrent_layers")
        if isinstance(given, tuple) and len(given) >= layers:
            return tuple(bool(item) for item in given[:layers])
        interval = keys.number("full_attention_interval") or DEFAULT_ATTENTION_INTERVAL
        return tuple(layer < trunk and (layer + 1) % interval != 0 for layer in range(layers))
    if row.recurrence is Recurrence.WITHOUT_KV_HEADS:
        heads, feed_forward = keys.per_layer("attention.head_count_kv"), keys.per_layer("feed_forward_length")
        return tuple(
            layer < trunk and not heads[layer] and not (row.one_part_layers and feed_forward[layer])
            for layer in range(layers)
        )
    return (False,) * layers


def pooling(keys: Keys) -> str:
    """How the header says that an embedding is made from the tokens'; "" if it says nothing that llama.cpp knows."""
    number = keys.get("pooling_type")
    return POOLINGS[number] if isinstance(number, int) and 0 <= number < len(POOLINGS) else ""


def scores_mean(row: Architecture, keys: Keys) -> bool:
    """Does a reranker's score come from the mean of the tokens (pooling_type_cls)?"""
    number = keys.get("classifier.pooling_type")
    return row.scores_mean if number is None else number == POOLINGS.index("mean")
