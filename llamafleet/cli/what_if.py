"""Re-run the plan with one input changed: a larger context, or the model in the next larger quantisation."""

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
STEPS = 32  # the largest context is found in steps of 1/32 of the trained context, with five plans
# Common quantisations by the type of most weights, smallest first. The second type of each is llama-quantize's choice
# for rows that are no multiple of 256 (src/llama-quant.cpp, tensor_type_fallback).
LADDER = (("Q2_K", "Q4_0"), ("Q3_K", "Q4_0"), ("Q4_K", "Q5_0"), ("Q5_K", "Q5_1"), ("Q6_K", "Q8_0"), ("Q8_0", "Q8_0"))
_BLOCKS = {name: (block, size) for name, block, size in GGML_TYPES.values()}
Planner = Callable[[Instance, Header], Plan | Refusal]


def what_if(planner: Planner, instance: Instance, header: Header, plan: Plan) -> Iterator[str]:
    """Sentences about the largest context that fits and about the next larger quantisation."""
    yield from _larger_context(planner, instance, header, plan)
    if larger := requantised(header):
        result = planner(instance, larger)
        name = f"the next larger quantisation, {main_type(larger)} with about {larger.weights_bytes / GIB:.1f} GiB,"
        yield f"{name} fits, {_speed(result)}" if isinstance(result, Plan) else f"{name} does not fit"


def _speed(plan: Plan) -> str:
    return f"at about {rate(plan.predicted.decode_tokens_per_s)} tokens/s"


def _larger_context(planner: Planner, instance: Instance, header: Header, plan: Plan) -> Iterator[str]:
    trained, now = Shape.of(header).context_tokens, plan.context_tokens
    if trained <= now:
        return
    largest = largest_context(planner, instance, header, now, trained)
    if largest is None:
        yield f"no larger context fits (the model was trained for {trained} tokens)"
        return
    is_whole = largest.context_tokens >= trained
    remark = "the whole trained context" if is_whole else f"the model was trained for {trained}"
    yield f"the largest context that fits: {largest.context_tokens} tokens ({remark}), {_speed(largest)}"


def largest_context(planner: Planner, instance: Instance, header: Header, low: int, high: int) -> Plan | None:
    """The plan with the largest context above `low` and up to `high` tokens; None if no larger context fits."""

    def plan_with(tokens: int) -> Plan | None:
        result = planner(replace(instance, context_tokens=tokens), header)
        return result if isinstance(result, Plan) else None

    best = plan_with(high)
    if best:
        return best
    step = max(high // STEPS, 1)
    fitting_steps, failing_steps = low // step, STEPS
    while failing_steps - fitting_steps > 1:
        middle = (fitting_steps + failing_steps) // 2
        if plan := plan_with(middle * step):
            fitting_steps, best = middle, plan
        else:
            failing_steps = middle
    return best


def requantised(header: Header) -> Header | None:
    """An estimate of the header in the next larger quantisation; None if there is none.

    Every tensor of a smaller type than the next gets the next type.
    """
    names = [name for name, _ in LADDER]
    main = main_type(header)
    if main not in names[:-1]:
        return None
    target = names.index(main) + 1
    tensors = tuple(_raised(tensor, target) for tensor in header.tensors)
    more = sum(tensor.bytes for tensor in tensors) - header.weights_bytes
    first, *others = header.file_bytes
    return replace(header, tensors=tensors, file_bytes=(first + more, *others))


def _raised(tensor: Tensor, target: int) -> Tensor:
    names = [name for name, _ in LADDER]
    if tensor.type not in names[:target]:  # types outside the ladder stay as they are
        return tensor
    fitting = (name for name in LADDER[target] if tensor.shape[0] % _BLOCKS[name][0] == 0)
    name = next(fitting, tensor.type)
    block, size = _BLOCKS[name]
    return replace(tensor, type=name, bytes=tensor.elements // block * size)


def main_type(header: Header) -> str:
    """The type in which most of the weights are stored; empty if there are no tensors."""
    counts: Counter[str] = Counter()
    for tensor in header.tensors:
        counts[tensor.type] += tensor.elements
    return counts.most_common(1)[0][0] if counts else ""
