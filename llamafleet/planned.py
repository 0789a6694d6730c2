"""The planned part of llama-server's command line: context, placement, threads.

Every flag is one of common/arg.cpp at b11434, and all that llama.cpp would else decide by itself at
each start is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .ledger import TRAITS

if TYPE_CHECKING:  # the plan imports this module for its `argv`
    from .answer import Plan

DEFAULT_BATCH_TOKENS = 2048  # llama.cpp's --batch-size; never below the ubatch
# What goes to the CPU, of a mixture of experts or not: all that may be spilled of a layer, or a part of it.
PATTERNS = {
    (True, "all"): r"ffn_(up|down|gate|gate_up)_(ch|)exps\.",
    (True, "down"): r"ffn_down_(ch|)exps\.",
    (True, "up"): r"ffn_(up|gate|gate_up)_(ch|)exps\.",
    (False, "all"): r"ffn_(up|down|gate)\.weight",
    (False, "down"): r"ffn_down\.weight",
    (False, "up"): r"ffn_(up|gate)\.weight",
}


def planned(plan: Plan) -> Iterator[str]:
    """The flags that the plan decides: context, placement, threads."""
    yield from ("--ctx-size", str(plan.context_tokens * plan.slots), "--parallel", str(plan.slots))
    yield from ("--no-kv-unified", "--cache-type-k", plan.kv_type, "--cache-type-v", plan.kv_type)
    yield from ("--flash-attn", "on", "--batch-size", str(max(DEFAULT_BATCH_TOKENS, plan.ubatch_tokens)))
    yield from ("--ubatch-size", str(plan.ubatch_tokens))
    yield from ("--threads", str(plan.threads), "--threads-batch", str(plan.threads))
    yield from ("--cache-ram", str(plan.prompt_cache_mib), "--fit", "off", "--load-mode", "none")
    yield from ("--ctx-checkpoints", str(plan.checkpoints))
    yield from _placed(plan)


def device_names(plan: Plan) -> list[str]:
    """llama.cpp's names of the plan's GPUs, in their order."""
    return [f"{TRAITS[plan.backend].device_prefix}{number}" for number in range(len(plan.gpus))]


def _placed(plan: Plan) -> Iterator[str]:
    if not plan.gpus:
        yield from ("--device", "none", "--n-gpu-layers", "0")
        return
    yield from ("--device", ",".join(device_names(plan)))
    yield from ("--n-gpu-layers", str(plan.placement.gpu_layers))
    if len(plan.gpus) > 1:
        yield from ("--split-mode", "layer")
        yield from ("--tensor-split", ",".join(str(count) for count in plan.placement.split()))
    overrides = [_override(sorted(plan.placement.spilled), PATTERNS[plan.is_moe, "all"])]
    overrides += [_override([layer], PATTERNS[plan.is_moe, part]) for layer, part in plan.placement.partly]
    if any(overrides):
        yield from ("--override-tensor", ",".join(override for override in overrides if override))


def _override(layers: Sequence[int], pattern: str) -> str:
    return rf"blk\.({'|'.join(map(str, layers))})\.{pattern}=CPU" if layers else ""
