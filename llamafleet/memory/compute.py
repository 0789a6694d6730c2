"""Bytes of llama.cpp's compute buffers: its graph is built (`graph/assemble`) and allocated (`graph/allocation`).

Layers and devices that repeat others are left out (`graph/repeats`). Results are cached, because most placements of a
search lead to a graph that was already allocated.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from llamafleet.memory.context import Context, as_served
from llamafleet.memory.graph.allocation import buffer_bytes
from llamafleet.memory.graph.assemble import build
from llamafleet.memory.graph.builder import BackendOf
from llamafleet.memory.graph.draft_head import build_head
from llamafleet.memory.graph.drafts import build_draft
from llamafleet.memory.graph.layers import FIRST_LAYER, INPUTS, Layers, layer_traits
from llamafleet.memory.graph.repeats import NEIGHBOURS, NO_NEIGHBOURS, fold, numbered, shorten
from llamafleet.memory.kv_cache import kv_bytes
from llamafleet.memory.placement import Placement
from llamafleet.memory.upper_bound import bound
from llamafleet.model.architecture import LayerGraph
from llamafleet.model.gguf import Header
from llamafleet.model.shape import DENSE, EXPERTS, Shape

# Raised for a header without tensors that its architecture's graph needs, or with impossible numbers.
_UNKNOWN = (LookupError, ArithmeticError, ValueError, RecursionError)
DRAFTS = (LayerGraph.EAGLE3, LayerGraph.DFLASH)
LAYER_LIMIT = 128  # layers of a graph, repeated ones left out: bounds the time that a hostile header takes


@dataclass(frozen=True)
class Rules:
    """Behaviour of a backend that changes the size of its compute buffers."""

    attention_scratch: bool = False  # flash attention converts a cache that is not f16 to f16
    op_offload: bool = False  # host weights are copied to the device for large batches


_KNOWN: dict[int, Compute] = {}  # by the header's id
_KNOWN_LOCK = threading.Lock()
KNOWN_LIMIT = 32


class Compute:
    """Compute-buffer sizes of one model, cached."""

    @classmethod
    def of(cls, header: Header) -> Compute:
        """The instance for this header; an earlier one, with its cached sizes, if there is one."""
        with _KNOWN_LOCK:
            compute = _KNOWN.get(id(header))
            if compute is None or compute.header is not header:
                compute = _KNOWN[id(header)] = cls(header)
                while len(_KNOWN) > KNOWN_LIMIT:
                    del _KNOWN[next(iter(_KNOWN))]
            return compute

    def __init__(self, header: Header) -> None:
        self.header, self.shape = header, Shape.of(header)
        self.layers = Layers(header, norm_misnamed=self.shape.architecture.output_norm_misnamed)
        parts = {part for layer in self.layers.parts.values() for part in layer}
        experts, dense = ({part for part in parts if pattern.fullmatch(part)} for pattern in (EXPERTS, DENSE))
        spilled = experts or dense
        down = {part for part in spilled if "ffn_down" in part}
        self.moved = {"all": spilled, "down": down, "up": spilled - down}  # tensors that a layer may have on the host
        self.has_layer_inputs = "per_layer_token_embd.weight" in self.layers[-1]
        self.kinds = numbered(self._kinds())
        self.types = {which: numbered(self._types(which)) for which in ("all", "down", "up", "layer")}
        self.by_graph: dict[Hashable, tuple[int, ...]] = {}  # sizes, by the layers of the graph
        self.by_request: dict[Hashable, tuple[int, ...]] = {}  # sizes, by the arguments of `bytes`
        self.caches: dict[Context, tuple[int, ...]] = {}
        self.models: dict[bool, Any] = {}  # the groups of its weights (weights.Model), with and without a draft head

    def kv_bytes(self, context: Context) -> tuple[int, ...]:
        """`kv_cache.kv_bytes` of this model, cached."""
        if context not in self.caches:
            self.caches[context] = kv_bytes(self.shape, as_served(self.shape, context))
        return self.caches[context]

    def _kinds(self) -> list[Hashable]:
        traits = layer_traits(self.shape)
        return [
            (traits[n], tuple((part, tensor.shape) for part, tensor in self.layers[n].items()))
            for n in range(self.shape.trunk_layers)
        ]

    def _types(self, which: str) -> list[Hashable]:
        """Weight types of each layer. `which`: "layer" for all its tensors, else a key of `moved`."""
        return [
            tuple(t.type for part, t in self.layers[n].items() if which == "layer" or part in self.moved[which])
            for n in range(self.shape.trunk_layers)
        ]

    @property
    def is_exact(self) -> bool:
        """Can this model's graph be built? Otherwise its sizes are an upper bound."""
        order = tuple(sorted({kind: n for n, kind in enumerate(self.kinds)}.values()))
        on_host = Placement.of((None,) * (len(self.kinds) + 1))
        return self._exact(Context(256, 1, "f16", 32), on_host, Rules(), order) is not None

    def bytes(self, context: Context, placement: Placement, rules: Rules, *, roughly: bool = False) -> tuple[int, ...]:
        """Bytes of each device's compute buffer and, last, of the host's. `roughly`: estimated in less time."""
        context = as_served(self.shape, context)
        neighbours = NO_NEIGHBOURS if roughly else NEIGHBOURS
        request = (context, placement, rules, neighbours)
        if request not in self.by_request:
            own = self._without_repeats(replace(context, head=False), placement, rules, neighbours)
            heads = self._of_heads(context, placement, rules) if context.head else (0,) * len(own)
            self.by_request[request] = tuple(size + more for size, more in zip(own, heads, strict=True))
        return self.by_request[request]

    def _of_heads(self, context: Context, placement: Placement, rules: Rules) -> tuple[int, ...]:
        """Bytes of the buffers of a draft head's own context."""
        context = replace(context, drafted=0, rollback=0)
        if not self.shape.architecture.verified:
            return self._bound(context, placement)
        try:
            with _garbage_collection_off():
                home = self._home(placement)
                graph = build_head(self.shape, self.layers, context, home, attention_scratch=rules.attention_scratch)
                cpu = len(placement.devices)
                return tuple(buffer_bytes(graph, cpu, pipelined=placement.is_pipeline, op_offload=rules.op_offload))
        except _UNKNOWN:
            return self._bound(context, placement)

    def _without_repeats(
        self, context: Context, placement: Placement, rules: Rules, neighbours: tuple[int, int]
    ) -> tuple[int, ...]:
        keys = [self._layer_key(placement, rules, n) for n in range(len(self.kinds))]
        holders, host = placement.backends, len(placement.devices)
        # Layers with an indexer hold zeros from the start of the graph until they use them, or leave gaps that add up.
        # In a pipeline, the logits of all tokens fill the gap that is left behind a few layers, but not behind many.
        fills_gaps = context.pooling and placement.is_pipeline and self.shape.architecture.computes_logits
        every_layer = self.shape.architecture.has_context_gaps or fills_gaps
        kinds, types = [key[:-1] for key in keys], [key[-1] for key in keys]
        order = tuple(range(len(keys))) if every_layer else shorten(kinds, types, neighbours)
        numbers = fold([
            tuple(keys[n][1:] for n in order if holders[n] == device) for device in range(host)
        ])  # fmt: skip
        representatives = {numbers.index(number) for number in numbers} | {host}
        order = tuple(n for n in order if holders[n] in representatives)
        sizes = self._cached(context, placement.renumbered(numbers), rules, order)
        return (*(sizes[number] for number in numbers), sizes[-1])

    def _cached(self, context: Context, placement: Placement, rules: Rules, order: tuple[int, ...]) -> tuple[int, ...]:
        last = (placement.backends[-1], len(placement.devices), placement.is_pipeline, rules)
        key = (context, tuple(self._layer_key(placement, rules, n) for n in order), last)
        if key not in self.by_graph:
            self.by_graph[key] = self._exact(context, placement, rules, order) or self._bound(context, placement)
        return self.by_graph[key]

    def _exact(
        self, context: Context, placement: Placement, rules: Rules, order: tuple[int, ...]
    ) -> tuple[int, ...] | None:
        """Bytes by building the graph; None if the graph of this model cannot be built."""
        if not self.shape.architecture.verified:
            return None
        try:
            with _garbage_collection_off():
                return self._allocated(context, placement, rules, order)
        except _UNKNOWN:
            return None

    def _bound(self, context: Context, placement: Placement) -> tuple[int, ...]:
        size = bound(self.shape, self.header.tensors, context, pipelined=placement.is_pipeline)
        return (size,) * (len(placement.devices) + 1)

    def _layer_key(self, placement: Placement, rules: Rules, n: int) -> tuple[Hashable, ...]:
        """Equal for two layers that can stand for each other: backend, kind, tensors on the host, own inputs, types.

        The types of weights count only where op-offload copies the weights from the host.
        """
        holder, moved = placement.backends[n], placement.moved.get(n)
        copied = "layer" if holder == len(placement.devices) else moved
        types = self.types[copied][n] if copied and rules.op_offload else None
        return holder, self.kinds[n], moved, n if self._has_own_input(placement, n) else None, types

    def _has_own_input(self, placement: Placement, n: int) -> bool:
        """Does the layer copy another backend's tensor besides the previous layer's result? Such copies add up."""
        holders, host = placement.backends, len(placement.devices)
        holder, first = holders[n], holders[0]
        per_layer_input = self.has_layer_inputs and host > 0 and (holder != first or first == host)
        return per_layer_input or holders[self.shape.cache_owners[n]] != holder

    def _allocated(
        self, context: Context, placement: Placement, rules: Rules, order: tuple[int, ...]
    ) -> tuple[int, ...]:
        """Bytes of each backend's buffer for the graph of the layers in `order`."""
        if len(order) > LAYER_LIMIT:
            raise ValueError(f"{len(order)} different layers, {LAYER_LIMIT} at most")
        home, cpu = self._home(placement), len(placement.devices)
        made = build_draft if self.shape.architecture.layer_graph in DRAFTS else build
        graph = made(self.shape, self.layers, context, home, order, attention_scratch=rules.attention_scratch)
        return tuple(buffer_bytes(graph, cpu, pipelined=placement.is_pipeline, op_offload=rules.op_offload))

    def _home(self, placement: Placement) -> BackendOf:
        """A function that gives the number of the backend which holds a tensor."""
        holders, moved, cpu = placement.backends, placement.moved, len(placement.devices)

        def home(part: str, layer: int | None) -> int:
            if layer is None:
                return cpu if part.startswith(INPUTS) else holders[0 if part.startswith(FIRST_LAYER) else -1]
            on_host = moved.get(layer)
            return cpu if on_host and part in self.moved[on_host] else holders[layer]

        return home


@contextmanager
def _garbage_collection_off() -> Iterator[None]:
    """Switch Python's garbage collector off: it would walk the thousands of objects of a graph many times."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
