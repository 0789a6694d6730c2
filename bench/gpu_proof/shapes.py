"""The models of the proof: real shapes with random weights, written quickly and without holes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Q

from sandbox.layouts import PUBLISHED, Layout
from sandbox.models import Tensor, leave_hole, metadata, tensors, write_header

# Blocks of a quantised tensor that are made anew; the tensor repeats them. A prime, so that no two rows are alike.
BLOCKS = 40_009
WRITTEN_BYTES = 64 << 20  # at a time, at least
ALIGNMENT_BYTES = 32
# A weight's standard deviation, where the block's own factor (d) is 1 and everything else in it is random.
DEVIATIONS = {Q.Q8_0: 73.9, Q.Q4_K: 257.0, Q.Q6_K: 1366.0, Q.Q5_0: 9.2}
MXFP4_DEVIATION = 2.9
SMALL: dict[str, Any] = {"vocab": 4096, "blocks": 4}


def layouts(scale: str) -> dict[str, Layout]:
    """The models by name: of published sizes, or small ones of the same architectures ("tiny", some 10 to 100 MB)."""
    real = {name: PUBLISHED[name] for name in ("gpt-oss-20b", "Qwen3-30B-A3B", "Qwen3-8B")}
    if scale == "real":
        return real
    return {
        "gpt-oss-20b": replace(real["gpt-oss-20b"], **SMALL, name="tiny-gpt-oss", embd=512, heads=8, kv_heads=2,
                               ff=512, experts=16),
        "Qwen3-30B-A3B": replace(real["Qwen3-30B-A3B"], **SMALL, name="tiny-qwen3moe", embd=512, heads=8, kv_heads=2,
                                 head_dim=64, ff=1024, expert_ff=256, experts=32, experts_used=4),
        "Qwen3-8B": replace(real["Qwen3-8B"], **SMALL, name="tiny-qwen3", embd=512, heads=8, kv_heads=2, head_dim=64,
                            ff=1536),
    }  # fmt: skip


def write(layout: Layout, folder: Path) -> Path:
    """The model's file in `folder`; one that is there in its whole size is kept."""
    file, part = (folder / f"{layout.name}-{layout.quant}.{end}" for end in ("gguf", "part"))
    if file.exists():
        return file
    table = list(tensors(layout, layout.quant))
    write_header(part, layout.architecture, metadata(layout, layout.quant), table)
    start = leave_hole(part, table)
    with part.open("r+b") as stream:
        for number, tensor in enumerate(table):
            stream.seek(start)
            for piece in pieces(tensor, number):
                stream.write(piece)
            start += -(-tensor.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    part.rename(file)
    return file


def pieces(tensor: Tensor, seed: int) -> Iterator[memoryview]:
    """The tensor's data, `nbytes` in all."""
    data = np.ascontiguousarray(values(tensor, seed)).view(np.uint8).reshape(-1)
    if len(data) < tensor.nbytes:
        data = np.tile(data, max(1, min(-(-tensor.nbytes // len(data)), WRITTEN_BYTES // len(data))))
    left = tensor.nbytes
    while left > 0:
        yield memoryview(data[:left])
        left -= len(data)


def values(tensor: Tensor, seed: int) -> np.ndarray[Any, Any]:
    """All of a small tensor, or the blocks that a large one repeats. Activations stay near 1."""
    chance = np.random.default_rng(seed)
    count, scale = math.prod(tensor.shape), 1 / math.sqrt(tensor.shape[0])
    if tensor.type is Q.F32:
        if "norm" in tensor.name:
            return np.ones(count, np.float32)
        return (chance.standard_normal(count) * (scale if len(tensor.shape) > 1 else 0.01)).astype(np.float32)
    length, size = GGML_QUANT_SIZES[tensor.type]
    blocks = min(count // length, BLOCKS)
    if tensor.type is Q.F16:
        return (chance.standard_normal(blocks * length) * scale).astype(np.float16)
    data = chance.integers(0, 256, (blocks, size), np.uint8)
    return _with_factor(data, tensor.type, scale)


def _with_factor(data: np.ndarray[Any, Any], kind: Q, scale: float) -> np.ndarray[Any, Any]:
    """Random blocks whose factors give weights of this standard deviation (ggml/src/ggml-common.h, block_q4_K and the
    others)."""
    if kind is Q.MXFP4:  # the exponent, with 127 as 1
        data[:, 0] = 127 + round(math.log2(scale / MXFP4_DEVIATION))
        return data
    if kind not in DEVIATIONS:
        raise ValueError(f"{kind.name}: random blocks of this type are not made here: add its factor's place")
    factor = np.array([scale / DEVIATIONS[kind]], np.float16)
    if kind is Q.Q6_K:
        data[:, -2:] = factor.view(np.uint8)
        return data
    data[:, :2] = factor.view(np.uint8)
    if kind is Q.Q4_K:  # dmin, so that the mean is 0: quants of 0 to 15
        data[:, 2:4] = (factor * np.float16(7.5)).view(np.uint8)
    return data
