"""llama.cpp's architectures (b11434), one row each, with the properties in which it differs from the defaults.

To add an architecture, write an outline in tests/oracle/architectures, then a row here. tests/oracle/test_adopt.py
fails for a row that src/llama-arch.cpp, LLM_ARCH_NAMES, does not have.

Decision 5: docs/decisions/0005-known-or-bound-never-guessed.md.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from llamafleet.model.architecture import Architecture, Cache, HeadRows, Indexer, LayerGraph, Recurrence, Rope

RELEASE = "b11434"  # llama.cpp release that these rows describe
PROJECTOR = "clip"  # general.architecture of an image or audio projector (mmproj), which is loaded beside a model only

# Parts of a draft head (nextn) that src/models/*.cpp load without `mtp_flags`.
_HEAD = r"nextn\.(embed_tokens|shared_head_head|shared_head_norm)\..*"
_FFN = r"ffn_(?!norm).*|exp_probs_b.*"


def _parts(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(patterns))


_ENCODER: dict[str, Any] = {"cache": Cache.NONE, "has_output": False, "computes_logits": False}

_ROWS = (
    Architecture(name="llama", weights_normed=True),
    Architecture(
        name="llama4",
        window_period=4,
        window_default=8192,
        window_fixed=8192,
        rope=Rope.ALL_BUT_LAST_OF_FOUR,
        rope_without_windows=True,
        scales_unrotated_queries=True,
        weighs_inputs=True,
    ),
    Architecture(name="grok", flash_attention=False, scales_embeddings=True, weights_normed=True),
    Architecture(name="bert", **_ENCODER, layer_graph=LayerGraph.NORMS_BEHIND, rope=Rope.NEVER),
    Architecture(
        name="modern-bert", **_ENCODER, layer_norm=True, window_period=3, window_dense_first=True, scores_mean=True
    ),
    Architecture(name="nomic-bert", **_ENCODER, layer_graph=LayerGraph.NORMS_BEHIND),
    Architecture(name="nomic-bert-moe", **_ENCODER, layer_graph=LayerGraph.NORMS_BEHIND),
    Architecture(name="neo-bert", **_ENCODER),
    Architecture(name="jina-bert-v2", **_ENCODER, layer_graph=LayerGraph.NORMS_BEHIND, rope=Rope.NEVER),
    Architecture(name="jina-bert-v3", **_ENCODER, layer_graph=LayerGraph.NORMS_BEHIND),
    Architecture(name="eurobert", **_ENCODER),
    Architecture(name="qwen3moe", weights_normed=True),
    Architecture(
        name="qwen3next",
        recurrence=Recurrence.BY_INTERVAL,
        head_rows=HeadRows.IN_LAYER,
        norm_first=True,
        late_output=True,
        weights_normed=True,
    ),
    Architecture(name="qwen3vl", has_deepstack=True),
    Architecture(name="qwen3vlmoe", has_deepstack=True, weights_normed=True),
    Architecture(name="qwen35", recurrence=Recurrence.BY_INTERVAL, norm_first=True, late_output=True),
    Architecture(
        name="qwen35moe", recurrence=Recurrence.BY_INTERVAL, norm_first=True, late_output=True, weights_normed=True
    ),
    Architecture(name="clef", verified=False, cache=Cache.UNKNOWN),
    Architecture(
        name="qwen4exp",
        recurrence=Recurrence.BY_INTERVAL,
        indexer=Indexer.BESIDE_STATE,
        indexer_rows=2,
        has_context_gaps=True,
        maps_layer_inputs=True,
        layer_graph=LayerGraph.MIXED_STREAMS,
        weights_normed=True,
    ),
    Architecture(name="phi2", parallel_sum=("attention", "ffn", "input")),
    Architecture(name="phi3", ignores_windows=True, residual_first_last=True),
    Architecture(
        name="phimoe", ignores_windows=True, rms_norm_with_bias=True, residual_first_last=True, weights_normed=True
    ),
    Architecture(name="plamo2", recurrence=Recurrence.WITHOUT_KV_HEADS, state_heads=True),
    Architecture(name="plamo3", verified=False, window_period=8),
    Architecture(name="minicpm3", scales_embeddings=True),
    Architecture(name="gemma", scales_embeddings=True),
    Architecture(name="gemma2", window_period=2, window_default=4096, scales_embeddings=True),
    Architecture(name="gemma3", window_period=6, scales_tokens=True),
    Architecture(
        name="gemma3n",
        window_period=5,
        cache_layers=20,
        embedding_held_twice=True,
        scales_tokens=True,
        layer_graph=LayerGraph.ALTERNATING_STATES,
        sparse_layers=10,
        normed_values=True,
    ),
    Architecture(
        name="gemma4",
        shares_caches=True,
        maps_layer_inputs=True,
        embedding_held_twice=True,
        scales_tokens=True,
        late_output=True,
        rope_factors_only_without_window=True,
        normed_values=True,
        weights_normed=True,
    ),
    Architecture(name="gemma4-assistant", verified=False, cache=Cache.UNKNOWN, mixes_inputs=False),
    Architecture(name="gemma-embedding", cache=Cache.NONE, computes_logits=False, window_period=6, scales_tokens=True),
    Architecture(name="mamba", recurrence=Recurrence.EVERY_LAYER),
    Architecture(name="mamba2", recurrence=Recurrence.EVERY_LAYER),
    Architecture(name="maple", verified=False, rope=Rope.WITH_WINDOW, weights_normed=True, clamps_at_once=True),
    Architecture(
        name="jamba",
        recurrence=Recurrence.WITHOUT_KV_HEADS,
        residual_first=True,
        residual_first_last=True,
        rope=Rope.NEVER,
    ),
    Architecture(name="falcon-h1", recurrence=Recurrence.BESIDE_ATTENTION),
    Architecture(name="command-r", layer_norm=True, parallel_sum=("ffn", "input", "attention")),
    Architecture(
        name="cohere2",
        window_period=4,
        layer_norm=True,
        parallel_sum=("ffn", "input", "attention"),
        rope=Rope.WITH_WINDOW,
    ),
    Architecture(
        name="cohere2moe",
        window_period=4,
        window_dense_first=True,
        draft_parts=_parts(_HEAD),
        late_output=True,
        parallel_sum=("ffn", "input", "attention"),
        rope=Rope.WITH_WINDOW_OR_DENSE,
    ),
    Architecture(name="dbrx", layer_norm=True, weights_normed=True),
    Architecture(name="olmo", verified=False, layer_norm=True),
    Architecture(name="olmo2", window_period=4),
    Architecture(name="muse-glimmer", verified=False, window_period=4, rope=Rope.WITH_WINDOW),
    Architecture(name="openelm", verified=False, residual_first=True),
    Architecture(name="arctic", weights_normed=True),
    Architecture(name="deepseek32", indexer=Indexer.EVERY_LAYER, has_context_gaps=True),
    Architecture(
        name="deepseek4",
        window_period=0,
        cache=Cache.COMPRESSED,
        has_context_gaps=True,
        mixes_inputs=False,
        layer_graph=LayerGraph.HYPER_CONNECTIONS,
        clamps_at_once=True,
    ),
    Architecture(name="glm-dsa", indexer=Indexer.BY_TYPES, indexer_shared_from=1048576, has_context_gaps=True),
    Architecture(name="t5", verified=False, cache=Cache.UNKNOWN),
    Architecture(
        name="nemotron_h",
        recurrence=Recurrence.WITHOUT_KV_HEADS,
        one_part_layers=True,
        late_output=True,
        rope=Rope.NEVER,
    ),
    Architecture(
        name="nemotron_h_moe",
        recurrence=Recurrence.WITHOUT_KV_HEADS,
        head_rows=HeadRows.IN_LAYER,
        one_part_layers=True,
        late_output=True,
        rope=Rope.NEVER,
    ),
    Architecture(
        name="exaone4",
        window_period=4,
        window_default=4096,
        window_only_with_layers=64,
        rope=Rope.WITH_WINDOW,
        rope_without_windows=True,
    ),
    Architecture(name="exaone-moe", window_period=4, rope=Rope.WITH_WINDOW),
    Architecture(name="rwkv6", recurrence=Recurrence.EVERY_LAYER, layer_graph=LayerGraph.RWKV),
    Architecture(name="rwkv6qwen2", verified=False, recurrence=Recurrence.EVERY_LAYER),
    Architecture(name="rwkv7", recurrence=Recurrence.EVERY_LAYER, layer_graph=LayerGraph.RWKV),
    Architecture(name="arwkv7", verified=False, recurrence=Recurrence.EVERY_LAYER),
    Architecture(name="granite", rope=Rope.UNLESS_SWITCHED_OFF, weights_normed=True),
    Architecture(name="granitemoe", weights_normed=True),
    Architecture(
        name="granitehybrid", recurrence=Recurrence.WITHOUT_KV_HEADS, rope=Rope.UNLESS_SWITCHED_OFF, weights_normed=True
    ),
    Architecture(
        name="graniteswitch", verified=False, cache=Cache.UNKNOWN, mixes_inputs=False, rope=Rope.UNLESS_SWITCHED_OFF
    ),
    Architecture(name="granite_swa", verified=False, weights_normed=True),
    Architecture(name="bailingmoe3", verified=False, recurrence=Recurrence.WITHOUT_KV_HEADS, late_output=True),
    Architecture(name="dots3note", verified=False, cache=Cache.UNKNOWN),
    Architecture(name="afmoe", window_period=4, scales_embeddings=True, rope=Rope.ALL_BUT_LAST_OF_FOUR),
    Architecture(name="laguna", window_period=4, window_dense_first=True),
    Architecture(name="ernie4_5-moe", weights_normed=True),
    Architecture(name="hunyuan-moe", weights_normed=True),
    Architecture(name="hy_v3", draft_parts=_parts(_HEAD, _FFN), late_output=True),
    Architecture(name="hy_v4", verified=False, cache=Cache.UNKNOWN, clamps_at_once=True),
    Architecture(name="smollm3", rope=Rope.ALL_BUT_LAST_OF_FOUR),
    Architecture(name="gpt-oss", window_period=2, late_output=True, keeps_last_state=True, weights_softmaxed=True),
    Architecture(
        name="lfm2",
        recurrence=Recurrence.WITHOUT_KV_HEADS,
        output_norm_misnamed=True,
        residual_first=True,
        residual_first_last=True,
    ),
    Architecture(
        name="lfm2moe",
        recurrence=Recurrence.WITHOUT_KV_HEADS,
        output_norm_misnamed=True,
        residual_first=True,
        residual_first_last=True,
        weights_normed=True,
    ),
    Architecture(name="dream", verified=False, cache=Cache.NONE),
    Architecture(
        name="smallthinker",
        window_period=4,
        window_dense_first=True,
        window_fixed=4096,
        rope=Rope.ALL_BUT_FIRST_OF_FOUR,
        rope_without_windows=True,
        weights_normed=True,
        chooses_early=True,
    ),
    Architecture(name="llama-embed", cache_is_unused=True, computes_logits=False, weights_normed=True),
    Architecture(name="t5encoder", verified=False, cache=Cache.NONE, computes_logits=False),
    Architecture(name="llada", verified=False, cache=Cache.NONE),
    Architecture(name="llada-moe", cache=Cache.NONE),
    Architecture(name="grovemoe", weights_normed=True, chooses_by_sigmoid=True),
    Architecture(name="minimax-01", verified=False, cache=Cache.UNKNOWN),
    Architecture(name="minimax-m2", weights_normed=True),
    Architecture(name="minimax-m3", indexer=Indexer.BEHIND_DENSE, indexer_keeps_values=True, has_context_gaps=True),
    Architecture(name="cogvlm", verified=False, mixes_inputs=False),
    Architecture(name="rnd1", verified=False, cache=Cache.NONE, weights_normed=True),
    Architecture(name="mistral3", weights_normed=True),
    Architecture(
        name="eagle3",
        has_output=False,
        vocabulary_of_target=True,
        mixes_inputs=False,
        layer_graph=LayerGraph.EAGLE3,
    ),
    Architecture(name="dflash", vocabulary_of_target=True, mixes_inputs=False, layer_graph=LayerGraph.DFLASH),
    Architecture(name="mimo2", head_rows=HeadRows.BEFORE_NORM, weights_normed=True),
    Architecture(
        name="step35",
        draft_parts=_parts(_HEAD, _FFN, r"attn_(q_norm|k_norm|gate)\..*"),
        head_rows=HeadRows.BEFORE_NORM,
        late_output=True,
        keeps_last_state=True,
    ),
    Architecture(
        name="kimi-linear",
        recurrence=Recurrence.WITHOUT_KV_HEADS,
        norm_first=True,
        rope=Rope.NEVER,
        weights_normed=True,
    ),
    Architecture(name="kimi-k3", verified=False, cache=Cache.UNKNOWN),
    Architecture(name="glm5-next", verified=False, cache=Cache.UNKNOWN, clamps_at_once=True),
    Architecture(name="mellum", verified=False, window_period=4, weights_normed=True),
    Architecture(name="pockettts", verified=False, cache=Cache.UNKNOWN),
)

# Compared with llama-server; all properties have their defaults.
_PLAIN = (
    "falcon",
    "stablelm",
    "qwen2",
    "qwen2moe",
    "qwen2vl",
    "qwen3",
    "internlm2",
    "starcoder2",
    "olmoe",
    "deepseek",
    "deepseek2",
    "glm4",
    "glm4moe",
    "nemotron",
    "bailingmoe2",
    "dots1",
    "arcee",
    "ernie4_5",
    "hunyuan-dense",
    "hunyuan_vl",
    "seed_oss",
    "apertus",
    "mistral4",
    "paddleocr",
)

# llama.cpp knows them; their ledger was not compared with llama-server.
_UNVERIFIED = (
    "deci",
    "gpt2",
    "gptj",
    "gptneox",
    "mpt",
    "baichuan",
    "starcoder",
    "refact",
    "bloom",
    "qwen",
    "plamo",
    "codeshell",
    "orion",
    "minicpm",
    "xverse",
    "deepseek2-ocr",
    "chatglm",
    "bitnet",
    "jais",
    "jais2",
    "exaone",
    "chameleon",
    "wavtokenizer-dec",
    "plm",
    "bailingmoe",
    "hrm_text",
    "pangu-embedded",
    "spark2_5",
    "maincoder",
    "talkie",
    "nanbeige",
    "qwen3tts",
)

ARCHITECTURES: Mapping[str, Architecture] = {
    row.name: row
    for row in (
        *_ROWS,
        *(Architecture(name=name) for name in _PLAIN),
        *(Architecture(name=name, verified=False) for name in _UNVERIFIED),
    )
}


def architecture_of(name: str) -> Architecture:
    """The row with this name; for a name that llama.cpp does not know, a new row that is not verified."""
    return ARCHITECTURES.get(name) or Architecture(name=name, verified=False)


def nearest(name: str) -> str | None:
    """The architecture with the most similar name; None if no name is similar."""
    return next(iter(difflib.get_close_matches(name, ARCHITECTURES, 1)), None)
