"""Graphs of the small models that are made for one model and read its hidden states: EAGLE-3 and DFlash.

src/models/eagle3.cpp and src/models/dflash.cpp at b11434, the decoders: both compute logits for every token. What they
do not have themselves, token embeddings and output matrix, they read from the model that they are made for: such a
matrix is taken to have the draft's width and its vocabulary, and to lie where the draft's own would.
"""

from __future__ import annotations

from llamafleet.memory.context import Context
from llamafleet.memory.graph import ggml
from llamafleet.memory.graph.assemble import ffn, ordinary_layer
from llamafleet.memory.graph.attention import attention
from llamafleet.memory.graph.builder import BackendOf, Builder, GraphUnknownError
from llamafleet.memory.graph.ggml import F32, I32, Graph, Tensor, apply, get_rows, mul_mat, new, reshape
from llamafleet.memory.graph.layers import Layers
from llamafleet.model.architecture import LayerGraph
from llamafleet.model.shape import Shape

BORROWED_TYPE = "F16"  # of a matrix of the other model: it changes no buffer
# A Markov head, or a selector: blocks of a few tokens, not a whole ubatch (build_dspark_markov_head).
UNKNOWN_PARTS = ("selector_hidden.weight", "hc_head_fn.weight")


def build_draft(
    shape: Shape,
    layers: Layers,
    context: Context,
    backend_of: BackendOf,
    order: tuple[int, ...],
    *,
    attention_scratch: bool = False,
) -> Graph:
    """The graph from tokens to logits with the layers in `order`, as `assemble.build` for other models."""
    b = Builder(shape, layers, context, backend_of, attention_scratch)
    positions = ggml.graph_input(I32, b.tokens * b.positions)
    is_eagle3 = shape.architecture.layer_graph is LayerGraph.EAGLE3
    cur = eagle3(b, positions) if is_eagle3 else dflash(b, order, positions)
    b.graph.expand(cur)
    if context.sampled:  # a copy of the logits with a row more, of which each slot's are sampled (build_sampling)
        b.graph.expand(new("pad", F32, (cur.ne[0], cur.ne[1] + 1), cur))
    return b.graph


def eagle3(b: Builder, positions: Tensor) -> Tensor:
    """The logits of EAGLE-3's only layer, from tokens and from the encoded hidden states (graph<false>)."""
    embedded, hidden = _embedded(b), ggml.graph_input(F32, b.embd, b.tokens)
    b.layer = 0
    normed = b.norm(embedded, "attn_norm")
    hidden_normed = b.norm(hidden, "attn_norm_2")
    residual = hidden_normed if b.shape.norms_residual else hidden
    cur = attention(b, ggml.concat(normed, hidden_normed, 0), positions)
    cur = apply("add", cur, residual)
    cur = apply("add", ffn(b, b.norm(cur, "ffn_norm"), ""), cur)
    cur.output = True
    return _logits(b, cur)


def dflash(b: Builder, order: tuple[int, ...], positions: Tensor) -> Tensor:
    """The logits of DFlash's layers for a batch of tokens (graph<false>)."""
    if any(part in b.layers[-1] for part in UNKNOWN_PARTS):
        raise GraphUnknownError("dflash: a selector, or layers of DeepSeek V4")
    cur = _embedded(b)
    if b.shape.scales_embeddings:
        cur = apply("scale", cur)
    for layer in order:
        b.layer = layer
        cur = ordinary_layer(b, cur, positions, None, False)
        cur = apply("mul", cur, scale) if (scale := b.weight("layer_output_scale.weight")) else cur
    return _logits(b, cur)


def _embedded(b: Builder) -> Tensor:
    table = b.weight("token_embd.weight", -1) or _borrowed(b, "token_embd.weight")
    return get_rows(table, ggml.graph_input(I32, b.tokens))


def _logits(b: Builder, cur: Tensor) -> Tensor:
    """Logits of all tokens; those of a smaller vocabulary are spread over the whole one (d2t)."""
    b.layer = -1
    cur = mul_mat(b.weight("output.weight", -1) or _borrowed(b, "output.weight"), b.norm(cur, "output_norm"))
    if numbers := b.weight("d2t", -1):
        rows = cur.ne[0]
        everywhere = apply("fill", Tensor("none", F32, (1, b.shape.vocabulary, b.tokens, 1)))
        spread = ggml.set_rows(everywhere, reshape(cur, 1, rows, b.tokens), reshape(numbers, rows, 1, 1))
        cur = reshape(spread, b.shape.vocabulary, b.tokens)
    cur.output = True
    return cur


def _borrowed(b: Builder, part: str) -> Tensor:
    return ggml.weight(BORROWED_TYPE, (b.embd, b.shape.vocabulary, 1, 1), b.backend_of(part, None))
