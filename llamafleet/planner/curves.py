"""How the predicted speed of a plan changes with the depth in the context, and with requests at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from llamafleet.host.backends import TRAITS
from llamafleet.host.machine import Machine
from llamafleet.host.speeds import NOT_MEASURED, Measurements, rates
from llamafleet.memory.adapters import adapters_of, merged
from llamafleet.memory.context import Context
from llamafleet.memory.weights import Model
from llamafleet.model.gguf import Header
from llamafleet.planner import speculation, tensor
from llamafleet.planner.at_gate import host_cost
from llamafleet.planner.result import Plan
from llamafleet.planner.roofline import Prediction, Roofline
from llamafleet.settings.schema import Instance
from llamafleet.settings.workload import Workload

STEPS = 8  # parts of the context, at whose ends the speed is predicted
MOST_COUNTS = 16  # numbers of requests at the same time


@dataclass(frozen=True)
class Speed:
    """A predicted value with its range; they are equal where nothing is uncertain."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class AtDepth:
    """With so many tokens in a slot's cache, on average while a reply is written: seconds until the workload's prompt
    is read, which is the last of them, and seconds for each token of the reply. A server that writes nothing reads
    inputs of so many tokens, and `each` is None."""

    tokens: int
    first: Speed
    each: Speed | None


@dataclass(frozen=True)
class AtOnce:
    """With so many requests at the same time, at the workload's depth: tokens that all of them write in a second."""

    requests: int
    together: Speed


@dataclass(frozen=True)
class Curves:
    """Predictions of one plan; `by_count` has one value where there is one slot, and none where nothing is written."""

    by_depth: tuple[AtDepth, ...]
    by_count: tuple[AtOnce, ...]


def curves(
    plan: Plan, instance: Instance, header: Header, machine: Machine, measured: Measurements = NOT_MEASURED,
    companions: Mapping[str, Header] = MappingProxyType({}),
) -> Curves | None:  # fmt: skip
    """The predictions for a plan of this instance; None of one that has no prediction, being partly in swap. Guesses
    ahead are not in them, since how many are right only a measurement tells. `companions`: the headers of what is
    loaded beside the model."""
    if plan.predicted.swap_bytes:
        return None
    adapters = adapters_of(companions)
    model = Model.of(merged(header, adapters) if adapters else header, head=speculation.uses_head(instance))
    work = Workload.of(instance, plan.context_tokens)

    def predict(changed: Workload, slots: int) -> Prediction:
        return _prediction(plan, model, machine, measured, changed, slots)

    by_count = (
        tuple(_at_once(count, predict(work, count)) for count in _counts(plan.slots)) if work.reply_tokens else ()
    )
    return Curves(tuple(_by_depth(plan, work, predict)), by_count)


def _prediction(
    plan: Plan, model: Model, machine: Machine, measured: Measurements, work: Workload, slots: int
) -> Prediction:  # fmt: skip
    machine_rates = rates(machine.cpu, plan.gpus, plan.threads, measured)
    context = Context(plan.context_tokens, slots, plan.kv_type, plan.ubatch_tokens)
    op_offload = TRAITS[plan.backend].op_offload and "--no-op-offload" not in plan.argv
    if "tensor" in plan.argv:
        return tensor.predict(
            range(len(plan.gpus)), context, Roofline(model, work, machine_rates, op_offload=op_offload)
        )
    machine_rates = replace(machine_rates, host_flops=machine_rates.host_flops / host_cost(model, machine_rates))
    roofline = Roofline(model, work, machine_rates, op_offload=op_offload)
    return roofline.predict(range(len(plan.placement.devices)), plan.placement.segments, context)


def _by_depth(plan: Plan, work: Workload, predict: Callable[[Workload, int], Prediction]) -> Iterator[AtDepth]:
    for step in range(0 if work.reply_tokens else 1, STEPS + 1):
        tokens = max(1, plan.context_tokens * step // STEPS)
        changed = replace(work, live_tokens=tokens, prompt_tokens=work.prompt_tokens if work.reply_tokens else tokens)
        told = predict(changed, 1)
        first = _seconds(
            told.prefill_tokens_per_s, told.prefill_low_tokens_per_s, told.prefill_high_tokens_per_s,
            changed.prompt_tokens,
        )  # fmt: skip
        each = (
            _seconds(told.decode_tokens_per_s, told.decode_low_tokens_per_s, told.decode_high_tokens_per_s)
            if work.reply_tokens
            else None
        )
        yield AtDepth(tokens, first, each)


def _seconds(speed: float, low: float, high: float, tokens: int = 1) -> Speed:
    """For so many tokens at that speed; a speed that is rounded to 0 is a hundredth of a token a second."""
    return Speed(*(tokens / max(one, 0.01) for one in (speed, high, low)))


def _counts(slots: int) -> list[int]:
    """Numbers of requests from one to the slots, in equal steps where these are many."""
    step = -(-slots // MOST_COUNTS)
    return sorted({1, slots, *range(step, slots + 1, step)})


def _at_once(count: int, told: Prediction) -> AtOnce:
    """The range is as wide as that of one request."""
    alone, together = max(told.decode_tokens_per_s, 0.01), told.all_slots_tokens_per_s
    low, high = told.decode_low_tokens_per_s / alone, told.decode_high_tokens_per_s / alone
    return AtOnce(count, Speed(together, together * low, together * high))
