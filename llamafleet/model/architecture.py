"""Properties of a llama.cpp architecture that change its memory: the columns of `architectures.py`.

Each field names its source in llama.cpp (b11434); `*` stands for the architecture's own file in src/models/. A field's
default is the value of most architectures.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, auto


class Cache(Enum):
    """Kind of a context's memory (src/llama-model.cpp, create_memory)."""

    ORDINARY = auto()  # K and V of each attention layer, state of each recurrent layer
    NONE = auto()  # no cache: tokens attend to their batch only (create_memory returns nullptr)
    COMPRESSED = auto()  # llama_kv_cache_dsv4: K of a window and of compressed cells, no V
    UNKNOWN = auto()  # another kind of memory, whose size is not computed here


class Indexer(Enum):
    """Which layers have an indexer: it picks the cells that attention reads, and has its own cache of keys."""

    NONE = auto()
    EVERY_LAYER = auto()  # src/llama-kv-cache-dsa.cpp, llama_kv_cache_dsa
    BY_TYPES = auto()  # the header's `attention.indexer.types` (src/models/glm-dsa.cpp, load_arch_hparams)
    BESIDE_STATE = auto()  # all layers without a recurrent state (src/models/qwen4exp.cpp, load_arch_tensors)
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
    """The structure of a layer."""

    ORDINARY = auto()  # attention or recurrent state, then feed-forward part or experts
    RWKV = auto()  # src/models/rwkv6-base.cpp, src/models/rwkv7-base.cpp
    ALTERNATING_STATES = auto()  # AltUp: several states of a token (src/models/gemma3n.cpp, altup_predict)
    NORMS_BEHIND = auto()  # an encoder whose norms follow attention and feed-forward part (src/models/bert.cpp)
    MIXED_STREAMS = auto()  # residual streams, mixed by gates (src/models/qwen4exp.cpp, build_hc_mix)
    EAGLE3 = auto()  # one layer, that reads hidden states of another model (src/models/eagle3.cpp)
    DFLASH = auto()  # layers whose cache is filled from hidden states of another model (src/models/dflash.cpp)
    HYPER_CONNECTIONS = auto()  # four residual streams (src/models/deepseek4.cpp, build_hc_pre)


