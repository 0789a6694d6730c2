"""The types that llama-quantize gives to tensors, for the quantisations used here (src/llama-quant.cpp at b11434).

IQ4_XS follows the rules for quantisation with an importance matrix, as in published files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from gguf import GGML_QUANT_SIZES, LlamaFileType
from gguf import GGMLQuantizationType as Q

from sandbox.layouts import Layout

# By quantisation: general.file_type, and the type of most tensors (llama_ftype_get_default_type).
MIXES: dict[str, tuple[LlamaFileType, Q]] = {
    "F16": (LlamaFileType.MOSTLY_F16, Q.F16),
    "Q8_0": (LlamaFileType.MOSTLY_Q8_0, Q.Q8_0),
    "Q4_0": (LlamaFileType.MOSTLY_Q4_0, Q.Q4_0),
    "Q3_K_M": (LlamaFileType.MOSTLY_Q3_K_M, Q.Q3_K),
    "Q4_K_M": (LlamaFileType.MOSTLY_Q4_K_M, Q.Q4_K),
    "Q5_K_M": (LlamaFileType.MOSTLY_Q5_K_M, Q.Q5_K),
    "IQ4_XS": (LlamaFileType.MOSTLY_IQ4_XS, Q.IQ4_XS),
    "MXFP4": (LlamaFileType.MOSTLY_MXFP4_MOE, Q.MXFP4),
}
# tensor_type_fallback: the types for rows that are no multiple of 256.
FALLBACKS = {Q.Q3_K: Q.Q4_0, Q.Q4_K: Q.Q5_0, Q.Q5_K: Q.Q5_1, Q.Q6_K: Q.Q8_0, Q.IQ4_XS: Q.IQ4_NL}
# Matrices that the converter keeps in F32 (conversion/base.py), and others that llama-quantize then leaves
# in F16 (tensor_allows_quantization).
KEPT_F32 = re.compile(r"ffn_gate_inp|token_types|position_embd|ssm_conv1d|time_mix_w[12]\.|time_mix_lerp_fused")
KEPT_F16 = re.compile(r"time_mix_[avg][12]\.")
# category_is_attn_v; without attn_kv_b, which only files from before April 2025 have: llama-quantize did not
# count it in then.
ATTENTION_V = re.compile(r"attn_(v|qkv)\.weight")


def tensor_types(layout: Layout, quant: str, shapes: Sequence[tuple[str, tuple[int, ...]]]) -> list[Q]:
    """Each tensor's type in a file of this quantisation."""
    values = [name for name, _ in shapes if ATTENTION_V.search(name)]  # llama-quantize counts them in file order
    types = []
    for name, shape in shapes:
        wanted = _kept(name, shape, quant)
        if wanted is None:  # F32 is 0
            wanted = _mixed(layout, quant, name, values)
        block_length, _ = GGML_QUANT_SIZES[wanted]
        types.append(FALLBACKS[wanted] if shape[0] % block_length else wanted)
    return types


def _kept(name: str, shape: tuple[int, ...], quant: str) -> Q | None:
    """The converter's type if llama-quantize keeps it; None if llama-quantize chooses another."""
    if len(shape) == 1 or not name.endswith(".weight") or KEPT_F32.search(name):
        return Q.F32
    return Q.F16 if quant == "F16" or KEPT_F16.search(name) else None


def _mixed(layout: Layout, quant: str, name: str, values: list[str]) -> Q:
    """The type of one tensor (src/llama-quant.cpp, llama_tensor_get_type_impl)."""
    base = MIXES[quant][1]
    if base in (Q.Q8_0, Q.MXFP4):  # there: LLAMA_FTYPE_MOSTLY_MXFP4_MOE
        return base if "_exps" in name else Q.Q8_0
    if name == "output.weight" or (layout.tied and name == "token_embd.weight"):
        return Q.Q6_K
    return _in_block(layout, quant, name, values) if name.startswith("blk.") else base


def _in_block(layout: Layout, quant: str, name: str, values: list[str]) -> Q:
    if name in values:
        return _attention_v(layout, quant, values.index(name), len(values))
    if "ffn_down" in name:
        return _ffn_down(quant, int(name.split(".")[1]), layout.blocks)
    return _attention_k_and_output(layout, quant, name)


def _attention_v(layout: Layout, quant: str, index: int, total: int) -> Q:
    chosen = MIXES[quant][1]
    if quant == "Q3_K_M":
        chosen = Q.Q5_K if index < 2 else Q.Q4_K
    elif quant == "IQ4_XS" and layout.heads >= 4 * layout.kv_heads:
        chosen = Q.Q5_K
    elif quant in ("Q4_K_M", "Q5_K_M") and _more_bits(index, total):
        chosen = Q.Q6_K
    if layout.is_70b and chosen in (Q.Q3_K, Q.Q4_K):
        chosen = Q.Q5_K
    return Q.Q8_0 if layout.experts == 8 else chosen


def _attention_k_and_output(layout: Layout, quant: str, name: str) -> Q:
    """Models of eight experts (Mixtral) get more bits in attention."""
    if "attn_k.weight" in name and layout.experts == 8:
        return Q.Q8_0
    if "attn_output" in name and layout.experts == 8 and quant in ("Q3_K_M", "Q4_K_M", "IQ4_XS"):
        return Q.Q5_K
    return Q.Q4_K if "attn_output" in name and quant == "Q3_K_M" else MIXES[quant][1]


def _ffn_down(quant: str, block: int, total: int) -> Q:
    if quant == "Q3_K_M":
        return Q.Q5_K if block < total // 16 else Q.Q4_K
    return Q.Q6_K if quant in ("Q4_K_M", "Q5_K_M") and _more_bits(block, total) else MIXES[quant][1]


def _more_bits(block: int, total: int) -> bool:
    """use_more_bits: the first and the last eighth, and every third between."""
    return block < total // 8 or block >= 7 * total // 8 or (block - total // 8) % 3 == 2
