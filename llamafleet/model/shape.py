"""A model's dimensions, read once from its header by llama.cpp's rules.

The rules are llama.cpp's at b11434: src/llama-hparams.cpp, src/llama-model.cpp (load_hparams) and `load_arch_hparams`
in src/models/*.cpp. A header may be hostile: a missing number is 0, and no combination of numbers raises an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from llamafleet.model.architecture import Architecture, Cache
from llamafleet.model.architectures import architecture_of
from llamafleet.model.gguf import Header
from llamafleet.model.gguf_cursor import LongArray, Value
from llamafleet.model.keys import Keys
from llamafleet.model.layer_rules import (
    cache_is_exact,
    cache_layers,
    cache_owners,
    indexer_layers,
    pooling,
    recurrent_layers,
    scores_mean,
    uses_rope,
    windows,
)

# Tensors that --n-cpu-moe matches (common/common.h, LLM_FFN_EXPS_REGEX), and those of a dense feed-forward part.
EXPERTS = re.compile(r"ffn_(up|down|gate|gate_up)_(ch|)exps\..*")
DENSE = re.compile(r"ffn_(up|down|gate)\.weight(\.lora_.*)?")

DEFAULT_TOKEN_SHIFTS = 2  # src/llama-hparams.h, token_shift_count


@dataclass(frozen=True)
class Experts:
    """Dimensions of a mixture of experts; all 0 for a dense model."""

    count: int
    used: tuple[int, ...]  # experts that each token uses, by layer
    feed_forward: int  # width of one expert
    groups: int
    groups_used: int
    gating: int  # src/llama-hparams.h, llama_expert_gating_func_type
    weights_normed: bool
    weights_scaled: bool


@dataclass(frozen=True)
class LatentAttention:
    """MLA: elements of the compressed head, and of the heads that it is decompressed to."""

    is_absorbed: bool  # K is the compressed head and V is read from it (src/llama-hparams.cpp, is_mla)
    rank: int
    rope: int  # elements of a head that RoPE rotates
    key: int
    value: int


@dataclass(frozen=True)
class IndexerShape:
    """Dimensions of the indexer, which picks the cells that attention reads."""

    layers: tuple[bool, ...]  # which layers have an indexer
    key: int  # elements of a head
    heads: int
    top: int  # number of cells, or blocks, that are picked
    block: int  # cells of a block


@dataclass(frozen=True)
class State:
    """Recurrent layers and the dimensions of their states, by the header's keys."""

    layers: tuple[bool, ...]
    inner: int  # ssm.inner_size
    size: int  # ssm.state_size
    groups: int  # ssm.group_count
    rank: int  # ssm.time_step_rank
    kernel: int  # ssm.conv_kernel
    norms_inputs: bool  # ssm.dt_b_c_rms
    short_cells: int  # shortconv.l_cache
    kda_head: int  # kda.head_dim
    wkv_head: int  # wkv.head_size
    token_shifts: int


@dataclass(frozen=True)
class Ngrams:
    """Hashed embeddings of token n-grams (src/models/qwen4exp.cpp, load_arch_hparams); without them all 0."""

    layers: tuple[bool, ...]  # which layers add them
    heads: int  # rows of the table for each token
    history: int  # tokens that a slot keeps, for each element of the residual streams


@dataclass(frozen=True)
class Clamps:
    """Which activations of a layer are clamped: those of experts, and of other feed-forward parts."""

    experts: bool
    others: bool


