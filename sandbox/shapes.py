"""The tensors of each architecture: names and shapes as llama.cpp's loader requires them.

The rules are load_arch_tensors() in llama.cpp's src/models/ARCHITECTURE.cpp. Shapes are in ggml's order, row
length first.
"""

from __future__ import annotations

from collections.abc import Callable

from sandbox.encoder_shapes import ENCODERS, Shapes, classifier, encoder
from sandbox.layouts import Layout

Part = Callable[[Layout, int], Shapes]  # arguments: layout, block number; names are without "blk.N."

# Extra per-block vectors: name, and the Layout attribute with its length.
QK_NORMS = (("attn_q_norm.weight", "head_dim"), ("attn_k_norm.weight", "head_dim"))
FFN_NORM = ("ffn_norm.weight", "embd")
POST_ATTENTION_NORM = ("post_attention_norm.weight", "embd")
POST_FFW_NORM = ("post_ffw_norm.weight", "embd")
BLOCK_VECTORS: dict[str, tuple[tuple[str, str], ...]] = {
    "llama": (FFN_NORM,),
    "qwen3": (FFN_NORM, *QK_NORMS),
    "qwen3moe": (FFN_NORM, *QK_NORMS),
    "qwen2": (FFN_NORM,),
    "qwen3next": (POST_ATTENTION_NORM,),
    "qwen35": (POST_ATTENTION_NORM,),
    "qwen35moe": (POST_ATTENTION_NORM,),
    "llama4": (FFN_NORM,),
    "olmoe": (FFN_NORM, ("attn_q_norm.weight", "embd"), ("attn_k_norm.weight", "embd")),
    "gemma3": (FFN_NORM, *QK_NORMS, POST_ATTENTION_NORM, POST_FFW_NORM),
    "gpt-oss": (POST_ATTENTION_NORM, ("attn_sinks.weight", "heads")),
    "glm4": (FFN_NORM, POST_ATTENTION_NORM, POST_FFW_NORM),
    "glm4moe": (POST_ATTENTION_NORM,),
    "deepseek2": (FFN_NORM,),
    "phi3": (FFN_NORM,),
}
GATE_AND_UP_FUSED = frozenset({"glm4", "phi3"})
ROUTER_BIASED = frozenset({"glm4moe", "deepseek2"})
SHARED_EXPERT_GATED = frozenset({"qwen3next", "qwen35moe"})
NEXTN_HAS_VOCABULARY = frozenset({"glm4moe"})


