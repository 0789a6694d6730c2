"""Projectors (mmproj files): published ones without their weights, and tiny ones of random weights for real servers."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Q

from sandbox.models import Tensor, leave_hole, write_header
from sandbox.projector_layouts import OTHER_PROJECTORS, PUBLISHED_PROJECTORS, ProjectorLayout
from sandbox.projector_shapes import shapes

__all__ = ["OTHER_PROJECTORS", "PUBLISHED_PROJECTORS", "ProjectorLayout", "tiny", "write"]

ALIGNMENT_BYTES = 32


def write(layout: ProjectorLayout, folder: Path, *, seed: int | None = None) -> Path:
    """Write the projector into `folder`, as mmproj-NAME.gguf; without `seed` the weights are a hole."""
    file = folder / f"mmproj-{layout.name}.gguf"
    table = list(tensors(layout))
    write_header(file, "clip", metadata(layout), table)
    start = leave_hole(file, table)
    if seed is None:
        return file
    with file.open("r+b") as stream:
        for tensor in table:
            stream.seek(start)
            stream.write(_values(tensor, seed).tobytes())
            start += -(-tensor.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return file


def tiny(folder: Path, width: int, *, seed: int = 0, name: str = "tiny", is_broken: bool = False) -> Path:
    """A projector of Gemma 3's kind for a model of this width: pictures of 56 pixels a side become 16 tokens.

    `is_broken`: its embeddings are no numbers (NaN).
    """
    layout = ProjectorLayout(name, "gemma3", width, 2, 64, 2, 128, patch=7, image=56, merge=2,
                             extra={"clip.vision.projector.scale_factor": 2})  # fmt: skip
    file = write(layout, folder, seed=seed)
    if is_broken:
        last = list(tensors(layout))[-1]
        with file.open("r+b") as stream:
            stream.seek(-(-(-last.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES), 2)
            stream.write(np.full(last.nbytes // 2, np.nan, np.float16).tobytes())
    return file


def metadata(layout: ProjectorLayout) -> dict[str, object]:
    """The header's metadata, with the keys that llama.cpp reads (tools/mtmd/clip-impl.h)."""
    modality = "audio" if layout.mel_bins else "vision"
    own: dict[str, object] = {
        "embedding_length": layout.embd, "feed_forward_length": layout.ff, "block_count": layout.blocks,
        "projection_dim": layout.width, "attention.head_count": layout.heads,
        "attention.layer_norm_epsilon": 1e-6,
    }  # fmt: skip
    if layout.mel_bins:
        own["num_mel_bins"] = layout.mel_bins
    else:
        own |= {"image_size": layout.image, "patch_size": layout.patch,
                "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}  # fmt: skip
    general = {"general.name": layout.name, "general.type": "mmproj", f"clip.has_{modality}_encoder": True,
               "clip.projector_type": layout.kind}  # fmt: skip
    silu = {} if "clip.use_silu" in layout.extra else {"clip.use_gelu": True}
    return general | {f"clip.{modality}.{key}": value for key, value in own.items()} | silu | dict(layout.extra)


def tensors(layout: ProjectorLayout) -> Iterator[Tensor]:
    """All tensors in file order."""
    for name, shape in shapes(layout):
        plain = len(shape) < 2 or "position_embd" in name or "norm" in name or "conv_dw" in name
        yield Tensor(name, shape, Q.F32 if plain else layout.type)


def _values(tensor: Tensor, seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    """Random weights that keep activations near 1."""
    shape = tensor.shape[::-1]
    generator = np.random.default_rng([seed, zlib.crc32(tensor.name.encode())])
    if "norm" in tensor.name or ".ln" in tensor.name or "_ln" in tensor.name:
        values = np.zeros(shape, np.float32) if tensor.name.endswith("bias") else np.ones(shape, np.float32)
    else:
        values = (generator.standard_normal(shape) / np.sqrt(tensor.shape[0])).astype(np.float32)
    return values if tensor.type == Q.F32 else values.astype(np.float16)
