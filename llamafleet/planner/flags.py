"""The planned part of llama-server's command line: context, placement, threads.

Every flag is in common/arg.cpp at b11434. Each value that llama.cpp would otherwise choose at its start is given.

Decision 3: docs/decisions/0003-flags-are-static.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llamafleet.host.backends import TRAITS
from llamafleet.memory.context import Context
from llamafleet.memory.placement import Placement

# Tensors of a layer that --override-tensor puts on the CPU, by (is a mixture of experts, part of the experts or FFN).
PATTERNS = {
    (True, "all"): r"ffn_(up|down|gate|gate_up)_(ch|)exps\.",
    (True, "down"): r"ffn_down_(ch|)exps\.",
    (True, "up"): r"ffn_(up|gate|gate_up)_(ch|)exps\.",
    (False, "all"): r"ffn_(up|down|gate)\.weight",
    (False, "down"): r"ffn_down\.weight",
    (False, "up"): r"ffn_(up|gate)\.weight",
}


def planned_flags(
    context: Context,
    placement: Placement,
    *,
    backend: str,
    gpus: int,
    threads: tuple[int, int],
    load_mode: str,
    prompt_cache_mib: int,
    checkpoints: int,
    is_moe: bool,
    tensors: bool = False,
) -> Iterator[str]:
    """The flags that a plan decides: context, placement, threads. `gpus` is the number of GPUs in use; `threads`: while
    a reply is written, and while a prompt is read; `tensors`: each GPU computes a part of every layer."""
    yield from _cache_flags(context)
    yield from (
        "--flash-attn",
        "on" if context.flash_attention else "off",
        "--batch-size",
        str(context.handed_over),
    )
    yield from ("--ubatch-size", str(context.ubatch_tokens))
    yield from _vector_flags(context)
    yield from ("--threads", str(threads[0]), "--threads-batch", str(threads[1]))
    yield from ("--cache-ram", str(prompt_cache_mib), "--fit", "off", "--load-mode", load_mode)
    yield from ("--ctx-checkpoints", str(checkpoints))
    yield from _placement_flags(placement, device_names(backend, gpus), is_moe, tensors)
    if not context.op_offload:
        yield "--no-op-offload"
    if not context.repack:
        yield "--no-repack"


def _vector_flags(context: Context) -> Iterator[str]:
    """What makes the server one of embeddings or of scores."""
    if context.pooling == "rank":
        yield "--rerank"
    elif context.pooling:
        yield from ("--embedding", "--pooling", context.pooling)


def _cache_flags(context: Context) -> Iterator[str]:
    """A cache for each slot, or one for all; then a limit for one slot where the pool has more (n_ctx_slot in
    tools/server/server-context.cpp)."""
    pool = context.stream_cells if context.unified else context.tokens * context.slots
    yield from ("--ctx-size", str(pool), "--parallel", str(context.slots))
    yield "--kv-unified" if context.unified else "--no-kv-unified"
    yield from ("--cache-type-k", context.key_type, "--cache-type-v", context.value_type)
    if context.unified and context.tokens < pool:
        yield from ("--kv-unified-per-slot", str(context.tokens))


def device_names(backend: str, count: int) -> list[str]:
    """llama.cpp's names of the first `count` GPUs, in order."""
    return [f"{TRAITS[backend].device_prefix}{number}" for number in range(count)]


def _placement_flags(placement: Placement, devices: Sequence[str], is_moe: bool, tensors: bool) -> Iterator[str]:
    if not devices:
        yield from ("--device", "none", "--n-gpu-layers", "0")
        return
    yield from ("--device", ",".join(devices))
    yield from ("--n-gpu-layers", str(placement.gpu_layers))
    if tensors:
        yield from ("--split-mode", "tensor")
    elif len(devices) > 1:
        yield from ("--split-mode", "layer")
        yield from ("--tensor-split", ",".join(str(count) for count in placement.split()))
    overrides = [_override(sorted(placement.spilled), PATTERNS[is_moe, "all"])]
    overrides += [_override([layer], PATTERNS[is_moe, part]) for layer, part in placement.partly]
    if any(overrides):
        yield from ("--override-tensor", ",".join(override for override in overrides if override))


def _override(layers: Sequence[int], pattern: str) -> str:
    return rf"blk\.({'|'.join(map(str, layers))})\.{pattern}=CPU" if layers else ""
