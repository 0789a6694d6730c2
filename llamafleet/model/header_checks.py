"""Check a header's numbers and tensor names: could llama.cpp load such a model?

Impossible numbers would cost the planner unlimited time and memory, or lead to a wrong plan. They are refused here,
where the message can name the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from llamafleet.model.architectures import architecture_of
from llamafleet.model.gguf_cursor import LongArray, Scalar, Value

LAYER_LIMIT = 512  # src/llama-hparams.h, LLAMA_MAX_LAYERS
EXPERT_LIMIT = 1024  # src/llama-hparams.h, LLAMA_MAX_EXPERTS
NUMBER_LIMIT = 2**32 - 1  # llama.cpp's hyperparameters are uint32_t
_LIMITS = {"block_count": LAYER_LIMIT, "expert_count": EXPERT_LIMIT}
# int32_t in llama.cpp: the image features of each layer, -1 for none (src/models/granite-swa.cpp, load_arch_hparams),
# and sections of RoPE.
_SIGNED = frozenset({
    "deepstack_mapping", "rope.dimension_sections", "vision.wa_pattern_mode", "audio.wa_pattern_mode",
    "vision.projector.spatial_offsets", "vision.feature_layer",
})  # fmt: skip
_BLOCK = re.compile(r"blk\.\d{1,3}\..+", re.ASCII)
_LAYER = re.compile(r"(?:^|\.)blk\.(\d{1,3})\.")


def problem(architecture: str, metadata: Mapping[str, Value], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """A message about the first impossible value; None for a valid header. `shapes`: the tensors' shapes by name."""
    prefix = f"{architecture}."
    for key, value in metadata.items():
        if key.startswith(prefix):
            for number in value if isinstance(value, tuple) else (value,):
                if not isinstance(number, LongArray) and (rule := _violated_rule(key.removeprefix(prefix), number)):
                    return f"has {key[:100]!r} = {number}, {rule}"
    return next(_contradictions(architecture, metadata, shapes), None)


def _violated_rule(key: str, number: Scalar) -> str | None:
    limit = _LIMITS.get(key, NUMBER_LIMIT)
    if isinstance(number, float):
        return "should be a whole number" if key in _LIMITS or not math.isfinite(number) else None
    if not isinstance(number, int):
        return None
    if number < 0 and key not in _SIGNED:
        return "should not be negative"
    return f"should be {limit} at most" if abs(number) > limit else None


def _contradictions(
    architecture: str, metadata: Mapping[str, Value], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[str]:
    """Messages about metadata that contradict the tensors.

    token_embd has the shape (embedding_length, tokens): src/models/*.cpp load it with this shape only. Some layers may
    have no tensors (src/models/deci.cpp skips them), but not most layers.
    """
    layers = metadata.get(f"{architecture}.block_count")
    with_tensors = {match[1] for name in shapes if (match := _LAYER.search(name))}
    if isinstance(layers, int) and layers > 2 * len(with_tensors):
        yield f"has {layers} layers by {architecture}.block_count, but tensors of {len(with_tensors)} layers"
    for name in shapes:
        if name.startswith("blk.") and not _BLOCK.fullmatch(name):
            yield f"has a tensor named {name!r}, should be blk.NUMBER.PART"
    shape = shapes.get("token_embd.weight", ())
    if len(shape) < 2:
        return
    embedding = metadata.get(f"{architecture}.embedding_length", shape[0])
    if embedding != shape[0]:
        yield f"has {architecture}.embedding_length = {embedding}, but rows of {shape[0]} elements in token_embd.weight"
    tokens = metadata.get("tokenizer.ggml.tokens")
    count = tokens.length if isinstance(tokens, LongArray) else len(tokens) if isinstance(tokens, tuple) else shape[1]
    if count != shape[1] and not architecture_of(architecture).vocabulary_of_target:
        yield f"has {count} tokens in tokenizer.ggml.tokens, but {shape[1]} rows in token_embd.weight"
