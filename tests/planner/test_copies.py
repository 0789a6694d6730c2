"""Copies of an instance, and instances that may use some GPUs only."""

import pytest

from llamafleet.planner.copies import with_copies
from llamafleet.planner.result import Plan, Refusal
from llamafleet.planner.stability import inputs_key
from llamafleet.settings.schema import SettingsError
from tests import planning

TWO = [24564, 24564]
SMALL = {"context_tokens": 8192}


def planned(host, *instances, layout="Llama-3.1-8B", **changes):
    settings = with_copies(planning.settings(*instances, **changes), host)
    if isinstance(settings, Refusal):
        return settings
    return planning.plans(host, [(layout,)] * len(settings.models), settings)


def used(plans):
    return [(plan.instance, [gpu.index for gpu in plan.gpus]) for plan in plans]


def test_one_copy_for_each_gpu():
    host = planning.machine(TWO)
    settings = with_copies(planning.settings({**SMALL, "copies": "per_gpu"}), host)
    assert [(one.name, one.port, one.gpus, one.copies) for one in settings.models] == [
        ("m0-1", 9000, ("gpu-0",), 1), ("m0-2", 9001, ("gpu-1",), 1)
    ]  # fmt: skip
    first, second = planned(host, {**SMALL, "copies": "per_gpu"})
    assert used([first, second]) == [("m0-1", [0]), ("m0-2", [1])]
    assert first.environment["CUDA_VISIBLE_DEVICES"] == "GPU-0"
    assert second.environment["CUDA_VISIBLE_DEVICES"] == "GPU-1"
    assert first.argv == second.argv  # each takes its own GPU's memory
    assert [row.device for row in second.ledger] == ["GPU1", "host"]
    assert "it may use GPU1 alone: gpus says so" in second.why


def test_a_model_that_needs_more_than_one_gpu_keeps_to_its_own():
    plans = planned(planning.machine(TWO, ram_gib=256), {**SMALL, "copies": "per_gpu"}, layout="Llama-3.3-70B")
    assert used(plans) == [("m0-1", [0]), ("m0-2", [1])] and all(plan.placement.spilled or None in
        plan.placement.layer_devices for plan in plans)  # fmt: skip


def test_copies_are_those_of_the_gpus_that_the_instance_and_the_host_name():
    host = planning.machine([24564] * 4)
    asked = {**SMALL, "copies": "per_gpu"}
    assert used(planned(host, {**asked, "gpus": ["3", "GPU-1"]})) == [("m0-1", [1]), ("m0-2", [3])]
    assert used(planned(host, asked, gpus=[0, 2])) == [("m0-1", [0]), ("m0-2", [2])]
    assert used(planned(planning.machine([24564]), asked)) == [("m0-1", [0])]


def test_a_number_of_copies_is_planned_one_after_another():
    settings = planning.settings({**SMALL, "copies": 3})
    assert [(one.name, one.port) for one in settings.models] == [("m0-1", 9000), ("m0-2", 9001), ("m0-3", 9002)]
    plans = planning.plans(planning.machine([16376, 16376]), [("Llama-3.1-8B",)] * 3, settings)
    assert all(isinstance(plan, Plan) for plan in plans)
    on_first = sum(row.used_bytes for plan in plans for row in plan.ledger if row.device == "GPU0")
    assert on_first <= plans[0].ledger[0].capacity_bytes
    assert [index for _, (index,) in used(plans)].count(0) == 2  # the third does not fit there


def test_a_copy_is_an_instance_like_any_other():
    host = planning.machine(TWO)
    [first, _] = planning.settings({**SMALL, "copies": 2}).models
    [alone] = planning.settings({**SMALL, "name": "m0-1"}).models
    settings = planning.settings()
    assert inputs_key(host, settings, first, {}) == inputs_key(host, settings, alone, {})
    assert planning.settings({**SMALL, "copies": 1}).models[0].name == "m0"


def test_without_a_gpu_there_is_none_for_a_copy():
    refusal = planned(planning.machine(), {**SMALL, "copies": "per_gpu"})
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "m0: copies is 'per_gpu', and box1 has no GPU that it may use"
    nothing = planned(planning.machine(TWO), {**SMALL, "copies": "per_gpu", "gpus": []})
    assert isinstance(nothing, Refusal)


