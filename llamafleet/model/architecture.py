"""What sets one of llama.cpp's architectures apart, as far as memory goes: the columns of `architectures.py`.

Each field names the place in llama.cpp (b11434) that it follows; `*` stands for the architecture's own file in
src/models/. A field's default is what most architectures do.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, auto


class Cache(Enum):
    """The memory of a context (src/llama-model.cpp, create_memory)."""

    ORDINARY = auto()  # K and V of each layer that attends, state of each recurrent layer
    NONE = auto()  # only the batch at hand is looked at: create_memory gives nullptr
    COMPRESSED = auto()  # llama_kv_cache_dsv4: a window and compressed cells, K alone
    UNKNOWN = auto()  # a memory with rules of its own that are not followed here


class Indexer(Enum):
    """Which layers have an indexer, which picks the cells that attention reads and keeps keys of its own."""

    NONE = auto()
    EVERY_LAYER = auto()  # src/llama-kv-cache-dsa.cpp, llama_kv_cache_dsa
    BY_TYPES = auto()  # the header's `attention.indexer.types` (src/models/glm-dsa.cpp, load_arch_hparams)
    BEHIND_DENSE = auto()  # all but the leading dense layers (src/models/minimax-m3.cpp, load_arch_tensors)


class Recurrence(Enum):
    """Which layers keep a recurrent state."""

    NONE = auto()
    EVERY_LAYER = auto()  # src/llama-arch.cpp, llm_arch_is_recurrent
    BESIDE_ATTENTION = auto()  # every layer has a state and attention (src/models/falcon-h1.cpp, load_arch_hparams)
    BY_INTERVAL = auto()  # all but every n-th, or by an array (src/models/qwen3next.cpp, load_arch_hparams)
    WITHOUT_KV_HEADS = auto()  # layers with no KV heads (src/models/jamba.cpp, load_arch_hparams)


class Rope(Enum):
    """Which layers apply RoPE to Q and K (src/models/*.cpp, graph)."""

    EVERY_LAYER = auto()
    NEVER = auto()
    UNLESS_SWITCHED_OFF = auto()  # the header's `rope.scaling.finetuned` (src/models/granite.cpp, load_arch_hparams)
    WITH_WINDOW = auto()  # layers with a sliding window
    WITH_WINDOW_OR_DENSE = auto()  # and the leading dense layers (src/models/cohere2moe.cpp, graph)
    ALL_BUT_LAST_OF_FOUR = auto()  # src/llama-hparams.h, n_no_rope_layer_step
    ALL_BUT_FIRST_OF_FOUR = auto()  # src/models/smallthinker.cpp, graph


class LayerGraph(Enum):
    """How a layer is put together."""

    ORDINARY = auto()  # attention or state, then feed-forward part or experts
    RWKV = auto()  # src/models/rwkv6-base.cpp, rwkv7-base.cpp
    ALTERNATING_STATES = auto()  # AltUp: several states of a token (src/models/gemma3n.cpp, altup_predict)
    HYPER_CONNECTIONS = auto()  # four residual streams (src/llama-graph.cpp, build_hc_pre)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One architecture of llama.cpp. What is not `verified` is planned by an upper bound."""

    name: str  # src/llama-arch.cpp, LLM_ARCH_NAMES
    verified: bool = True  # held against llama-server by tests/oracle

    # Sliding windows
    window_period: int | None = None  # one of so many layers attends to everything; 0: none does (*, load_arch_hparams)
    window_dense_first: bool = False  # that layer is the first of its period (src/llama-hparams.cpp, set_swa_pattern)
    window_default: int = 0  # tokens, where the header gives none (*, load_arch_hparams)
    window_fixed: int = 0  # tokens, whatever the header gives, if it gives any (*, load_arch_hparams)
    window_only_with_layers: int = 0  # only models of so many layers have windows (exaone4: the 32B)
    ignores_windows: bool = False  # the header has the key, llama.cpp does not use it (src/models/phi3.cpp)

    # Context memory
    cache: Cache = Cache.ORDINARY
    flash_attention: bool = (
        True  # False: it is switched off, whatever is asked (src/llama-context.cpp, llama_init_from_model)
    )
    cache_layers: int = 0  # layers from the front that own a cache, the others read theirs; 0: see `shares_caches`
    shares_caches: bool = False  # the header's last `attention.shared_kv_layers` read the caches of earlier layers
    recurrence: Recurrence = Recurrence.NONE
    one_part_layers: bool = False  # a layer is attention, state or feed-forward part (src/models/nemotron-h.cpp, graph)
    indexer: Indexer = Indexer.NONE
    indexer_shared_from: int = 0  # trained context from which three layers of four share an indexer
    indexer_keeps_values: bool = False  # the indexer's cache has V as well, which is not read (llama_kv_cache_msa)
    has_context_gaps: bool = False  # layers are not interchangeable: all are laid out, since gaps between them add up

    # Weights
    draft_parts: re.Pattern[str] | None = (
        None  # of a draft head (nextn), what is loaded without it (*, load_arch_tensors)
    )
    embedding_held_twice: bool = (
        False  # as input and as output, also on one device (src/models/gemma4.cpp, load_arch_tensors)
    )
    output_norm_misnamed: bool = False  # it is token_embd_norm (src/llama-arch.cpp, LLM_TENSOR_OUTPUT_NORM_LFM2)
    vocabulary_of_target: bool = False  # a draft model with a part of its target's vocabulary (src/models/eagle3.cpp)

    # Embeddings (src/llama-graph.cpp, build_inp_embd)
    scales_tokens: bool = False  # the rows of tokens are multiplied, not those of vectors (tok_scale)
    scales_embeddings: bool = False  # both are, also where the header gives no factor
    mixes_inputs: bool = True  # tokens and vectors in one batch (src/llama-arch.cpp, llm_arch_supports_mixed_batch)
    has_deepstack: bool = False  # the first layers add rows of an image (src/models/qwen3vl.cpp, graph)

    # Layers (*, graph)
    layer_graph: LayerGraph = LayerGraph.ORDINARY
    layer_norm: bool = False  # LLM_NORM, though its tensors have no bias
    rms_norm_with_bias: bool = False  # LLM_NORM_RMS, though its tensors have a bias
    norm_first: bool = False  # the first norm is computed before all else of a layer
    late_output: bool = False  # rows that become logits are picked after the last layer, not inside it
    keeps_last_state: bool = False  # the last layer's result is kept for a draft model (t_h_nextn)
    residual_first: bool = False  # the sum behind attention or state takes the residual's memory if it can
    residual_first_last: bool = False  # ... and so does the sum behind the feed-forward part
    parallel_sum: tuple[str, str, str] = ("ffn", "attention", "input")  # order of the sum where both parts are parallel
    sparse_layers: int = 0  # layers from the front that keep only the largest activations (gemma3n, gaussian_topk)

    # Attention
    rope: Rope = Rope.EVERY_LAYER
    rope_without_windows: bool = False  # where no layer has a window, every layer applies RoPE
    rope_factors_only_without_window: bool = False  # src/models/gemma4.cpp, graph
    scales_unrotated_queries: bool = False  # Q is scaled by position where RoPE is not applied (src/models/llama4.cpp)
    normed_values: bool = False  # V is normed too, without a tensor for it

    # Recurrent state
    state_heads: bool = False  # Mamba with heads and norms of its own (src/models/plamo2.cpp, build_plamo2_mamba_layer)

    # Mixture of experts (src/llama-graph.cpp, build_moe_ffn)
    weights_normed: bool = False  # norm_w, whatever the header gives
    weights_softmaxed: bool = False  # LLAMA_EXPERT_GATING_FUNC_TYPE_SOFTMAX_WEIGHT
    weighs_inputs: bool = False  # weight_before_ffn
    chooses_by_sigmoid: bool = False  # by other numbers than those that weigh (src/models/grovemoe.cpp, graph)
    chooses_early: bool = False  # from what the layer gets, before its attention (src/models/smallthinker.cpp, graph)
    clamps_at_once: bool = False  # one operation clamps both gate and up (ggml_swiglu_clamp)
