"""Make small weightless models of any architecture from an outline in YAML: metadata and the tensors' shapes.

    architecture: gemma2
    quant: F16                                                  type of the matrices; Q8_0 if it is not given
    vocabulary: 4096
    metadata: {block_count: 6, embedding_length: 512, ...}      keys without the architecture
    unsigned64: {ple.head_offsets: [0, ...]}                    further keys without it, lists of 64-bit numbers
    others: {xielu.beta: [0.5, ...]}                            keys that never have it
    tensors:                                                    of the whole model; no "output.*" if it is tied
      token_embd.weight: [512, 4096]
    layers:                                                     of each layer, by layer numbers
      all: {attn_norm.weight: [512], attn_q.weight: [512, 1024]}
      0-2,5: {ffn_up.weight: [512, 2048]}

A matrix is of that type if its rows allow it and its name does not match the regular expression `f32`; all else is F32.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Q

from sandbox.models import Tensor, Unsigned64, leave_hole, tokenizer, write_header

# llama-quantize does not quantise these tensors (src/llama-quant.cpp, tensor_allows_quantization).
KEPT = re.compile(
    r".*(_norm|ffn_gate_inp|ssm_conv1d|shortconv\.conv|time_mix_lerp|altup|laurel|per_layer_model_proj).*"
)


def read(outline: Path) -> dict[str, Any]:
    """The outline as data."""
    content = yaml.safe_load(outline.read_text())
    assert isinstance(content, dict), outline
    return content


def weightless(outline: Path, folder: Path) -> Path:
    """Write the model's header and a hole for its weights into `folder`."""
    content = read(outline)
    file = folder / f"{outline.stem}.gguf"
    values = {f"{content['architecture']}.{key}": value for key, value in content["metadata"].items()}
    for key, numbers in content.get("unsigned64", {}).items():
        values[f"{content['architecture']}.{key}"] = [Unsigned64(number) for number in numbers]
    values |= {"general.name": outline.stem, **content.get("others", {}), **tokenizer(content["vocabulary"])}
    table = list(_tensors(content))
    write_header(file, content["architecture"], values, table)
    leave_hole(file, table)
    return file


def _tensors(outline: dict[str, Any]) -> Iterator[Tensor]:
    f32, quant = re.compile(outline.get("f32", "^$")), Q[outline.get("quant", "Q8_0")]
    for name, shape in outline["tensors"].items():
        yield Tensor(name, tuple(shape), _type(name, shape, f32, quant))
    count = outline["metadata"]["block_count"]
    for layer in range(count):
        for which, parts in outline["layers"].items():
            if layer in _numbers(str(which), count):
                for part, shape in parts.items():
                    yield Tensor(f"blk.{layer}.{part}", tuple(shape), _type(part, shape, f32, quant))


def _type(name: str, shape: list[int], f32: re.Pattern[str], quant: Q) -> Q:
    if name.endswith("tid2eid.weight"):  # numbers of experts by token
        return Q.I32
    if name == "d2t":  # a draft's tokens as the model's
        return Q.I64
    is_matrix = len(shape) > 1 and name.endswith(".weight") and shape[0] % GGML_QUANT_SIZES[quant][0] == 0
    return quant if is_matrix and not KEPT.fullmatch(name) and not f32.fullmatch(name) else Q.F32


def _numbers(text: str, count: int) -> set[int]:
    """Layer numbers of a text such as "0-2,5"; "all" gives every number below `count`."""
    if text == "all":
        return set(range(count))
    ends = (part.partition("-") for part in text.split(","))
    return {number for low, _, high in ends for number in range(int(low), int(high or low) + 1)}
