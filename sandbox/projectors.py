"""Projectors (mmproj files): published ones without their weights, and tiny ones of random weights that can be served.

The numbers are from the models' config.json (vision_config, audio_config) on the Hub, or from the defaults of their
classes in transformers where config.json leaves them out. Names and shapes of tensors are those that llama.cpp's
conversion scripts write (gguf-py/gguf/constants.py; conversion/*.py).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Q

from sandbox.models import Tensor, leave_hole, write_header

ALIGNMENT_BYTES = 32


@dataclass(frozen=True)
class ProjectorLayout:
    """The numbers of one encoder. `width` is that of the model's embeddings."""

    name: str
    kind: str  # llama.cpp's name of the projector
    width: int
    blocks: int
    embd: int
    heads: int
    ff: int
    patch: int = 14
    image: int = 0
    head_dim: int = 0  # 0: embd / heads
    merge: int = 1
    deepstack: tuple[int, ...] = ()  # layers
    mel_bins: int = 0  # of sound; 0: of pictures
    options: frozenset[str] = frozenset()  # what some of a kind have and others have not
    extra: Mapping[str, object] = field(default_factory=dict)  # metadata, whole keys
    type: Q = Q.F16

    @property
    def prefix(self) -> str:
        """Of names of tensors."""
        return "a" if self.mel_bins else "v"


_SO400M: dict[str, Any] = {"blocks": 27, "embd": 1152, "heads": 16, "ff": 4304}
_CLIP_L: dict[str, Any] = {"embd": 1024, "heads": 16, "ff": 4096}
_GEMMA3: dict[str, Any] = {"kind": "gemma3", "patch": 14, "image": 896, "merge": 4, **_SO400M}
_QWEN3_MERGE: dict[str, object] = {"clip.vision.spatial_merge_size": 2}
_QWEN25: dict[str, Any] = {
    "kind": "qwen2.5vl_merger", "blocks": 32, "embd": 1280, "heads": 16, "ff": 3420, "image": 560, "merge": 2,
    "extra": {"clip.vision.n_wa_pattern": 8, "clip.use_silu": True},
}  # fmt: skip
_QWEN3: dict[str, Any] = {"kind": "qwen3vl_merger", "patch": 16, "image": 768, "merge": 2, "extra": _QWEN3_MERGE}
_GEMMA4: dict[str, Any] = {"kind": "gemma4v", "patch": 16, "image": 224, "merge": 3}

PUBLISHED_PROJECTORS: dict[str, ProjectorLayout] = {
    one.name: one
    for one in (
        ProjectorLayout("gemma-3-4b", width=2560, **_GEMMA3),
        ProjectorLayout("gemma-3-12b", width=3840, **_GEMMA3),
        ProjectorLayout("gemma-3-27b", width=5376, **_GEMMA3),
        ProjectorLayout("gemma-4-e4b", width=2560, blocks=16, embd=768, heads=12, ff=3072, **_GEMMA4),
        ProjectorLayout("gemma-4-31b", width=5376, **_SO400M, options=frozenset({"standardized"}), **_GEMMA4),
        ProjectorLayout("qwen2-vl-7b", "qwen2vl_merger", 3584, 32, 1280, 16, 5120, image=560, merge=2),
        ProjectorLayout("qwen2.5-vl-3b", width=2048, **_QWEN25),
        ProjectorLayout("qwen2.5-vl-7b", width=3584, **_QWEN25),
        ProjectorLayout("qwen3-vl-2b", width=2048, blocks=24, embd=1024, heads=16, ff=4096, deepstack=(5, 11, 17),
                        **_QWEN3),
        ProjectorLayout("qwen3-vl-8b", width=4096, **_SO400M, deepstack=(8, 16, 24), **_QWEN3),
        ProjectorLayout("qwen3.6-35b-a3b", width=2048, **_SO400M, **_QWEN3),
        ProjectorLayout("pixtral-12b", "pixtral", 5120, 24, **_CLIP_L, patch=16, image=1024),
        ProjectorLayout("mistral-small-3.1-24b", "pixtral", 5120, 24, **_CLIP_L, image=1540, merge=2,
                        extra={"clip.vision.spatial_merge_size": 2}),
        ProjectorLayout("internvl3-8b", "internvl", 3584, 24, **_CLIP_L, image=448, merge=2,
                        extra={"clip.vision.projector.scale_factor": 2}),
        ProjectorLayout("llava-1.5-7b", "mlp", 4096, 23, **_CLIP_L, image=336),
        ProjectorLayout("smolvlm2-500m", "idefics3", 960, 12, 768, 12, 3072, patch=16, image=512, merge=4,
                        extra={"clip.vision.projector.scale_factor": 4, "clip.vision.preproc_image_size": 2048}),
        ProjectorLayout("glm-4.1v-9b", "glm4v", 4096, 24, 1536, 12, 4096, image=336, merge=2,
                        extra={"clip.use_silu": True}),
        ProjectorLayout("kimi-vl-a3b", "kimivl", 2048, **_SO400M, image=896, merge=2,
                        extra={"clip.vision.projector.scale_factor": 2}),
        ProjectorLayout("voxtral-mini-3b", "voxtral", 3072, 32, 1280, 20, 5120, mel_bins=128,
                        extra={"clip.audio.projector.stack_factor": 4}),
        ProjectorLayout("qwen2-audio-7b", "qwen2a", 4096, 32, 1280, 20, 5120, mel_bins=128),
    )
}  # fmt: skip


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


