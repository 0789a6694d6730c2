"""A model's whole graph, and its layers: attention or a recurrent state, then a feed-forward part or experts."""

from __future__ import annotations

from llamafleet.memory.context import Context
from llamafleet.memory.graph import ggml, qwen4exp
from llamafleet.memory.graph.attention import attention
from llamafleet.memory.graph.builder import BackendOf, Builder
from llamafleet.memory.graph.deepseek4 import hc_head, hyper_connections_layer, repeated_streams
from llamafleet.memory.graph.encoder import encoder
from llamafleet.memory.graph.gemma import (
    add_layer_input,
    altup_mean,
    altup_states,
    ffn_and_experts,
    gemma3n_layer,
    layer_inputs,
)
from llamafleet.memory.graph.ggml import F32, I32, Graph, Tensor, apply, get_rows, mul_mat, new
from llamafleet.memory.graph.layers import Layers
from llamafleet.memory.graph.mla import latent_attention
from llamafleet.memory.graph.moe import moe_ffn
from llamafleet.memory.graph.pooling import pool
from llamafleet.memory.graph.recurrent import recurrent
from llamafleet.memory.graph.rwkv import rwkv_layer
from llamafleet.model.architecture import LayerGraph, Recurrence
from llamafleet.model.shape import Shape

# A layer with one of these norms computes its feed-forward part after attention, not in parallel to it.
NORMS_BETWEEN = ("ffn_norm.weight", "post_attention_norm.weight", "post_ffw_norm.weight", "attn_output_norm.weight")


def build(
    shape: Shape,
    layers: Layers,
    context: Context,
    backend_of: BackendOf,
    order: tuple[int, ...],
    *,
    attention_scratch: bool = False,
) -> Graph:
    """The graph from tokens to logits with the layers in `order` (all, or without repeated ones, see `repeats`).

    `attention_scratch`: flash attention converts a cache that is not f16.
    """
    row = shape.architecture
    b = Builder(shape, layers, context, backend_of, attention_scratch)
    positions, outputs = ggml.graph_input(I32, b.tokens * b.positions), ggml.graph_input(I32, context.outputs)
    if row.layer_graph is LayerGraph.NORMS_BEHIND:
        return encoder(b, order, positions, outputs)
    cur = b.embeddings()
    recurrent_layers, first_values, layer_input = shape.state.layers, None, layer_inputs(b, cur)
    cur = _first_layer_input(b, cur)
    for layer in order:
        b.layer = layer
        if row.layer_graph is LayerGraph.RWKV:
            cur, first_values = rwkv_layer(b, cur, outputs if layer == order[-1] else None, first_values)
        elif row.layer_graph is LayerGraph.HYPER_CONNECTIONS:
            cur = hyper_connections_layer(b, cur, positions, lambda normed: _ffn_or_experts(b, normed))
        elif row.layer_graph is LayerGraph.MIXED_STREAMS:
            rows = outputs if layer == order[-1] else None
            cur = qwen4exp.streams_layer(b, cur, positions, rows, lambda mixed: _ffn_or_experts(b, mixed))
        elif row.layer_graph is LayerGraph.ALTERNATING_STATES:
            cur = gemma3n_layer(b, cur, layer_input, lambda normed: attention(b, normed, positions))
        else:
            rows = None if row.late_output or layer != order[-1] else outputs
            cur = ordinary_layer(b, cur, positions, rows, recurrent_layers[layer])
            cur = add_layer_input(b, cur, layer_input)
    b.layer = -1
    cur = _output_norm_input(b, cur, outputs)
    cur.output = row.keeps_last_state
    if row.late_output and cur.output:
        cur = get_rows(cur, outputs)
    cur = b.norm(b.norm(cur, "output_norm"), "enc.output_norm")
    cur.output = True
    if row.late_output and not row.keeps_last_state:
        cur = get_rows(cur, outputs)
        cur.output = True
    embd = cur
    if row.computes_logits:
        cur = logits(b, cur)
        cur.output = True
    b.graph.expand(cur)
    pool(b, embd)
    return b.graph


