"""Mixture of experts: select experts, compute them, sum their results (src/llama-graph.cpp, build_moe_ffn, b11434)."""

from __future__ import annotations

from llamafleet.memory.graph import ggml
from llamafleet.memory.graph.builder import Builder, GraphUnknownError
from llamafleet.memory.graph.ggml import F32, I32, Tensor, apply, get_rows, new, reshape, view

EXPERTS_USED_LIMIT = 64  # for each token; models use 1 to 32. Bounds the time that a hostile header takes
SIGMOID = 2  # src/llama-hparams.h, expert_gating_func


def moe_ffn(b: Builder, cur: Tensor, logits: Tensor | None = None, kind: str = "exps") -> Tensor:
    """The result of a layer's experts. `logits`: the router's scores, if they are not computed from `cur`.

    `kind`: "exps", or "chexps" for chunk experts.
    """
    parts, tokens, row = b.layers[b.layer], cur.ne[1], b.shape.architecture
    logits = logits or b.linear("ffn_gate_inp", cur)
    ids, weights = _selected_experts(b, logits, parts[f"ffn_down_{kind}.weight"].shape[2])
    b.graph.expand(weights)
    # Experts compute in a smaller dimension (src/models/nemotron-h.cpp, build_ffn_layer).
    if "ffn_latent_down.weight" in parts:
        cur = b.linear("ffn_latent_down", cur)
    embd, used = cur.ne[0], ids.ne[0]
    cur = reshape(cur, embd, 1, tokens)
    if row.weighs_inputs:
        cur = apply("mul", new("repeat", F32, (embd, used, tokens), cur), weights)
    act = _expert_activation(b, cur, ids, kind)
    out = _expert_linear(b, f"ffn_down_{kind}", act, ids)
    if not row.weighs_inputs:
        out = apply("mul", out, weights)
    b.graph.expand(out)
    total = _sum_of_experts(b, out)
    return b.linear("ffn_latent_up", total) if "ffn_latent_up.weight" in parts else total


