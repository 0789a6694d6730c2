"""A mixture of experts: who is chosen, what they compute, the sum (build_moe_ffn of src/llama-graph.cpp at b11434)."""

from __future__ import annotations

from llamafleet.memory.graph import ggml
from llamafleet.memory.graph.builder import Builder, GraphUnknownError
from llamafleet.memory.graph.ggml import F32, I32, Tensor, get_rows, new, reshape, same, view

EXPERTS_USED_LIMIT = 64  # for each token; models have 1 to 32, and hostile headers get no time
SIGMOID = 2  # expert_gating_func, llama-hparams.h


def experts(b: Builder, cur: Tensor, logits: Tensor | None = None, kind: str = "exps") -> Tensor:
    """The result of a layer's experts for its input. `logits`: where the choice is made from something else."""
    parts, tokens, row = b.layers[b.layer], cur.ne[1], b.shape.architecture
    ids, weights = _chosen(b, logits or b.linear("ffn_gate_inp", cur), parts[f"ffn_down_{kind}.weight"].shape[2])
    b.graph.expand(weights)
    if "ffn_latent_down.weight" in parts:  # experts work on rows made smaller (models/nemotron-h.cpp:272)
        cur = b.linear("ffn_latent_down", cur)
    embd, used = cur.ne[0], ids.ne[0]
    cur = reshape(cur, embd, 1, tokens)
    if row.weighs_inputs:
        cur = same("mul", new("repeat", F32, (embd, used, tokens), cur), weights)
    act = _expert_activation(b, cur, ids, kind)
    out = _expert_linear(b, f"ffn_down_{kind}", act, ids)
    if not row.weighs_inputs:
        out = same("mul", out, weights)
    b.graph.expand(out)
    total = _summed(b, out)
    return b.linear("ffn_latent_up", total) if "ffn_latent_up.weight" in parts else total


def _chosen(b: Builder, logits: Tensor, experts_there: int) -> tuple[Tensor, Tensor]:
    """Numbers of the experts for each token, and their weights."""
    count, tokens, row = logits.ne[0], logits.ne[1], b.shape.architecture
    used = b.shape.experts.used[b.layer]
    if not 0 < used <= min(count, EXPERTS_USED_LIMIT):
        raise GraphUnknownError(f"{used} of {count} experts used")
    groups_of = count // experts_there  # that share one (models/grovemoe.cpp)
    used = min(used, count // groups_of)
    probabilities = logits
    if not row.weights_softmaxed:
        sigmoid = b.shape.experts.gating == SIGMOID
        probabilities = same("unary" if sigmoid else "soft_max", logits)
    bias = b.weight("exp_probs_b.bias") or b.weight("exp_probs_b")  # models/hy-v3.cpp:68
    selection = same("add", probabilities, bias) if bias else probabilities
    if row.chooses_by_sigmoid:
        selection = same("unary", logits)
    groups = b.shape.experts.groups
    if groups > 1:
        selection = _grouped(selection, count, groups, b.shape.experts.groups_used, tokens)
    if "ffn_gate_tid2eid.weight" in b.layers[b.layer]:  # chosen by the token alone (models/deepseek4.cpp:1295)
        assert b.token_ids is not None  # made with the embeddings
        ids = get_rows(b.need("ffn_gate_tid2eid.weight"), b.token_ids)
    else:
        ids = view(same_i32("argsort", selection), (used, tokens), (count * 4,))
    if groups_of > 1:
        ids = new("cast", I32, ids.ne, same("scale", new("cast", F32, ids.ne, ids)))
    return ids, _weights(b, get_rows(reshape(probabilities, 1, count, tokens), ids))


def _weights(b: Builder, weights: Tensor) -> Tensor:
    """Made to a sum of one and scaled, where the model does."""
    _, used, tokens, _ = weights.ne
    row = b.shape.architecture
    if row.weights_softmaxed:
        weights = reshape(same("soft_max", reshape(weights, used, tokens)), 1, used, tokens)
    if row.weights_normed or b.shape.experts.weights_normed:
        flat = reshape(weights, used, tokens)
        total = same("clamp", new("sum_rows", F32, (1, tokens), flat))
        weights = reshape(same("div", flat, total), 1, used, tokens)
    if b.shape.experts.weights_scaled:
        weights = same("scale", weights)
    return weights


def _summed(b: Builder, out: Tensor) -> Tensor:
    embd, used, tokens, _ = out.ne
    views = [view(out, (embd, tokens), (out.nb[2],)) for _ in range(used)]
    for one in views:
        b.graph.expand(one)
    total = views[0]
    for one in views[1:]:
        total = same("add", total, one)
        b.graph.expand(total)
    return ggml.cont(total) if used == 1 else total


def _expert_activation(b: Builder, cur: Tensor, ids: Tensor, kind: str) -> Tensor:
    parts = b.layers[b.layer]
    if "ffn_gate_up_exps.weight" in parts:
        both = _expert_linear(b, "ffn_gate_up_exps", cur, ids)
        half = (both.ne[0] // 2, both.ne[1], both.ne[2])
        gate, up = (view(both, half, (both.nb[1], both.nb[2])) for _ in range(2))
        return new("glu", F32, half, gate, up)
    up = _expert_linear(b, f"ffn_up_{kind}", cur, ids)
    if f"ffn_gate_{kind}.weight" not in parts:
        return same("unary", up)
    return b.gated(_expert_linear(b, f"ffn_gate_{kind}", cur, ids), up, b.shape.clamps[b.layer].experts)


def _expert_linear(b: Builder, part: str, cur: Tensor, ids: Tensor) -> Tensor:
    out = ggml.mul_mat_id(b.need(f"{part}.weight"), cur, ids)
    if scale := b.weight(f"{part.replace('gate_up', 'up')}.scale"):
        count, tokens = scale.ne[0], cur.ne[2]
        each = new("repeat", F32, (1, count, tokens), reshape(scale, 1, count))
        out = same("mul", out, get_rows(each, ids))
    bias = b.weight(f"{part}.bias")
    return same("add_id", out, bias, ids) if bias else out


def same_i32(op: str, a: Tensor) -> Tensor:
    """An operation that gives numbers of rows instead of values."""
    return new(op, I32, a.ne, a)


def _grouped(scores: Tensor, count: int, groups: int, used: int, tokens: int) -> Tensor:
    """Only experts of the best groups may be chosen (DeepSeek V3)."""
    each = count // groups
    split = reshape(scores, each, groups, tokens)
    best = view(same_i32("argsort", split), (2, groups, tokens), (each * 4, each * groups * 4))
    values = get_rows(reshape(split, 1, each, groups, tokens), best)
    sums = new("sum_rows", F32, (1, groups, tokens), reshape(values, 2, groups, tokens))
    sums = reshape(sums, groups, tokens)
    chosen = view(same_i32("argsort", sums), (used, tokens), (groups * 4,))
    kept = get_rows(split, chosen)
    return reshape(ggml.set_rows(same("fill", split), kept, chosen), count, tokens)
