"""The numbers of models that make embeddings or scores: published ones, and tiny ones that can be served.

The numbers of a published model are from its config.json on the Hub.
"""

from __future__ import annotations

from typing import Any

from sandbox.layouts import Layout, Value

NONE, MEAN, CLS, LAST, RANK = range(5)  # include/llama.h, llama_pooling_type


def _encoder(pooling: int, **more: Value) -> dict[str, Value]:
    return {"attention.causal": False, "attention.layer_norm_epsilon": 1e-12, "pooling_type": pooling, **more}


def _bert(name: str, blocks: int, embd: int, heads: int, pooling: int, **more: Any) -> Layout:
    numbers: dict[str, Any] = {"vocab": 30522, "context": 512, **more}
    return Layout(name, "bert", blocks=blocks, embd=embd, heads=heads, kv_heads=heads, head_dim=embd // heads,
                  ff=4 * embd, quant="F16", extra=_encoder(pooling), **numbers)  # fmt: skip


def _qwen3(name: str, blocks: int, embd: int, heads: int, ff: int, pooling: int, **more: Any) -> Layout:
    return Layout(name, "qwen3", blocks=blocks, embd=embd, heads=heads, kv_heads=8, head_dim=128, ff=ff, tied=True,
                  rope_base=1e6, quant="Q8_0", extra={"pooling_type": pooling}, **more)  # fmt: skip


XLM_R: dict[str, Any] = {"vocab": 250002, "context": 8192}
QWEN3_RERANKER: dict[str, Any] = {"context": 40960, "vocab": 151669, "scores": 2}

EMBEDDERS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        _bert("all-MiniLM-L6-v2", 6, 384, 12, MEAN),
        _bert("bge-small-en-v1.5", 12, 384, 12, CLS),
        _bert("bge-large-en-v1.5", 24, 1024, 16, CLS),
        _bert("bge-m3", 24, 1024, 16, CLS, **XLM_R),
        Layout("nomic-embed-text-v1.5", "nomic-bert", blocks=12, embd=768, heads=12, kv_heads=12, head_dim=64, ff=3072,
               vocab=30522, context=2048, rope_base=1000.0, quant="F16", extra=_encoder(MEAN)),
        Layout("nomic-embed-text-v2-moe", "nomic-bert-moe", blocks=12, embd=768, heads=12, kv_heads=12, head_dim=64,
               ff=3072, vocab=250048, context=512, rope_base=10000.0, experts=8, experts_used=2, quant="F16",
               extra=_encoder(MEAN, moe_every_n_layers=2)),
        _qwen3("Qwen3-Embedding-0.6B", 28, 1024, 16, 3072, LAST, context=32768, vocab=151669),
        _qwen3("Qwen3-Embedding-4B", 36, 2560, 32, 9728, LAST, context=40960, vocab=151665),
        _qwen3("Qwen3-Embedding-8B", 36, 4096, 32, 12288, LAST, context=40960, vocab=151665),
    )
}  # fmt: skip

RERANKERS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        _bert("bge-reranker-v2-m3", 24, 1024, 16, RANK, scores=1, **XLM_R),
        Layout("jina-reranker-v1-tiny-en", "jina-bert-v2", blocks=4, embd=384, heads=12, kv_heads=12, head_dim=32,
               ff=1536, vocab=61056, context=8192, scores=1, quant="F16", extra=_encoder(RANK)),
        Layout("gte-reranker-modernbert-base", "modern-bert", blocks=22, embd=768, heads=12, kv_heads=12, head_dim=64,
               ff=1152, vocab=50368, context=8192, rope_base=160000.0, window=128, scores=1, quant="F16",
               extra=_encoder(RANK, **{"rope.freq_base_swa": 10000.0})),
        _qwen3("Qwen3-Reranker-0.6B", 28, 1024, 16, 3072, RANK, **QWEN3_RERANKER),
        _qwen3("Qwen3-Reranker-4B", 36, 2560, 32, 9728, RANK, **QWEN3_RERANKER),
    )
}  # fmt: skip

# Served with random weights: a BERT with its own kind of vocabulary, a decoder, and rerankers of both kinds.
TINY: dict[str, Layout] = {
    "embedder": _bert("tiny-embedder", 2, 128, 4, MEAN, vocab=512),
    "decoder-embedder": Layout("tiny-decoder-embedder", "llama", blocks=2, embd=128, heads=4, kv_heads=2, head_dim=32,
                               ff=256, vocab=512, context=2048, rope_base=10000.0, quant="F16",
                               extra={"pooling_type": LAST}),
    "reranker": _bert("tiny-reranker", 2, 128, 4, RANK, vocab=512, scores=1),
}  # fmt: skip
