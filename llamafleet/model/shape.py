"""What a header says of a model's context: which layers have a cache, of what size, and which a recurrent state.

The rules are llama.cpp's at b11434: src/llama-kv-cache.cpp, src/llama-kv-cache-iswa.cpp,
src/llama-memory-recurrent.cpp and the hyperparameters in src/llama-hparams.cpp and src/models/.
Where an architecture is not known here the answer is an upper bound.
"""

from __future__ import annotations

from llamafleet.model.gguf import Header
from llamafleet.model.gguf_cursor import LongArray

STATE_BYTES = 4  # recurrent state is f32

# Every n-th layer attends to everything, the others to a window (src/models/*.cpp, the default of
# load_swa_pattern). Architectures not listed must carry the pattern as an array, else full
# attention is assumed, which is an upper bound.
SWA_PERIODS = {
    "afmoe": 4,
    "cohere2": 4,
    "cohere2moe": 4,
    "deepseek4": 0,
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
SWA_WINDOWS = {"gemma2": 4096, "exaone4": 4096, "llama4": 8192}  # where the header tells none
FIXED_WINDOWS = {"llama4": 8192, "smallthinker": 4096}  # whatever it tells, if it is not none
NO_SWA = frozenset({"phi3", "phimoe"})  # have the key, llama.cpp does not use it (models/phi3.cpp:13-23)


SHARED_CACHES = frozenset({"gemma3n", "gemma4"})  # the last layers read the caches of earlier ones
GEMMA3N_CACHES = 20  # layers that have one (models/gemma3n.cpp:7)

# Recurrent from the first to the last layer (llm_arch_is_recurrent, src/llama-arch.cpp).
RECURRENT = frozenset({"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"})
# Three of four layers recurrent, by interval or by array (src/models/qwen3next.cpp:17).
BY_INTERVAL = frozenset({"qwen3next", "qwen35", "qwen35moe"})
# Recurrent where a layer has no KV heads (src/models/jamba.cpp:12 and others).
BY_HEADS = frozenset({"jamba", "plamo2", "granitehybrid", "lfm2", "lfm2moe", "nemotron_h", "nemotron_h_moe",
                      "kimi-linear", "bailingmoe3"})  # fmt: skip
PARALLEL_HYBRIDS = frozenset({"falcon-h1"})  # attention and state side by side in every layer
INDEXED = frozenset({"deepseek32", "glm-dsa"})  # llama_kv_cache_dsa
GLM_SHARED_CONTEXT = 1048576  # from here on three layers of four share their indexer (src/models/glm-dsa.cpp:60)
# Caches with rules of their own, which are not here (create_memory, src/llama-model.cpp:2358).
UNKNOWN_CACHES = frozenset({"glm5-next", "hy_v4", "dots3note",
                            "qwen4exp", "minimax-01", "kimi-k3", "graniteswitch", "gemma4-assistant", "dflash",
                            "eagle3", "t5", "clef", "pockettts"})  # fmt: skip
# No cache at all: they look at one batch only (create_memory gives nullptr).
CACHELESS = frozenset({"bert", "jina-bert-v2", "jina-bert-v3", "nomic-bert", "nomic-bert-moe", "neo-bert", "eurobert",
                       "modern-bert", "gemma-embedding", "dream", "llada", "llada-moe", "rnd1"})  # fmt: skip
NO_FLASH = frozenset({"grok"})  # flash attention is switched off, whatever is asked (llama-context.cpp:3819)


def number(header: Header, key: str, default: int = 0) -> int:
    """A whole number of the architecture's metadata; the largest where there is one for each layer."""
    value = header.get(key)
    if isinstance(value, tuple):
        return max((int(item) for item in value if isinstance(item, int)), default=default)
    return max(0, int(value)) if isinstance(value, int | float) else default


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
    window = FIXED_WINDOWS.get(arch, window)
    if isinstance(pattern, tuple) and len(pattern) >= layers:
        return tuple(window if item else 0 for item in pattern[:layers])
    period = pattern if isinstance(pattern, int) else SWA_PERIODS.get(arch, 1)
    full = 0 if arch in SWA_DENSE_FIRST else period - 1
    return tuple(0 if layer % period == full else window for layer in range(layers)) if period else (window,) * layers


def is_known(header: Header) -> bool:
    """Are the rules for this architecture exact? Otherwise they are an upper bound, or meant as one."""
    arch = header.architecture
    if arch in UNKNOWN_CACHES:
        return False
    if number(header, "attention.sliding_window") == 0 or arch in NO_SWA:
        return True
    return arch in SWA_PERIODS or isinstance(header.get("attention.sliding_window_pattern"), tuple | int | LongArray)


def is_latent(header: Header) -> bool:
    """MLA: K is compressed and V is read from it; both lengths must be there (llama_hparams::is_mla)."""
    return number(header, "attention.key_length_mla") > 0 and number(header, "attention.value_length_mla") > 0


def indexer_layers(header: Header) -> tuple[bool, ...]:
    """Which layers have an indexer, with keys of its own, that picks what they and the next ones attend to."""
    layers, types = number(header, "block_count"), header.get("attention.indexer.types")
    if header.architecture == "minimax-m3":
        dense = number(header, "leading_dense_block_count")
        return tuple(layer >= dense for layer in range(layers))
    if header.architecture not in INDEXED:
        return (False,) * layers
    if header.architecture == "glm-dsa":
        if isinstance(types, tuple) and len(types) >= trunk_layers(header):
            return (*(bool(one) for one in types[: trunk_layers(header)]), *(False,) * (layers - trunk_layers(header)))
        if types is None and number(header, "context_length") >= GLM_SHARED_CONTEXT:
            return tuple(layer < 2 or layer % 4 == 2 for layer in range(layers))
    return (True,) * layers


def trunk_layers(header: Header) -> int:
    """Layers that are computed: those of a draft head (nextn) come after them."""
    return max(0, number(header, "block_count") - number(header, "nextn_predict_layers"))


def head_sizes(header: Header, window: bool) -> tuple[int, int]:
    """Elements of a head of K and of V (llama-model.cpp:1421)."""
    heads = per_layer(header, "attention.head_count", 1)
    width = number(header, "embedding_length") // max(1, heads[0] if heads else 1)
    key, value = number(header, "attention.key_length", width), number(header, "attention.value_length", width)
    if window:
        key = number(header, "attention.key_length_swa", key)
        value = number(header, "attention.value_length_swa", value)
    return key, value


def layers_with_cache(header: Header, layers: int) -> int:
    """Layers from the front that own a cache; the rest share theirs (llama-hparams.cpp, has_kv)."""
    if header.architecture in CACHELESS:
        return 0
    if header.architecture == "gemma3n":
        return min(layers, GEMMA3N_CACHES)  # models/gemma3n.cpp:7
    without = number(header, "attention.shared_kv_layers") if header.architecture == "gemma4" else 0
    return min(layers - min(layers, without), trunk_layers(header))


def cache_owners(header: Header) -> tuple[int, ...]:
    """For each layer, the one whose cache it reads: its own, or one before (`reuse`, src/llama-model.cpp:2797)."""
    layers = number(header, "block_count")
    owners = layers_with_cache(header, layers) if header.architecture in SHARED_CACHES else layers
    if owners == layers:
        return tuple(range(layers))
    sizes = windows(header)
    return tuple(n if n < owners else max(0, owners - (2 if sizes[n] else 1)) for n in range(layers))


def recurrent_layers(header: Header) -> tuple[bool, ...]:
    """Which layers keep recurrent state instead of a cache."""
    layers, arch = number(header, "block_count"), header.architecture
    trunk = trunk_layers(header)
    if arch in RECURRENT or arch in PARALLEL_HYBRIDS:
        return (True,) * layers
    if arch in BY_INTERVAL:
        given = header.get("attention.recurrent_layers")
        if isinstance(given, tuple) and len(given) >= layers:
            return tuple(bool(item) for item in given[:layers])
        interval = number(header, "full_attention_interval") or 4
        return tuple(layer < trunk and (layer + 1) % interval != 0 for layer in range(layers))
    if arch in BY_HEADS:
        heads, wide = per_layer(header, "attention.head_count_kv"), per_layer(header, "feed_forward_length")
        also_wide = not arch.startswith("nemotron")
        return tuple(layer < trunk and not heads[layer] and (also_wide or not wide[layer]) for layer in range(layers))
    return (False,) * layers


def state_bytes(header: Header) -> int:
    """Bytes of one layer's recurrent state for one slot: n_embd_r and n_embd_s of llama-hparams.cpp."""
    embd, kernel = number(header, "embedding_length"), number(header, "ssm.conv_kernel")
    if size := number(header, "wkv.head_size"):
        return (number(header, "token_shift_count", 2) + size) * embd * STATE_BYTES
    if cells := number(header, "shortconv.l_cache"):
        return embd * (cells - 1) * STATE_BYTES
    if size := number(header, "kda.head_dim"):
        heads = per_layer(header, "attention.head_count", 1)[0]
        return (3 * (kernel - 1 if kernel else 3) + size) * size * heads * STATE_BYTES
    inner, state = number(header, "ssm.inner_size"), number(header, "ssm.state_size")
    rows = max(0, kernel - 1) * (inner + 2 * number(header, "ssm.group_count") * state)
    return (rows + state * inner) * STATE_BYTES
