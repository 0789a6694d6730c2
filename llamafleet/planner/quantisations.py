"""A model in another quantisation: an estimate of its header, tensor by tensor, from the header of an existing file.

Sizes by bits per weight alone miss by a quarter for small models, whose embedding and rows that are no multiple of 256
keep larger types.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from llamafleet.model.ggml_types import GGML_TYPES
from llamafleet.model.gguf import Header, Tensor

# Common quantisations by the type of most weights, smallest first. The second type of each is llama-quantize's choice
# for rows that are no multiple of 256 (src/llama-quant.cpp, tensor_type_fallback).
LADDER = (("Q2_K", "Q4_0"), ("Q3_K", "Q4_0"), ("Q4_K", "Q5_0"), ("Q5_K", "Q5_1"), ("Q6_K", "Q8_0"), ("Q8_0", "Q8_0"))
# The names of published files by the type of most weights.
FILES = {"Q2_K": "Q2_K", "Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "Q6_K": "Q6_K", "Q8_0": "Q8_0"}
# Tensors that llama-quantize keeps a step larger than the others below Q6_K, and below Q4_K (llama_tensor_get_type).
_LARGER, _LARGER_BELOW_Q4 = ("attn_v.", "attn_qkv.", "ffn_down"), ("attn_output.",)
_NAMES = [name for name, _ in LADDER]
_BLOCKS = {name: (block, size) for name, block, size in GGML_TYPES.values()}
_UNQUANTISED = ("F32", "F16", "BF16")


def main_type(header: Header) -> str:
    """The type in which most of the weights are stored; empty if there are no tensors."""
    counts: Counter[str] = Counter()
    for tensor in header.tensors:
        counts[tensor.type] += tensor.elements
    return counts.most_common(1)[0][0] if counts else ""


def larger(header: Header) -> Header | None:
    """The next larger quantisation; None if there is none. Every tensor of a smaller type than the next gets that."""
    main = main_type(header)
    if main not in _NAMES[:-1]:
        return None
    target = _NAMES.index(main) + 1
    return _with(header, tuple(_stored(one, target) if one.type in _NAMES[:target] else one for one in header.tensors))


def smaller(header: Header) -> list[tuple[str, Header]]:
    """The smaller quantisations by their names, the largest first, each at least a twentieth smaller than the model."""
    tied = all(tensor.name != "output.weight" for tensor in header.tensors)
    found = []
    for target in reversed(range(len(LADDER))):
        changed = _with(header, tuple(_reduced(one, target, tied) for one in header.tensors))
        if changed.weights_bytes < 0.95 * header.weights_bytes:
            found.append((FILES[_NAMES[target]], changed))
    return found


def _reduced(tensor: Tensor, target: int, tied: bool) -> Tensor:
    """The tensor as a quantisation of this place in the ladder has it; never larger than it is."""
    if (
        len(tensor.shape) < 2
        or ".lora_" in tensor.name
        or tensor.type not in (*_NAMES, *_UNQUANTISED, *(other for _, other in LADDER))
    ):
        return tensor  # norms, adapters, and types that are no step of the ladder: MXFP4 is as the model was trained
    q4, q6 = _NAMES.index("Q4_K"), _NAMES.index("Q6_K")
    raised = _LARGER * (target < q6) + _LARGER_BELOW_Q4 * (target < q4)
    step = target + any(part in tensor.name for part in raised)
    if tensor.name == ("token_embd.weight" if tied else "output.weight"):  # which computes the output
        step = max(target, q6)
    stored = _stored(tensor, step)
    return stored if stored.bytes < tensor.bytes else tensor


def _stored(tensor: Tensor, target: int) -> Tensor:
    fitting = (name for name in LADDER[target] if tensor.shape[0] % _BLOCKS[name][0] == 0)
    name = next(fitting, tensor.type)
    block, size = _BLOCKS[name]
    return replace(tensor, type=name, bytes=tensor.elements // block * size)


def _with(header: Header, tensors: tuple[Tensor, ...]) -> Header:
    more = sum(tensor.bytes for tensor in tensors) - header.weights_bytes
    first, *others = header.file_bytes
    return replace(header, tensors=tensors, file_bytes=(max(0, first + more), *others))
