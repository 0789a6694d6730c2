"""llama.cpp's projectors, one row each: what its code has at b11434 and no header says.

Sources: tools/mtmd/clip-impl.h, PROJECTOR_TYPE_NAMES; tools/mtmd/clip.cpp, load_hparams, load_tensors and
clip_n_mmproj_embd; tools/mtmd/mtmd.cpp, mtmd_decode_use_non_causal; tools/mtmd/models/models.h, support_batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """One projector. A picture's sizes are in pixels, patches and, behind the merge of patches, tokens."""

    merge: int = 1  # patches of a side that become a token, where the header does not say it
    merge_key: str = ""
    tokens: tuple[int, int] = (0, 0)  # of the smallest and largest picture; both 0: one fixed size
    has_pixel_keys: bool = False  # the header gives the limits in pixels
    has_longest_edge: bool = False  # ... or the longest side
    warm_up_side: int = 0  # tokens of a side of the picture that is reserved for at the start; 0: the largest
    output: tuple[str, int] = ("", 0)  # the tensor and the dimension that is the width of its embeddings
    causal: bool = True  # False: all tokens of a picture must be in one ubatch
    batches: bool = False  # encodes several pictures of equal size at once
    frames: int = 1  # of a film that are encoded as one picture (clip_model_n_temporal_merge)
    hears: bool = False
    windowed: bool = False  # some layers have a mask
    limits: bool = False  # --image-min-tokens and --image-max-tokens change its pictures


SCALE, MERGE = "projector.scale_factor", "spatial_merge_size"
_MM2 = ("mm.2.weight", 1)
_FC = ("mm.model.fc.weight", 1)
_AUDIO_MLP2 = ("mm.a.mlp.2.weight", 1)
_QWEN: dict[str, Any] = {"merge": 2, "merge_key": MERGE, "tokens": (8, 4096), "warm_up_side": 46, "limits": True}
_OF_PIXELS: dict[str, Any] = {"has_pixel_keys": True, "warm_up_side": 46}

