"""What sets a model's layers apart: their tensors, and what numbers of the header or only src/models/*.cpp say."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import NamedTuple

from llamafleet.memory.graph.rope import turned
from llamafleet.model.gguf import Header, Tensor
from llamafleet.model.gguf_cursor import Value
from llamafleet.model.shape import cache_owners, number, per_layer, recurrent_layers, windows

CLAMPED_AT_ONCE = frozenset({"maple", "deepseek4", "glm5-next", "hy_v4"})  # ggml_swiglu_clamp
IMAGES_IN_LAYERS = frozenset({"qwen3vl", "qwen3vlmoe"})  # deepstack
MISNAMED_NORM = frozenset({"lfm2", "lfm2moe"})  # their last norm is token_embd_norm (LLM_TENSOR_OUTPUT_NORM_LFM2)

# Tensors outside layers that are read row by row, always from the host (LLM_TENSOR_LAYER_INPUT), and those that are
# the first layer's all the same (LLM_TENSOR_INFOS); all others go with the output.
INPUTS = ("token_embd.", "token_types.", "position_embd.", "per_layer_token_embd.")
FIRST_LAYER = ("token_embd_norm.", "per_layer_model_proj.", "per_layer_proj_norm.")
# Of two kinds of factors, for long and short contexts, one is used; they are of one size.
ROTATIONS = ("rope_freqs.weight", "rope_factors_long.weight")
SPARSE = {"gemma3n": 10}  # layers from the front that keep the largest values alone (models.h, n_layer_sparsity)


class Layers:
    """A header's tensors by layer and part: `layers[3]["attn_q.weight"]`; those outside layers at -1."""

    def __init__(self, header: Header) -> None:
        self.parts: dict[int, dict[str, Tensor]] = {}
        for tensor in header.tensors:
            layer, part = -1, tensor.name
            if part.startswith("blk."):
                number_text, part = part[4:].split(".", 1)
                layer = int(number_text) if number_text.isdigit() else -1
            elif header.architecture in MISNAMED_NORM:
                part = part.replace("token_embd_norm", "output_norm")
            if part.endswith("_norm"):  # falcon-h1 and plamo2 have some without it
                part += ".weight"
            self.parts.setdefault(layer, {})[part] = tensor

    def __getitem__(self, layer: int) -> Mapping[str, Tensor]:
        return self.parts.get(layer, {})


def marks(header: Header) -> list[Hashable]:
    """Of each layer, all that sets it apart besides its tensors."""
    sizes = windows(header)
    images = [layer < image_layers(header) for layer in range(len(sizes))]
    sparse = [layer < SPARSE.get(header.architecture, 0) for layer in range(len(sizes))]
    shares = [owner != layer for layer, owner in enumerate(cache_owners(header))]
    used, clamps = per_layer(header, "expert_used_count"), clamped(header, len(sizes))
    state, turn = recurrent_layers(header), turned(header, sizes)
    return list(zip(state, sizes, used, turn, clamps, images, sparse, shares, strict=True))


class Clamped(NamedTuple):
    """Is the activation of a layer's experts, and of its other feed-forward parts, held below a limit?"""

    experts: bool
    others: bool


def clamped(header: Header, layers: int) -> tuple[Clamped, ...]:
    """Of each layer; build_ffn and build_moe_ffn. Not where one operation does it all."""
    if header.architecture in CLAMPED_AT_ONCE:
        return (Clamped(False, False),) * layers
    limits = [_each(header.get(f"swiglu_clamp_{part}"), layers) for part in ("exp", "shexp")]
    return tuple(Clamped(*pair) for pair in zip(*limits, strict=True))


def image_layers(header: Header) -> int:
    """Layers from the front that add a part of an image's rows of their own, by which rows are wider (n_embd_inp)."""
    return number(header, "n_deepstack_layers") if header.architecture in IMAGES_IN_LAYERS else 0


def _each(limit: Value | None, layers: int) -> list[bool]:
    each = limit if isinstance(limit, tuple) and len(limit) >= layers else (limit,) * layers
    return [isinstance(one, float) and one > 0 for one in each[:layers]]
