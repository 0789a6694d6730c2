"""Rules between the settings of embeddings and reranking."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def of_vectors(instance: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is wrong with an instance's settings of embeddings and reranking: the setting and a sentence each."""
    serves, pooling, example = instance["serves"], instance["pooling"], instance["rerank_example"]
    if serves == "chat" and pooling is not None:
        yield "pooling", f'is {pooling!r}, but serves is "chat": set serves to "embedding", or leave pooling out'
    if serves == "embedding" and pooling == "rank":
        yield "pooling", 'is "rank", which gives scores: set serves to "reranking", or name another pooling'
    if serves == "reranking" and pooling not in (None, "rank"):
        yield "pooling", f'is {pooling!r}, but a reranking server pools by "rank": leave it out'
    if example is not None and serves != "reranking":
        yield "rerank_example", f'is set, but serves is {serves!r}: set serves to "reranking", or leave it out'
    if example is not None and example.relevant == example.irrelevant:
        yield "rerank_example", "has the same text as relevant and as irrelevant: give two texts"
