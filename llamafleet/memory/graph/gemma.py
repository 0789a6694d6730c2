"""Parts that only Gemma 4 has, and the layers of Gemma 3n (src/models/gemma4.cpp, src/models/gemma3n.cpp at b11434).

Both have an embedding of each token for each layer. Gemma 3n keeps several states of each token: a layer computes with
the first state, and the other states are predicted before the layer and corrected after it (AltUp).
"""

from __future__ import annotations

from collections.abc import Callable

from llamafleet.memory.graph import ggml
from llamafleet.memory.graph.builder import Builder, GraphUnknownError
from llamafleet.memory.graph.ggml import (
    F32,
    I32,
    Tensor,
    apply,
    concat,
    get_rows,
    mul_mat,
    new,
    permute,
    reshape,
    transpose,
    view,
)
from llamafleet.memory.graph.moe import moe_ffn

Part = Callable[[Tensor], Tensor]  # computes attention or a feed-forward part from its normed input


def layer_inputs(b: Builder, cur: Tensor) -> Tensor | None:
    """Each layer's own embedding, mixed with the model's: (width, tokens, layers); None if the model has none."""
    table, mixer = (b.weight(f"per_layer_{part}.weight", -1) for part in ("token_embd", "model_proj"))
    layers = b.shape.layers
    if table is None or mixer is None:
        return None
    embeddings = get_rows(table, ggml.graph_input(I32, b.tokens))
    embeddings = apply("scale", reshape(embeddings, table.ne[0] // layers, layers, b.tokens))
    b.graph.expand(embeddings)
    mixed = reshape(apply("scale", mul_mat(mixer, cur)), *embeddings.ne)
    mixed = apply("scale", apply("add", b.norm(mixed, "per_layer_proj_norm"), embeddings))
    return ggml.cont(permute(mixed, 0, 2, 1, 3))


def add_layer_input(b: Builder, cur: Tensor, layer_input: Tensor | None) -> Tensor:
    """Gemma 4: add the layer's own embedding to the layer's result, then scale the sum."""
    if layer_input is not None:
        cur = apply("add", cur, _layer_input_projection(b, cur, layer_input))
    scale = b.weight("layer_output_scale.weight")
    return apply("mul", cur, scale) if scale else cur


def _layer_input_projection(b: Builder, cur: Tensor, layer_input: Tensor) -> Tensor:
    gate = apply("unary", b.linear("inp_gate", cur))
    return b.norm(b.linear("proj", apply("mul", gate, _first_slice(layer_input))), "post_norm")


def ffn_and_experts(b: Builder, residual: Tensor, dense: Part) -> Tensor:
    """Gemma 4: sum of a dense part and experts; the router has its own norm of the input."""
    dense_result = b.norm(dense(b.norm(residual, "ffn_norm")), "post_ffw_norm_1")
    router_input = apply("mul", apply("scale", apply("rms_norm", residual)), b.need("ffn_gate_inp.scale"))
    scores = mul_mat(b.need("ffn_gate_inp.weight"), router_input)
    experts_result = moe_ffn(b, b.norm(residual, "pre_ffw_norm_2"), scores)
    return apply("add", dense_result, b.norm(experts_result, "post_ffw_norm_2"))


def altup_states(b: Builder, cur: Tensor) -> Tensor:
    """All AltUp states of each token, from its embedding: (embedding, tokens, states)."""
    matrices = b.weight("altup_proj.weight", -1)
    if matrices is None:
        raise GraphUnknownError("gemma3n: no tensor altup_proj.weight")
    target_magnitude, repeated = _magnitude(cur), new("repeat", F32, (b.embd, b.tokens, matrices.ne[2]), cur)
    return concat(cur, _with_magnitude(mul_mat(matrices, repeated), target_magnitude), 2)


def altup_mean(b: Builder, cur: Tensor) -> Tensor:
    """The mean of all AltUp states of each token."""
    matrices, target_magnitude = b.need("altup_unembd_proj.weight"), _magnitude(_first_slice(cur))
    others = _with_magnitude(mul_mat(matrices, _other_slices(cur)), target_magnitude)
    mean = _first_slice(cur)
    for _ in range(matrices.ne[2]):
        mean = apply("add", mean, _first_slice(others))
    return apply("scale", mean)


def gemma3n_layer(b: Builder, states: Tensor, layer_input: Tensor | None, attention: Part) -> Tensor:
    """All AltUp states after one layer, from all states before it."""
    if layer_input is None:
        raise GraphUnknownError("gemma3n: no tensor per_layer_token_embd.weight")
    predicted = _altup_predict(b, states)
    active = _first_slice(predicted)
    cur = b.norm(active, "attn_norm")
    low_rank = apply("add", b.norm(b.linear("laurel_r", b.linear("laurel_l", cur)), "laurel_post_norm"), cur)
    cur = apply("add", b.norm(attention(cur), "post_attention_norm"), active)
    residual = apply("scale", apply("add", cur, low_rank))
    cur = b.norm(_feed_forward(b, b.norm(residual, "ffn_norm")), "post_ffw_norm")
    corrected = _altup_correct(b, predicted, apply("add", cur, residual))
    scaled = apply("mul", _first_slice(corrected), b.need("altup_correct_scale.weight"))
    return concat(
        _first_slice(corrected),
        apply("add", _other_slices(corrected), _layer_input_projection(b, scaled, layer_input)),
        2,
    )


def _feed_forward(b: Builder, cur: Tensor) -> Tensor:
    up, gate = b.linear("ffn_up", cur), b.linear("ffn_gate", cur)
    if b.layer < b.shape.architecture.sparse_layers:
        per_token = (1, gate.ne[1])
        mean = new("mean", F32, per_token, gate)
        variance = new("sum_rows", F32, per_token, apply("sqr", apply("sub", gate, mean)))
        threshold = apply("add", mean, apply("scale", apply("sqrt", apply("scale", variance))))
        gate = apply("unary", apply("sub", gate, threshold))
    return b.linear("ffn_down", apply("mul", up, apply("unary", gate)))


def _router_modalities(b: Builder, state: Tensor) -> Tensor:
    """The router's coefficients of the states (altup_compute_router_modalities)."""
    return apply("unary", mul_mat(b.need("altup_router.weight"), apply("scale", b.norm(state, "altup_router_norm"))))


def _altup_predict(b: Builder, states: Tensor) -> Tensor:
    coefficients = b.linear("altup_predict_coef", _router_modalities(b, _first_slice(states)))
    count = states.ne[2]
    mixed = mul_mat(ggml.cont(permute(states, 1, 2, 0, 3)), reshape(coefficients, count, count, b.tokens))
    return apply("add", ggml.cont(permute(mixed, 0, 2, 1, 3)), states)


def _altup_correct(b: Builder, predicted: Tensor, state: Tensor) -> Tensor:
    count = predicted.ne[2]
    innovation = apply("sub", state, _first_slice(predicted))
    coefficients = apply("scale", b.linear("altup_correct_coef", _router_modalities(b, state)))
    coefficients = ggml.cont(transpose(coefficients), 1, b.tokens, count)
    repeated = new("repeat", F32, (b.embd, b.tokens, count), innovation)
    return apply("add", apply("mul", repeated, coefficients), predicted)


def _magnitude(cur: Tensor) -> Tensor:
    """Length of each row (calc_magnitude)."""
    return apply("sqrt", new("sum_rows", F32, (1, *cur.ne[1:]), apply("sqr", cur)))


def _with_magnitude(cur: Tensor, target_magnitude: Tensor) -> Tensor:
    """`cur`, scaled to this magnitude."""
    magnitude = _magnitude(cur)
    return apply("div", apply("mul", cur, target_magnitude), magnitude)


def _first_slice(cur: Tensor) -> Tensor:
    return view(cur, cur.ne[:2])


def _other_slices(cur: Tensor) -> Tensor:
    return view(cur, (*cur.ne[:2], cur.ne[2] - 1))
