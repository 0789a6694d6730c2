"""Make LoRA adapters for test models: with random weights, or with a hole in their place.

The keys and names of tensors are those that convert_lora_to_gguf.py writes.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Q

from sandbox.layouts import PUBLISHED, TINY, Layout
from sandbox.models import Tensor, leave_hole, tensors, write_header

# What peft adapts with target_modules="all-linear": attention and feed-forward matrices of every layer.
ALL_LINEAR = r"blk\.\d+\.(attn_(q|k|v|output|qkv)|ffn_(up|down|gate)(_exps)?)\.weight"


def lora(
    folder: Path,
    base: Layout | str,
    *,
    rank: int = 8,
    matrices: str = ALL_LINEAR,
    seed: int | None = None,
    name: str = "lora",
    alpha: float = 16.0,
    **values: object,
) -> Path:
    """Write an adapter of this rank for the model's tensors that `matrices` matches; returns the file in `folder`.

    With `seed` it has random weights that change the model's answers; equal arguments give equal bytes. `values` are
    further keys of the header, with "__" for a dot, or others in place of those that an adapter has.
    """
    layout = base if isinstance(base, Layout) else {**PUBLISHED, **TINY}[base]
    table = list(_pairs(layout, rank, matrices))
    file = folder / f"{name}.gguf"
    own: dict[str, object] = {
        "general.type": "adapter",
        "general.name": name,
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
    }
    write_header(
        file, layout.architecture, {**own, **{key.replace("__", "."): value for key, value in values.items()}}, table
    )
    start = leave_hole(file, table)
    if seed is not None:
        with file.open("r+b") as stream:
            for tensor in table:
                stream.seek(start)
                stream.write(_values(tensor, seed))
                start += -(-tensor.nbytes // 32) * 32
    return file


def _pairs(layout: Layout, rank: int, matrices: str) -> Iterator[Tensor]:
    for tensor in tensors(layout, layout.quant):
        if re.fullmatch(matrices, tensor.name):
            columns, rows, *experts = tensor.shape
            a, b = (columns, rank), (rank, rows)
            if tensor.name == "token_embd.weight":
                a, b = (rank, rows), (rank, columns)
            yield Tensor(f"{tensor.name}.lora_a", (*a, *experts), Q.F16)
            yield Tensor(f"{tensor.name}.lora_b", (*b, *experts), Q.F16)


def _values(tensor: Tensor, seed: int) -> bytes:
    generator = np.random.default_rng([seed, zlib.crc32(tensor.name.encode())])
    scale = 1 / math.sqrt(tensor.shape[0])
    return (generator.standard_normal(tensor.shape[::-1]) * scale).astype(np.float16).tobytes()
