"""What a projector's header says: the encoders that make embeddings of pictures and of sound for a model.

The rules are those of tools/mtmd/clip.cpp, load_hparams and clip_n_mmproj_embd at b11434. A header may be hostile:
numbers are checked where llama.cpp checks them, and bounded where a graph is built of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from llamafleet.model.gguf import Header, Tensor
from llamafleet.model.projector_kinds import KINDS, SPEAKING, SPLIT_KINDS, Kind

ARCHITECTURE = "clip"
VISION, AUDIO = "vision", "audio"
DEEPSTACK = re.compile(r"v\.deepstack\.\d+\.fc1\.weight")
LAYER_LIMIT = 512  # the largest encoders have 64 layers
IMAGE_SIDE_LIMIT = 8192  # pixels; load_hparams
PATCH_LIMIT = 65536
AUDIO_FRAMES = 3000  # tools/mtmd/clip-model.h, warmup_audio_size: thirty seconds
# Whatever modality an encoder has, these of its file are loaded too (load_tensors).
_ALWAYS_LOADED = ("v.class_embd", "v.patch_embd.", "v.norm_embd.")
_OF_SOUND = ("a.", "mm.a.")


class ProjectorError(ValueError):
    """A file that llama.cpp would not load as a projector, or for no model that is served; the text says why."""


@dataclass(frozen=True)
class Encoder:
    """One encoder. `patch`, `side` and `warm_up_side` are pixels, `merge` patches of a side that become one token."""

    name: str  # llama.cpp's of the projector
    kind: Kind
    embedding: int
    heads: int
    kv_heads: int
    head: int  # elements
    feed_forward: int
    layers: int
    patch: int
    merge: int
    side: int  # of a picture of fixed size
    warm_up_side: int  # of the picture that llama-server reserves for at its start; of sound: frames
    min_tokens: int  # of the smallest picture
    max_tokens: int  # of the largest picture that is encoded at once
    window_pattern: int  # each N-th layer has no window; 0: none has
    feature_layers: tuple[int, ...]
    mel_bins: int
    stack: int  # frames that become one token
    tensors: tuple[Tensor, ...]

    @property
    def hears(self) -> bool:
        """Is it of sound?"""
        return self.kind.hears

    @property
    def has_dynamic_size(self) -> bool:
        """Do --image-min-tokens and --image-max-tokens change its pictures?"""
        return self.kind.limits


@dataclass(frozen=True)
class Projector:
    """A file of one encoder or two."""

    encoders: tuple[Encoder, ...]
    width: int  # of its embeddings, which must be the model's; 0: unknown

    @property
    def vision(self) -> Encoder | None:
        """The encoder of pictures."""
        return next((one for one in self.encoders if not one.hears), None)

    @property
    def modalities(self) -> tuple[str, ...]:
        """What it makes the model understand: "vision", "audio", in this order."""
        return tuple(AUDIO if one.hears else VISION for one in self.encoders)

    @property
    def largest_to_smallest(self) -> float:
        """How much more arithmetic the largest picture takes than the smallest; 1 where pictures have one size."""
        one = self.vision
        return _work(one, one.max_tokens) / _work(one, one.min_tokens) if one else 1.0

    @property
    def same_ubatch_tokens(self) -> int:
        """Tokens of a picture that must all be in one ubatch, since they are attended to in both directions; 0: they
        may be divided (mtmd_decode_use_non_causal)."""
        one = self.vision
        if one is None or one.kind.causal:
            return 0
        if one.name == "gemma4v" and self.width in (1536, 2560):  # the smaller models read pictures as text
            return 0
        return one.max_tokens


def _work(encoder: Encoder, tokens: int) -> float:
    """Arithmetic of one picture: each weight for each patch, and attention of all patches to all."""
    patches = max(1, tokens * encoder.merge**2)
    weights = sum(tensor.elements for tensor in encoder.tensors)
    return 2.0 * patches * weights + 4.0 * patches**2 * encoder.embedding * encoder.layers


def read(header: Header, min_tokens: int | None = None, max_tokens: int | None = None) -> Projector:
    """The projector of this header, with the settings image_min_tokens and image_max_tokens. Raises ProjectorError."""
    if header.architecture != ARCHITECTURE:
        raise ProjectorError(f"is a model of architecture {header.architecture}, not a projector (clip)")
    found = []
    for modality in (VISION, AUDIO):
        if header.metadata.get(f"clip.has_{modality}_encoder") is True:
            found.append(_encoder(header, modality, min_tokens, max_tokens))
    if any(one.name == "gemma3nv" for one in found):
        found = [one for one in found if not one.hears]  # clip_init: its sound is not supported
    if not found:
        raise ProjectorError("has neither an encoder of pictures nor one of sound (clip.has_vision_encoder)")
    return Projector(tuple(found), _width(header, found[0]))


def _encoder(header: Header, modality: str, min_tokens: int | None, max_tokens: int | None) -> Encoder:
    name = _kind_name(header, modality)
    kind = KINDS[name]
    keys = _Keys(header, modality)
    embedding, heads, layers = keys.number("embedding_length"), keys.number("attention.head_count"), keys.layers()
    patch = 1 if kind.hears else keys.number("patch_size")
    side = 0 if kind.hears else keys.number("image_size", least=0)
    if not 0 < patch < PATCH_LIMIT or side > IMAGE_SIDE_LIMIT:
        raise ProjectorError(f"has clip.vision.patch_size {patch} and image_size {side}, which llama.cpp refuses")
    merge = keys.optional(kind.merge_key, kind.merge) if kind.merge_key else kind.merge
    if name == "gemma4uv":  # its convolution merges the patches
        patch, merge = patch * merge, 1
    if not 0 < merge < PATCH_LIMIT:
        raise ProjectorError(f"has clip.vision.{kind.merge_key} {merge}, which llama.cpp refuses")
    largest = _max_tokens(kind, keys, patch * merge, side, max_tokens)
    heads_kv = keys.optional("attention.head_count_kv", heads)
    return Encoder(
        name=name, kind=kind, embedding=embedding, heads=heads, kv_heads=heads_kv,
        head=keys.optional("attention.head_dim", 0) or (embedding // heads if heads else 0),
        feed_forward=keys.number("feed_forward_length", least=0), layers=layers, patch=patch, merge=merge, side=side,
        warm_up_side=AUDIO_FRAMES if kind.hears else _warm_up_side(kind, patch * merge, side, largest, max_tokens),
        min_tokens=_min_tokens(kind, keys, patch * merge, largest, min_tokens), max_tokens=largest,
        window_pattern=keys.optional("n_wa_pattern", 0), feature_layers=keys.list("feature_layer"),
        mel_bins=640 if name == "gemma4ua" else keys.optional("num_mel_bins", 0),
        stack=keys.optional("projector.stack_factor", 0),
        tensors=tuple(_loaded(header.tensors, kind)),
    )  # fmt: skip


def _kind_name(header: Header, modality: str) -> str:
    """llama.cpp's name of the projector of an encoder. Raises ProjectorError for one that it does not know."""
    common = header.metadata.get("clip.projector_type")
    name = common or header.metadata.get(f"clip.{modality}.projector_type")
    if isinstance(name, str) and name in SPLIT_KINDS:
        name = SPLIT_KINDS[name][modality == AUDIO]
    if name in SPEAKING:
        raise ProjectorError(f"is a projector of speech ({name}), which llama-server does not serve")
    if not isinstance(name, str) or name not in KINDS:
        shown = repr(name)[:80]
        raise ProjectorError(f"is a projector of the type {shown}, which the pinned llama.cpp does not know")
    return name


