"""What would change with another context or the next quantisation: the same plan, asked again with one thing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

from llamafleet.cli.tables import rate
from llamafleet.model.ggml_types import GGML_TYPES
from llamafleet.model.gguf import Header, Tensor
from llamafleet.model.shape import Shape
from llamafleet.planner.result import Plan, Refusal
from llamafleet.settings.schema import Instance

GIB = 1024**3
STEPS = 32  # how exactly the largest context is told: in 32nds of what was trained, five plans to find it
# Quantisations as people choose them, by what most of the weights are stored in; the second of each is what
# llama-quantize takes for rows that are no multiple of 256 (tensor_type_fallback, src/llama-quant.cpp).
LADDER = (("Q2_K", "Q4_0"), ("Q3_K", "Q4_0"), ("Q4_K", "Q5_0"), ("Q5_K", "Q5_1"), ("Q6_K", "Q8_0"), ("Q8_0", "Q8_0"))
_BLOCKS = {name: (block, size) for name, block, size in GGML_TYPES.values()}
Planner = Callable[[Instance, Header], Plan | Refusal]


def outlook(planner: Planner, instance: Instance, header: Header, plan: Plan) -> Iterator[str]:
    """Sentences on the largest context that fits and on the next larger quantisation."""
    yield from _larger_context(planner, instance, header, plan)
    if bigger := requantised(header):
        answer = planner(instance, bigger)
        told = f"the next quantisation up, {main_type(bigger)} with about {bigger.weights_bytes / GIB:.1f} GiB,"
        yield f"{told} fits, {_speed(answer)}" if isinstance(answer, Plan) else f"{told} does not fit"


def _speed(plan: Plan) -> str:
    return f"at about {rate(plan.predicted.decode_tokens_per_s)} tokens/s"


def _larger_context(planner: Planner, instance: Instance, header: Header, plan: Plan) -> Iterator[str]:
    trained, now = Shape.of(header).context_tokens, plan.context_tokens
    if trained <= now:
        return
    largest = largest_context(planner, instance, header, now, trained)
    if largest is None:
        yield f"no larger context fits (trained for {trained} tokens)"
        return
    whole = "all that it was trained for" if largest.context_tokens >= trained else f"trained for {trained}"
    yield f"the largest context that fits: {largest.context_tokens} tokens ({whole}), {_speed(largest)}"


def largest_context(planner: Planner, instance: Instance, header: Header, low: int, high: int) -> Plan | None:
    """The plan with the largest context above `low` and up to `high` tokens, None if none fits."""

    def at(tokens: int) -> Plan | None:
        answer = planner(replace(instance, context_tokens=tokens), header)
        return answer if isinstance(answer, Plan) else None

    best = at(high)
    if best:
        return best
    step = max(high // STEPS, 1)
    few, many = low // step, STEPS
    while many - few > 1:
        middle = (few + many) // 2
        if found := at(middle * step):
            few, best = middle, found
        else:
            many = middle
    return best


def requantised(header: Header) -> Header | None:
    """The model as the next quantisation up would have it, None where there is none.

    Estimated from this one: whatever is stored in less than the next type becomes that.
    """
    rungs = [name for name, _ in LADDER]
    main = main_type(header)
    if main not in rungs[:-1]:
        return None
    target = rungs.index(main) + 1
    tensors = tuple(_raised(tensor, target) for tensor in header.tensors)
    more = sum(t.bytes for t in tensors) - header.weights_bytes
    first, *others = header.file_bytes
    return replace(header, tensors=tensors, file_bytes=(first + more, *others))


def _raised(tensor: Tensor, target: int) -> Tensor:
    rungs = [name for name, _ in LADDER]
    if tensor.type not in rungs[:target]:  # other types stay as they are
        return tensor
    kind = next((one for one in LADDER[target] if tensor.shape[0] % _BLOCKS[one][0] == 0), tensor.type)
    block, size = _BLOCKS[kind]
    return replace(tensor, type=kind, bytes=tensor.elements // block * size)


def main_type(header: Header) -> str:
    """What most of the weights are stored in."""
    counts: Counter[str] = Counter()
    for tensor in header.tensors:
        counts[tensor.type] += tensor.elements
    return counts.most_common(1)[0][0] if counts else ""