@dataclass(frozen=True)
class Shape:
    """A model's dimensions. A tuple has one value for each layer."""

    architecture: Architecture
    name: str  # of the model, printable
    layers: int
    trunk_layers: int  # without the layers of a draft head (nextn), which come last
    embedding: int
    embedding_out: int  # elements of an embedding that a server gives (n_embd_out)
    context_tokens: int  # trained; 0 if the header does not have it
    vocabulary: int
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    head: tuple[int, int]  # elements of a head of K and of V, in layers without a window
    window_head: tuple[int, int]  # ... and in layers with a sliding window
    sliding_window: int  # tokens, from the header, even if llama.cpp ignores it
    windows: tuple[int, ...]  # tokens; 0 for attention to all cells
    cache_layers: int  # the first layers, which own a cache
    cache_owners: tuple[int, ...]  # the layer whose cache each layer reads: itself or an earlier one
    uses_rope: tuple[bool, ...]
    position_numbers: int  # numbers that give one token's position
    feed_forward: tuple[int, ...]
    leading_dense: int
    image_layers: int  # the first layers, which add rows of an image (deepstack)
    clamps: tuple[Clamps, ...]
    scales_embeddings: bool
    caps_attention: bool  # attn_logit_softcapping
    caps_logits: bool  # final_logit_softcapping
    norms_residual: bool  # EAGLE-3's residual is the normed hidden state (norm_before_residual)
    experts: Experts
    latent: LatentAttention
    indexer: IndexerShape
    state: State
    ngrams: Ngrams
    compress_ratios: tuple[int, ...]  # tokens that a compressed cell stands for
    residual_streams: int
    output_groups: int
    output_rank: int
    cache_is_exact: bool  # False: the caches' bytes are an upper bound
    pooling: str  # what the header says of embeddings: "none", "mean", "cls", "last", "rank"; "" if nothing
    is_causal: bool  # False: a token attends to those behind it too
    scores_mean: bool  # a reranker's score comes from the mean of the tokens, not from one token

    @property
    def cache(self) -> Cache:
        """Kind of the context's memory; unknown for an architecture that is not verified."""
        known = self.architecture.verified or self.architecture.cache is Cache.NONE
        return self.architecture.cache if known else Cache.UNKNOWN

    def head_sizes(self, window: bool) -> tuple[int, int]:
        """Elements of a head of K and of V. `window`: in layers with a sliding window."""
        return self.window_head if window else self.head

    @classmethod
    def of(cls, header: Header) -> Shape:
        """The dimensions of a header's model."""
        row, keys = architecture_of(header.architecture), Keys(header)
        layers = keys.number("block_count")
        trunk = max(0, layers - keys.number("nextn_predict_layers"))
        swa = windows(row, keys, layers, trunk)
        owners = cache_layers(row, keys, layers, trunk)
        head = _head(keys)
        return cls(
            architecture=row,
            name=header.name,
            layers=layers,
            trunk_layers=trunk,
            embedding=keys.number("embedding_length"),
            embedding_out=keys.number("embedding_length_out") or keys.number("embedding_length"),
            context_tokens=keys.number("context_length"),
            vocabulary=_vocabulary(header, keys),
            heads=keys.per_layer("attention.head_count", 1),
            kv_heads=keys.per_layer("attention.head_count_kv", keys.number("attention.head_count", 1)),
            head=head,
            window_head=(
                keys.number("attention.key_length_swa", head[0]),
                keys.number("attention.value_length_swa", head[1]),
            ),
            sliding_window=keys.number("attention.sliding_window"),
            windows=swa,
            cache_layers=owners,
            cache_owners=cache_owners(row, swa, owners),
            uses_rope=uses_rope(row, keys, swa),
            position_numbers=4 if keys.has("rope.dimension_sections") else 1,
            feed_forward=keys.per_layer("feed_forward_length"),
            leading_dense=keys.number("leading_dense_block_count"),
            image_layers=keys.number("n_deepstack_layers") if row.has_deepstack else 0,
            clamps=_clamps(row, keys, layers),
            scales_embeddings=row.scales_embeddings or keys.has("embedding_scale"),
            caps_attention=keys.has("attn_logit_softcapping"),
            caps_logits=keys.has("final_logit_softcapping"),
            norms_residual=keys.has("norm_before_residual"),
            experts=_experts(keys),
            latent=_latent(keys),
            indexer=_indexer(row, keys, layers, trunk),
            state=_state(row, keys, layers, trunk),
            ngrams=_ngrams(keys, layers),
            compress_ratios=keys.per_layer("attention.compress_ratios"),
            residual_streams=keys.number("hyper_connection.count"),
            output_groups=keys.number("attention.output_group_count"),
            output_rank=keys.number("attention.output_lora_rank"),
            cache_is_exact=cache_is_exact(row, keys),
            pooling=pooling(keys),
            is_causal=keys.get("attention.causal") is not False,
            scores_mean=scores_mean(row, keys),
        )


