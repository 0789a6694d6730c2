"""What a header says of its model, held against what llama.cpp could load.

Numbers that no model has would cost a planner time and memory without end, or be believed: they are refused
here, where the file is still known by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from llamafleet.model.architectures import architecture_of
from llamafleet.model.gguf_cursor import LongArray, Scalar, Value

LAYER_LIMIT = 512  # LLAMA_MAX_LAYERS, src/llama-hparams.h:11
EXPERT_LIMIT = 1024  # LLAMA_MAX_EXPERTS, src/llama-hparams.h:12
NUMBER_LIMIT = 2**32 - 1  # hyperparameters are uint32_t there
_LIMITS = {"block_count": LAYER_LIMIT, "expert_count": EXPERT_LIMIT}
# int32_t there: which image features a layer takes, -1 for none (granite-swa.cpp:22), and parts of a position.
_SIGNED = frozenset({"deepstack_mapping", "rope.dimension_sections"})
_BLOCK = re.compile(r"blk\.\d{1,3}\..+", re.ASCII)
_LAYER = re.compile(r"(?:^|\.)blk\.(\d{1,3})\.")


def problem(architecture: str, metadata: Mapping[str, Value], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The first thing that cannot be, in words; None for a sound header. `shapes`: of the tensors, by name."""
    prefix = f"{architecture}."
    for key, value in metadata.items():
        if key.startswith(prefix):
            for number in value if isinstance(value, tuple) else (value,):
                if not isinstance(number, LongArray) and (wrong := _wrong(key.removeprefix(prefix), number)):
                    return f"has {key[:100]!r} = {number}, which cannot be: {wrong}"
    return next(_contradictions(architecture, metadata, shapes), None)


def _wrong(key: str, number: Scalar) -> str | None:
    limit = _LIMITS.get(key, NUMBER_LIMIT)
    if isinstance(number, float):
        return "should be a whole number" if key in _LIMITS or not math.isfinite(number) else None
    if not isinstance(number, int):
        return None
    if number < 0 and key not in _SIGNED:
        return "should not be negative"
    return f"{limit} at most is possible" if abs(number) > limit else None


def _contradictions(
    architecture: str, metadata: Mapping[str, Value], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[str]:
    """Every model's token_embd is (embedding_length, tokens): src/models/*.cpp load it with just this shape.

    A layer without any tensors is possible (models/deci.cpp skips some), most of them without is not.
    """
    layers = metadata.get(f"{architecture}.block_count")
    held = {match[1] for name in shapes if (match := _LAYER.search(name))}
    if isinstance(layers, int) and layers > 2 * len(held):
        yield f"gives {layers} layers in {architecture}.block_count, but tensors of {len(held)}"
    for name in shapes:
        if name.startswith("blk.") and not _BLOCK.fullmatch(name):
            yield f"names the tensor {name!r}, should be blk.NUMBER.PART"
    shape = shapes.get("token_embd.weight", ())
    if len(shape) < 2:
        return
    embedding = metadata.get(f"{architecture}.embedding_length", shape[0])
    if embedding != shape[0]:
        yield f"has {architecture}.embedding_length = {embedding}, but rows of {shape[0]} in token_embd.weight"
    tokens = metadata.get("tokenizer.ggml.tokens")
    told = tokens.length if isinstance(tokens, LongArray) else len(tokens) if isinstance(tokens, tuple) else shape[1]
    if told != shape[1] and not architecture_of(architecture).vocabulary_of_target:
        yield f"has {told} tokens in tokenizer.ggml.tokens, but {shape[1]} rows in token_embd.weight"
