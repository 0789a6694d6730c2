"""Predictions over depth and over requests at once: at the workload they are the plan's own."""

from dataclasses import replace

import pytest

from llamafleet.planner.curves import curves
from llamafleet.planner.plan import plan_host
from llamafleet.planner.roofline import Prediction
from tests import planning

GPUS = {"cpu": (), "gpu": (24564,), "spilled": (8192,), "tensor": (24564, 24564)}
CASES = {
    "cpu": ("Qwen3-8B", {}), "gpu": ("Qwen3-8B", {}), "spilled": ("Qwen3-8B", {"concurrency": 3, "slots": 3}),
    "tensor": ("Qwen3-8B", {"split_mode": "tensor"}),
}  # fmt: skip


def made(kind, **changes):
    """(plan, its instance, curves) of a case."""
    layout, own = CASES[kind]
    host = planning.machine(GPUS[kind])
    asked = planning.settings({**own, **changes})
    [plan] = planning.plans(host, [(layout,)], asked)
    return plan, asked.models[0], curves(plan, asked.models[0], planning.header(layout), host)


@pytest.mark.parametrize("kind", CASES)
def test_at_the_workload_s_depth_they_are_what_the_plan_predicts(kind):
    context = made(kind)[0].context_tokens
    plan, instance, found = made(kind, live_tokens=context)
    assert found.by_depth[-1].tokens == context
    last, told = found.by_depth[-1], plan.predicted
    assert last.each.value == pytest.approx(1 / told.decode_tokens_per_s, rel=1e-3)
    assert last.first.value == pytest.approx(instance.prompt_tokens / told.prefill_tokens_per_s, rel=1e-3)
    assert found.by_count[0].together.value == pytest.approx(told.decode_tokens_per_s, rel=1e-3)
    assert found.by_count[-1].together.value == pytest.approx(told.all_slots_tokens_per_s, rel=1e-3)
    assert [one.requests for one in found.by_count] == list(range(1, plan.slots + 1))


@pytest.mark.parametrize("kind", CASES)
def test_deeper_is_slower_and_more_at_once_write_more(kind):
    _, _, found = made(kind)
    for key in ("each", "first"):
        values = [getattr(one, key) for one in found.by_depth]
        assert [one.value for one in values] == sorted(one.value for one in values)
        assert values[-1].value > values[0].value
        assert all(one.low < one.value < one.high for one in values)
    speeds = [one.together for one in found.by_count]
    assert [one.value for one in speeds] == sorted(one.value for one in speeds)
    assert all(one.low < one.value < one.high for one in speeds)


def test_many_slots_have_some_of_the_numbers_and_both_ends():
    plan, _, found = made("gpu", slots=50, concurrency=50, context_tokens=1024)
    counts = [one.requests for one in found.by_count]
    assert plan.slots == 50 and counts[0] == 1 and counts[-1] == 50 and len(counts) < 20


def test_a_server_that_writes_nothing_has_seconds_by_the_length_of_its_inputs():
    host = planning.machine((24564,))
    asked = planning.settings({"serves": "embedding", "pooling": "mean", "context_tokens": 2048})
    [plan] = planning.plans(host, [("Qwen3-8B",)], asked)
    found = curves(plan, asked.models[0], planning.header("Qwen3-8B"), host)
    assert found.by_count == () and all(one.each is None for one in found.by_depth)
    assert found.by_depth[-1].tokens == 2048 and found.by_depth[-1].first.value > found.by_depth[0].first.value


def test_a_plan_that_is_partly_in_swap_has_none():
    plan, instance, _ = made("cpu")
    swaps = replace(plan, predicted=Prediction(0.0, 0.0, swap_bytes=5))
    assert curves(swaps, instance, planning.header("Qwen3-8B"), planning.machine()) is None


def test_types_that_cost_a_processor_more_are_counted():
    layers = planning.header("Qwen3-8B")
    slow = replace(layers, tensors=tuple(replace(one, type="Q5_0") for one in layers.tensors))
    host, asked = planning.machine(), planning.settings({"live_tokens": 32768})
    [plan] = plan_host(host, [(asked.models[0], slow)], asked)
    last = curves(plan, asked.models[0], slow, host).by_depth[-1]
    prompt = asked.models[0].prompt_tokens
    assert last.tokens == 32768 and last.first.value == pytest.approx(
        prompt / plan.predicted.prefill_tokens_per_s, rel=1e-3
    )
