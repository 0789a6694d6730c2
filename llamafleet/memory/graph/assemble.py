"""What a layer computes: attention or a state, feed-forward or experts; and the whole graph of a model."""

from __future__ import annotations

from llamafleet.memory.context import Context
from llamafleet.memory.graph import ggml
from llamafleet.memory.graph.attention import attention
from llamafleet.memory.graph.builder import Builder, Homes
from llamafleet.memory.graph.deepseek4 import first_streams, last_streams, streams_layer
from llamafleet.memory.graph.gemma import (
    experts_beside,
    gemma3n_layer,
    layer_inputs,
    stacked,
    unstacked,
    with_layer_input,
)
from llamafleet.memory.graph.ggml import F32, I32, Graph, Tensor, get_rows, mul_mat, new, same
from llamafleet.memory.graph.layers import Layers
from llamafleet.memory.graph.mla import latent_attention
from llamafleet.memory.graph.moe import experts
from llamafleet.memory.graph.recurrent import recurrent
from llamafleet.memory.graph.rwkv import rwkv_layer
from llamafleet.model.architecture import LayerGraph, Recurrence
from llamafleet.model.shape import Shape

# Layers that have one of them compute feed-forward after attention, not beside it.
NORMS_BETWEEN = ("ffn_norm.weight", "post_attention_norm.weight", "post_ffw_norm.weight", "attn_output_norm.weight")


def build(
    shape: Shape,
    layers: Layers,
    context: Context,
    homes: Homes,
    order: tuple[int, ...],
    *,
    attention_scratch: bool = False,
) -> Graph:
    """The graph of the layers in `order` (all of them, or enough of each kind), from tokens to logits."""
    row = shape.architecture
    b = Builder(shape, layers, context, homes, attention_scratch)
    positions, outputs = ggml.graph_input(I32, b.tokens * b.positions), ggml.graph_input(I32, context.outputs)
    cur = b.embeddings()
    state, first, own = shape.state.layers, None, layer_inputs(b, cur)
    cur = _first(b, cur)
    for layer in order:
        b.layer = layer
        if row.layer_graph is LayerGraph.RWKV:
            cur, first = rwkv_layer(b, cur, outputs if layer == order[-1] else None, first)
        elif row.layer_graph is LayerGraph.HYPER_CONNECTIONS:
            cur = streams_layer(b, cur, positions, lambda normed: _feed_forward(b, normed))
        elif row.layer_graph is LayerGraph.ALTERNATING_STATES:
            cur = gemma3n_layer(b, cur, own, lambda normed: attention(b, normed, positions))
        else:
            cur = _layer(b, cur, positions, None if row.late_output or layer != order[-1] else outputs, state[layer])
            cur = with_layer_input(b, cur, own)
    b.layer = -1
    cur = _last(b, cur, outputs)
    cur.output = row.keeps_last_state
    if row.late_output and cur.output:
        cur = get_rows(cur, outputs)
    cur = b.norm(cur, "output_norm")
    cur.output = True
    if row.late_output and cur.ne[1] != context.outputs:
        cur = get_rows(cur, outputs)
        cur.output = True
    head = b.weight("output.weight") or ggml.weight(*_tied(b))
    cur = mul_mat(head, cur)
    if bias := b.weight("output.bias"):
        cur = same("add", cur, bias)
    if shape.caps_logits:
        cur = same("scale", same("unary", same("scale", cur)))
    cur.output = True
    b.graph.expand(cur)
    return b.graph


def _first(b: Builder, cur: Tensor) -> Tensor:
    """What the first layer gets of the embeddings."""
    kind = b.shape.architecture.layer_graph
    if kind is LayerGraph.ALTERNATING_STATES:
        return stacked(b, cur)
    if kind is LayerGraph.HYPER_CONNECTIONS:
        return first_streams(b, cur)
    return b.norm(cur, "token_embd_norm") if kind is LayerGraph.RWKV else cur


def _last(b: Builder, cur: Tensor, outputs: Tensor) -> Tensor:
    """What the last norm gets of the last layer's result."""
    kind = b.shape.architecture.layer_graph
    if kind is LayerGraph.ALTERNATING_STATES:
        return get_rows(unstacked(b, cur), outputs)
    return last_streams(b, cur, outputs) if kind is LayerGraph.HYPER_CONNECTIONS else cur


def _tied(b: Builder) -> tuple[str, tuple[int, ...], int]:
    table = b.layers[-1]["token_embd.weight"]
    return table.type, table.shape, b.homes("output.weight", None)


