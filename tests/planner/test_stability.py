"""Keep or change a plan: the memory of other processes changes from run to run, and the plan must not."""

import dataclasses

import pytest

from llamafleet.host.recorded import PlanRecord
from llamafleet.planner import stability
from llamafleet.planner.result import Plan, Refusal
from tests import planning
from tests.planning import MIB

SETTINGS = planning.settings({"context_tokens": 32768})
LAYOUT = "gpt-oss-120b"
# A quarter of the 1024 MiB of reserve.
THRESHOLD_MIB = 256


def machine(used_mib=500, total_mib=24564, **more):
    return planning.machine([{"total_mib": total_mib, "used_by_others_mib": used_mib}], **more)


def planner(settings=SETTINGS, layout=LAYOUT):
    return lambda host: planning.plans(host, [(layout,)] * len(settings.models), settings)


def installed(host, settings=SETTINGS, layout=LAYOUT):
    plans = planner(settings, layout)(host)
    return {one.instance: stability.InstalledPlan(one.argv, stability.RecordedMemory.of(host)) for one in plans}


def chosen(host, before, settings=SETTINGS, layout=LAYOUT):
    return stability.keep_or_replan(host, settings, planner(settings, layout), installed(before, settings, layout))


def argvs(choice):
    return [one.argv for one in choice.results]


def test_drift_would_change_the_plan_without_keeping():
    # The other tests rely on this: a layer's experts are about 1.6 GiB, so some change of the memory changes the plan.
    plans = {planner()(machine(used))[0].argv for used in range(500, 2600, 50)}
    assert len(plans) > 1


def edge():
    """The most MiB of other processes with which the plan stays the same; with 2 MiB more the plan is another."""
    low, high = 500, 2600
    first = planner()(machine(low))[0].argv
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if planner()(machine(middle))[0].argv == first else (low, middle)
    return low


EDGE = edge()


@pytest.mark.parametrize("more", [1, 2, 100, THRESHOLD_MIB - 1])
def test_others_holding_a_little_more_changes_nothing(more):
    before = machine(EDGE)
    choice = chosen(machine(EDGE + more), before)
    assert argvs(choice) == [one.argv for one in planner()(before)]
    assert choice.results[0].argv != planner()(machine(EDGE + more))[0].argv
    assert choice.why == f"kept: the installed plan still fits (GPU0 -{more} MiB)"
    # The ledger has the memory of now, and a part of the reserve is used.
    assert choice.results[0].ledger[0].free_bytes == planner()(before)[0].ledger[0].free_bytes - more * MIB


@pytest.mark.parametrize("less", [1, 2, 100, THRESHOLD_MIB - 1])
def test_others_holding_a_little_less_changes_nothing(less):
    before = machine(EDGE + 1)
    choice = chosen(machine(EDGE + 1 - less), before)
    assert argvs(choice) == [one.argv for one in planner()(before)]
    assert choice.results[0].argv != planner()(machine(EDGE + 1 - less))[0].argv


def test_more_than_the_reserve_can_give_changes_the_plan():
    now = machine(EDGE + 600)
    choice = chosen(now, machine(EDGE))
    assert choice.results == planner()(now)
    assert choice.memory == stability.RecordedMemory.of(now)
    assert choice.why.startswith("changed: GPU0 has 600 MiB less than when m0 was planned")


def test_drift_adds_up_over_runs_and_is_measured_from_the_installed_plan():
    # The record keeps the memory that the plan was made for, so that small steps together do not exceed the limit.
    before = machine(EDGE)
    for step in range(0, THRESHOLD_MIB, 50):
        assert chosen(machine(EDGE + step), before).memory == stability.RecordedMemory.of(before)
    assert "changed" in chosen(machine(EDGE + THRESHOLD_MIB + 50), before).why


def test_much_freed_memory_is_used_where_that_is_faster():
    now = machine(500)
    choice = chosen(now, machine(15_000))
    assert choice.results == planner()(now)
    assert "changed: m0: its workload would take" in choice.why


def test_much_freed_memory_that_brings_nothing_is_left():
    small = planning.settings({"context_tokens": 4096})
    before = machine(8000)
    choice = chosen(machine(100), before, small, "Llama-3.2-3B")
    assert argvs(choice) == [one.argv for one in planner(small, "Llama-3.2-3B")(before)]
    assert choice.why.startswith("kept: the same inputs")


@pytest.mark.parametrize(("freed", "kept"), [(200, True), (3000, False)])
def test_a_better_cache_type_is_worth_a_change_once_much_is_freed(freed, kept):
    settings = planning.settings({"context_tokens": 8192, "kv_types": ["f16", "q8_0"]})
    before, now = machine(4000), machine(4000 - freed)
    [plan] = planner(settings, "Llama-3.2-3B")(before)

    def plan_by_memory(host):
        kv_type = "q8_0" if host.gpus[0].memory_used_by_others_bytes == 4000 * MIB else "f16"
        argv = tuple(kv_type if word == "f16" else word for word in plan.argv)
        return [dataclasses.replace(plan, kv_type=kv_type, argv=argv)]

    old = {"m0": stability.InstalledPlan(plan_by_memory(before)[0].argv, stability.RecordedMemory.of(before))}
    choice = stability.keep_or_replan(now, settings, plan_by_memory, old)
    assert choice.results[0].kv_type == ("q8_0" if kept else "f16")
    assert kept or choice.why == "changed: m0: a KV cache of type f16 fits now, it was q8_0"


