"""Encoders: tokens attend to all of the batch, norms follow each part, and the last layer's result is the model's.

Source: src/models/bert.cpp, llama_model_bert::graph at b11434.
"""

from __future__ import annotations

from llamafleet.memory.graph.attention import attention
from llamafleet.memory.graph.builder import Builder, GraphUnknownError
from llamafleet.memory.graph.ggml import F32, Graph, Tensor, apply, get_rows, new, view
from llamafleet.memory.graph.moe import moe_ffn
from llamafleet.memory.graph.pooling import pool


def encoder(b: Builder, order: tuple[int, ...], positions: Tensor, outputs: Tensor) -> Graph:
    """The graph from tokens to the last layer's result, with the layers in `order`."""
    cur = b.embeddings()
    if (types := b.weight("token_types.weight", -1)) is not None:
        cur = apply("add", cur, view(types, (b.embd,)))
    if (places := b.weight("position_embd.weight", -1)) is not None:
        cur = apply("add", get_rows(places, positions), cur)
    cur = _norm_behind_embeddings(b, cur)
    for layer in order:
        b.layer = layer
        cur = _layer(b, cur, positions, outputs if layer == order[-1] else None)
    b.layer = -1
    cur.output = True
    b.graph.expand(cur)
    pool(b, cur)
    return b.graph


def _norm_behind_embeddings(b: Builder, cur: Tensor) -> Tensor:
    scale, bias = b.weight("token_embd_norm.weight", -1), b.weight("token_embd_norm.bias", -1)
    if scale is None or bias is None:
        raise GraphUnknownError(f"{b.shape.architecture.name}: no tensors token_embd_norm")
    return apply("add", apply("mul", apply("norm", cur), scale), bias)


def _layer(b: Builder, inputs: Tensor, positions: Tensor, outputs: Tensor | None) -> Tensor:
    cur = attention(b, inputs, positions)
    if outputs is not None:
        cur, inputs = get_rows(cur, outputs), get_rows(inputs, outputs)
    cur = b.norm(apply("add", cur, inputs), "attn_output_norm")
    if "attn_norm_2.weight" in b.layers[b.layer]:
        cur = b.norm(apply("add", cur, inputs), "attn_norm_2")
    return b.norm(apply("add", _feed_forward(b, cur), cur), "layer_output_norm")


def _feed_forward(b: Builder, cur: Tensor) -> Tensor:
    parts = b.layers[b.layer]
    if "ffn_gate_inp.weight" in parts:
        return moe_ffn(b, cur)
    up = b.linear("ffn_up", cur)
    if "ffn_gate.weight" in parts:
        act = apply("glu", b.linear("ffn_gate", cur), up)
    elif up.ne[0] != parts["ffn_down.weight"].shape[0]:
        act = new("glu", F32, (parts["ffn_down.weight"].shape[0], up.ne[1]), up)
    else:
        act = apply("unary", up)
    return b.linear("ffn_down", act)
