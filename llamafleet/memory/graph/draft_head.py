"""The graph of a draft head's own context: the next token from a token and the hidden state before it (MTP, nextn).

src/models/*.cpp at b11434, graph_mtp: the token's embedding and the hidden state are normed, joined and projected; then
comes one layer of the model's kind, and the output matrix. A head of several layers computes one of them at a time.
"""

from __future__ import annotations

from dataclasses import replace

from llamafleet.memory.context import Context
from llamafleet.memory.graph import ggml
from llamafleet.memory.graph.assemble import logits, ordinary_layer
from llamafleet.memory.graph.builder import BackendOf, Builder, GraphUnknownError
from llamafleet.memory.graph.ggml import F32, I32, Graph, get_rows, mul_mat
from llamafleet.memory.graph.layers import Layers
from llamafleet.model.architecture import HeadRows, Indexer, LayerGraph, Rope
from llamafleet.model.shape import Shape


def build_head(
    shape: Shape, layers: Layers, context: Context, backend_of: BackendOf, *, attention_scratch: bool = False
) -> Graph:
    """The graph of the head's first layer. Raises GraphUnknownError for a header without its tensors."""
    row = shape.architecture
    if row.layer_graph is not LayerGraph.ORDINARY or row.one_part_layers:
        raise GraphUnknownError(f"{row.name}: the graph of its draft head is not known")
    if row.indexer is not Indexer.NONE:  # the head attends to all cells
        shape = replace(shape, indexer=replace(shape.indexer, layers=(False,) * shape.layers))
    if row.rope is not Rope.NEVER:
        shape = replace(shape, uses_rope=(True,) * shape.layers)
    b = Builder(shape, layers, context, backend_of, attention_scratch)
    b.layer = shape.trunk_layers
    rows_at = row.head_rows
    tokens, hidden = ggml.graph_input(I32, b.tokens), ggml.graph_input(F32, b.embd, b.tokens)
    positions, outputs = ggml.graph_input(I32, b.tokens * b.positions), ggml.graph_input(I32, context.outputs)
    table = b.weight("nextn.embed_tokens.weight") or b.weight("token_embd.weight", -1)
    if table is None:
        raise GraphUnknownError(f"{row.name}: no tensor token_embd.weight")
    embedded = get_rows(table, tokens)
    normed = b.norm(hidden, "nextn.hnorm")
    joined = ggml.concat(b.norm(embedded, "nextn.enorm"), normed, 0)
    cur = b.linear("nextn.eh_proj", joined)
    cur = ordinary_layer(b, cur, positions, outputs if rows_at is HeadRows.IN_LAYER else None, False)
    head = b.weight("nextn.shared_head_head.weight")
    if rows_at is HeadRows.BEFORE_NORM:
        cur = get_rows(cur, outputs)
        cur.output = True
    if "nextn.shared_head_norm.weight" in b.layers[b.layer]:
        cur = b.norm(cur, "nextn.shared_head_norm")
    else:
        b.layer = -1
        cur = b.norm(cur, "output_norm")
    if rows_at is not HeadRows.BEFORE_NORM:
        cur.output = True
    if rows_at is HeadRows.AFTER_NORM:
        cur = get_rows(cur, outputs)
    cur = mul_mat(head, cur) if head else logits(b, cur)
    cur.output = True
    b.graph.expand(cur)
    return b.graph
