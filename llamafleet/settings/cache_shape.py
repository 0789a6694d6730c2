"""Rules between the settings of a KV cache's shape."""

from __future__ import annotations

from collections.abc import Iterator


def problems(
    *, kv_unified: bool, pool_tokens: int | None, context_tokens: int | None, live_tokens: int | None,
    batch_tokens: int | None, ubatch_tokens: int | None,
) -> Iterator[tuple[str, str]]:  # fmt: skip
    """The key and a sentence for each setting of an instance that another one contradicts."""
    if batch_tokens is not None and ubatch_tokens is not None and batch_tokens < ubatch_tokens:
        yield "batch_tokens", f"{batch_tokens} is less than ubatch_tokens, {ubatch_tokens}: a batch has whole ubatches"
    if pool_tokens is None:
        return
    if not kv_unified:
        yield (
            "pool_tokens",
            f"{pool_tokens} is the size of a pool, and each slot has a cache of its own: set kv_unified",
        )
    for key, tokens in (("context_tokens", context_tokens), ("live_tokens", live_tokens)):
        if tokens is not None and tokens > pool_tokens:
            yield key, f"{tokens} is more than the pool that all slots share (pool_tokens {pool_tokens})"
