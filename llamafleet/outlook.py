"""What would change with another context or the next quantisation: the same plan, asked again with one thing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

from .ggml_types import GGML_TYPES
from .gguf import Header, Tensor
from .kv import number
from .plan import DEFAULT_CONTEXT_LIMIT, Plan, Refusal
from .settings import Instance
from .show import rate

GIB = 1024**3
STEP_TOKENS = 1024  # how exactly the largest context is told
# Quantisations as people choose them, by what most of the weights are stored in; the second of each is what
# llama-quantize takes for rows that are no multiple of 256 (tensor_type_fallback, src/llama-quant.cpp).
LADDER = (("Q2_K", "Q4_0"), ("Q3_K", "Q4_0"), ("Q4_K", "Q5_0"), ("Q5_K", "Q5_1"), ("Q6_K", "Q8_0"), ("Q8_0", "Q8_0"))
_BLOCKS = {name: (block, size) for name, block, size in GGML_TYPES.values()}
Planner = Callable[[Instance, Header], Plan | Refusal]


def outlook(planner: Planner, instance: Instance, header: Header, answer: Plan | Refusal) -> Iterator[str]:
    """Sentences on the next larger context and quantisation; of a refusal on the next that fit."""
    if isinstance(answer, Plan):
        yield from _larger_context(planner, instance, header, answer)
        bigger = requantised(header, 1)
        if bigger:
            yield f"the next quantisation up, {_told(bigger)}, {_outcome(planner(instance, bigger))}"
    elif answer.ledger:
        yield from _smaller_context(planner, instance, header)
        yield from _smaller_quantisation(planner, instance, header)


def _larger_context(planner: Planner, instance: Instance, header: Header, plan: Plan) -> Iterator[str]:
    trained, now = number(header, "context_length"), plan.context_tokens
    if trained <= now:
        return
    largest = largest_context(planner, instance, header, now, trained)
    if largest is None:
        yield f"no larger context fits than {now} tokens (trained for {trained})"
        return
    whole = "all that it was trained for" if largest.context_tokens >= trained else f"trained for {trained}"
    speed = rate(largest.predicted.decode_tokens_per_s)
    yield f"the largest context that fits: {largest.context_tokens} tokens ({whole}), at about {speed} tokens/s"


def _smaller_context(planner: Planner, instance: Instance, header: Header) -> Iterator[str]:
    trained = number(header, "context_length") or DEFAULT_CONTEXT_LIMIT
    asked = instance.context_tokens or min(trained, DEFAULT_CONTEXT_LIMIT)
    largest = largest_context(planner, instance, header, 0, asked)
    if largest:
        speed = rate(largest.predicted.decode_tokens_per_s)
        yield f"set context_tokens to {largest.context_tokens}: the most that fits, at about {speed} tokens/s"


def _smaller_quantisation(planner: Planner, instance: Instance, header: Header) -> Iterator[str]:
    for steps in range(-1, -len(LADDER), -1):
        smaller = requantised(header, steps)
        if smaller and isinstance(answer := planner(instance, smaller), Plan):
            yield f"take a smaller quantisation: {_told(smaller)}, {_outcome(answer)}"
            return


def largest_context(planner: Planner, instance: Instance, header: Header, low: int, high: int) -> Plan | None:
    """The plan with the largest context above `low` and up to `high` tokens, None if none fits."""

    def at(tokens: int) -> Plan | None:
        answer = planner(replace(instance, context_tokens=tokens), header)
        return answer if isinstance(answer, Plan) else None

    if found := at(high):
        return found
    low, high = low // STEP_TOKENS, -(-high // STEP_TOKENS)
    best = None
    while high - low > 1:
        middle = (low + high) // 2
        if found := at(middle * STEP_TOKENS):
            low, best = middle, found
        else:
            high = middle
    return best


def requantised(header: Header, steps: int) -> Header | None:
    """The model as it would be that many quantisations up or down; None where there is none.

    Estimated from this one: upwards what is stored in less becomes the next type, downwards each goes as far.
    """
    rungs = [name for name, _ in LADDER]
    main = main_type(header)
    if main not in rungs or not 0 <= rungs.index(main) + steps < len(rungs):
        return None
    at_least = rungs.index(main) + steps if steps > 0 else 0
    tensors = tuple(_moved(tensor, steps, at_least) for tensor in header.tensors)
    smaller = sum(t.bytes for t in header.tensors) - sum(t.bytes for t in tensors)
    whole = max(0, header.file_bytes_total - smaller)
    return replace(header, tensors=tensors, file_bytes=(whole, *(0,) * (len(header.file_bytes) - 1)))


def main_type(header: Header) -> str:
    """What most of the weights are stored in."""
    counts: Counter[str] = Counter()
    for tensor in header.tensors:
        counts[tensor.type] += tensor.elements
    return counts.most_common(1)[0][0] if counts else ""


def _moved(tensor: Tensor, steps: int, at_least: int) -> Tensor:
    rungs = [name for name, _ in LADDER]
    now = rungs.index(tensor.type) if tensor.type in rungs else len(rungs)  # other types stay as they are
    target = max(now + steps, 0) if steps < 0 else at_least
    if now == len(rungs) or (steps > 0 and now >= at_least):
        return tensor
    kind = next((one for one in LADDER[target] if tensor.shape[0] % _BLOCKS[one][0] == 0), tensor.type)
    block, size = _BLOCKS[kind]
    return replace(tensor, type=kind, bytes=tensor.elements // block * size)


def _told(header: Header) -> str:
    return f"{main_type(header)} with about {header.weights_bytes / GIB:.1f} GiB"


def _outcome(answer: Plan | Refusal) -> str:
    if isinstance(answer, Plan):
        return f"fits, at about {rate(answer.predicted.decode_tokens_per_s)} tokens/s"
    return "does not fit"