def shapes(layout: Layout) -> Shapes:
    """Every tensor's name and shape, in file order."""
    embd, block = layout.embd, BLOCKS.get(layout.architecture, _transformer)
    if layout.architecture in ENCODERS:
        yield from encoder(layout)
        return
    yield "token_embd.weight", (embd, layout.vocab)
    if layout.architecture == "rwkv7":
        yield from _norm("token_embd_norm", embd)
    for i in range(layout.blocks):
        for name, shape in block(layout, i):
            yield f"blk.{i}.{name}", shape
    yield "output_norm.weight", (embd,)
    if layout.architecture == "rwkv7":
        yield "output_norm.bias", (embd,)
    if not layout.tied:
        yield "output.weight", (embd, layout.vocab)
    if layout.rope_factors:
        yield "rope_freqs.weight", (layout.head_dim // 2,)
    yield from classifier(layout)


def _transformer(layout: Layout, i: int) -> Shapes:
    yield "attn_norm.weight", (layout.embd,)
    for name, length in BLOCK_VECTORS[layout.architecture]:
        yield name, (getattr(layout, length),)
    yield from ATTENTION.get(layout.architecture, _attention)(layout, i)
    yield from (_experts if layout.experts and i >= layout.dense_blocks else _dense)(layout, i)
    if i >= layout.blocks - layout.nextn:
        yield from _nextn(layout)


def _attention(layout: Layout, i: int) -> Shapes:
    embd, q, kv = layout.embd, layout.heads * layout.head_dim, layout.kv_heads * layout.head_dim
    for part, columns, rows in (("q", embd, q), ("k", embd, kv), ("v", embd, kv), ("output", q, embd)):
        yield f"attn_{part}.weight", (columns, rows)
        if layout.biases or (layout.qkv_biases and part != "output"):
            yield f"attn_{part}.bias", (rows,)


def _fused_attention(layout: Layout, i: int) -> Shapes:
    q, kv = layout.heads * layout.head_dim, layout.kv_heads * layout.head_dim
    yield "attn_qkv.weight", (layout.embd, q + 2 * kv)
    yield "attn_output.weight", (q, layout.embd)


def _latent_attention(layout: Layout, i: int) -> Shapes:
    """MLA: separate tensors for keys and values in files since April 2025, one `attn_kv_b` in earlier files."""
    q_rank, kv_rank = layout.number("attention.q_lora_rank"), layout.number("attention.kv_lora_rank")
    rope = layout.number("rope.dimension_count")
    latent = "attention.key_length_mla" in layout.extra
    suffix = "_mla" if latent else ""
    key = layout.number("attention.key_length" + suffix)
    value = layout.number("attention.value_length" + suffix)
    yield "attn_q_a_norm.weight", (q_rank,)
    yield "attn_kv_a_norm.weight", (kv_rank,)
    yield "attn_q_a.weight", (layout.embd, q_rank)
    yield "attn_q_b.weight", (q_rank, layout.heads * key)
    yield "attn_kv_a_mqa.weight", (layout.embd, kv_rank + rope)
    if latent:
        yield "attn_k_b.weight", (key - rope, kv_rank, layout.heads)
        yield "attn_v_b.weight", (kv_rank, value, layout.heads)
    else:
        yield "attn_kv_b.weight", (kv_rank, layout.heads * (key - rope + value))
    yield "attn_output.weight", (layout.heads * value, layout.embd)


def _gated_attention(layout: Layout, i: int) -> Shapes:
    """Qwen3-Next and 3.5: a gate beside each query; most blocks have a gated delta net instead."""
    if i < layout.blocks - layout.nextn and (i + 1) % layout.number("full_attention_interval"):
        yield from _delta_net(layout)
        return
    embd, q, kv = layout.embd, layout.heads * layout.head_dim, layout.kv_heads * layout.head_dim
    for part, columns, rows in (("q", embd, 2 * q), ("k", embd, kv), ("v", embd, kv), ("output", q, embd)):
        yield f"attn_{part}.weight", (columns, rows)
    for name, _ in QK_NORMS:
        yield name, (layout.head_dim,)


def _delta_net(layout: Layout) -> Shapes:
    state, value_heads = layout.number("ssm.state_size"), layout.number("ssm.time_step_rank")
    keys, values = state * layout.number("ssm.group_count"), state * value_heads
    if layout.architecture == "qwen3next":  # as in the first files; newer converters split ssm_in
        yield "ssm_in.weight", (layout.embd, 2 * keys + 2 * values)
        yield "ssm_ba.weight", (layout.embd, 2 * value_heads)
    else:
        yield "attn_qkv.weight", (layout.embd, 2 * keys + values)
        yield "attn_gate.weight", (layout.embd, values)
        yield "ssm_beta.weight", (layout.embd, value_heads)
        yield "ssm_alpha.weight", (layout.embd, value_heads)
    yield "ssm_conv1d.weight", (layout.number("ssm.conv_kernel"), 2 * keys + values)
    yield "ssm_dt.bias", (value_heads,)
    yield "ssm_a", (value_heads,)
    yield "ssm_norm.weight", (state,)
    yield "ssm_out.weight", (values, layout.embd)


def _dense(layout: Layout, i: int) -> Shapes:
    fused = layout.architecture in GATE_AND_UP_FUSED
    if not fused:
        yield "ffn_gate.weight", (layout.embd, layout.ff)
    yield "ffn_up.weight", (layout.embd, layout.ff * (2 if fused else 1))
    yield "ffn_down.weight", (layout.ff, layout.embd)


def _experts(layout: Layout, i: int) -> Shapes:
    embd, ff, many = layout.embd, layout.expert_ff or layout.ff, layout.experts
    yield "ffn_gate_inp.weight", (embd, many)
    if layout.biases:
        yield "ffn_gate_inp.bias", (many,)
    if layout.architecture in ROUTER_BIASED:
        yield "exp_probs_b.bias", (many,)
    for part, columns, rows in (("gate", embd, ff), ("up", embd, ff), ("down", ff, embd)):
        yield f"ffn_{part}_exps.weight", (columns, rows, many)
        if layout.biases:
            yield f"ffn_{part}_exps.bias", (rows, many)
    if not layout.shared_ff:
        return
    if layout.architecture in SHARED_EXPERT_GATED:
        yield "ffn_gate_inp_shexp.weight", (embd,)
    yield "ffn_gate_shexp.weight", (embd, layout.shared_ff)
    yield "ffn_up_shexp.weight", (embd, layout.shared_ff)
    yield "ffn_down_shexp.weight", (layout.shared_ff, embd)


def _nextn(layout: Layout) -> Shapes:
    """Further tensors of a block for multi-token prediction."""
    embd = layout.embd
    yield "nextn.eh_proj.weight", (2 * embd, embd)
    for name in ("enorm", "hnorm", "shared_head_norm"):
        yield f"nextn.{name}.weight", (embd,)
    if layout.architecture in NEXTN_HAS_VOCABULARY:
        for name in ("embed_tokens", "shared_head_head"):
            yield f"nextn.{name}.weight", (embd, layout.vocab)


def _mamba(layout: Layout, i: int) -> Shapes:
    embd, inner, state = layout.embd, layout.number("ssm.inner_size"), layout.number("ssm.state_size")
    rank = layout.number("ssm.time_step_rank")
    yield "attn_norm.weight", (embd,)
    yield "ssm_in.weight", (embd, 2 * inner)
    yield "ssm_conv1d.weight", (layout.number("ssm.conv_kernel"), inner)
    yield "ssm_conv1d.bias", (inner,)
    yield "ssm_x.weight", (inner, rank + 2 * state)
    yield "ssm_dt.weight", (rank, inner)
    yield "ssm_dt.bias", (inner,)
    yield "ssm_a", (state, inner)
    yield "ssm_d", (inner,)
    yield "ssm_out.weight", (inner, embd)


def _rwkv7(layout: Layout, i: int) -> Shapes:
    embd = layout.embd
    ranks = {
        "w": layout.number("attention.decay_lora_rank"),
        "a": layout.number("attention.iclr_lora_rank"),
        # The first block does not use it; the converter copies the tensor above into it.
        "v": layout.number(f"attention.{'value_residual_mix' if i else 'iclr'}_lora_rank"),
    }
    for name in ("attn_norm", "attn_norm_2", "time_mix_ln"):
        yield from _norm(name, embd)
    for letter, rank in ranks.items():
        yield f"time_mix_{letter}0.weight", (embd,)
        yield f"time_mix_{letter}1.weight", (embd, rank)
        yield f"time_mix_{letter}2.weight", (rank, embd)
    yield "time_mix_g1.weight", (embd, layout.number("attention.gate_lora_rank"))
    yield "time_mix_g2.weight", (layout.number("attention.gate_lora_rank"), embd)
    yield "time_mix_lerp_fused.weight", (embd, 1, 1, 6)
    for name in ("k_k", "k_a", "r_k"):
        yield f"time_mix_{name}.weight", (embd,)
    for name in ("key", "value", "receptance", "output"):
        yield f"time_mix_{name}.weight", (embd, embd)
    yield "channel_mix_lerp_k.weight", (embd,)
    yield "channel_mix_key.weight", (embd, layout.ff)
    yield "channel_mix_value.weight", (layout.ff, embd)


def _norm(name: str, length: int) -> Shapes:
    yield f"{name}.weight", (length,)
    yield f"{name}.bias", (length,)


ATTENTION: dict[str, Part] = {
    "deepseek2": _latent_attention,
    "phi3": _fused_attention,
    "qwen3next": _gated_attention,
    "qwen35": _gated_attention,
    "qwen35moe": _gated_attention,
}
BLOCKS: dict[str, Part] = {"mamba": _mamba, "rwkv7": _rwkv7}