def tiny(folder: Path, width: int, *, seed: int = 0) -> Path:
    """A projector of Gemma 3's kind for a model of this width: pictures of 56 pixels a side become 16 tokens."""
    return write(ProjectorLayout("tiny", "gemma3", width, 2, 64, 2, 128, patch=7, image=56, merge=2,
                                 extra={"clip.vision.projector.scale_factor": 2}), folder, seed=seed)  # fmt: skip


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
    for name, shape in (*_inputs(layout), *_layers(layout), *_outputs(layout)):
        plain = len(shape) < 2 or "position_embd" in name or "norm" in name
        yield Tensor(name, shape, Q.F32 if plain else layout.type)


Shapes = Iterator[tuple[str, tuple[int, ...]]]


def _both(name: str, shape: tuple[int, ...]) -> Shapes:
    """A weight and its bias."""
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[-1:]


def _inputs(one: ProjectorLayout) -> Shapes:
    if one.mel_bins:
        yield from _conv_1d("a.conv1d.1", one.mel_bins, one.embd)
        yield from _conv_1d("a.conv1d.2", one.embd, one.embd)
        yield "a.position_embd.weight", (one.embd, 1500)
        yield from _both("a.post_ln", (one.embd,))
        return
    patch = (one.patch, one.patch, 3, one.embd)
    yield "v.patch_embd.weight", patch
    side = one.image // one.patch
    if one.kind in ("qwen2vl_merger", "qwen2.5vl_merger", "qwen3vl_merger", "glm4v"):
        yield "v.patch_embd.weight.1", patch
    if one.kind in ("gemma3", "idefics3", "qwen3vl_merger", "glm4v", "kimivl"):
        yield "v.patch_embd.bias", (one.embd,)
        yield "v.position_embd.weight", (one.embd, side * side)
    if one.kind == "gemma4v":
        yield "v.position_embd.weight", (one.embd, 10240, 2)
    if one.kind == "glm4v":
        yield "v.norm_embd.weight", (one.embd,)
    if one.kind in ("internvl", "mlp"):
        yield "v.class_embd", (one.embd,)
        yield "v.position_embd.weight", (one.embd, side * side + 1)
    if one.kind == "internvl":
        yield "v.patch_embd.bias", (one.embd,)
    if one.kind == "mlp":
        yield from _both("v.pre_ln", (one.embd,))
    if one.kind == "pixtral":
        yield "v.pre_ln.weight", (one.embd,)
    if one.kind in ("gemma3", "idefics3", "kimivl", "qwen3vl_merger"):
        yield from _both("v.post_ln", (one.embd,))
    if one.kind in ("qwen2.5vl_merger", "glm4v"):
        yield "v.post_ln.weight", (one.embd,)
    if one.kind == "qwen2vl_merger":
        yield from _both("v.post_ln", (one.embd,))


def _conv_1d(name: str, channels: int, out: int) -> Shapes:
    yield f"{name}.weight", (3, channels, out)
    yield f"{name}.bias", (1, out)


