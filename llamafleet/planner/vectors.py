"""Servers of embeddings and of scores (`serves`): which models can be such a server, and how it is planned.

An input is a whole request: it is read, and nothing is written. llama-server computes it in one batch, where a token's
vector depends on those behind it (tools/server/server-context.cpp, can_split), and keeps no prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from llamafleet.memory.context import Context
from llamafleet.memory.ledger import output_bytes
from llamafleet.model.architecture import Cache
from llamafleet.model.gguf import Header
from llamafleet.model.shape import Shape
from llamafleet.planner.result import Refusal
from llamafleet.settings.schema import Instance
from llamafleet.units import MIB

CLASSIFIER = "cls."  # what the names of a classifier's tensors begin with (src/llama-arch.cpp, LLM_TENSOR_CLS)


def pooling_of(instance: Instance, shape: Shape) -> str:
    """How a vector or a score is made from the tokens' results; "" for a server that writes text, or if nobody says."""
    if instance.serves == "chat":
        return ""
    return "rank" if instance.serves == "reranking" else instance.pooling or shape.pooling


def unsuited(instance: Instance, header: Header, shape: Shape) -> Refusal | None:
    """Why this model cannot serve what the instance is to serve; None if it can."""
    name, serves = header.name, instance.serves
    scores = shape.pooling == "rank"
    as_reranker, as_embedder = 'set serves = "reranking"', 'set serves = "embedding"'
    if serves == "chat" and not shape.architecture.computes_logits:
        makes, way_out = ("scores", as_reranker) if scores else ("embeddings", as_embedder)
        return _refusal(instance, f"{name} ({header.architecture}) makes {makes}, and cannot write text", way_out)
    if scores and (serves == "chat" or (serves == "embedding" and instance.pooling is None)):
        return _refusal(instance, f"{name} is a reranker (its pooling_type is rank), and serves is {serves!r}",
                        as_reranker)  # fmt: skip
    if serves == "embedding" and not pooling_of(instance, shape):
        return _refusal(
            instance, f"{name} does not say how an embedding is made from its tokens' (it has no pooling_type)",
            'set pooling to what the model was trained with, mostly "last" or "mean" ("none": a vector for each token)',
        )  # fmt: skip
    if serves == "reranking" and not any(tensor.name.startswith(CLASSIFIER) for tensor in header.tensors):
        return _refusal(
            instance, f"{name} has no classifier (no tensors cls.*), so its scores would mean nothing",
            "take a GGUF file that was converted as a reranker",
        )  # fmt: skip
    return None


def _refusal(instance: Instance, reason: str, way_out: str) -> Refusal:
    return Refusal(f"{instance.name}: {reason}", instance=instance.name, suggestions=(way_out,))


def needs_whole_inputs(shape: Shape, pooling: str) -> bool:
    """Must an input fit into one batch? Not where the last token of a model with a cache has it all
    (can_split)."""
    if not pooling or shape.architecture.attends_to_batch:
        return bool(pooling)
    return not (pooling == "last" or (pooling == "rank" and shape.is_causal))


def too_small(instance: Instance, shape: Shape, tokens: int) -> str:
    """Why the ubatch that the settings name is too small for inputs of so many tokens; empty if it is not."""
    pooling, ubatch = pooling_of(instance, shape), instance.ubatch_tokens
    if ubatch is None or ubatch >= tokens or not needs_whole_inputs(shape, pooling):
        return ""
    return (
        f"ubatch_tokens: {ubatch} is less than the context of {tokens} tokens, and llama-server refuses inputs that are"
        f" larger than a ubatch (pooling {pooling}): leave it out, or set context_tokens to {ubatch}"
    )


def as_planned(instance: Instance) -> Instance:
    """The instance with the settings that its kind of server has: one of vectors keeps no prompts and no checkpoints,
    since llama-server computes every input anew (server_context, is_stateless_task)."""
    if instance.serves == "chat":
        return instance
    return replace(instance, prompt_cache_mib=0, context_checkpoints_mib=0)


def why(context: Context, shape: Shape) -> Iterator[str]:
    """Sentences about inputs, batches and results of a server of vectors."""
    what = "scores" if context.pooling == "rank" else "embeddings"
    cache = "no KV cache" if shape.cache is Cache.NONE else f"KV cache {context.kv_type}"
    yield f"serves {what} (pooling {context.pooling}): inputs of up to {context.tokens} tokens, {cache}"
    if needs_whole_inputs(shape, context.pooling):
        yield f"ubatch {context.ubatch_tokens}: an input is computed at once, so ubatch and batch hold a whole one"
    yield (
        f"{output_bytes(shape, context) // MIB} MiB of RAM are for the results of a batch: llama.cpp makes room for"
        f" {shape.vocabulary} logits of each of its tokens, although nobody reads them"
    )
    yield "no prompt cache and no context checkpoints: every input is computed anew"
