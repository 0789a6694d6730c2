"""One KV cache that all slots share, `kv_unified`: how much of it a request may have, and when it runs out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from llamafleet.memory.context import PAD_CELLS, Context
from llamafleet.settings.schema import Instance
from llamafleet.settings.workload import Workload

DEFAULT_CONTEXT_LIMIT = 32768  # tokens, if the settings give no context_tokens (inventory/group_data/all.py)


def padded(tokens: int) -> int:
    """As many tokens as llama-server makes of a context (src/llama-context.cpp, llama_context::llama_context)."""
    return -(-tokens // PAD_CELLS) * PAD_CELLS


def slot_tokens(instance: Instance, trained: int) -> int:
    """The context of one slot, in tokens, before slots share a pool. `trained`: the model's; 0 if it is not known."""
    tokens = instance.context_tokens or min(trained or DEFAULT_CONTEXT_LIMIT, DEFAULT_CONTEXT_LIMIT)
    if instance.pool_tokens is not None and instance.context_tokens is None:
        tokens = min(instance.pool_tokens, trained or instance.pool_tokens)
    return min(padded(tokens), max(tokens, trained)) if trained else padded(tokens)


def with_pool(context: Context, instance: Instance, trained: int) -> Context:
    """The context with the instance's pool, if its slots share one.

    One request may have `context_tokens` of a pool of `pool_tokens`, else all of the pool, and never more than the
    model was trained for (n_ctx_slot in tools/server/server-context.cpp).
    """
    if not instance.kv_unified:
        return context
    pool = padded(instance.pool_tokens or context.tokens * context.slots)
    most = context.tokens if instance.pool_tokens and instance.context_tokens else pool
    return replace(context, tokens=min(most, pool, trained or pool), unified=True, pool_tokens=pool)


def in_words(context: Context) -> str:
    """The context of the slots, such as "8192 tokens for each of 2 slot(s)"."""
    if not context.unified:
        return f"{context.tokens} tokens for each of {context.slots} slot(s)"
    return (
        f"one pool of {context.pool_tokens} tokens for {context.slots} slot(s), up to {context.tokens} for one request"
    )


def running_out(context: Context, work: Workload) -> Iterator[str]:
    """What happens when the pool is full, if that can be (tools/server/server-context.cpp,
    server_context_impl; llama.cpp #23652)."""
    if not context.unified or context.tokens * context.slots <= context.pool_tokens:
        return
    yield (
        "the pool can run out: llama-server then drops what idle slots keep; where that is not enough, all requests "
        'that are running end with the error "Context size has been exceeded" (llama.cpp #23652)'
    )
    busy, held = min(work.concurrency, context.slots), context.pool_tokens // (work.prompt_tokens + work.reply_tokens)
    if held < busy:
        yield (
            f"warning: the pool holds {held} of the workload's {busy} requests of {work.prompt_tokens} + "
            f"{work.reply_tokens} tokens at once: set a larger pool_tokens, or fewer slots"
        )
