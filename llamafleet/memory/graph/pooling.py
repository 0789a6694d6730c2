"""What a server of embeddings or scores computes behind the last layer: one vector or score from a sequence's tokens.

Source: src/llama-graph.cpp, build_pooling and build_dense_out at b11434.
"""

from __future__ import annotations

from llamafleet.memory.graph import ggml
from llamafleet.memory.graph.builder import Builder
from llamafleet.memory.graph.ggml import F32, I32, Tensor, apply, get_rows, mul_mat

# Their scores become likelihoods (build_pooling, "softmax for qwen3 reranker").
WITH_SOFTMAX = ("qwen3", "qwen3vl")


def pool(b: Builder, embd: Tensor) -> None:
    """Expand the graph by the pooled result; nothing for a server that writes text. `embd`: a row for each output."""
    if not b.context.pooling:
        return
    cur = _pooled(b, embd)
    b.graph.expand(cur)
    cur = _dense(b, cur)
    cur.output = True
    b.graph.expand(cur)


def _pooled(b: Builder, embd: Tensor) -> Tensor:
    kind = b.context.pooling
    if kind == "none":
        return embd
    if kind == "mean" or (kind == "rank" and b.shape.scores_mean):
        return _head(b, mul_mat(ggml.cont(ggml.transpose(embd), embd.ne[1], embd.ne[0]), _share_of_each_token(b)))
    return _head(b, get_rows(embd, ggml.graph_input(I32, b.context.slots)))


def _share_of_each_token(b: Builder) -> Tensor:
    return ggml.graph_input(F32, b.tokens, b.context.slots)


def _head(b: Builder, cur: Tensor) -> Tensor:
    """The classifier of a reranker; `cur` for embeddings."""
    if b.context.pooling != "rank":
        return cur
    if b.weight("cls.weight", -1) is not None:
        cur = apply("unary", _linear(b, "cls", cur))
        cur = b.norm(cur, "cls.norm")
    if b.weight("cls.output.weight", -1) is not None:
        cur = _linear(b, "cls.output", cur)
    return apply("soft_max", cur) if b.shape.architecture.name in WITH_SOFTMAX else cur


def _dense(b: Builder, cur: Tensor) -> Tensor:
    """The projections of sentence-transformers behind the pooling, where the file has them."""
    if b.weight("dense_2.weight", -1) is not None:
        cur = _linear(b, "dense_2", cur)
    if (last := b.weight("dense_3.weight", -1)) is not None:
        cur = mul_mat(last, cur)
    return cur


def _linear(b: Builder, part: str, cur: Tensor) -> Tensor:
    matrix, bias = b.weight(f"{part}.weight", -1), b.weight(f"{part}.bias", -1)
    assert matrix is not None  # the callers have looked
    cur = mul_mat(matrix, cur)
    return apply("add", cur, bias) if bias is not None else cur
