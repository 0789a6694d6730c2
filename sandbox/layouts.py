"""The numbers of the test models as data: published models, as their publishers give them, and two tiny ones.

Numbers of a published model: its config.json on the Hub. Its size: printed by llama.cpp for the published
file, quoted in `source`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Layout:
    """The numbers of one model. Lengths are elements, `context` and `window` tokens."""

    name: str
    architecture: str
    blocks: int
    embd: int
    heads: int
    kv_heads: int
    head_dim: int
    ff: int  # of a dense block; of one expert where there are experts
    vocab: int
    context: int = 131072
    rope_base: float = 500000.0
    experts: int = 0
    experts_used: int = 0
    window: int = 0
    tied: bool = False  # no output.weight: the token embedding serves as output too
    biases: bool = False
    extra: dict[str, int | float | str] = field(default_factory=dict)  # metadata; keys without the architecture
    quant: str = "Q4_K_M"
    published_gib: float = 0.0  # tensors' size in `quant` as llama.cpp prints it, two decimals
    source: str = ""  # who published that figure

    @property
    def is_70b(self) -> bool:
        """What llama-quantize takes for LLM_TYPE_70B (src/models/llama.cpp): 80 layers, grouped queries."""
        return self.architecture == "llama" and self.blocks == 80 and self.heads != self.kv_heads


# What the models of one family share.
LLAMA3: dict[str, Any] = {"architecture": "llama", "vocab": 128256, "head_dim": 128, "kv_heads": 8}
GPT_OSS: dict[str, Any] = {
    "architecture": "gpt-oss", "embd": 2880, "heads": 64, "kv_heads": 8, "head_dim": 64, "ff": 2880, "vocab": 201088,
    "experts_used": 4, "window": 128, "biases": True, "rope_base": 150000.0, "quant": "MXFP4",
    "extra": {"rope.scaling.type": "yarn", "rope.scaling.factor": 32.0, "rope.scaling.original_context_length": 4096},
}  # fmt: skip
QWEN3: dict[str, Any] = {"head_dim": 128, "vocab": 151936, "context": 40960, "rope_base": 1e6}
# Where the sizes were read.
TABLES = "llama-bench tables, many, "
BENCH = "llama-bench, llama.cpp b11434 "

PUBLISHED: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("gpt-oss-120b", blocks=36, experts=128, **GPT_OSS,
               published_gib=59.02, source=BENCH + "benches/mac-m2-ultra/mac-m2-ultra.md:95"),
        Layout("gpt-oss-20b", blocks=24, experts=32, **GPT_OSS,
               published_gib=11.27, source=BENCH + "benches/mac-m2-ultra/mac-m2-ultra.md:47"),
        Layout("Llama-3.1-8B", blocks=32, embd=4096, heads=32, ff=14336, **LLAMA3,
               published_gib=4.58, source=TABLES + "`llama 8B Q4_K - Medium | 4.58 GiB | 8.03 B`"),
        Layout("Llama-3.3-70B", blocks=80, embd=8192, heads=64, ff=28672, **LLAMA3,
               published_gib=39.59, source=TABLES + "`llama 70B Q4_K - Medium | 39.59 GiB | 70.55 B`"),
        Layout("Llama-3.2-3B", blocks=28, embd=3072, heads=24, ff=8192, tied=True, **LLAMA3,
               published_gib=1.87, source=BENCH + "docs/backend/VirtGPU/development.md:203"),
        Layout("Qwen3-30B-A3B", "qwen3moe", blocks=48, embd=2048, heads=32, kv_heads=4, ff=768, experts=128,
               experts_used=8, extra={"feed_forward_length": 6144}, **QWEN3,
               published_gib=17.28, source=TABLES + "`qwen3moe 30B.A3B Q4_K - Medium | 17.28 GiB | 30.53 B`"),
        Layout("Qwen3-8B", "qwen3", blocks=36, embd=4096, heads=32, kv_heads=8, ff=12288, **QWEN3,
               published_gib=4.68, source=TABLES + "`qwen3 8B Q4_K - Medium | 4.68 GiB | 8.19 B`"),
        Layout("Gemma-3-12B", "gemma3", blocks=48, embd=3840, heads=16, kv_heads=8, head_dim=256, ff=15360,
               vocab=262144, window=1024, tied=True, rope_base=1e6,
               extra={"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
               published_gib=6.79, source=TABLES + "`gemma3 12B Q4_K - Medium | 6.79 GiB | 11.77 B`"),
    )
}  # fmt: skip

TINY: dict[str, Layout] = {
    "dense": Layout("tiny-dense", "llama", blocks=4, embd=256, heads=4, kv_heads=2, head_dim=64, ff=512,
                    vocab=512, context=8192, rope_base=10000.0, quant="F16"),
    "moe": Layout("tiny-moe", "qwen3moe", blocks=4, embd=256, heads=4, kv_heads=2, head_dim=64, ff=128,
                  vocab=512, context=8192, rope_base=10000.0, experts=16, experts_used=4, quant="F16"),
}  # fmt: skip
