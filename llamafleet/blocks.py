"""What a layer computes: attention of every kind, feed-forward; and the whole graph of a model."""

from __future__ import annotations

from . import ggml
from .experts import experts
from .features import Layers
from .ggml import F32, I32, Graph, Tensor, concat, get_rows, mul_mat, new, permute, reshape, same, view
from .gguf import Header
from .graph import Builder, Homes
from .kv import BY_INTERVAL, PARALLEL_HYBRIDS, Context, is_latent, number, recurrent_layers
from .recurrent import recurrent
from .rwkv import RWKV, rwkv_layer

# Rows that become logits are picked after the last layer, not before its feed-forward part: where the graph
# asks for `embeddings_nextn_masked`, which llama-server leaves off (src/models/*.cpp).
LATE_OUTPUT = frozenset({"bailingmoe3", "cohere2moe", "gemma4", "hy_v3", "nemotron_h", "nemotron_h_moe", "gpt-oss",
                         "qwen35", "qwen35moe", "qwen3next", "step35"})  # fmt: skip
# Their last layer's result, before the last norm, is kept for a draft model (t_h_nextn).
KEPT_STATE = frozenset({"gpt-oss", "gemma4", "step35", "hy_v3", "cohere2moe"})
# Add to what was there before, not the other way round: the sum takes the memory of the first if it can.
RESIDUAL_FIRST = frozenset({"jamba", "lfm2", "lfm2moe", "openelm"})  # what attention or state gives
RESIDUAL_FIRST_LAST = frozenset({"jamba", "lfm2", "lfm2moe", "phi3", "phimoe"})  # what the feed-forward part gives
NORM_FIRST = BY_INTERVAL | {"kimi-linear"}  # the first norm before all else (models/qwen3next.cpp:158)
ONE_PART = frozenset({"nemotron_h", "nemotron_h_moe"})  # a layer is attention, state or feed-forward, with one residual
# What is computed first where attention and feed-forward part are added to the input side by side (src/models/*.cpp).
SUMS = {
    "phi2": ("attention", "ffn", "input"),
    "command-r": ("ffn", "input", "attention"),
    "cohere2": ("ffn", "input", "attention"),
    "cohere2moe": ("ffn", "input", "attention"),
}
# The experts are chosen from what the layer gets, before its attention.
EARLY_CHOICE = frozenset({"smallthinker"})
# Layers that have one of them compute feed-forward after attention, not beside it.
NORMS_BETWEEN = ("ffn_norm.weight", "post_attention_norm.weight", "post_ffw_norm.weight", "attn_output_norm.weight")


def build(
    header: Header,
    layers: Layers,
    context: Context,
    homes: Homes,
    order: tuple[int, ...],
    *,
    attention_scratch: bool = False,
) -> Graph:
    """The graph of the layers in `order` (all of them, or enough of each kind), from tokens to logits."""
    b = Builder(header, layers, context, homes, attention_scratch)
    late = header.architecture in LATE_OUTPUT
    positions, outputs = ggml.graph_input(I32, b.tokens * b.positions), ggml.graph_input(I32, context.outputs)
    cur = b.embeddings()
    state, first = recurrent_layers(header), None
    if header.architecture in RWKV:
        cur = b.norm(cur, "token_embd_norm")
    for layer in order:
        b.layer = layer
        if header.architecture in RWKV:
            cur, first = rwkv_layer(b, cur, outputs if layer == order[-1] else None, first)
        else:
            cur = _layer(b, cur, positions, None if late or layer != order[-1] else outputs, state[layer])
    b.layer = -1
    cur.output = header.architecture in KEPT_STATE
    if late and cur.output:
        cur = get_rows(cur, outputs)
    cur = b.norm(cur, "output_norm")
    cur.output = True
    if late and cur.ne[1] != context.outputs:
        cur = get_rows(cur, outputs)
        cur.output = True
    head = b.weight("output.weight") or ggml.weight(*_tied(b))
    cur = mul_mat(head, cur)
    if bias := b.weight("output.bias"):
        cur = same("add", cur, bias)
    if header.get("final_logit_softcapping"):
        cur = same("scale", same("unary", same("scale", cur)))
    cur.output = True
    b.graph.expand(cur)
    return b.graph


def _tied(b: Builder) -> tuple[str, tuple[int, ...], int]:
    table = b.layers[-1]["token_embd.weight"]
    return table.type, table.shape, b.homes("output.weight", None)


