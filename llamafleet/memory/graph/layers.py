"""What sets a model's layers apart: their tensors, and what numbers of the header or only src/models/*.cpp say."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from llamafleet.model.gguf import Header, Tensor
from llamafleet.model.shape import Shape

# Tensors outside layers that are read row by row, always from the host (LLM_TENSOR_LAYER_INPUT), and those that are
# the first layer's all the same (LLM_TENSOR_INFOS); all others go with the output.
INPUTS = ("token_embd.", "token_types.", "position_embd.", "per_layer_token_embd.")
FIRST_LAYER = ("token_embd_norm.", "per_layer_model_proj.", "per_layer_proj_norm.")
# Of two kinds of factors, for long and short contexts, one is used; they are of one size.
ROTATIONS = ("rope_freqs.weight", "rope_factors_long.weight")


class Layers:
    """A header's tensors by layer and part: `layers[3]["attn_q.weight"]`; those outside layers at -1."""

    def __init__(self, header: Header, *, norm_misnamed: bool) -> None:
        self.parts: dict[int, dict[str, Tensor]] = {}
        for tensor in header.tensors:
            layer, part = -1, tensor.name
            if part.startswith("blk."):
                number_text, part = part[4:].split(".", 1)
                layer = int(number_text) if number_text.isdigit() else -1
            elif norm_misnamed:
                part = part.replace("token_embd_norm", "output_norm")
            if part.endswith("_norm"):  # falcon-h1 and plamo2 have some without it
                part += ".weight"
            self.parts.setdefault(layer, {})[part] = tensor

    def __getitem__(self, layer: int) -> Mapping[str, Tensor]:
        return self.parts.get(layer, {})


def marks(shape: Shape) -> list[Hashable]:
    """Of each layer, all that sets it apart besides its tensors."""
    layers = range(shape.layers)
    images = [layer < shape.image_layers for layer in layers]
    sparse = [layer < shape.architecture.sparse_layers for layer in layers]
    shares = [owner != layer for layer, owner in enumerate(shape.cache_owners)]
    of_each = (shape.state.layers, shape.windows, shape.experts.used, shape.uses_rope, shape.clamps)
    return list(zip(*of_each, images, sparse, shares, strict=True))
