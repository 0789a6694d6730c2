"""The tensors of encoders, and of classifiers behind a model: names and shapes as llama.cpp's loader requires them.

The rules are those of load_arch_tensors() in llama.cpp, one file of src/models for each architecture: bert, nomic-bert,
nomic-bert-moe, jina-bert-v2, modern-bert. Shapes are in ggml's order, row length first.
"""

from __future__ import annotations

from collections.abc import Iterator

from sandbox.layouts import Layout

Shapes = Iterator[tuple[str, tuple[int, ...]]]

ENCODERS = frozenset({"bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v2", "modern-bert"})
TOKEN_TYPES = 2


def encoder(layout: Layout) -> Shapes:
    """Every tensor's name and shape, in file order."""
    embd = layout.embd
    yield "token_embd.weight", (embd, layout.vocab)
    if layout.architecture == "modern-bert":
        yield "token_embd_norm.weight", (embd,)
        yield "output_norm.weight", (embd,)
    else:
        yield "token_types.weight", (embd, TOKEN_TYPES)
        yield from _with_bias("token_embd_norm", embd)
    if layout.architecture == "bert":
        yield "position_embd.weight", (embd, layout.context)
    block = _norms_before if layout.architecture == "modern-bert" else _norms_behind
    for i in range(layout.blocks):
        for name, shape in block(layout, i):
            yield f"blk.{i}.{name}", shape
    yield from classifier(layout)


def classifier(layout: Layout) -> Shapes:
    """What makes scores of a model's result: a matrix, mostly behind another one of the model's width."""
    embd = layout.embd
    if not layout.scores:
        return
    if layout.architecture == "jina-bert-v2":
        yield from _with_bias("cls", embd, layout.scores)
        return
    if layout.architecture == "bert":
        yield from _with_bias("cls", embd, embd)
    if layout.architecture == "modern-bert":
        yield "cls.weight", (embd, embd)
        yield "cls.norm.weight", (embd,)
    yield "cls.output.weight", (embd, layout.scores)
    if layout.architecture in ENCODERS:
        yield "cls.output.bias", (layout.scores,)


def _norms_before(layout: Layout, i: int) -> Shapes:
    embd = layout.embd
    if i:
        yield "attn_norm.weight", (embd,)
    yield "attn_qkv.weight", (embd, 3 * embd)
    yield "attn_output.weight", (embd, embd)
    yield "ffn_norm.weight", (embd,)
    yield "ffn_up.weight", (embd, 2 * layout.ff)
    yield "ffn_down.weight", (layout.ff, embd)


def _norms_behind(layout: Layout, i: int) -> Shapes:
    embd, biased = layout.embd, layout.architecture != "nomic-bert"
    line = _with_bias if biased else _without_bias
    if layout.architecture.startswith("nomic"):
        yield from line("attn_qkv", embd, 3 * embd)
    else:
        for part in "qkv":
            yield from line(f"attn_{part}", embd, embd)
    yield from line("attn_output", embd, embd)
    yield from _with_bias("attn_output_norm", embd)
    if layout.experts and i % layout.number("moe_every_n_layers") == 1:
        yield "ffn_gate_inp.weight", (embd, layout.experts)
        yield "ffn_up_exps.weight", (embd, layout.ff, layout.experts)
        yield "ffn_down_exps.weight", (layout.ff, embd, layout.experts)
    else:
        gated = layout.architecture in ("nomic-bert", "jina-bert-v2")
        if gated:
            yield "ffn_gate.weight", (embd, layout.ff)
        yield from (_without_bias if gated else _with_bias)("ffn_up", embd, layout.ff)
        yield from line("ffn_down", layout.ff, embd)
    yield from _with_bias("layer_output_norm", embd)


def _with_bias(name: str, *shape: int) -> Shapes:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[-1:]


def _without_bias(name: str, *shape: int) -> Shapes:
    yield f"{name}.weight", shape