def logits(b: Builder, cur: Tensor) -> Tensor:
    """The logits of normed rows."""
    head = b.weight("output.weight", -1) or ggml.weight(*_tied_output(b))
    cur = b.adapted("output.weight", mul_mat(head, cur), mul_mat, cur)
    if bias := b.weight("output.bias", -1):
        cur = apply("add", cur, bias)
    return apply("scale", apply("unary", apply("scale", cur))) if b.shape.caps_logits else cur


def _first_layer_input(b: Builder, cur: Tensor) -> Tensor:
    """Input of the first layer, from the embeddings."""
    kind = b.shape.architecture.layer_graph
    if kind is LayerGraph.ALTERNATING_STATES:
        return altup_states(b, cur)
    if kind is LayerGraph.MIXED_STREAMS:
        return qwen4exp.start(b, cur)
    if kind is LayerGraph.HYPER_CONNECTIONS:
        return repeated_streams(b, cur)
    return b.norm(cur, "token_embd_norm")


def _output_norm_input(b: Builder, cur: Tensor, outputs: Tensor) -> Tensor:
    """Input of the output norm, from the last layer's result."""
    kind = b.shape.architecture.layer_graph
    if kind is LayerGraph.ALTERNATING_STATES:
        return get_rows(altup_mean(b, cur), outputs)
    if kind is LayerGraph.MIXED_STREAMS:
        return qwen4exp.head(b, cur)
    return hc_head(b, cur, outputs) if kind is LayerGraph.HYPER_CONNECTIONS else cur


def _tied_output(b: Builder) -> tuple[str, tuple[int, ...], int]:
    """Type, shape and backend of the token embedding as output matrix."""
    table = b.layers[-1]["token_embd.weight"]
    return table.type, table.shape, b.backend_of("output.weight", None)


def ordinary_layer(b: Builder, inputs: Tensor, positions: Tensor, outputs: Tensor | None, is_recurrent: bool) -> Tensor:
    """The result of the current layer: attention or a recurrent state, then a feed-forward part or experts.

    `outputs`: numbers of the rows that are still needed after attention; None: all.
    """
    parts, row = b.layers[b.layer], b.shape.architecture
    if row.recurrence is Recurrence.BESIDE_ATTENTION:
        return _parallel_hybrid_layer(b, inputs, positions, outputs)
    logits = b.linear("ffn_gate_inp", inputs) if row.chooses_early else None
    normed = ffn_input = cur = b.norm(inputs, "attn_norm")
    if "attn_norm_2.weight" in parts:  # Falcon 40B
        ffn_input = b.norm(inputs, "attn_norm_2")
    if row.norm_first:
        b.graph.expand(normed)
    if is_recurrent:
        cur = recurrent(b, normed)
    elif "attn_kv_a_mqa.weight" in parts:
        cur = latent_attention(b, normed, positions)
    elif any(part.startswith("attn_") and part.endswith(("q.weight", "qkv.weight")) for part in parts):
        cur = attention(b, normed, positions)
    elif row.one_part_layers:
        cur = _ffn_or_experts(b, normed)
    if outputs is not None:
        cur, inputs = get_rows(cur, outputs), get_rows(inputs, outputs)
        logits = get_rows(logits, outputs) if logits else None
    if any(part in parts for part in NORMS_BETWEEN):
        return b.with_deepstack(_after_attention(b, cur, inputs, logits))
    if row.one_part_layers or not any(part.startswith("ffn_") for part in parts):
        return apply("add", cur, inputs)  # mamba: a layer has no feed-forward part
    if outputs is not None:
        ffn_input = get_rows(ffn_input, outputs)
    summands = {"attention": cur, "ffn": _ffn_or_experts(b, ffn_input), "input": inputs}
    first, second, third = (summands[name] for name in row.parallel_sum)
    return apply("add", apply("add", first, second), third)


