"""Bytes of llama.cpp's compute buffers, by laying out its graph as it does (`blocks`, `scheduling`).

Layers that repeat need not be repeated here: a run of equal layers takes no more memory from the second on.
Answers are remembered, because a search over placements asks for few really different ones.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from .blocks import build
from .bound import bound, vocabulary
from .gguf import Header
from .graph import Layers
from .kv import Context, kv_bytes, recurrent_layers, trunk_layers, windows
from .scheduling import sizes

__all__ = ["DENSE", "EXPERTS", "Compute", "Layout", "vocabulary"]

# A header that lacks what its architecture's graph needs, or says what cannot be.
_UNKNOWN = (LookupError, ArithmeticError, ValueError, RecursionError)
LAYER_LIMIT = 128  # laid out at once; models have a few kinds of layers, and hostile headers get no time
REPEATS = 2  # of a run of equal layers, or of equal groups of layers, that are laid out
LONGEST_GROUP = 12  # layers after which a pattern may repeat

# What --n-cpu-moe matches (common/common.h, LLM_FFN_EXPS_REGEX), and a dense model's feed-forward part.
EXPERTS = re.compile(r"ffn_(up|down|gate|gate_up)_(ch|)exps\..*")
DENSE = re.compile(r"ffn_(up|down|gate)\.weight")


_DOWN = re.compile(r".*ffn_down.*")


@dataclass(frozen=True)
class Layout:
    """Who holds what, as the scheduler numbers backends: devices from 0, and `devices` for the host."""

    holders: tuple[int, ...]  # of each layer and, last, the output
    moved: Mapping[int, str]  # layers with experts (FFN) on the host, and which: "all", "down" or "up"
    devices: int
    attention_scratch: bool = False
    op_offload: bool = False

    @property
    def flags(self) -> tuple[bool, bool]:
        """What the backend does besides."""
        return self.attention_scratch, self.op_offload

    @property
    def is_pipeline(self) -> bool:
        """Devices work side by side on several batches (llama-context.cpp:432)."""
        return self.devices > 1 and self.devices not in self.holders and not self.moved


_KNOWN: dict[int, Compute] = {}  # by the header's id
KNOWN_LIMIT = 32


class Compute:
    """One model's compute buffers."""

    @classmethod
    def of(cls, header: Header) -> Compute:
        """The same one for the same header, with all that it remembers."""
        found = _KNOWN.get(id(header))
        if found is None or found.header is not header:
            found = _KNOWN[id(header)] = cls(header)
            while len(_KNOWN) > KNOWN_LIMIT:
                del _KNOWN[next(iter(_KNOWN))]
        return found

    def __init__(self, header: Header) -> None:
        self.header, self.layers = header, Layers(header)
        parts = [part for layer in self.layers.parts.values() for part in layer]
        self.spills = EXPERTS if any(EXPERTS.fullmatch(part) for part in parts) else DENSE
        # Small numbers are quick to compare. Weights' types matter only where op-offload copies weights.
        self.kinds, self.kinds_copied = _numbered(self._kinds(typed=False)), _numbered(self._kinds(typed=True))
        self.known: dict[Hashable, tuple[int, ...]] = {}  # by what is laid out
        self.asked: dict[Hashable, tuple[int, ...]] = {}  # by what was asked
        self.caches: dict[Context, tuple[int, ...]] = {}

    def kv_bytes(self, context: Context) -> tuple[int, ...]:
        """`kv.kv_bytes`, remembered."""
        if context not in self.caches:
            self.caches[context] = kv_bytes(self.header, context)
        return self.caches[context]

    def _kinds(self, *, typed: bool) -> list[Hashable]:
        state, window = recurrent_layers(self.header), windows(self.header)
        return [
            (state[n], window[n], tuple((part, t.shape, typed and t.type) for part, t in self.layers[n].items()))
            for n in range(trunk_layers(self.header))
        ]

    @property
    def is_exact(self) -> bool:
        """Is it known what this model computes? Otherwise its figures are a bound."""
        try:
            self._laid_out(Context(256, 1, "f16", 32), Layout((0,) * (len(self.kinds) + 1), {}, 0))
        except _UNKNOWN:
            return False
        return True

    def bytes(self, context: Context, layout: Layout) -> tuple[int, ...]:
        """Of each device, and last of the host."""
        asked = (context, layout.holders, tuple(sorted(layout.moved.items())), layout.devices, layout.flags)
        if asked not in self.asked:
            self.asked[asked] = self._shortened(context, layout)
        return self.asked[asked]

    def _shortened(self, context: Context, layout: Layout) -> tuple[int, ...]:
        kinds = self.kinds_copied if layout.op_offload else self.kinds
        signs = [(kind, layout.holders[n], layout.moved.get(n)) for n, kind in enumerate(kinds)]
        order = shorten(signs)
        last = (layout.holders[-1], layout.devices, layout.is_pipeline, layout.flags)
        key = (context, tuple(signs[n] for n in order), last)
        if key not in self.known:
            try:
                with _no_collection():
                    self.known[key] = self._laid_out(context, layout, order)
            except _UNKNOWN:
                self.known[key] = (bound(self.header, context, pipelined=layout.is_pipeline),) * (layout.devices + 1)
        return self.known[key]

    def _laid_out(self, context: Context, layout: Layout, order: tuple[int, ...] = (0,)) -> tuple[int, ...]:
        cpu = layout.devices
        if len(order) > LAYER_LIMIT:
            raise ValueError("no two layers are alike")

        def home(part: str, layer: int | None) -> int:
            if layer is None:
                return cpu if part.startswith("token_embd") else layout.holders[-1]
            which = layout.moved.get(layer)
            if which and self.spills.fullmatch(part) and which in ("all", "down" if _DOWN.fullmatch(part) else "up"):
                return cpu
            return layout.holders[layer]

        graph = build(self.header, self.layers, context, home, order, attention_scratch=layout.attention_scratch)
        return tuple(sizes(graph, cpu, pipelined=layout.is_pipeline, op_offload=layout.op_offload))


@contextmanager
def _no_collection() -> Iterator[None]:
    """A graph is thousands of objects that live for milliseconds: the collector would walk them all many times."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _numbered(kinds: Sequence[Hashable]) -> list[int]:
    numbers = {kind: number for number, kind in enumerate(kinds)}
    return [numbers[kind] for kind in kinds]


def shorten(signs: Sequence[Hashable]) -> tuple[int, ...]:
    """Positions that are left when repetitions of any group of neighbours are cut to a few."""
    kept = list(range(len(signs)))
    for length in range(1, LONGEST_GROUP + 1):
        position = 0
        while position < len(kept):
            group = [signs[n] for n in kept[position : position + length]]
            end = position + length
            while [signs[n] for n in kept[end : end + length]] == group and len(group) == length:
                end += length
            spare = (end - position) // length - REPEATS
            if spare > 0:
                del kept[position + length : position + length * (spare + 1)]
                position = end - spare * length
            position += 1
    return tuple(kept)
