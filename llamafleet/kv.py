"""How much memory a model's context takes: the KV cache, layer by layer, and recurrent state.

The rules are llama.cpp's at b11434: src/llama-kv-cache.cpp, src/llama-kv-cache-iswa.cpp,
src/llama-memory-recurrent.cpp and the hyperparameters in src/llama-hparams.cpp and src/models/.
Where an architecture is not known here the answer is an upper bound.
"""

from __future__ import annotations

from dataclasses import dataclass

from .gguf import GGML_TYPES, Header, LongArray

PAD_CELLS = 256  # llama-context.cpp and llama-kv-cache-iswa.cpp pad contexts to this
_BLOCKS = {name.lower(): (block, size) for name, block, size in GGML_TYPES.values()}
STATE_BYTES = 4  # recurrent state is f32

# Every n-th layer attends to everything, the others to a window (src/models/*.cpp, the default of
# load_swa_pattern). Architectures not listed must carry the pattern as an array, else full
# attention is assumed, which is an upper bound.
SWA_PERIODS = {
    "afmoe": 4,
    "cohere2": 4,
    "cohere2moe": 4,
    "exaone-moe": 4,
    "exaone4": 4,
    "gemma2": 2,
    "gemma3": 6,
    "gemma3n": 5,
    "gpt-oss": 2,
    "laguna": 4,
    "llama4": 4,
    "mellum": 4,
    "muse-glimmer": 4,
    "olmo2": 4,
    "plamo3": 8,
    "smallthinker": 4,
}
SWA_DENSE_FIRST = frozenset({"cohere2moe", "laguna", "smallthinker"})
SWA_WINDOWS = {"gemma2": 4096, "exaone4": 4096, "exaone-moe": 128, "llama4": 8192, "smallthinker": 4096}
NO_SWA = frozenset({"phi3", "phimoe"})  # have the key, llama.cpp does not use it (models/phi3.cpp:13-23)


@dataclass(frozen=True)
class Context:
    """The context asked for: tokens of one slot, slots, cache type, tokens computed together."""

    tokens: int
    slots: int
    kv_type: str
    ubatch_tokens: int

    @property
    def cells(self) -> int:
        """KV cells of one slot, padded."""
        return _padded(self.tokens)