def _parallel_hybrid_layer(b: Builder, inputs: Tensor, positions: Tensor, outputs: Tensor | None) -> Tensor:
    """Attention and recurrent state in parallel, each with its own norm of the input (src/models/falcon-h1.cpp,
    llama_model_falcon_h1::graph)."""
    attended = attention(b, b.norm(inputs, "attn_norm"), positions)
    state = recurrent(b, b.norm(inputs, "attn_norm"))
    residual = apply("add", apply("add", attended, state), inputs)
    if outputs is not None:
        residual = get_rows(residual, outputs)
    return apply("add", _ffn_or_experts(b, b.norm(residual, "ffn_norm")), residual)


def _after_attention(b: Builder, cur: Tensor, inputs: Tensor, logits: Tensor | None) -> Tensor:
    """Residual, norm, feed-forward part, residual; with a norm after either part where the model has one."""
    parts = b.layers[b.layer]
    sandwich = "ffn_norm.weight" in parts or "post_ffw_norm.weight" in parts
    post_norm = "attn_output_norm" if "attn_output_norm.weight" in parts else "post_attention_norm"
    if sandwich:
        cur = b.norm(cur, post_norm)
    row = b.shape.architecture
    residual = apply("add", inputs, cur) if row.residual_first else apply("add", cur, inputs)
    if not any(part.startswith("ffn_") and "norm" not in part for part in parts):
        return residual
    if "pre_ffw_norm_2.weight" in parts:
        cur = ffn_and_experts(b, residual, lambda normed: ffn(b, normed, ""))
        return apply("add", b.norm(cur, "post_ffw_norm"), residual)
    cur = b.norm(residual, "ffn_norm" if sandwich else post_norm)
    if "ffn_norm_exps.weight" in parts:  # a dense part, then experts on the layer's input (src/models/arctic.cpp)
        residual = apply("add", ffn(b, cur, ""), residual)
        return apply("add", moe_ffn(b, b.norm(inputs, "ffn_norm_exps")), residual)
    cur = b.norm(_ffn_or_experts(b, cur, logits), "post_ffw_norm")
    return apply("add", residual, cur) if row.residual_first_last else apply("add", cur, residual)


def _ffn_or_experts(b: Builder, cur: Tensor, logits: Tensor | None = None) -> Tensor:
    parts = b.layers[b.layer]
    if "ffn_gate_inp.weight" not in parts:
        return ffn(b, cur, "")
    if "ffn_up_chexps.weight" in parts:  # chunk experts take the experts' result (src/models/grovemoe.cpp)
        logits = b.linear("ffn_gate_inp", cur)
        out = moe_ffn(b, cur, logits)
        return apply("add", out, apply("scale", moe_ffn(b, out, logits, "chexps")))
    out = moe_ffn(b, cur, logits)
    if "ffn_up_shexp.weight" in parts:
        shared = ffn(b, cur, "_shexp")
        if "ffn_gate_inp_shexp.weight" in parts:
            shared = apply("mul", shared, apply("unary", b.linear("ffn_gate_inp_shexp", cur)))
        out = apply("add", out, shared)
    elif "ffn_up.weight" in parts:  # a dense part in parallel to the experts (src/models/grok.cpp)
        out = apply("scale", apply("add", ffn(b, cur, ""), out))
    return out


def ffn(b: Builder, cur: Tensor, suffix: str) -> Tensor:
    """The layer's feed-forward part, or its shared expert (`suffix`: "_shexp")."""
    parts = b.layers[b.layer]
    up = b.linear(f"ffn_up{suffix}", cur)
    down = parts[f"ffn_down{suffix}.weight"].shape[0]
    if f"ffn_gate{suffix}.weight" in parts:
        gate = b.linear(f"ffn_gate{suffix}", cur)
        act = b.gated(gate, up, b.shape.clamps[b.layer].others)
    elif up.ne[0] == 2 * down:
        act = new("glu", F32, (down, up.ne[1]), up)
    else:
        act = apply("unary", up)
    return b.linear(f"ffn_down{suffix}", act)