def _layer(b: Builder, inputs: Tensor, positions: Tensor, outputs: Tensor | None, state: bool) -> Tensor:
    parts, row = b.layers[b.layer], b.shape.architecture
    if row.recurrence is Recurrence.BESIDE_ATTENTION:
        return _side_by_side(b, inputs, positions, outputs)
    logits = b.linear("ffn_gate_inp", inputs) if row.chooses_early else None
    normed = side = cur = b.norm(inputs, "attn_norm")
    if "attn_norm_2.weight" in parts:  # Falcon 40B
        side = b.norm(inputs, "attn_norm_2")
    if row.norm_first:
        b.graph.expand(normed)
    if state:
        cur = recurrent(b, normed)
    elif "attn_kv_a_mqa.weight" in parts:
        cur = latent_attention(b, normed, positions)
    elif any(part.startswith("attn_") and part.endswith(("q.weight", "qkv.weight")) for part in parts):
        cur = attention(b, normed, positions)
    elif row.one_part_layers:
        cur = _feed_forward(b, normed)
    if outputs is not None:
        cur, inputs = get_rows(cur, outputs), get_rows(inputs, outputs)
        logits = get_rows(logits, outputs) if logits else None
    if any(part in parts for part in NORMS_BETWEEN):
        return b.fed(_after_attention(b, cur, inputs, logits))
    if row.one_part_layers or not any(part.startswith("ffn_") for part in parts):
        return same("add", cur, inputs)  # mamba: nothing but the state
    if outputs is not None:
        side = get_rows(side, outputs)
    summands = {"attention": cur, "ffn": _feed_forward(b, side), "input": inputs}
    first, second, third = (summands[name] for name in row.parallel_sum)
    return same("add", same("add", first, second), third)


def _side_by_side(b: Builder, inputs: Tensor, positions: Tensor, outputs: Tensor | None) -> Tensor:
    """Attention and state, each with a norm of its own of what comes in (models/falcon-h1.cpp:131)."""
    attended = attention(b, b.norm(inputs, "attn_norm"), positions)
    state = recurrent(b, b.norm(inputs, "attn_norm"))
    residual = same("add", same("add", attended, state), inputs)
    if outputs is not None:
        residual = get_rows(residual, outputs)
    return same("add", _feed_forward(b, b.norm(residual, "ffn_norm")), residual)


def _after_attention(b: Builder, cur: Tensor, inputs: Tensor, logits: Tensor | None) -> Tensor:
    """Residual, norm, feed-forward, residual; with norms behind both parts where the model has them."""
    parts = b.layers[b.layer]
    sandwich = "ffn_norm.weight" in parts or "post_ffw_norm.weight" in parts
    behind = "attn_output_norm" if "attn_output_norm.weight" in parts else "post_attention_norm"
    if sandwich:
        cur = b.norm(cur, behind)
    row = b.shape.architecture
    residual = same("add", inputs, cur) if row.residual_first else same("add", cur, inputs)
    if not any(part.startswith("ffn_") and "norm" not in part for part in parts):
        return residual
    if "pre_ffw_norm_2.weight" in parts:
        cur = experts_beside(b, residual, lambda normed: _dense(b, normed, ""))
        return same("add", b.norm(cur, "post_ffw_norm"), residual)
    cur = b.norm(residual, "ffn_norm" if sandwich else behind)
    if "ffn_norm_exps.weight" in parts:  # a dense part, then experts that take what the layer gets (models/arctic.cpp)
        residual = same("add", _dense(b, cur, ""), residual)
        return same("add", experts(b, b.norm(inputs, "ffn_norm_exps")), residual)
    cur = b.norm(_feed_forward(b, cur, logits), "post_ffw_norm")
    return same("add", residual, cur) if row.residual_first_last else same("add", cur, residual)


def _feed_forward(b: Builder, cur: Tensor, logits: Tensor | None = None) -> Tensor:
    parts = b.layers[b.layer]
    if "ffn_gate_inp.weight" not in parts:
        return _dense(b, cur, "")
    if "ffn_up_chexps.weight" in parts:  # experts of groups take what the others give (models/grovemoe.cpp)
        logits = b.linear("ffn_gate_inp", cur)
        out = experts(b, cur, logits)
        return same("add", out, same("scale", experts(b, out, logits, "chexps")))
    out = experts(b, cur, logits)
    if "ffn_up_shexp.weight" in parts:
        shared = _dense(b, cur, "_shexp")
        if "ffn_gate_inp_shexp.weight" in parts:
            shared = same("mul", shared, same("unary", b.linear("ffn_gate_inp_shexp", cur)))
        out = same("add", out, shared)
    elif "ffn_up.weight" in parts:  # a dense part beside the experts (models/grok.cpp)
        out = same("scale", same("add", _dense(b, cur, ""), out))
    return out


def _dense(b: Builder, cur: Tensor, suffix: str) -> Tensor:
    parts = b.layers[b.layer]
    up = b.linear(f"ffn_up{suffix}", cur)
    down = parts[f"ffn_down{suffix}.weight"].shape[0]
    if f"ffn_gate{suffix}.weight" in parts:
        gate = b.linear(f"ffn_gate{suffix}", cur)
        act = b.gated(gate, up, b.shape.clamps[b.layer].others)
    elif up.ne[0] == 2 * down:
        act = new("glu", F32, (down, up.ne[1]), up)
    else:
        act = same("unary", up)
    return b.linear(f"ffn_down{suffix}", act)
