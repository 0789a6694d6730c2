"""Re-run the plan with one input changed: a larger context, or the model in the next larger quantisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from llamafleet.cli.tables import rate
from llamafleet.model.gguf import Header
from llamafleet.model.shape import Shape
from llamafleet.planner.quantisations import larger, main_type
from llamafleet.planner.result import Plan, Refusal
from llamafleet.settings.schema import Instance

GIB = 1024**3
STEPS = 32  # the largest context is found in steps of 1/32 of the trained context, with five plans
Planner = Callable[[Instance, Header], Plan | Refusal]


def what_if(planner: Planner, instance: Instance, header: Header, plan: Plan) -> Iterator[str]:
    """Sentences about the largest context that fits and about the next larger quantisation."""
    yield from _larger_context(planner, instance, header, plan)
    if next_larger := larger(header):
        result = planner(instance, next_larger)
        size = f"{next_larger.weights_bytes / GIB:.1f} GiB"
        name = f"the next larger quantisation, {main_type(next_larger)} with about {size},"
        yield f"{name} fits, {_speed(result)}" if isinstance(result, Plan) else f"{name} does not fit"


def _speed(plan: Plan) -> str:
    if plan.predicted.swap_bytes:
        return "in part from swap, at the speed of a disk"
    return f"at about {rate(plan.predicted.tokens_per_s)} tokens/s"


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
