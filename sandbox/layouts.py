"""The numbers of the test models as data: published models, and tiny models that can be served.

The numbers of a published model are from its config.json on the Hub. Its file sizes and its number of tensors are from
llama.cpp's logs for published files; `sizes` gives the source.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Value = int | float | str | bool | list[int]


@dataclass(frozen=True)
class Layout:
    """The numbers of one model. Lengths are in elements, `context` and `window` in tokens."""

    name: str
    architecture: str
    blocks: int
    embd: int
    heads: int
    kv_heads: int
    head_dim: int
    ff: int  # of a dense block
    vocab: int
    context: int = 131072
    rope_base: float = 500000.0
    experts: int = 0
    experts_used: int = 0
    expert_ff: int = 0  # of one expert, where it is not `ff`
    shared_ff: int = 0  # of the shared experts, which process every token
    dense_blocks: int = 0  # the first blocks, without experts
    nextn: int = 0  # of `blocks`, the last ones: for multi-token prediction
    window: int = 0
    tied: bool = False  # no output.weight: the token embedding serves as output too
    biases: bool = False
    qkv_biases: bool = False
    rope_factors: bool = False  # has rope_freqs.weight
    scores: int = 0  # that a reranker's classifier gives
    extra: dict[str, Value] = field(default_factory=dict)  # metadata; keys without the architecture
    quant: str = "Q4_K_M"
    # Size of all tensors by quantisation as llama.cpp prints it, two decimals, with the source of the figure.
    sizes: dict[str, tuple[float, str]] = field(default_factory=dict)
    tensors: int = 0  # number of tensors in a published log

    def number(self, key: str) -> int:
        """A whole number of `extra`."""
        value = self.extra[key]
        assert isinstance(value, int)
        return value

    @property
    def is_70b(self) -> bool:
        """Does llama-quantize treat the model as LLM_TYPE_70B (src/models/llama.cpp: 80 layers, grouped queries)?"""
        return self.architecture == "llama" and self.blocks == 80 and self.heads != self.kv_heads


# Metadata that the models of a family share.
LLAMA3: dict[str, Any] = {
    "architecture": "llama", "vocab": 128256, "head_dim": 128, "kv_heads": 8, "rope_factors": True,
}  # fmt: skip
GPT_OSS: dict[str, Any] = {
    "architecture": "gpt-oss", "embd": 2880, "heads": 64, "kv_heads": 8, "head_dim": 64, "ff": 2880, "vocab": 201088,
    "experts_used": 4, "window": 128, "biases": True, "rope_base": 150000.0, "quant": "MXFP4",
    "extra": {"rope.scaling.type": "yarn", "rope.scaling.factor": 32.0, "rope.scaling.original_context_length": 4096},
}  # fmt: skip
QWEN: dict[str, Any] = {"head_dim": 128, "vocab": 151936, "rope_base": 1e6}
QWEN3: dict[str, Any] = {"context": 40960, **QWEN}
QWEN3_MOE: dict[str, Any] = {"architecture": "qwen3moe", "kv_heads": 4, "experts": 128, "experts_used": 8, **QWEN3}
GEMMA3: dict[str, Any] = {
    "architecture": "gemma3", "vocab": 262144, "window": 1024, "tied": True, "rope_base": 1e6,
    "extra": {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
}  # fmt: skip
DEEPSEEK_R1: dict[str, Any] = {
    "architecture": "deepseek2", "blocks": 61, "embd": 7168, "heads": 128, "ff": 18432, "vocab": 129280,
    "context": 163840, "rope_base": 10000.0, "experts": 256, "experts_used": 8, "expert_ff": 2048, "shared_ff": 2048,
    "dense_blocks": 3,
}  # fmt: skip
DEEPSEEK_R1_EXTRA: dict[str, Value] = {
    "attention.q_lora_rank": 1536, "attention.kv_lora_rank": 512, "rope.dimension_count": 64,
    "expert_shared_count": 1, "expert_weights_scale": 2.5, "expert_weights_norm": True, "expert_gating_func": 2,
    "rope.scaling.type": "yarn", "rope.scaling.factor": 40.0, "rope.scaling.original_context_length": 4096,
    "rope.scaling.yarn_log_multiplier": 0.1,
}  # fmt: skip
DELTA_NET: dict[str, Value] = {
    "rope.dimension_count": 64, "full_attention_interval": 4, "ssm.conv_kernel": 4, "ssm.state_size": 128,
    "ssm.group_count": 16, "ssm.time_step_rank": 32, "ssm.inner_size": 4096,
}  # fmt: skip
DELTA_NET_MOE: dict[str, Value] = {**DELTA_NET, "expert_shared_feed_forward_length": 512}
SECTIONS: dict[str, Value] = {"rope.dimension_sections": [11, 11, 10, 0]}
QWEN35: dict[str, Any] = {"head_dim": 256, "vocab": 248320, "context": 262144, "rope_base": 1e7}
QWEN35_DENSE: dict[str, Any] = {"architecture": "qwen35", "kv_heads": 4, **QWEN35}
QWEN35_MOE: dict[str, Any] = {
    "architecture": "qwen35moe", "embd": 2048, "heads": 16, "kv_heads": 2, "ff": 0, "experts": 256, "experts_used": 8,
    "expert_ff": 512, "shared_ff": 512, **QWEN35,
}  # fmt: skip
# Where the sizes were read: rows of llama-bench tables that many have published, those that llama.cpp itself
# carries at b11434, and logs.
TABLES = "llama-bench tables, many, "
BENCH = "llama-bench, llama.cpp b11434 "


PUBLISHED: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("gpt-oss-120b", blocks=36, experts=128, **GPT_OSS, tensors=687,
               sizes={"MXFP4": (59.02, BENCH + "benches/mac-m2-ultra/mac-m2-ultra.md:95")}),
        Layout("gpt-oss-20b", blocks=24, experts=32, **GPT_OSS, tensors=459,
               sizes={"MXFP4": (11.27, BENCH + "benches/mac-m2-ultra/mac-m2-ultra.md:47")}),
        Layout("Llama-3.1-8B", blocks=32, embd=4096, heads=32, ff=14336, **LLAMA3, tensors=292,
               sizes={"Q4_K_M": (4.58, TABLES + "`llama 8B Q4_K - Medium | 4.58 GiB | 8.03 B`"),
                      "Q4_0": (4.33, "https://github.com/ikawrakow/ik_llama.cpp/discussions/562")}),
        Layout("Llama-3.3-70B", blocks=80, embd=8192, heads=64, ff=28672, **LLAMA3, tensors=724,
               sizes={"Q4_K_M": (39.59, TABLES + "`llama 70B Q4_K - Medium | 39.59 GiB | 70.55 B`")}),
        Layout("Llama-3.2-3B", blocks=28, embd=3072, heads=24, ff=8192, tied=True, **LLAMA3, tensors=255,
               sizes={"Q4_K_M": (1.87, BENCH + "docs/backend/VirtGPU/development.md:203")}),
        Layout("Llama-4-Scout", "llama4", blocks=48, embd=5120, heads=40, kv_heads=8, head_dim=128, ff=16384,
               vocab=202048, context=10485760, experts=16, experts_used=1, expert_ff=8192, shared_ff=8192,
               rope_factors=True, extra={"interleave_moe_layer_step": 1},
               sizes={"Q4_K_M": (60.86, TABLES + "`llama4 17Bx16E (Scout) Q4_K - Medium | 60.86 GiB | 107.77 B`")}),
        Layout("Mixtral-8x7B", "llama", blocks=32, embd=4096, heads=32, kv_heads=8, head_dim=128, ff=14336, vocab=32000,
               context=32768, rope_base=1e6, experts=8, experts_used=2,
               sizes={"Q4_K_M": (26.49, TABLES + "`llama 8x7B Q4_K - Medium | 26.49 GiB | 46.70 B`")}),
        Layout("Mistral-Small-24B", "llama", blocks=40, embd=5120, heads=32, kv_heads=8, head_dim=128, ff=32768,
               vocab=131072, context=32768, rope_base=1e8,
               sizes={"Q4_K_M": (13.34, TABLES + "`llama 13B Q4_K - Medium | 13.34 GiB | 23.57 B`")}),
        Layout("Phi-4", "phi3", blocks=40, embd=5120, heads=40, kv_heads=10, head_dim=128, ff=17920, vocab=100352,
               context=16384, rope_base=250000.0,
               sizes={"Q4_K_M": (8.43, TABLES + "`phi3 14B Q4_K - Medium | 8.43 GiB | 14.66 B`")}),
        Layout("Qwen2.5-3B", "qwen2", blocks=36, embd=2048, heads=16, kv_heads=2, ff=11008, qkv_biases=True, tied=True,
               **QWEN, context=32768,
               sizes={"Q4_K_M": (1.79, TABLES + "`qwen2 3B Q4_K - Medium | 1.79 GiB | 3.09 B`")}),
        Layout("Qwen2.5-32B", "qwen2", blocks=64, embd=5120, heads=40, kv_heads=8, ff=27648, qkv_biases=True,
               **(QWEN | {"vocab": 152064}),
               sizes={"Q4_K_M": (18.48, TABLES + "`qwen2 32B Q4_K - Medium | 18.48 GiB | 32.76 B`")}),
        Layout("OLMoE-1B-7B", "olmoe", blocks=16, embd=2048, heads=16, kv_heads=16, head_dim=128, ff=1024, vocab=50304,
               context=4096, rope_base=10000.0, experts=64, experts_used=8,
               sizes={"Q4_K_M": (3.92, TABLES + "`olmoe A1.7B Q4_K - Medium | 3.92 GiB | 6.92 B`")}),
        Layout("Qwen3-0.6B", "qwen3", blocks=28, embd=1024, heads=16, kv_heads=8, ff=3072, tied=True, **QWEN3,
               sizes={"Q4_K_M": (0.36, TABLES + "`qwen3 0.6B Q4_K - Medium | 372.65 MiB | 596.05 M`")}),
        Layout("Qwen3-8B", "qwen3", blocks=36, embd=4096, heads=32, kv_heads=8, ff=12288, **QWEN3,
               sizes={"Q4_K_M": (4.68, TABLES + "`qwen3 8B Q4_K - Medium | 4.68 GiB | 8.19 B`")}),
        Layout("Qwen3-32B", "qwen3", blocks=64, embd=5120, heads=64, kv_heads=8, ff=25600, **QWEN3,
               sizes={"Q4_K_M": (18.40, TABLES + "`qwen3 32B Q4_K - Medium | 18.40 GiB | 32.76 B`")}),
        Layout("Qwen3-30B-A3B", blocks=48, embd=2048, heads=32, ff=6144, expert_ff=768, **QWEN3_MOE, tensors=579,
               sizes={"Q4_K_M": (17.28, TABLES + "`qwen3moe 30B.A3B Q4_K - Medium | 17.28 GiB | 30.53 B`"),
                      "Q8_0": (30.25, BENCH + "benches/mac-m2-ultra/mac-m2-ultra.md:143")}),
        Layout("Qwen3-235B-A22B", blocks=94, embd=4096, heads=64, ff=12288, expert_ff=1536, **QWEN3_MOE,
               sizes={"Q4_K_M": (132.39, "logs, `235.09 B, 132.39 GiB`"),
                      "Q8_0": (232.77, "https://github.com/ikawrakow/ik_llama.cpp/pull/370")}),
        # The files of December 2025, before converters parted `ssm_in`.
        Layout("Qwen3-Next-80B-A3B", "qwen3next", blocks=48, embd=2048, heads=16, kv_heads=2, head_dim=256, ff=5120,
               vocab=151936, context=262144, rope_base=1e7, experts=512, experts_used=10, expert_ff=512, shared_ff=512,
               extra=DELTA_NET_MOE, tensors=807,  # https://github.com/ggml-org/llama.cpp/pull/16095
               sizes={"Q4_K_M": (45.08, TABLES + "`qwen3next 80B.A3B Q4_K - Medium | 45.08 GiB | 79.67 B`")}),
        Layout("Qwen3.5-4B", blocks=32, embd=2560, heads=16, ff=9216, tied=True, extra=DELTA_NET | SECTIONS,
               **QWEN35_DENSE,
               sizes={"Q4_K_M": (2.51, TABLES + "`qwen35 4B Q4_K - Medium | 2.51 GiB | 4.21 B`")}),
        Layout("Qwen3.5-9B", blocks=32, embd=4096, heads=16, ff=12288, extra=DELTA_NET | SECTIONS, **QWEN35_DENSE,
               sizes={"Q4_K_M": (5.23, TABLES + "`qwen35 9B Q4_K - Medium | 5.23 GiB | 8.95 B`")}),
        Layout("Qwen3.6-27B", blocks=64, embd=5120, heads=24, ff=17408, **QWEN35_DENSE,
               extra={**DELTA_NET, **SECTIONS, "ssm.time_step_rank": 48, "ssm.inner_size": 6144},
               tensors=851, sizes={"Q4_K_M": (15.40, TABLES + "`qwen35 27B Q4_K - Medium | 15.40 GiB | 26.90 B`")}),
        Layout("Qwen3.6-35B-A3B", blocks=40, extra=DELTA_NET_MOE | SECTIONS, **QWEN35_MOE,
               sizes={"Q4_K_M": (19.70, "llama-bench, lmstudio-community's file: model_size 21155768832 bytes")}),
        Layout("Qwen3.6-35B-A3B-MTP", blocks=41, nextn=1, **QWEN35_MOE,
               extra={**DELTA_NET_MOE, **SECTIONS, "nextn_predict_layers": 1},
               sizes={"Q4_K_M": (20.21, TABLES + "`qwen35moe 35B.A3B Q4_K - Medium | 20.21 GiB | 35.51 B`")}),
        Layout("Gemma-3-12B", blocks=48, embd=3840, heads=16, kv_heads=8, head_dim=256, ff=15360, **GEMMA3,
               sizes={"Q4_K_M": (6.79, TABLES + "`gemma3 12B Q4_K - Medium | 6.79 GiB | 11.77 B`")}),
        Layout("Gemma-3-27B", blocks=62, embd=5376, heads=32, kv_heads=16, head_dim=128, ff=21504, **GEMMA3,
               sizes={"Q4_K_M": (15.40, TABLES + "`gemma3 27B Q4_K - Medium | 15.40 GiB | 27.01 B`")}),
        Layout("GLM-4.5-Air", "glm4moe", blocks=47, nextn=1, embd=4096, heads=96, kv_heads=8, head_dim=128, ff=10944,
               vocab=151552, rope_base=1e6, experts=128, experts_used=8, expert_ff=1408, shared_ff=1408,
               dense_blocks=1, qkv_biases=True, tensors=803,  # https://github.com/ggml-org/llama.cpp/pull/14939
               extra={"rope.dimension_count": 64, "nextn_predict_layers": 1, "expert_shared_count": 1,
                      "expert_weights_scale": 1.0, "expert_weights_norm": True, "expert_gating_func": 2},
               sizes={"Q4_K_M": (67.85, "llama-bench, build b6767: GLM 4.5 Air Q4_K (67.85 GiB)")}),
        Layout("GLM-Z1-32B", "glm4", blocks=61, embd=6144, heads=48, kv_heads=2, head_dim=128, ff=23040, vocab=151552,
               context=32768, rope_base=10000.0, extra={"rope.dimension_count": 64},
               sizes={"Q4_K_M": (18.32, TABLES + "`glm4 32B Q4_K - Medium | 18.32 GiB | 32.57 B`"),
                      "IQ4_XS": (16.38, "https://github.com/ikawrakow/ik_llama.cpp/pull/344")}),
        # No size of Q4_K_M with MLA was found; it differs from the next only where attn_kv_b is parted.
        Layout("DeepSeek-R1", kv_heads=1, head_dim=576, **DEEPSEEK_R1, tensors=1086,
               extra={**DEEPSEEK_R1_EXTRA, "attention.value_length": 512, "attention.key_length_mla": 192,
                      "attention.value_length_mla": 128},
               sizes={"Q8_0": (664.29, TABLES + "`deepseek2 671B Q8_0 | 664.29 GiB | 671.03 B`")}),
        Layout("DeepSeek-R1-before-MLA", kv_heads=128, head_dim=192, **DEEPSEEK_R1, tensors=1025,
               extra={**DEEPSEEK_R1_EXTRA, "attention.key_length": 192, "attention.value_length": 128},
               sizes={"Q4_K_M": (376.65, TABLES + "`deepseek2 671B Q4_K - Medium | 376.65 GiB | 671.03 B`")}),
        Layout("RWKV7-G1-2.9B", "rwkv7", blocks=32, embd=2560, heads=0, kv_heads=0, head_dim=0, ff=10240, vocab=65536,
               context=1048576, quant="F16",
               extra={"wkv.head_size": 64, "attention.decay_lora_rank": 96, "attention.iclr_lora_rank": 96,
                      "attention.value_residual_mix_lora_rank": 64, "attention.gate_lora_rank": 320},
               sizes={"F16": (5.52, "https://github.com/RWKV-Vibe/RWKV-Inference-Performance-Test/")}),
        Layout("Falcon3-Mamba-7B", "mamba", blocks=64, embd=4096, heads=0, kv_heads=0, head_dim=0, ff=0, vocab=65024,
               context=1048576, tensors=643,  # https://github.com/ggml-org/llama.cpp/issues/6758
               extra={"ssm.conv_kernel": 4, "ssm.inner_size": 8192, "ssm.state_size": 16, "ssm.time_step_rank": 256,
                      "ssm.dt_b_c_rms": True}),
    )
}  # fmt: skip

TINY: dict[str, Layout] = {
    "dense": Layout("tiny-dense", "llama", blocks=4, embd=256, heads=4, kv_heads=2, head_dim=64, ff=512,
                    vocab=512, context=8192, rope_base=10000.0, quant="F16"),
    "moe": Layout("tiny-moe", "qwen3moe", blocks=4, embd=256, heads=4, kv_heads=2, head_dim=64, ff=128,
                  vocab=512, context=8192, rope_base=10000.0, experts=16, experts_used=4, quant="F16"),
    "windowed": Layout("tiny-windowed", "gemma3", blocks=6, embd=256, heads=4, kv_heads=2, head_dim=64, ff=256,
                       vocab=512, context=8192, rope_base=10000.0, window=256, quant="F16"),
    "hybrid": Layout("tiny-hybrid", "qwen35", blocks=4, embd=256, heads=4, kv_heads=2, head_dim=64, ff=512,
                     vocab=512, context=8192, rope_base=10000.0, quant="F16",
                     extra={"rope.dimension_sections": [11, 11, 10, 0], "full_attention_interval": 4,
                            "ssm.conv_kernel": 4, "ssm.state_size": 64, "ssm.group_count": 2,
                            "ssm.time_step_rank": 4, "ssm.inner_size": 256}),
    "recurrent": Layout("tiny-recurrent", "mamba", blocks=4, embd=256, heads=0, kv_heads=0, head_dim=0, ff=0,
                        vocab=512, context=8192, quant="F16",
                        extra={"ssm.conv_kernel": 4, "ssm.inner_size": 512, "ssm.state_size": 16,
                               "ssm.time_step_rank": 32}),
}  # fmt: skip