def test_ports_that_copies_take_from_each_other_are_told():
    with pytest.raises(SettingsError) as caught:
        planning.settings({"name": "a", "port": 9000, "copies": 2}, {"name": "b", "port": 9001})
    assert caught.value.problems == ["models[1].port: 9001 is already the port of 'a-2', copy 2 of 'a'"]
    with pytest.raises(SettingsError) as caught:
        planning.settings({"name": "b", "port": 9001}, {"name": "a", "port": 9000, "copies": 2})
    assert caught.value.problems == [
        "models[1].port: copy 2 of 'a' would have port 9001, counted up from 9000, which is already the port of 'b'"
    ]
    refusal = planned(planning.machine(TWO), {"name": "a", "copies": "per_gpu"}, {"name": "b"})
    assert isinstance(refusal, Refusal) and "9001 is already the port of 'a-2', copy 2 of 'a'" in refusal.reason


def test_names_that_copies_take_are_told():
    with pytest.raises(SettingsError) as caught:
        planning.settings({"name": "a", "copies": 2}, {"name": "a-2", "port": 9100})
    assert caught.value.problems == ["models[1].name: 'a-2' has the name of 'a-2', copy 2 of 'a'"]
    with pytest.raises(SettingsError) as caught:
        planning.settings({"name": "a" * 62, "copies": 2})
    assert [problem.partition(", which")[2] for problem in caught.value.problems] == [
        " has more than 63 characters"
    ] * 2
    with pytest.raises(SettingsError) as caught:
        planning.settings({"name": "a", "port": 65535, "copies": 2})
    assert caught.value.problems == [
        "models[0].copies: copy 2 of 'a' would have port 65536: ports are counted up from 65535, to 65535"
    ]


@pytest.mark.parametrize("copies", [0, 257, -1, True, "per_card", 1.5, None])
def test_what_copies_should_be(copies):
    with pytest.raises(SettingsError, match='should be a number from 1 to 256, or "per_gpu"'):
        planning.settings({"copies": copies})


# --- gpus of an instance -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["1", "GPU-1", "gpu-1", "0000:02:00.0"])
def test_an_instance_keeps_to_its_gpus(name):
    first, second = planned(planning.machine(TWO), {**SMALL, "gpus": [name]}, SMALL)
    assert used([first, second]) == [("m0", [1]), ("m1", [0])]
    assert first.environment["CUDA_VISIBLE_DEVICES"] == "GPU-1" and "it may use GPU1 alone: gpus says so" in first.why


def test_an_instance_without_a_gpu_runs_on_the_processor():
    [plan] = planned(planning.machine(TWO), {**SMALL, "gpus": []})
    assert isinstance(plan, Plan) and plan.gpus == () and planning.argument(plan.argv, "--device") == "none"
    assert plan.environment["CUDA_VISIBLE_DEVICES"] == "" and "it uses no GPU: gpus says so" in plan.why
    shared = planning.machine([{"unified_memory": True}])
    [plan] = planned(shared, {**SMALL, "gpus": []})
    assert plan.gpus == () and plan.ledger[-1].used_bytes < plan.ledger[-1].capacity_bytes


def test_a_gpu_that_the_host_does_not_have_is_refused():
    refusal, other = planned(planning.machine(TWO), {**SMALL, "gpus": ["7"]}, SMALL)
    assert isinstance(refusal, Refusal) and isinstance(other, Refusal)  # a slip of the keyboard, told before anything
    assert refusal.reason.startswith(
        "models: m0: gpus: box1 has no GPU 7; it has 0 (NVIDIA GeForce RTX 4090, 0000:01:00.0, GPU-0)"
    )


@pytest.mark.parametrize(
    ("gpus", "changes", "why"),
    [
        ([24564, 24564], {"gpus": [0]}, "gpus: GPU 1 of box1 cannot be used: gpus does not name it"),
        ([24564, {"problem": "it fell off the bus"}], {}, "gpus: GPU 1 of box1 cannot be used: it fell off the bus"),
        (
            [24564, {"vendor": "amd"}],
            {"backend": "cuda"},
            'gpus: GPU 1 of box1 cannot be used: the backend "cuda" does',
        ),
    ],
)
def test_a_gpu_that_plans_do_not_use_is_refused_with_the_reason(gpus, changes, why):
    if "problem" in str(gpus):
        changes = {"backend": "cuda"}
    first, second = planned(planning.machine(gpus), {**SMALL, "gpus": ["1"]}, SMALL, **changes)
    assert isinstance(first, Refusal) and first.reason.startswith(f"m0: {why}"), first.reason
    assert isinstance(second, Plan)