def _layers(one: ProjectorLayout) -> Shapes:
    has_biases = one.kind not in ("pixtral", "gemma4v", "glm4v")
    inner = one.heads * (one.head_dim or one.embd // one.heads)
    for layer in range(one.blocks):
        name = f"{one.prefix}.blk.{layer}"

        def part(suffix: str, shape: tuple[int, ...], biased: bool = has_biases, name: str = name) -> Shapes:
            yield f"{name}.{suffix}.weight", shape
            if biased:
                yield f"{name}.{suffix}.bias", shape[-1:]

        if one.kind in ("qwen3vl_merger", "glm4v"):
            yield from part("attn_qkv", (one.embd, 3 * inner))
        else:
            yield from part("attn_q", (one.embd, inner))
            yield from part("attn_k", (one.embd, inner), has_biases and not one.mel_bins)
            yield from part("attn_v", (one.embd, inner))
        yield from part("attn_out", (inner, one.embd))
        plain_norm = has_biases and one.kind != "qwen2.5vl_merger"
        for norm in ("ln1", "ln2"):
            yield from part(norm, (one.embd,), plain_norm)
        if one.kind == "gemma4v":
            head = inner // one.heads
            for norm, size in (("attn_q_norm", head), ("attn_k_norm", head), ("attn_post_norm", one.embd),
                               ("ffn_post_norm", one.embd)):  # fmt: skip
                yield from part(norm, (size,))
        if one.kind == "internvl":
            yield f"{name}.ls1.weight", (one.embd,)
            yield f"{name}.ls2.weight", (one.embd,)
        if one.kind in ("qwen2.5vl_merger", "pixtral", "gemma4v", "glm4v"):
            yield from part("ffn_gate", (one.embd, one.ff))
        yield from part("ffn_up", (one.embd, one.ff))
        yield from part("ffn_down", (one.ff, one.embd))


def _outputs(one: ProjectorLayout) -> Shapes:
    return _OUTPUTS[one.kind](one, one.embd * one.merge**2)


def _of_gemma3(one: ProjectorLayout, squared: int) -> Shapes:
    yield "mm.soft_emb_norm.weight", (one.embd,)
    yield "mm.input_projection.weight", (one.width, one.embd)


def _of_gemma4(one: ProjectorLayout, squared: int) -> Shapes:
    if "standardized" in one.options:
        yield "v.std_bias", (one.embd,)
        yield "v.std_scale", (one.embd,)
    yield "mm.input_projection.weight", (one.embd, one.width)


def _of_qwen(one: ProjectorLayout, squared: int) -> Shapes:
    yield from _both("mm.0", (squared, squared))
    yield from _both("mm.2", (squared, one.width))
    for layer in one.deepstack:
        yield from _both(f"v.deepstack.{layer}.norm", (squared,))
        yield from _both(f"v.deepstack.{layer}.fc1", (squared, squared))
        yield from _both(f"v.deepstack.{layer}.fc2", (squared, one.width))


def _of_pixtral(one: ProjectorLayout, squared: int) -> Shapes:
    if one.merge > 1:
        yield "mm.input_norm.weight", (one.embd,)
        yield "mm.patch_merger.weight", (squared, one.embd)
    yield from _both("mm.1", (one.embd, one.width))
    yield from _both("mm.2", (one.width, one.width))
    yield "v.token_embd.img_break", (one.width,)


def _of_internvl(one: ProjectorLayout, squared: int) -> Shapes:
    yield from _both("mm.model.mlp.0", (squared,))
    yield from _both("mm.model.mlp.1", (squared, one.width))
    yield from _both("mm.model.mlp.3", (one.width, one.width))


def _of_llava(one: ProjectorLayout, squared: int) -> Shapes:
    yield from _both("mm.0", (one.embd, one.width))
    yield from _both("mm.2", (one.width, one.width))


def _of_idefics3(one: ProjectorLayout, squared: int) -> Shapes:
    yield "mm.model.fc.weight", (squared, one.width)


def _of_kimi(one: ProjectorLayout, squared: int) -> Shapes:
    yield from _both("mm.input_norm", (one.embd,))
    yield from _both("mm.1", (squared, squared))
    yield from _both("mm.2", (squared, one.width))


def _of_glm(one: ProjectorLayout, squared: int) -> Shapes:
    yield from _both("mm.patch_merger", (one.merge, one.merge, one.embd, one.width))
    yield "mm.model.fc.weight", (one.width, one.width)
    yield from _both("mm.post_norm", (one.width,))
    yield "mm.up.weight", (one.width, 13696)
    yield "mm.gate.weight", (one.width, 13696)
    yield "mm.down.weight", (13696, one.width)


def _of_voxtral(one: ProjectorLayout, squared: int) -> Shapes:
    yield "mm.a.mlp.1.weight", (one.embd * 4, one.width)
    yield "mm.a.mlp.2.weight", (one.width, one.width)


def _of_qwen_audio(one: ProjectorLayout, squared: int) -> Shapes:
    yield from _both("mm.a.fc", (one.embd, one.width))


# What is behind the layers, by kind; the second argument is the length of a row of merged patches.
_OUTPUTS: dict[str, Callable[[ProjectorLayout, int], Shapes]] = {
    **dict.fromkeys(("qwen2vl_merger", "qwen2.5vl_merger", "qwen3vl_merger"), _of_qwen),
    "gemma3": _of_gemma3, "gemma4v": _of_gemma4, "pixtral": _of_pixtral, "internvl": _of_internvl, "mlp": _of_llava,
    "idefics3": _of_idefics3, "kimivl": _of_kimi, "glm4v": _of_glm, "voxtral": _of_voxtral, "qwen2a": _of_qwen_audio,
}  # fmt: skip


def _values(tensor: Tensor, seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    """Random weights that keep activations near 1."""
    shape = tensor.shape[::-1]
    generator = np.random.default_rng([seed, zlib.crc32(tensor.name.encode())])
    if "norm" in tensor.name or ".ln" in tensor.name or "_ln" in tensor.name:
        values = np.zeros(shape, np.float32) if tensor.name.endswith("bias") else np.ones(shape, np.float32)
    else:
        values = (generator.standard_normal(shape) / np.sqrt(tensor.shape[0])).astype(np.float32)
    return values if tensor.type == Q.F32 else values.astype(np.float16)