def _layer(b: Builder, inputs: Tensor, positions: Tensor, outputs: Tensor | None, state: bool) -> Tensor:
    parts = b.layers[b.layer]
    if b.header.architecture in PARALLEL_HYBRIDS:
        return _side_by_side(b, inputs, positions, outputs)
    logits = b.linear("ffn_gate_inp", inputs) if b.header.architecture in EARLY_CHOICE else None
    normed = side = cur = b.norm(inputs, "attn_norm")
    if "attn_norm_2.weight" in parts:  # Falcon 40B
        side = b.norm(inputs, "attn_norm_2")
    if b.header.architecture in NORM_FIRST:
        b.graph.expand(normed)
    if state:
        cur = recurrent(b, normed)
    elif "attn_kv_a_mqa.weight" in parts:
        cur = _latent_attention(b, normed, positions)
    elif any(part.startswith("attn_") and part.endswith(("q.weight", "qkv.weight")) for part in parts):
        cur = _attention(b, normed, positions)
    elif b.header.architecture in ONE_PART:
        cur = _feed_forward(b, normed)
    if outputs is not None:
        cur, inputs = get_rows(cur, outputs), get_rows(inputs, outputs)
        logits = get_rows(logits, outputs) if logits else None
    if any(part in parts for part in NORMS_BETWEEN):
        return b.fed(_after_attention(b, cur, inputs, logits))
    if b.header.architecture in ONE_PART or not any(part.startswith("ffn_") for part in parts):
        return same("add", cur, inputs)  # mamba: nothing but the state
    if outputs is not None:
        side = get_rows(side, outputs)
    summands = {"attention": cur, "ffn": _feed_forward(b, side), "input": inputs}
    first, second, third = (summands[name] for name in SUMS.get(b.header.architecture, ("ffn", "attention", "input")))
    return same("add", same("add", first, second), third)


def _side_by_side(b: Builder, inputs: Tensor, positions: Tensor, outputs: Tensor | None) -> Tensor:
    """Attention and state, each with a norm of its own of what comes in (models/falcon-h1.cpp:131)."""
    attended = _attention(b, b.norm(inputs, "attn_norm"), positions)
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
    arch = b.header.architecture
    residual = same("add", inputs, cur) if arch in RESIDUAL_FIRST else same("add", cur, inputs)
    if not any(part.startswith("ffn_") and "norm" not in part for part in parts):
        return residual
    cur = b.norm(residual, "ffn_norm" if sandwich else behind)
    if "ffn_norm_exps.weight" in parts:  # a dense part, then experts that take what the layer gets (models/arctic.cpp)
        residual = same("add", _dense(b, cur, ""), residual)
        return same("add", experts(b, b.norm(inputs, "ffn_norm_exps")), residual)
    cur = b.norm(_feed_forward(b, cur, logits), "post_ffw_norm")
    return same("add", residual, cur) if arch in RESIDUAL_FIRST_LAST else same("add", cur, residual)