def _padded(cells: int) -> int:
    return -(-cells // PAD_CELLS) * PAD_CELLS


def number(header: Header, key: str, default: int = 0) -> int:
    """A whole number of the architecture's metadata; the largest where there is one for each layer."""
    value = header.get(key)
    if isinstance(value, tuple):
        return max((int(item) for item in value if isinstance(item, int)), default=default)
    return int(value) if isinstance(value, int | float) else default


def per_layer(header: Header, key: str, default: int = 0) -> tuple[int, ...]:
    """A whole number for each layer."""
    layers = number(header, "block_count")
    value = header.get(key)
    if isinstance(value, tuple) and len(value) >= layers:
        return tuple(int(item) if isinstance(item, int) else default for item in value[:layers])
    return (number(header, key, default),) * layers


def windows(header: Header) -> tuple[int, ...]:
    """Each layer's attention window in tokens, 0 for attention to everything."""
    layers = number(header, "block_count")
    arch = header.architecture
    window = number(header, "attention.sliding_window", SWA_WINDOWS.get(arch, 0))
    pattern = header.get("attention.sliding_window_pattern")
    if window == 0 or arch in NO_SWA or (arch == "exaone4" and layers != 64):
        return (0,) * layers
    if isinstance(pattern, tuple) and len(pattern) >= layers:
        return tuple(window if item else 0 for item in pattern[:layers])
    period = pattern if isinstance(pattern, int) else SWA_PERIODS.get(arch, 1)
    full = 0 if arch in SWA_DENSE_FIRST else period - 1
    return tuple(0 if layer % period == full else window for layer in range(layers)) if period else (window,) * layers


def is_known(header: Header) -> bool:
    """Are the rules for this architecture exact? An unknown window pattern makes them an upper bound."""
    if number(header, "attention.sliding_window") == 0 or header.architecture in NO_SWA:
        return True
    return header.architecture in SWA_PERIODS or isinstance(
        header.get("attention.sliding_window_pattern"), tuple | int | LongArray
    )


def kv_bytes(header: Header, context: Context) -> tuple[int, ...]:
    """Bytes of each layer's KV cache and recurrent state, all slots together (no unified cache)."""
    layers = number(header, "block_count")
    heads = number(header, "attention.head_count", 1)
    kv_heads = per_layer(header, "attention.head_count_kv", heads)
    width = number(header, "embedding_length") // max(1, heads)
    key, value = _head_sizes(header, width)
    key_swa = number(header, "attention.key_length_swa", key)
    value_swa = number(header, "attention.value_length_swa", value)
    latent = number(header, "attention.key_length_mla") > 0 and number(header, "attention.value_length_mla") > 0
    recurrent, state = _recurrent(header, kv_heads)
    owners = _layers_with_cache(header, layers)
    total = []
    for layer, window in enumerate(windows(header)):
        if recurrent[layer]:
            cache = state * context.slots
        else:
            k = (key_swa if window else key) * kv_heads[layer]
            v = 0 if latent else (value_swa if window else value) * kv_heads[layer]
            cells = _padded(min(context.cells, window + context.ubatch_tokens)) if window else context.cells
            cache = (row_bytes(k, context.kv_type) + row_bytes(v, context.kv_type)) * cells * context.slots
        both = recurrent[layer] and header.architecture in _PARALLEL_HYBRIDS
        if both:
            cache += 2 * row_bytes(key * kv_heads[layer], context.kv_type) * context.cells * context.slots
        total.append(cache if layer < owners else 0)
    return tuple(total)


_PARALLEL_HYBRIDS = frozenset({"falcon-h1"})  # attention and state side by side in every layer


def _head_sizes(header: Header, width: int) -> tuple[int, int]:
    return number(header, "attention.key_length", width), number(header, "attention.value_length", width)


def row_bytes(elements: int, kv_type: str) -> int:
    """Bytes of a row of a cache type; a last, partial block counts whole."""
    block, size = _BLOCKS[kv_type]
    return -(-elements // block) * size


def _layers_with_cache(header: Header, layers: int) -> int:
    """Layers from the front that own a cache; the rest share theirs (llama-hparams.cpp, has_kv)."""
    if header.architecture == "gemma3n":
        return min(layers, 20)  # models/gemma3n.cpp:7
    without = number(header, "attention.shared_kv_layers") + number(header, "nextn_predict_layers")
    return layers - min(layers, without)


def _recurrent(header: Header, kv_heads: tuple[int, ...]) -> tuple[tuple[bool, ...], int]:
    """Which layers keep recurrent state, and its bytes for one slot (n_embd_r + n_embd_s)."""
    layers = len(kv_heads)
    inner = number(header, "ssm.inner_size")
    convolution = number(header, "shortconv.l_cache")
    if not inner and not convolution:
        return (False,) * layers, 0
    if convolution:
        state = number(header, "embedding_length") * (convolution - 1)
    else:
        size = number(header, "ssm.state_size")
        groups = number(header, "ssm.group_count")
        kernel = max(0, number(header, "ssm.conv_kernel") - 1)
        state = kernel * (inner + 2 * groups * size) + size * inner
    interval = number(header, "full_attention_interval")
    if interval or header.architecture in ("qwen3next", "qwen35", "qwen35moe"):
        which = tuple((layer + 1) % (interval or 4) != 0 for layer in range(layers))
    elif header.architecture in _PARALLEL_HYBRIDS or not any(kv_heads):
        which = (True,) * layers
    else:
        which = tuple(heads == 0 for heads in kv_heads)
    return which, state * STATE_BYTES
