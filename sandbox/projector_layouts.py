"""The numbers of published projectors as data.

They are from the models' config.json (vision_config, audio_config) on the Hub, or from the defaults of their classes in
transformers where config.json leaves them out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gguf import GGMLQuantizationType as Q


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
        ProjectorLayout("gemma-4-e4b-audio", "gemma4a", 2560, 12, 1024, 8, 4096, mel_bins=128),
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

# Of further kinds, whose graphs are compared too: numbers of this size, not those of a certain file.
OTHER_PROJECTORS: dict[str, ProjectorLayout] = {
    one.name: one
    for one in (
        ProjectorLayout("lfm2", "lfm2", 2048, **_SO400M, patch=16, image=256, merge=2,
                        extra={"clip.vision.projector.scale_factor": 2}),
        ProjectorLayout("gemma4uv", "gemma4uv", 3840, 0, 3840, 16, 0, patch=16, image=224, merge=3),
        ProjectorLayout("janus_pro", "janus_pro", 4096, 24, **_CLIP_L, patch=16, image=384),
        ProjectorLayout("phi4", "phi4", 3072, **_SO400M, image=448,
                        extra={"clip.vision.image_min_pixels": 50176, "clip.vision.image_max_pixels": 1806336}),
        ProjectorLayout("lightonocr", "lightonocr", 1024, 24, **_CLIP_L, image=1540, merge=2,
                        extra={"clip.vision.spatial_merge_size": 2, "clip.vision.preproc_image_size": 1540}),
        ProjectorLayout("glm5v", "glm5v", 4096, 24, 1536, 12, 4096, image=336, merge=2,
                        extra={"clip.use_silu": True, "clip.vision.swiglu_clamp": 7.0,
                               "clip.vision.image_min_pixels": 12544, "clip.vision.image_max_pixels": 4816896}),
        ProjectorLayout("ultravox", "ultravox", 4096, 32, 1280, 20, 5120, mel_bins=128,
                        extra={"clip.audio.projector.stack_factor": 8}),
        ProjectorLayout("musicflamingo", "musicflamingo", 3584, 32, 1280, 20, 5120, mel_bins=128),
    )
}  # fmt: skip