def _max_tokens(kind: Kind, keys: _Keys, token_side: int, side: int, wanted: int | None) -> int:
    """Tokens of the largest picture that is encoded at once; of sound 0. `token_side`: pixels of a token's side."""
    if kind.hears:
        return 0
    if kind.limits and wanted:
        return wanted
    pixels = keys.optional("image_max_pixels", 0) if kind.has_pixel_keys else 0
    if pixels:
        return max(1, pixels // token_side**2)
    if kind.tokens[1]:
        return kind.tokens[1]
    if kind.limits and kind.has_longest_edge:
        side = keys.optional("preproc_image_size", side)
    return max(1, math.ceil(side / token_side) ** 2)


def _min_tokens(kind: Kind, keys: _Keys, token_side: int, largest: int, wanted: int | None) -> int:
    """Tokens of the smallest picture; that of the largest where pictures have one size."""
    if kind.limits and wanted:
        return min(wanted, largest)
    pixels = keys.optional("image_min_pixels", 0) if kind.has_pixel_keys else 0
    return min(largest, max(1, pixels // token_side**2) if pixels else kind.tokens[0] or largest)


def _warm_up_side(kind: Kind, token_side: int, side: int, largest: int, wanted: int | None) -> int:
    """Pixels of a side of the picture that is reserved for at the start (set_warmup_n_tokens)."""
    if kind.warm_up_side:
        tokens = kind.warm_up_side**2
        return (math.isqrt(wanted) if wanted and tokens > wanted else kind.warm_up_side) * token_side
    return math.isqrt(largest * token_side**2) if kind.tokens[1] else side


def _loaded(tensors: Sequence[Tensor], kind: Kind) -> list[Tensor]:
    """The tensors that llama.cpp loads for an encoder of this kind."""
    if kind.hears:
        return [one for one in tensors if one.name.startswith((*_OF_SOUND, *_ALWAYS_LOADED))]
    return [one for one in tensors if not one.name.startswith(_OF_SOUND)]


def _width(header: Header, encoder: Encoder) -> int:
    """The width of the embeddings; 0 where it is not read from one tensor."""
    name, axis = encoder.kind.output
    tensor = next((one for one in header.tensors if one.name == name), None)
    if tensor is None or len(tensor.shape) <= axis:
        return 0
    if encoder.name != "qwen3vl_merger":
        return tensor.shape[axis]
    return tensor.shape[axis] * (1 + sum(1 for one in header.tensors if DEEPSTACK.fullmatch(one.name)))


class _Keys:
    """The values of an encoder in the header."""

    def __init__(self, header: Header, modality: str) -> None:
        self.header, self.prefix = header, f"clip.{modality}."

    def number(self, key: str, least: int = 1) -> int:
        """A whole number that llama.cpp needs. Raises ProjectorError without it."""
        value = self.header.metadata.get(self.prefix + key)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
            raise ProjectorError(f"has {self.prefix}{key} = {str(value)[:20]}, should be a number from {least} on")
        return value

    def optional(self, key: str, default: int) -> int:
        """A whole number, or the default where the header has none."""
        return self.number(key, 0) if self.prefix + key in self.header.metadata else default

    def list(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers; empty without one."""
        value = self.header.metadata.get(self.prefix + key)
        return tuple(one for one in value if isinstance(one, int)) if isinstance(value, tuple) else ()

    def layers(self) -> int:
        """The number of layers, of which there must be tensors."""
        layers = self.number("block_count", 0)
        if layers > LAYER_LIMIT:
            raise ProjectorError(f"has {self.prefix}block_count = {layers}, {LAYER_LIMIT} at most are supported")
        return layers