class HeadRows(Enum):
    """Where the graph of a draft head (nextn) keeps only the rows whose logits are wanted (*, graph_mtp)."""

    AFTER_NORM = auto()  # behind the norm before the output matrix
    BEFORE_NORM = auto()
    IN_LAYER = auto()  # behind attention


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One architecture of llama.cpp. Without `verified`, its memory is planned by an upper bound."""

    name: str  # src/llama-arch.cpp, LLM_ARCH_NAMES
    verified: bool = True  # tests/oracle compares its ledger with llama-server

    # Sliding windows
    window_period: int | None = None  # one layer of this many attends to all cells; 0: none does (*, load_arch_hparams)
    window_dense_first: bool = False  # ... and it is the first of them (src/llama-hparams.cpp, set_swa_pattern)
    window_default: int = 0  # tokens, if the header has no window size (*, load_arch_hparams)
    window_fixed: int = 0  # tokens, replaces any size in the header (*, load_arch_hparams)
    window_only_with_layers: int = 0  # only models with this many layers have windows (exaone4: the 32B)
    ignores_windows: bool = False  # llama.cpp ignores the header's window size (src/models/phi3.cpp)

    # Context memory
    cache: Cache = Cache.ORDINARY
    cache_is_unused: bool = False  # it is allocated, but tokens attend to their batch only (src/models/llama-embed.cpp)
    flash_attention: bool = (
        True  # False: llama.cpp always switches it off (src/llama-context.cpp, llama_init_from_model)
    )
    cache_layers: int = 0  # the first layers that own a cache; later ones read these; 0: see `shares_caches`
    shares_caches: bool = False  # the header's last `attention.shared_kv_layers` read the caches of earlier layers
    recurrence: Recurrence = Recurrence.NONE
    one_part_layers: bool = False  # each layer is attention, state or feed-forward part (src/models/nemotron-h.cpp)
    indexer: Indexer = Indexer.NONE
    indexer_shared_from: int = 0  # trained context in tokens from which three of four layers share an indexer
    indexer_rows: int = 1  # keys of a cell: as computed and pooled (src/llama-hparams.h, indexer_kpool_row)
    indexer_keeps_values: bool = False  # the indexer's cache has an unused V too (llama_kv_cache_msa)
    has_context_gaps: bool = False  # gaps between layers' tensors add up, so the graph needs every layer

    # Weights
    draft_parts: re.Pattern[str] | None = (
        None  # tensors of a draft head (nextn) that are always loaded (*, load_arch_tensors)
    )
    head_rows: HeadRows = HeadRows.AFTER_NORM
    embedding_held_twice: bool = (
        False  # input and output each load it, even on one device (src/models/gemma4.cpp, load_arch_tensors)
    )
    has_output: bool = True  # False: no tied output matrix: an encoder, whose result is the last layer's, or a draft
    computes_logits: bool = True  # False: whatever is asked, it makes embeddings and scores only (*, graph)
    maps_layer_inputs: bool = False  # per_layer_token_embd may be mapped (TENSOR_READ_LAZY; *, load_arch_tensors)
    output_norm_misnamed: bool = False  # named token_embd_norm (src/llama-arch.cpp, LLM_TENSOR_OUTPUT_NORM_LFM2)
    vocabulary_of_target: bool = False  # a draft model that has part of its target's vocabulary (src/models/eagle3.cpp)

    # Embeddings (src/llama-graph.cpp, build_inp_embd)
    scales_tokens: bool = False  # rows of tokens are scaled, rows of vectors are not (tok_scale)
    scales_embeddings: bool = False  # both are scaled, even without a factor in the header
    mixes_inputs: bool = True  # a batch may mix tokens and vectors (src/llama-arch.cpp, llm_arch_supports_mixed_batch)
    has_deepstack: bool = False  # the first layers add image rows (src/models/qwen3vl.cpp, graph)

    # Layers (*, graph)
    layer_graph: LayerGraph = LayerGraph.ORDINARY
    scores_mean: bool = (
        False  # a reranker without `classifier.pooling_type` takes the mean (src/models/modern-bert.cpp)
    )
    layer_norm: bool = False  # LLM_NORM, although its norms have no bias
    rms_norm_with_bias: bool = False  # LLM_NORM_RMS, although its norms have a bias
    norm_first: bool = False  # a layer computes its first norm before anything else
    late_output: bool = False  # rows for logits are selected after the last layer, not inside it
    keeps_last_state: bool = False  # a draft model reads the last layer's result (t_h_nextn)
    residual_first: bool = False  # the residual is the first operand of the sum after attention or state
    residual_first_last: bool = False  # ... and of the sum after the feed-forward part
    parallel_sum: tuple[str, str, str] = ("ffn", "attention", "input")  # operands in parallel layers
    sparse_layers: int = 0  # the first layers, which keep only the largest activations (gemma3n, gaussian_topk)

    # Attention
    rope: Rope = Rope.EVERY_LAYER
    rope_without_windows: bool = False  # every layer applies RoPE if no layer has a window
    rope_factors_only_without_window: bool = False  # src/models/gemma4.cpp, graph
    scales_unrotated_queries: bool = False  # layers without RoPE scale Q by position (src/models/llama4.cpp)
    normed_values: bool = False  # V is normed too, by a norm without weights

    # Recurrent state
    state_heads: bool = False  # Mamba with heads and more norms (src/models/plamo2.cpp, build_plamo2_mamba_layer)

    # Mixture of experts (src/llama-graph.cpp, build_moe_ffn)
    weights_normed: bool = False  # norm_w, even if the header does not ask for it
    weights_softmaxed: bool = False  # LLAMA_EXPERT_GATING_FUNC_TYPE_SOFTMAX_WEIGHT
    weighs_inputs: bool = False  # weight_before_ffn
    chooses_by_sigmoid: bool = False  # selection by other scores than the weights (src/models/grovemoe.cpp, graph)
    chooses_early: bool = False  # experts selected by the layer's input (src/models/smallthinker.cpp, graph)
    clamps_at_once: bool = False  # one operation clamps gate and up (ggml_swiglu_clamp)

    @property
    def attends_to_batch(self) -> bool:
        """Do tokens attend to those of their batch, and to no cached ones?"""
        return self.cache is Cache.NONE or self.cache_is_unused
