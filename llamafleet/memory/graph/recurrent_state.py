"""Read and store the state that recurrent layers keep for each slot (src/llama-graph.cpp at b11434)."""

from __future__ import annotations

from collections.abc import Callable

from llamafleet.memory.graph import ggml
from llamafleet.memory.graph.builder import Builder
from llamafleet.memory.graph.ggml import F32, Tensor, concat, cpy, get_rows, new, reshape, transpose, view
from llamafleet.model.architecture import LayerGraph


def build_rs(b: Builder, width: int, scan: Callable[[Tensor, Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The state tensor and the gathered states of all slots (build_rs).

    `width`: elements of one slot's state. `scan`: an operation that reads the states in place instead.
    """
    slots = b.context.slots
    store = ggml.cache(F32, (width, slots), b.backend_of("cache", b.layer))
    ids, main, tail = b.state_ids()
    b.graph.expand(ggml.inplace("scale", view(store, (0,))))
    gathered = get_rows(store, tail if scan else ids)
    states = scan(store, main) if scan else view(gathered, (width, slots), (gathered.nb[1],))
    b.graph.expand(states)
    b.graph.expand(cpy(view(gathered, (width, 0), (gathered.nb[1],)), view(store, (width, 0), (store.nb[1],))))
    return store, states


def build_conv_state(b: Builder, cur: Tensor, channels: int, kernel: int) -> Tensor:
    """Prepend the stored columns to the new ones, and store the newest (build_conv_state).

    `cur`: (channels, tokens of a slot, slots).
    """
    slots = b.context.slots
    store, before = build_rs(b, (kernel - 1) * channels)
    columns = concat(reshape(before, kernel - 1, channels, slots), transpose(cur), 0)
    last = view(columns, (kernel - 1, channels, slots), (columns.nb[1], columns.nb[2]))
    if b.shape.architecture.layer_graph is LayerGraph.MIXED_STREAMS:  # build_conv_state_at
        last = ggml.cont(last)
    b.graph.expand(cpy(last, view(store, ((kernel - 1) * channels, slots), (store.nb[1],))))
    return columns


def ssm_conv(columns: Tensor, weight: Tensor, tokens: int) -> Tensor:
    return new("ssm_conv", F32, (columns.ne[1], tokens, columns.ne[2]), columns, weight)