def _attention(b: Builder, cur: Tensor, positions: Tensor) -> Tensor:
    """Heads with K and V of their own or shared in groups; q and k normed where there are tensors for it."""
    parts, heads_kv = b.layers[b.layer], b.kv_heads[b.layer]
    size_k, size_v = b.head_sizes()
    gate = None
    if "attn_qkv.weight" in parts:
        fused = b.linear("attn_qkv", cur)
        q = view(fused, (size_k, b.heads[b.layer], b.tokens), (size_k * 4, fused.nb[1]))
        k = view(fused, (size_k, heads_kv, b.tokens), (size_k * 4, fused.nb[1]))
        v = view(fused, (size_v, heads_kv, b.tokens), (size_v * 4, fused.nb[1]))
    else:
        q, k = b.linear("attn_q", cur), b.linear("attn_k", cur)
        v = b.linear("attn_v", cur) if "attn_v.weight" in parts else k
        heads = b.heads[b.layer]
        if q.ne[0] == 2 * size_k * heads:  # the other half is a gate (models/qwen3next.cpp)
            whole = reshape(q, 2 * size_k, heads, b.tokens)
            q = view(whole, (size_k, heads, b.tokens), (whole.nb[1], whole.nb[2]))
            gate = view(whole, (size_k, heads, b.tokens), (whole.nb[1], whole.nb[2]))
        else:
            if "attn_q_norm.weight" in parts and parts["attn_q_norm.weight"].shape[0] != size_k:
                q, k = b.norm(q, "attn_q_norm"), b.norm(k, "attn_k_norm")
            q = reshape(q, size_k, q.ne[0] // size_k, b.tokens)
        k, v = reshape(k, size_k, heads_kv, b.tokens), reshape(v, size_v, heads_kv, b.tokens)
    if "attn_q_norm.weight" in parts and parts["attn_q_norm.weight"].shape[0] == size_k:
        q, k = b.norm(q, "attn_q_norm"), b.norm(k, "attn_k_norm")
    if b.turned[b.layer]:
        factors = b.position_factors()
        q, k = same("rope", q, positions, *factors), same("rope", k, positions, *factors)
    attended = b.attend(q, k, v, size_k, size_v)
    if gate is not None:
        attended = same("mul", attended, same("unary", ggml.cont(gate, attended.ne[0], b.tokens)))
    elif "attn_gate.weight" in parts:
        attended = _gated(attended, b.linear("attn_gate", cur), b.tokens)
    return b.linear("attn_output", b.norm(attended, "attn_sub_norm"))


def _gated(attended: Tensor, gate: Tensor, tokens: int) -> Tensor:
    if gate.ne[0] == attended.ne[0]:
        return same("mul", attended, same("unary", gate))
    heads = gate.ne[0]  # one gate for each head (models/step35.cpp)
    split = reshape(attended, attended.ne[0] // heads, heads, tokens)
    return reshape(same("mul", split, reshape(same("unary", gate), 1, heads, tokens)), attended.ne[0], tokens)


def _latent_attention(b: Builder, cur: Tensor, positions: Tensor) -> Tensor:
    """MLA (models/deepseek2.cpp): K is one compressed head that serves as V too; or, without both *_mla
    lengths, ordinary heads that are decompressed first.
    """
    parts, heads, tokens = b.layers[b.layer], b.heads[b.layer], b.tokens
    rank, rope = number(b.header, "attention.kv_lora_rank"), number(b.header, "rope.dimension_count")
    latent = is_latent(b.header)
    size_k = number(b.header, "attention.key_length_mla" if latent else "attention.key_length")
    size_v = number(b.header, "attention.value_length_mla" if latent else "attention.value_length")
    plain = size_k - rope
    if "attn_q.weight" in parts:
        q = b.linear("attn_q", cur)
    else:
        q = b.linear("attn_q_b", b.norm(b.linear("attn_q_a", cur), "attn_q_a_norm"))
    q = reshape(q, size_k, heads, tokens)
    both = b.linear("attn_kv_a_mqa", cur)
    compressed = view(both, (rank, tokens), (both.nb[1],))
    factors = b.position_factors()
    k_rope = view(both, (rope, 1, tokens), (both.nb[1], both.nb[1]))
    k_rope = same("rope", k_rope, positions, *factors) if b.turned[b.layer] else k_rope
    compressed = b.norm(compressed, "attn_kv_a_norm")
    if latent:
        q_rope = view(q, (rope, heads, tokens), (q.nb[1], q.nb[2]))
        q_rope = same("rope", q_rope, positions, *factors) if b.turned[b.layer] else q_rope
        q_plain = permute(view(q, (plain, heads, tokens), (q.nb[1], q.nb[2])), 0, 2, 1, 3)
        absorbed = permute(mul_mat(b.need("attn_k_b.weight"), q_plain), 0, 2, 1, 3)
        q = concat(absorbed, q_rope, 0)
        compressed = reshape(compressed, rank, 1, tokens)
        k = concat(compressed, k_rope, 0)
        attended = b.attend_latent(q, k, compressed, rank + rope, rank, b.need("attn_v_b.weight"))
        return b.linear("attn_output", attended)
    kv = b.linear("attn_kv_b", compressed)
    stride = (plain + size_v) * 4
    k_plain = view(kv, (plain, heads, tokens), (stride, stride * heads))
    v = ggml.cont(view(kv, (size_v, heads, tokens), (stride, stride * heads)))
    k = concat(k_plain, new("repeat", F32, (rope, heads, tokens), k_rope), 0)
    return b.linear("attn_output", b.attend(same("rope", q, positions, *factors), k, v, size_k, size_v))


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
        act = b.gated(gate, up, b.clamped[b.layer].others)
    elif up.ne[0] == 2 * down:
        act = new("glu", F32, (down, up.ne[1]), up)
    else:
        act = same("unary", up)
    return b.linear(f"ffn_down{suffix}", act)
