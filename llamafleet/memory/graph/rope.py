"""Which layers turn q and k by their positions; by what, is in the header or the tensors (src/models/ at b11434)."""

from __future__ import annotations

from collections.abc import Sequence

from llamafleet.model.gguf import Header
from llamafleet.model.shape import number

# Positions are known from recurrent layers alone.
NEVER = frozenset({"jamba", "nemotron_h", "nemotron_h_moe", "kimi-linear"})
# A file may say so (src/models/granite.cpp:34).
BY_FILE = frozenset({"granite", "granitehybrid", "graniteswitch"})
# Only layers with a window; exaone4, unlike the others, all of them where none has one.
WITH_WINDOW = frozenset({"cohere2", "cohere2moe", "exaone4", "exaone-moe", "maple", "muse-glimmer"})
# All but one of so many: the last or the first (n_no_rope_layer_step) ...
BUT_ONE = {"smollm3": (4, 3), "afmoe": (4, 3), "llama4": (4, 3), "smallthinker": (4, 0)}
ALL_WITHOUT_WINDOWS = frozenset({"exaone4", "llama4", "smallthinker"})  # ... of those that have windows at all


def turned(header: Header, sizes: Sequence[int]) -> tuple[bool, ...]:
    """For each layer: does it turn q and k? `sizes`: the layers' windows."""
    arch, layers = header.architecture, range(len(sizes))
    if arch in NEVER or (arch in BY_FILE and header.get("rope.scaling.finetuned") is False):
        return (False,) * len(sizes)
    if arch in ALL_WITHOUT_WINDOWS and not any(sizes):
        return (True,) * len(sizes)
    if arch in WITH_WINDOW:
        first = number(header, "leading_dense_block_count") if arch == "cohere2moe" else 0
        return tuple(layer < first or sizes[layer] > 0 for layer in layers)
    count, which = BUT_ONE.get(arch, (1, -1))
    return tuple(layer % count != which for layer in layers)