KINDS: dict[str, Kind] = {
    "mlp": Kind(output=_MM2),
    "ldp": Kind(output=("mm.model.mb_block.1.block.2.1.bias", 0)),
    "ldpv2": Kind(output=("mm.model.peg.0.bias", 0)),
    "resampler": Kind(output=("resampler.proj.weight", 0)),
    "adapter": Kind(output=("adapter.linear.dense_4h_to_h.weight", 1)),
    "qwen2vl_merger": Kind(output=("mm.2.bias", 0), frames=2, **_QWEN),
    "qwen2.5vl_merger": Kind(output=("mm.2.bias", 0), frames=2, windowed=True, **_QWEN),
    "qwen3vl_merger": Kind(output=("mm.2.bias", 0), frames=2, **_QWEN),
    "ling3vl": Kind(output=("mm.2.bias", 0), frames=2, **_QWEN),
    "step3vl": Kind(merge=4, merge_key=SCALE, has_longest_edge=True, output=_FC),
    "gemma3": Kind(merge=4, merge_key=SCALE, output=("mm.input_projection.weight", 0), causal=False),
    "gemma3nv": Kind(merge_key=SCALE, output=("mm.input_projection.weight", 0)),
    "gemma3na": Kind(hears=True),
    "gemma4v": Kind(merge=3, merge_key=SCALE, tokens=(70, 1120), warm_up_side=16, causal=False, batches=True,
                    output=("mm.input_projection.weight", 1), limits=True),
    "gemma4a": Kind(output=("mm.a.input_projection.weight", 1), hears=True),
    "gemma4uv": Kind(merge=3, merge_key=SCALE, tokens=(70, 1120), warm_up_side=16, causal=False,
                     output=("mm.input_projection.weight", 1), limits=True),
    "gemma4ua": Kind(output=("mm.a.input_projection.weight", 1), hears=True),
    "phi4": Kind(has_pixel_keys=True, warm_up_side=16, output=_MM2),
    "idefics3": Kind(merge_key=SCALE, has_longest_edge=True, output=_FC),
    "pixtral": Kind(merge_key=MERGE, tokens=(8, 1024), warm_up_side=16, output=_MM2, limits=True),
    "ultravox": Kind(output=_AUDIO_MLP2, hears=True),
    "internvl": Kind(merge_key=SCALE, output=("mm.model.mlp.3.weight", 1), batches=True),
    "llama4": Kind(merge_key=SCALE, output=_FC),
    "qwen2a": Kind(output=("mm.a.fc.weight", 1), hears=True),
    "qwen3a": Kind(output=_AUDIO_MLP2, hears=True),
    "glma": Kind(output=_AUDIO_MLP2, hears=True),
    "voxtral": Kind(output=_AUDIO_MLP2, hears=True),
    "meralion": Kind(output=("mm.a.mlp.3.weight", 1), hears=True),
    "musicflamingo": Kind(output=_AUDIO_MLP2, hears=True),
    "lfm2": Kind(merge_key=SCALE, tokens=(64, 256), output=_MM2, limits=True),
    "kimivl": Kind(merge_key=SCALE, tokens=(8, 1024), warm_up_side=16, output=_MM2, limits=True),
    "paddleocr": Kind(merge=2, has_pixel_keys=True, warm_up_side=28, output=_MM2),
    "lightonocr": Kind(merge_key=MERGE, has_longest_edge=True, warm_up_side=16, output=_MM2, limits=True),
    "cogvlm": Kind(output=("mm.down.weight", 1)),
    "janus_pro": Kind(output=("mm.1.bias", 0)),
    "dots_ocr": Kind(merge_key=SCALE, output=_MM2, **_OF_PIXELS),
    "dots3note_v": Kind(merge_key=MERGE, output=_MM2, **_OF_PIXELS),
    "dots3note_a": Kind(output=("mm.a.mlp.3.weight", 1), hears=True),
    "deepseekocr": Kind(output=_FC, batches=True, windowed=True),
    "deepseekocr2": Kind(output=_FC, batches=True, windowed=True),
    "deepseek4v": Kind(merge_key=SCALE, tokens=(16, 384), warm_up_side=16, output=_MM2, causal=False, limits=True),
    "lfm2a": Kind(output=("a.position_embd.weight", 0), hears=True),
    "glm4v": Kind(output=("mm.down.weight", 1), **_QWEN),
    "glm5v": Kind(merge=2, merge_key=MERGE, output=("mm.down.weight", 1), limits=True, **_OF_PIXELS),
    "youtuvl": Kind(merge=2, merge_key=MERGE, tokens=(1, 62500), warm_up_side=16, output=("mm.2.bias", 0),
                    windowed=True, limits=True),
    "yasa2": Kind(output=_MM2),
    "kimik25": Kind(merge_key=SCALE, tokens=(2, 4096), has_pixel_keys=True, output=_MM2, limits=True),
    "nemotron_v2_vl": Kind(merge_key=SCALE, output=("mm.model.mlp.3.weight", 1)),
    "exaone4_5": Kind(merge=2, merge_key=MERGE, output=("mm.2.bias", 0), windowed=True, **_OF_PIXELS),
    "hunyuanvl": Kind(merge=2, merge_key=MERGE, tokens=(256, 16384), has_pixel_keys=True, warm_up_side=32, output=_FC,
                      limits=True),
    "minicpmv4_6": Kind(merge=4, merge_key=SCALE, output=("mm.down.weight", 1), windowed=True),
    "granite_speech": Kind(hears=True),
    "mimovl": Kind(merge=2, merge_key=MERGE, output=_MM2, windowed=True, **_OF_PIXELS),
    "minimax_m3": Kind(merge=2, merge_key=MERGE, tokens=(8, 576), warm_up_side=16, output=("mm.merger.fc2.bias", 0),
                       limits=True),
    "granite4_vision": Kind(),
    "mimo_audio": Kind(output=_AUDIO_MLP2, hears=True),
    "parakeet": Kind(hears=True),
    "muse-glimmer": Kind(merge=2, merge_key=MERGE, tokens=(1, 4096), warm_up_side=32, output=_MM2, windowed=True,
                         limits=True),
}  # fmt: skip
# A name that stands for two: of the encoder of pictures, and of that of sound.
SPLIT_KINDS = {"qwen2.5o": ("qwen2.5vl_merger", "qwen2a")}
# They make sound, which llama-server has no address for, or read the voice that it is to have.
SPEAKING = ("qwen3tts_spkenc", "qwen3tts_gen", "pockettts_spkenc", "pockettts_gen")