def _head(keys: Keys) -> tuple[int, int]:
    """Elements of a head of K and of V (src/llama-model.cpp, load_hparams)."""
    heads = keys.per_layer("attention.head_count", 1)
    width = keys.number("embedding_length") // max(1, heads[0] if heads else 1)
    return keys.number("attention.key_length", width), keys.number("attention.value_length", width)


def _clamps(row: Architecture, keys: Keys, layers: int) -> tuple[Clamps, ...]:
    """Clamps of each layer (src/llama-graph.cpp, build_ffn and build_moe_ffn); none if one operation includes them."""
    if row.clamps_at_once:
        return (Clamps(False, False),) * layers
    limits = [_limits(keys.get(f"swiglu_clamp_{part}"), layers) for part in ("exp", "shexp")]
    return tuple(Clamps(*pair) for pair in zip(*limits, strict=True))


def _limits(limit: Value | None, layers: int) -> list[bool]:
    limits = limit if isinstance(limit, tuple) and len(limit) >= layers else (limit,) * layers
    return [isinstance(value, float) and value > 0 for value in limits[:layers]]


def _experts(keys: Keys) -> Experts:
    return Experts(
        count=keys.number("expert_count"),
        used=keys.per_layer("expert_used_count"),
        feed_forward=keys.number("expert_feed_forward_length", keys.number("feed_forward_length")),
        groups=keys.number("expert_group_count"),
        groups_used=keys.number("expert_group_used_count"),
        gating=keys.number("expert_gating_func"),
        weights_normed=keys.has("expert_weights_norm"),
        weights_scaled=keys.get("expert_weights_scale") not in (None, 0.0, 1.0),
    )


def _latent(keys: Keys) -> LatentAttention:
    is_absorbed = keys.number("attention.key_length_mla") > 0 and keys.number("attention.value_length_mla") > 0
    suffix = "_mla" if is_absorbed else ""
    return LatentAttention(
        is_absorbed=is_absorbed,
        rank=keys.number("attention.kv_lora_rank"),
        rope=keys.number("rope.dimension_count"),
        key=keys.number(f"attention.key_length{suffix}"),
        value=keys.number(f"attention.value_length{suffix}"),
    )


def _indexer(row: Architecture, keys: Keys, layers: int, trunk: int) -> IndexerShape:
    return IndexerShape(
        layers=indexer_layers(row, keys, layers, trunk),
        key=keys.number("attention.indexer.key_length"),
        heads=keys.number("attention.indexer.head_count"),
        top=keys.number("attention.indexer.top_k"),
        block=keys.number("attention.indexer.block_size"),
    )


def _state(row: Architecture, keys: Keys, layers: int, trunk: int) -> State:
    return State(
        layers=recurrent_layers(row, keys, layers, trunk),
        inner=keys.number("ssm.inner_size"),
        size=keys.number("ssm.state_size"),
        groups=keys.number("ssm.group_count"),
        rank=keys.number("ssm.time_step_rank"),
        kernel=keys.number("ssm.conv_kernel"),
        norms_inputs=keys.has("ssm.dt_b_c_rms"),
        short_cells=keys.number("shortconv.l_cache"),
        kda_head=keys.number("kda.head_dim"),
        wkv_head=keys.number("wkv.head_size"),
        token_shifts=keys.number("token_shift_count", DEFAULT_TOKEN_SHIFTS),
    )


def _ngrams(keys: Keys, layers: int) -> Ngrams:
    listed = keys.get("ple.layers")
    numbers = set(listed) if isinstance(listed, tuple) else set()
    size = keys.number("ple.ngram_size") if numbers else 0
    return Ngrams(
        layers=tuple(layer in numbers for layer in range(layers)),
        heads=max(0, size - 1) * keys.number("ple.heads_per_ngram"),
        history=max(0, keys.number("ple.conv_kernel") - 1) * size,
    )


def _vocabulary(header: Header, keys: Keys) -> int:
    """Number of tokens in the vocabulary."""
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, LongArray):
        return tokens.length
    if isinstance(tokens, tuple):
        return len(tokens)
    shapes: Mapping[str, tuple[int, ...]] = {tensor.name: tensor.shape for tensor in header.tensors}
    embedding = shapes.get("output.weight") or shapes.get("token_embd.weight")
    return embedding[-1] if embedding else keys.number("vocab_size")
