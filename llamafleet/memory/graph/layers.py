"""A model's tensors by layer, and other properties by which the graphs of two layers differ."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping

from llamafleet.model.gguf import Header, Tensor
from llamafleet.model.shape import Shape

# Tensors outside blk.*: INPUTS are always on the host (LLM_TENSOR_LAYER_INPUT), FIRST_LAYER are on the first layer's
# device (LLM_TENSOR_INFOS), all others are on the output's device.
INPUTS = ("token_embd.", "token_types.", "position_embd.", "per_layer_token_embd.")
FIRST_LAYER = ("token_embd_norm.", "per_layer_model_proj.", "per_layer_proj_norm.")
# RoPE factors. Factors for short contexts have the size of those for long ones, and only one tensor is used.
ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight")


# The first matrix of an adapter's pair, as `memory/adapters.py` names it.
ADAPTED = re.compile(r"(.*)\.lora_a\.(\d+)")


class Layers:
    """A header's tensors by layer and name: `layers[3]["attn_q.weight"]`; tensors outside blk.* have layer -1.

    `adapted` has the numbers of the adapters that change a tensor, by layer and name.
    """

    def __init__(self, header: Header, *, norm_misnamed: bool) -> None:
        self.parts: dict[int, dict[str, Tensor]] = {}
        self.adapted: dict[tuple[int, str], list[int]] = {}
        for tensor in header.tensors:
            layer, part = -1, tensor.name
            if part.startswith("blk."):
                number_text, part = part[4:].split(".", 1)
                layer = int(number_text) if number_text.isdigit() else -1
            elif norm_misnamed:
                part = part.replace("token_embd_norm", "output_norm")
            if part.endswith("_norm"):  # falcon-h1 and plamo2 have norms without this suffix
                part += ".weight"
            self.parts.setdefault(layer, {})[part] = tensor
            if match := ADAPTED.fullmatch(part):
                self.adapted.setdefault((layer, match[1]), []).append(int(match[2]))

    def __getitem__(self, layer: int) -> Mapping[str, Tensor]:
        return self.parts.get(layer, {})


def layer_traits(shape: Shape) -> list[Hashable]:
    """For each layer, the properties besides its tensors that change its graph."""
    layers = range(shape.layers)
    images = [layer < shape.image_layers for layer in layers]
    sparse = [layer < shape.architecture.sparse_layers for layer in layers]
    reads_other_cache = [owner != layer for layer, owner in enumerate(shape.cache_owners)]
    properties = (shape.state.layers, shape.windows, shape.experts.used, shape.uses_rope, shape.clamps)
    return list(zip(*properties, images, sparse, reads_other_cache, strict=True))