def test_what_still_fits_is_kept_also_where_a_new_plan_would_be_refused():
    settings = planning.settings({"context_tokens": 8192, "slots": 1, "ubatch_tokens": 512})
    layout = "gpt-oss-120b"
    free_mib = planner(settings, layout)(with_ram(80_000))[0].ledger[-1].free_bytes // MIB
    exact = with_ram(80_000 - free_mib)
    short = with_ram(80_000 - free_mib - 50)
    assert isinstance(planner(settings, layout)(short)[0], Refusal)
    choice = chosen(short, exact, settings, layout)
    assert isinstance(choice.results[0], Plan) and choice.why.startswith("kept")
    # The total still differs by less than 1 %, but by more than a quarter of the reserve.
    too_short = with_ram(80_000 - free_mib - 600)
    assert isinstance(chosen(too_short, exact, settings, layout).results[0], Refusal)


def with_ram(mib):
    """A host without a GPU and with this much RAM."""
    host = planning.machine()
    return dataclasses.replace(host, memory=dataclasses.replace(host.memory, total_bytes=mib * MIB))


@pytest.mark.parametrize(
    ("now", "why"),
    [
        (machine(EDGE + 2, ram_gib=128), "other hardware"),
        (machine(EDGE + 2, total_mib=24000), "other hardware"),
        (planning.machine([{"used_by_others_mib": EDGE + 2, "uuid": "GPU-new"}]), "other hardware"),
        (planning.machine([{"used_by_others_mib": EDGE + 2}, 24564]), "other hardware"),
    ],
    ids=["ram", "gpu", "another_gpu", "a_second_gpu"],
)
def test_other_hardware_is_planned_anew(now, why):
    choice = chosen(now, machine(EDGE))
    assert choice.results == planner()(now)
    assert why in choice.why or choice.why.startswith("kept: the same inputs")


def test_a_kernel_that_takes_some_mib_more_is_the_same_hardware():
    before = machine(EDGE)
    now = dataclasses.replace(
        machine(EDGE + 2), memory=dataclasses.replace(before.memory, total_bytes=before.memory.total_bytes - 20 * MIB)
    )
    assert argvs(chosen(now, before)) == [one.argv for one in planner()(before)]


def test_another_plan_from_the_same_inputs_is_followed():
    now = machine(EDGE + 2)
    old = {"m0": stability.InstalledPlan(("--n-gpu-layers", "7"), stability.RecordedMemory.of(machine(EDGE)))}
    choice = stability.keep_or_replan(now, SETTINGS, planner(), old)
    assert choice.results == planner()(now)
    assert "makes another plan from the same inputs" in choice.why


def test_nothing_installed_is_planned_for_what_is_there():
    now = machine(EDGE)
    assert stability.keep_or_replan(now, SETTINGS, planner(), {}) == stability.Choice(
        planner()(now), stability.RecordedMemory.of(now)
    )


def test_a_second_instance_beside_a_kept_one():
    two = planning.settings({"context_tokens": 8192}, {"context_tokens": 4096})
    plan = lambda host: planning.plans(host, [("Qwen3-30B-A3B",), ("Llama-3.2-3B",)], two)  # noqa: E731
    before = machine(300)
    first = {"m0": stability.InstalledPlan(plan(before)[0].argv, stability.RecordedMemory.of(before))}
    choice = stability.keep_or_replan(machine(340), two, plan, first)
    assert choice.results[0].argv == first["m0"].argv
    assert isinstance(choice.results[1], Plan)


MEMORY = stability.RecordedMemory.of(machine(EDGE))
RECORD = {"plan": {"argv": ["--fit", "off"]}, "inputs": {"key": "k", "memory": MEMORY.to_json()}, "verified": None}


@pytest.mark.parametrize(
    "record",
    [None, [], "text", {}, {**RECORD, "inputs": {"key": "k"}}, {**RECORD, "inputs": {"key": "k", "memory": {"a": 1}}},
     {**RECORD, "inputs": {**RECORD["inputs"], "key": "other"}}, {**RECORD, "plan": None}, {**RECORD, "verified": 1}],
)  # fmt: skip
def test_a_record_that_cannot_be_used_is_none(record):
    assert stability.InstalledPlan.of(PlanRecord.of(record), "k") is None


def test_a_plan_survives_its_record():
    plan = stability.InstalledPlan.of(PlanRecord.of(RECORD), "k")
    assert plan == stability.InstalledPlan(("--fit", "off"), MEMORY)


# --- what a plan is made of -----------------------------------------------------------------------


def key(host=None, settings=SETTINGS, model=None):
    return stability.inputs_key(host or machine(), settings, settings.models[0], model or {"files": [["a", 5, None]]})


@pytest.mark.parametrize(
    "other",
    [
        {"settings": planning.settings({"context_tokens": 16384})},
        {"settings": planning.settings({"context_tokens": 32768}, gpu_reserve_mib=2048)},
        {"model": {"files": [["a", 6, None]]}},
        {"host": planning.machine([{"uuid": "GPU-new"}])},
        {"host": planning.machine([{"problem": "fell off the bus"}])},
    ],
)
def test_other_inputs_have_another_key(other):
    assert key(**other) != key()


@pytest.mark.parametrize(
    "same",
    [
        {"host": machine(used_mib=9000, available_gib=3)},
        {"settings": planning.settings({"context_tokens": 32768, "port": 1234, "listen": "127.0.0.2"})},
        {"settings": planning.settings({"context_tokens": 32768}, keep_releases=9, llama_cpp_ref="b1")},
    ],
)
def test_what_does_not_touch_the_plan_does_not_touch_the_key(same):
    assert key(**same) == key()