def _selected_experts(b: Builder, logits: Tensor, experts_in_tensor: int) -> tuple[Tensor, Tensor]:
    """Numbers of the experts that each token uses, and their weights."""
    count, tokens, row = logits.ne[0], logits.ne[1], b.shape.architecture
    used = b.shape.experts.used[b.layer]
    if not 0 < used <= min(count, EXPERTS_USED_LIMIT):
        raise GraphUnknownError(f"{used} of {count} experts used, 1 to {EXPERTS_USED_LIMIT} possible")
    sharing = count // experts_in_tensor  # experts that share a chunk expert (src/models/grovemoe.cpp)
    used = min(used, count // sharing)
    probabilities = logits
    if not row.weights_softmaxed:
        sigmoid = b.shape.experts.gating == SIGMOID
        probabilities = apply("unary" if sigmoid else "soft_max", logits)
    bias = b.weight("exp_probs_b.bias") or b.weight("exp_probs_b")  # src/models/hy-v3.cpp, load_arch_tensors
    selection = apply("add", probabilities, bias) if bias else probabilities
    if row.chooses_by_sigmoid:
        selection = apply("unary", logits)
    groups = b.shape.experts.groups
    if groups > 1:
        selection = _mask_groups(selection, count, groups, b.shape.experts.groups_used, tokens)
    # A table gives each token's experts (src/models/deepseek4.cpp, ffn_gate_tid2eid).
    if "ffn_gate_tid2eid.weight" in b.layers[b.layer]:
        assert b.token_ids is not None  # set by `Builder.embeddings`
        ids = get_rows(b.need("ffn_gate_tid2eid.weight"), b.token_ids)
    else:
        ids = view(apply_i32("argsort", selection), (used, tokens), (count * 4,))
    if sharing > 1:
        ids = new("cast", I32, ids.ne, apply("scale", new("cast", F32, ids.ne, ids)))
    return ids, _expert_weights(b, get_rows(reshape(probabilities, 1, count, tokens), ids))


def _expert_weights(b: Builder, weights: Tensor) -> Tensor:
    """Weights of the experts, normalised to a sum of 1 and scaled where the model does so."""
    _, used, tokens, _ = weights.ne
    row = b.shape.architecture
    if row.weights_softmaxed:
        weights = reshape(apply("soft_max", reshape(weights, used, tokens)), 1, used, tokens)
    if row.weights_normed or b.shape.experts.weights_normed:
        flat = reshape(weights, used, tokens)
        total = apply("clamp", new("sum_rows", F32, (1, tokens), flat))
        weights = reshape(apply("div", flat, total), 1, used, tokens)
    if b.shape.experts.weights_scaled:
        weights = apply("scale", weights)
    return weights


def _sum_of_experts(b: Builder, out: Tensor) -> Tensor:
    embd, used, tokens, _ = out.ne
    views = [view(out, (embd, tokens), (out.nb[2],)) for _ in range(used)]
    for x in views:
        b.graph.expand(x)
    total = views[0]
    for x in views[1:]:
        total = apply("add", total, x)
        b.graph.expand(total)
    return ggml.cont(total) if used == 1 else total


def _expert_activation(b: Builder, cur: Tensor, ids: Tensor, kind: str) -> Tensor:
    parts = b.layers[b.layer]
    if "ffn_gate_up_exps.weight" in parts:
        gate_up = _expert_linear(b, "ffn_gate_up_exps", cur, ids)
        half = (gate_up.ne[0] // 2, gate_up.ne[1], gate_up.ne[2])
        gate, up = (view(gate_up, half, (gate_up.nb[1], gate_up.nb[2])) for _ in range(2))
        return new("glu", F32, half, gate, up)
    up = _expert_linear(b, f"ffn_up_{kind}", cur, ids)
    if f"ffn_gate_{kind}.weight" not in parts:
        return apply("unary", up)
    return b.gated(_expert_linear(b, f"ffn_gate_{kind}", cur, ids), up, b.shape.clamps[b.layer].experts)


def _expert_linear(b: Builder, part: str, cur: Tensor, ids: Tensor) -> Tensor:
    out = ggml.mul_mat_id(b.need(f"{part}.weight"), cur, ids)
    if scale := b.weight(f"{part.replace('gate_up', 'up')}.scale"):
        count, tokens = scale.ne[0], cur.ne[2]
        scales = new("repeat", F32, (1, count, tokens), reshape(scale, 1, count))
        out = apply("mul", out, get_rows(scales, ids))
    out = b.adapted(f"{part}.weight", out, lambda matrix, x: ggml.mul_mat_id(matrix, x, ids), cur)
    bias = b.weight(f"{part}.bias")
    return apply("add_id", out, bias, ids) if bias else out


def apply_i32(op: str, a: Tensor) -> Tensor:
    """The result of an operation that gives row numbers (I32), with the operand's shape."""
    return new(op, I32, a.ne, a)


def _mask_groups(scores: Tensor, count: int, groups: int, used: int, tokens: int) -> Tensor:
    """Scores with the experts of all but the best groups masked (DeepSeek V3)."""
    per_group = count // groups
    split = reshape(scores, per_group, groups, tokens)
    top_two = view(apply_i32("argsort", split), (2, groups, tokens), (per_group * 4, per_group * groups * 4))
    values = get_rows(reshape(split, 1, per_group, groups, tokens), top_two)
    sums = new("sum_rows", F32, (1, groups, tokens), reshape(values, 2, groups, tokens))
    sums = reshape(sums, groups, tokens)
    top_groups = view(apply_i32("argsort", sums), (used, tokens), (groups * 4,))
    group_scores = get_rows(split, top_groups)
    return reshape(ggml.set_rows(apply("fill", split), group_scores, top_groups), count, tokens)
