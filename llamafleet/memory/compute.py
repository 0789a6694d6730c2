"""Bytes of llama.cpp's compute buffers, by laying out its graph as it does (`graphs/blocks`, `graphs/scheduling`).

Layers and devices that only repeat others are left out (`graphs/repeats`). Answers are remembered, because a
search over placements asks for few really different ones.
"""

from __future__ import annotations

import gc
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from llamafleet.memory.context import Context, as_served
from llamafleet.memory.graph.allocation import sizes
from llamafleet.memory.graph.assemble import build
from llamafleet.memory.graph.layers import FIRST_LAYER, INPUTS, Layers, marks
from llamafleet.memory.graph.repeats import NEIGHBOURS, NO_NEIGHBOURS, fold, numbered, shorten
from llamafleet.memory.kv_cache import kv_bytes
from llamafleet.memory.placement import Placement
from llamafleet.memory.upper_bound import bound
from llamafleet.model.gguf import Header
from llamafleet.model.shape import DENSE, EXPERTS, Shape

# A header that lacks what its architecture's graph needs, or says what cannot be.
_UNKNOWN = (LookupError, ArithmeticError, ValueError, RecursionError)
LAYER_LIMIT = 128  # laid out at once; models have a few kinds of layers, and hostile headers get no time


@dataclass(frozen=True)
class Rules:
    """What a backend does besides, as far as buffers depend on it."""

    attention_scratch: bool = False  # flash attention unpacks a cache that is not f16
    op_offload: bool = False  # host weights are copied to the device for large batches


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
        self.header, self.shape = header, Shape.of(header)
        self.layers = Layers(header, norm_misnamed=self.shape.architecture.output_norm_misnamed)
        parts = {part for layer in self.layers.parts.values() for part in layer}
        experts, dense = ({one for one in parts if what.fullmatch(one)} for what in (EXPERTS, DENSE))
        spilled = experts or dense
        down = {one for one in spilled if "ffn_down" in one}
        self.moved = {"all": spilled, "down": down, "up": spilled - down}  # tensors of a layer on the host
        self.has_inputs = "per_layer_token_embd.weight" in self.layers[-1]
        self.kinds = numbered(self._kinds())  # small numbers are quick to compare
        self.types = {which: numbered(self._types(which)) for which in ("all", "down", "up", "layer")}
        self.known: dict[Hashable, tuple[int, ...]] = {}  # by what is laid out
        self.asked: dict[Hashable, tuple[int, ...]] = {}  # by what was asked
        self.caches: dict[Context, tuple[int, ...]] = {}

    def kv_bytes(self, context: Context) -> tuple[int, ...]:
        """`caches.kv_bytes`, remembered."""
        if context not in self.caches:
            self.caches[context] = kv_bytes(self.shape, as_served(self.shape, context))
        return self.caches[context]

    def _kinds(self) -> list[Hashable]:
        apart = marks(self.shape)
        return [
            (apart[n], tuple((part, tensor.shape) for part, tensor in self.layers[n].items()))
            for n in range(self.shape.trunk_layers)
        ]

    def _types(self, which: str) -> list[Hashable]:
        """Of each layer, the types of its experts (FFN), or which of these, or of the whole layer."""
        return [
            tuple(t.type for part, t in self.layers[n].items() if which == "layer" or part in self.moved[which])
            for n in range(self.shape.trunk_layers)
        ]

    @property
    def is_exact(self) -> bool:
        """Is it known what this model computes? Otherwise its figures are a bound."""
        if not self.shape.architecture.verified:
            return False
        try:
            each = tuple(sorted({kind: n for n, kind in enumerate(self.kinds)}.values()))
            self._laid_out(Context(256, 1, "f16", 32), Placement.of((None,) * (len(self.kinds) + 1)), Rules(), each)
        except _UNKNOWN:
            return False
        return True

    def bytes(self, context: Context, placement: Placement, rules: Rules, *, roughly: bool = False) -> tuple[int, ...]:
        """Of each device, and last of the host."""
        context = as_served(self.shape, context)
        neighbours = NO_NEIGHBOURS if roughly else NEIGHBOURS
        asked = (context, placement, rules, neighbours)
        if asked not in self.asked:
            self.asked[asked] = self._shortened(context, placement, rules, neighbours)
        return self.asked[asked]

    def _shortened(
        self, context: Context, placement: Placement, rules: Rules, neighbours: tuple[int, int]
    ) -> tuple[int, ...]:
        signs = [self._sign(placement, rules, n) for n in range(len(self.kinds))]
        holders, host = placement.backends, len(placement.devices)
        # An indexer's layers keep zeros from the start of the graph until they need them, or leave gaps that add up.
        whole = self.shape.architecture.has_context_gaps
        order = tuple(range(len(signs))) if whole else shorten(*_apart(signs), neighbours)
        numbers = fold([
            tuple(signs[n][1:] for n in order if holders[n] == device) for device in range(host)
        ])  # fmt: skip
        shown = {numbers.index(number) for number in numbers} | {host}
        order = tuple(n for n in order if holders[n] in shown)
        found = self._remembered(context, placement.renumbered(numbers), rules, order)
        return (*(found[number] for number in numbers), found[-1])

    def _remembered(
        self, context: Context, placement: Placement, rules: Rules, order: tuple[int, ...]
    ) -> tuple[int, ...]:
        last = (placement.backends[-1], len(placement.devices), placement.is_pipeline, rules)
        key = (context, tuple(self._sign(placement, rules, n) for n in order), last)
        if key not in self.known:
            self.known[key] = self._exact(context, placement, rules, order) or self._bound(context, placement)
        return self.known[key]

    def _exact(
        self, context: Context, placement: Placement, rules: Rules, order: tuple[int, ...]
    ) -> tuple[int, ...] | None:
        """None where it is not known what the model computes."""
        if not self.shape.architecture.verified:
            return None
        try:
            with _no_collection():
                return self._laid_out(context, placement, rules, order)
        except _UNKNOWN:
            return None

    def _bound(self, context: Context, placement: Placement) -> tuple[int, ...]:
        size = bound(self.shape, self.header.tensors, context, pipelined=placement.is_pipeline)
        return (size,) * (len(placement.devices) + 1)

    def _sign(self, placement: Placement, rules: Rules, n: int) -> tuple[Hashable, ...]:
        """What sets a layer apart: its holder, and of its weights their types only if they are copied from the host."""
        holder, moved = placement.backends[n], placement.moved.get(n)
        copied = "layer" if holder == len(placement.devices) else moved
        types = self.types[copied][n] if copied and rules.op_offload else None
        return holder, self.kinds[n], moved, n if self._is_fed(placement, n) else None, types

    def _is_fed(self, placement: Placement, n: int) -> bool:
        """Does another backend give it more than what the layer before computed? Such copies add up."""
        holders, host = placement.backends, len(placement.devices)
        holder, first = holders[n], holders[0]
        has_own = self.has_inputs and host > 0 and (holder != first or first == host)
        return has_own or holders[self.shape.cache_owners[n]] != holder

    def _laid_out(
        self, context: Context, placement: Placement, rules: Rules, order: tuple[int, ...]
    ) -> tuple[int, ...]:
        holders, moved, cpu = placement.backends, placement.moved, len(placement.devices)
        if len(order) > LAYER_LIMIT:
            raise ValueError("no two layers are alike")

        def home(part: str, layer: int | None) -> int:
            if layer is None:
                return cpu if part.startswith(INPUTS) else holders[0 if part.startswith(FIRST_LAYER) else -1]
            which = moved.get(layer)
            return cpu if which and part in self.moved[which] else holders[layer]

        graph = build(self.shape, self.layers, context, home, order, attention_scratch=rules.attention_scratch)
        return tuple(sizes(graph, cpu, pipelined=placement.is_pipeline, op_offload=rules.op_offload))


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


def _apart(signs: Sequence[tuple[Hashable, ...]]) -> tuple[list[Hashable], list[Hashable]]:
    """All but the weights' types, and these."""
    return [sign[:-1] for sign in signs], [sign[-1] for sign in signs]
