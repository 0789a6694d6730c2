"""Published models that guess for others, or for themselves: small ones of a family, and files with a draft head.

The numbers are from their config.json on the Hub, as those of `layouts.PUBLISHED`.
"""

from __future__ import annotations

from dataclasses import replace

from sandbox.layouts import DELTA_NET, LLAMA3, PUBLISHED, QWEN, QWEN3, SECTIONS, TINY, Layout


def _with_head(name: str) -> Layout:
    """The layout with the layer of its draft head (nextn), which other files of the model lack."""
    layout = PUBLISHED[name]
    return replace(
        layout, name=f"{name}-MTP", blocks=layout.blocks + 1, nextn=1, tensors=0, sizes={},
        extra={**layout.extra, "nextn_predict_layers": 1},
    )  # fmt: skip


DRAFTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("Llama-3.2-1B", blocks=16, embd=2048, heads=32, ff=8192, tied=True, **(LLAMA3 | {"head_dim": 64})),
        Layout("Qwen2.5-Coder-1.5B", "qwen2", blocks=28, embd=1536, heads=12, kv_heads=2, ff=8960, qkv_biases=True,
               tied=True, **QWEN, context=32768),
        Layout("Qwen2.5-Coder-0.5B", "qwen2", blocks=24, embd=896, heads=14, kv_heads=2, ff=4864, qkv_biases=True,
               tied=True, **(QWEN | {"head_dim": 64}), context=32768),
        Layout("Qwen3-4B", "qwen3", blocks=36, embd=2560, heads=32, kv_heads=8, ff=9728, tied=True, **QWEN3),
        Layout("Qwen3.5-4B-MTP", "qwen35", blocks=33, nextn=1, embd=2560, heads=16, kv_heads=4, head_dim=256, ff=9216,
               vocab=248320, context=262144, rope_base=1e7, tied=True,
               extra={**DELTA_NET, **SECTIONS, "nextn_predict_layers": 1}),
        _with_head("Qwen3.6-27B"),
        _with_head("Qwen3-Next-80B-A3B"),
        _with_head("DeepSeek-R1"),
    )
}  # fmt: skip
# Tiny models that can be served, as `layouts.TINY`: drafts for its "dense" one, and one with a head of its own.
TINY_DRAFTS: dict[str, Layout] = {
    "draft": replace(TINY["dense"], name="tiny-draft", blocks=2),
    "other": replace(TINY["dense"], name="tiny-other", blocks=2, vocab=700),
    "head": replace(TINY["hybrid"], name="tiny-head", blocks=5, nextn=1,
                    extra={**TINY["hybrid"].extra, "nextn_predict_layers": 1}),
}  # fmt: skip
