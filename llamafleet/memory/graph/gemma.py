"""What Gemma 4 has besides, and the layers of Gemma 3n (src/models/gemma4.cpp, gemma3n.cpp at b11434).

Both have an embedding of each token for each layer. Gemma 3n keeps several states of each token, one of which goes
through a layer; the others are predicted before it and corrected behind it (AltUp).
"""

from __future__ import annotations

from collections.abc import Callable

from llamafleet.memory.graph import ggml
from llamafleet.memory.graph.builder import Builder, GraphUnknownError
from llamafleet.memory.graph.ggml import (
    F32,
    I32,
    Tensor,
    concat,
    get_rows,
    mul_mat,
    new,
    permute,
    reshape,
    same,
    transpose,
    view,
)
from llamafleet.memory.graph.moe import experts

Part = Callable[[Tensor], Tensor]  # attention or a feed-forward part, from its normed input


def layer_inputs(b: Builder, cur: Tensor) -> Tensor | None:
    """The embeddings of all layers, each mixed with the model's: (width, tokens, layers)."""
    table, mixer = (b.weight(f"per_layer_{part}.weight", -1) for part in ("token_embd", "model_proj"))
    layers = b.shape.layers
    if table is None or mixer is None:
        return None
    own = get_rows(table, ggml.graph_input(I32, b.tokens))
    own = same("scale", reshape(own, table.ne[0] // layers, layers, b.tokens))
    b.graph.expand(own)
    mixed = reshape(same("scale", mul_mat(mixer, cur)), *own.ne)
    mixed = same("scale", same("add", b.norm(mixed, "per_layer_proj_norm"), own))
    return ggml.cont(permute(mixed, 0, 2, 1, 3))


def with_layer_input(b: Builder, cur: Tensor, own: Tensor | None) -> Tensor:
    """Gemma 4: add the layer's own embedding behind the layer, scale all."""
    if own is not None:
        cur = same("add", cur, _gated(b, cur, own))
    scale = b.weight("layer_output_scale.weight")
    return same("mul", cur, scale) if scale else cur


def _gated(b: Builder, cur: Tensor, own: Tensor) -> Tensor:
    gate = same("unary", b.linear("inp_gate", cur))
    return b.norm(b.linear("proj", same("mul", gate, _slice(own))), "post_norm")


def experts_beside(b: Builder, residual: Tensor, dense: Part) -> Tensor:
    """Gemma 4: experts and a dense part side by side; what chooses the experts is normed in another way."""
    wide = b.norm(dense(b.norm(residual, "ffn_norm")), "post_ffw_norm_1")
    choice = same("mul", same("scale", same("rms_norm", residual)), b.need("ffn_gate_inp.scale"))
    scores = mul_mat(b.need("ffn_gate_inp.weight"), choice)
    chosen = experts(b, b.norm(residual, "pre_ffw_norm_2"), scores)
    return same("add", wide, b.norm(chosen, "post_ffw_norm_2"))


def stacked(b: Builder, cur: Tensor) -> Tensor:
    """All states of each token, from its embedding: (embedding, tokens, states)."""
    matrices = b.weight("altup_proj.weight", -1)
    if matrices is None:
        raise GraphUnknownError("gemma3n without altup_proj.weight")
    size, repeated = _magnitude(cur), new("repeat", F32, (b.embd, b.tokens, matrices.ne[2]), cur)
    return concat(cur, _of_size(mul_mat(matrices, repeated), size), 2)


def unstacked(b: Builder, cur: Tensor) -> Tensor:
    """One state of each token: the mean of all."""
    matrices, size = b.need("altup_unembd_proj.weight"), _magnitude(_slice(cur))
    others = _of_size(mul_mat(matrices, _rest(cur)), size)
    mean = _slice(cur)
    for _ in range(matrices.ne[2]):
        mean = same("add", mean, _slice(others))
    return same("scale", mean)


def gemma3n_layer(b: Builder, states: Tensor, own: Tensor | None, attention: Part) -> Tensor:
    """One layer, from and to all states."""
    if own is None:
        raise GraphUnknownError("gemma3n without per_layer_token_embd.weight")
    predicted = _predicted(b, states)
    active = _slice(predicted)
    cur = b.norm(active, "attn_norm")
    low_rank = same("add", b.norm(b.linear("laurel_r", b.linear("laurel_l", cur)), "laurel_post_norm"), cur)
    cur = same("add", b.norm(attention(cur), "post_attention_norm"), active)
    residual = same("scale", same("add", cur, low_rank))
    cur = b.norm(_feed_forward(b, b.norm(residual, "ffn_norm")), "post_ffw_norm")
    corrected = _corrected(b, predicted, same("add", cur, residual))
    scaled = same("mul", _slice(corrected), b.need("altup_correct_scale.weight"))
    return concat(_slice(corrected), same("add", _rest(corrected), _gated(b, scaled, own)), 2)


def _feed_forward(b: Builder, cur: Tensor) -> Tensor:
    up, gate = b.linear("ffn_up", cur), b.linear("ffn_gate", cur)
    if b.layer < b.shape.architecture.sparse_layers:
        one = (1, gate.ne[1])
        mean = new("mean", F32, one, gate)
        spread = new("sum_rows", F32, one, same("sqr", same("sub", gate, mean)))
        cut = same("add", mean, same("scale", same("sqrt", same("scale", spread))))
        gate = same("unary", same("sub", gate, cut))
    return b.linear("ffn_down", same("mul", up, same("unary", gate)))


def _shares(b: Builder, state: Tensor) -> Tensor:
    """How much of each state (altup_compute_router_modalities)."""
    return same("unary", mul_mat(b.need("altup_router.weight"), same("scale", b.norm(state, "altup_router_norm"))))


def _predicted(b: Builder, states: Tensor) -> Tensor:
    shares = b.linear("altup_predict_coef", _shares(b, _slice(states)))
    count = states.ne[2]
    mixed = mul_mat(ggml.cont(permute(states, 1, 2, 0, 3)), reshape(shares, count, count, b.tokens))
    return same("add", ggml.cont(permute(mixed, 0, 2, 1, 3)), states)


def _corrected(b: Builder, predicted: Tensor, state: Tensor) -> Tensor:
    count = predicted.ne[2]
    new_part = same("sub", state, _slice(predicted))
    shares = same("scale", b.linear("altup_correct_coef", _shares(b, state)))
    shares = ggml.cont(transpose(shares), 1, b.tokens, count)
    repeated = new("repeat", F32, (b.embd, b.tokens, count), new_part)
    return same("add", same("mul", repeated, shares), predicted)


def _magnitude(cur: Tensor) -> Tensor:
    return same("sqrt", new("sum_rows", F32, (1, *cur.ne[1:]), same("sqr", cur)))


def _of_size(cur: Tensor, size: Tensor) -> Tensor:
    own = _magnitude(cur)
    return same("div", same("mul", cur, size), own)


def _slice(cur: Tensor) -> Tensor:
    return view(cur, cur.ne[:2])


def _rest(cur: Tensor) -> Tensor:
    return view(cur, (*cur.ne[:2], cur.ne[2] - 1))
