"""Recurrent layers: the graph by a layer's tensors, and LFM2's short convolution (src/models/lfm2.cpp at b11434)."""

from __future__ import annotations

from llamafleet.memory.graph.builder import Builder, GraphUnknownError
from llamafleet.memory.graph.delta_net import delta_net, kimi_delta_attention
from llamafleet.memory.graph.ggml import Tensor, apply, reshape, view
from llamafleet.memory.graph.mamba import mamba, mamba2, plamo2_mamba
from llamafleet.memory.graph.recurrent_state import build_conv_state, ssm_conv


def recurrent(b: Builder, cur: Tensor) -> Tensor:
    """The result of a recurrent layer, before the residual is added, from its normed input."""
    parts = b.layers[b.layer]
    if "shortconv.conv.weight" in parts:
        return _short_convolution(b, cur)
    if "ssm_beta_alpha.weight" in parts or "ssm_ba.weight" in parts or "ssm_alpha.weight" in parts:
        return delta_net(b, cur)
    if "ssm_conv1d_q.weight" in parts:
        return kimi_delta_attention(b, cur)
    if "ssm_x.weight" in parts:
        return plamo2_mamba(b, cur) if b.shape.architecture.state_heads else mamba(b, cur)
    if "ssm_conv1d.weight" in parts and b.shape.state.rank:
        return mamba2(b, cur)
    raise GraphUnknownError(f"{b.shape.architecture.name}: recurrent layer {b.layer} of an unknown kind")


def _short_convolution(b: Builder, cur: Tensor) -> Tensor:
    """Short convolution with a gate before and after it (src/models/lfm2.cpp)."""
    kernel, embd = b.shape.state.short_cells, b.embd
    slots, seq_tokens = b.context.slots, b.tokens // b.context.slots
    projected = b.linear("shortconv.in_proj", reshape(cur, embd, seq_tokens, slots))
    gate_in, gate_out, x = (
        view(projected, (embd, seq_tokens, slots), (projected.nb[1], projected.nb[2])) for _ in range(3)
    )
    columns = build_conv_state(b, apply("mul", gate_in, x), embd, kernel)
    out = apply("mul", gate_out, ssm_conv(columns, b.need("shortconv.conv.weight"), seq_tokens))
    return reshape(b.linear("shortconv.out_proj", out), embd, b.tokens)
