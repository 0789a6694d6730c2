"""Layers that keep a state instead of a cache; of short convolutions all of it (src/models/lfm2.cpp at b11434)."""

from __future__ import annotations

from llamafleet.memory.graph.builder import Builder, GraphUnknownError
from llamafleet.memory.graph.delta_net import delta_net, kimi_delta
from llamafleet.memory.graph.ggml import Tensor, reshape, same, view
from llamafleet.memory.graph.mamba import mamba, mamba2, plamo_mamba
from llamafleet.memory.graph.recurrent_state import convolve, convolved


def recurrent(b: Builder, cur: Tensor) -> Tensor:
    """The state's part of a layer, from its normed input to what is added to the residual."""
    parts = b.layers[b.layer]
    if "shortconv.conv.weight" in parts:
        return _short_convolution(b, cur)
    if "ssm_beta_alpha.weight" in parts or "ssm_ba.weight" in parts or "ssm_alpha.weight" in parts:
        return delta_net(b, cur)
    if "ssm_conv1d_q.weight" in parts:
        return kimi_delta(b, cur)
    if "ssm_x.weight" in parts:
        return plamo_mamba(b, cur) if b.shape.architecture.state_heads else mamba(b, cur)
    if "ssm_conv1d.weight" in parts and b.shape.state.rank:
        return mamba2(b, cur)
    raise GraphUnknownError(f"the state of {b.shape.architecture.name}, layer {b.layer}")


def _short_convolution(b: Builder, cur: Tensor) -> Tensor:
    """models/lfm2.cpp."""
    kernel, embd = b.shape.state.short_cells, b.embd
    slots, each = b.context.slots, b.tokens // b.context.slots
    whole = b.linear("shortconv.in_proj", reshape(cur, embd, each, slots))
    gate_in, gate_out, x = (view(whole, (embd, each, slots), (whole.nb[1], whole.nb[2])) for _ in range(3))
    columns = convolve(b, same("mul", gate_in, x), embd, kernel)
    out = same("mul", gate_out, convolved(columns, b.need("shortconv.conv.weight"), each))
    return reshape(b.linear("shortconv.out_proj", out), embd, b.tokens)
