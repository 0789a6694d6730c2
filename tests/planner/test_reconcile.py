"""A plan compared with the binary's report: the command line, the tolerance, and the rounds until both agree."""

import dataclasses

import pytest

from llamafleet.memory.ledger import Correction
from llamafleet.planner.reconcile import (
    ROUNDS,
    TOLERANCE_BYTES,
    MemoryReport,
    compare,
    question,
    reconcile,
    summary,
    tolerance,
)
from llamafleet.planner.result import Plan, Refusal
from tests import planning
from tests.planning import MIB

GIB = 1024 * MIB
SETTINGS = planning.settings({"context_tokens": 8192})


def planned(corrections=None, *, layout="gpt-oss-120b", gpus=(16376,), settings=SETTINGS, **machine):
    host = planning.machine(list(gpus), **machine)
    return planning.plans(host, [(layout,)] * len(settings.models), settings, corrections)


def counted(row):
    return row.weights_bytes + row.kv_bytes + row.compute_bytes + row.staging_bytes


def answer(plan, **more):
    """The report of a binary that agrees with the plan, except for `more` bytes on its devices."""
    names = [f"CUDA{n}" for n in range(len(plan.gpus))]
    reported = {name: counted(row) + more.pop(name, 0) for name, row in zip(names, plan.ledger, strict=False)}
    # Host memory is reported in parts.
    repacked = plan.ledger[-1].weights_bytes
    return MemoryReport(
        {**reported, "Host": counted(plan.ledger[-1]) - repacked + more.pop("host", 0), "CPU_REPACK": repacked}
    )


class Binary:
    """A binary that reports the ledger's bytes plus `more` bytes, a number or a function of the plan, by device."""

    def __init__(self, **more):
        self.more, self.asked = more, []

    def __call__(self, plan):
        self.asked.append(plan.argv)
        more = {name: size(plan) if callable(size) else size for name, size in self.more.items()}
        return answer(plan, **more)


def settled(binary, corrections=None, is_known=lambda plan: False, **how):
    """Settle with this binary. Its report depends on the flags alone, so the plan's corrections are subtracted."""
    current = {}

    def planner(given):
        current.update(given)
        return planned(given, **how)

    def ask(plan):
        extra = current.get(plan.instance, Correction()).extra_bytes
        reported = dict(binary(plan).told)
        for name, device in (("CUDA0", "GPU0"), ("Host", "host")):
            reported[name] -= extra.get(device, 0)
        return MemoryReport(reported)

    return reconcile(planner, ask, corrections or {}, is_known)


def test_the_question_is_the_service_without_what_it_must_not_touch():
    argv = ["/r/bin/llama-server", "--model", "/m.gguf", "--host", "0.0.0.0", "--port", "8080", "--fit", "off",
            "--ctx-size", "4096", "--api-key-file", "/run/keys"]  # fmt: skip
    assert question(argv) == (
        "/r/bin/llama-server", "--model", "/m.gguf", "--ctx-size", "4096",
        "--host", "127.0.0.1", "--port", "0", "-lv", "4",
    )  # fmt: skip


def test_a_real_command_line_keeps_its_placement():
    [plan] = planned()
    command = question(plan.argv)
    assert "--override-tensor" in command and "--fit" not in command
    assert set(plan.argv) - set(command) <= {"--fit", "off"}


def test_tolerance_is_16_mib_or_one_in_a_hundred():
    assert tolerance(100 * MIB) == TOLERANCE_BYTES == 16 * MIB
    assert tolerance(20 * GIB) == 20 * GIB // 100


def test_devices_are_matched_and_host_memory_is_one_sum():
    [plan] = planned(gpus=[{"index": 3}])
    seen = compare(plan, answer(plan, CUDA0=5 * MIB, host=-7 * MIB))
    assert seen.differences == {plan.ledger[0].device: 5 * MIB, "host": -7 * MIB}
    assert seen.beyond(only_more=False) == {}


def test_overhead_is_not_compared():
    [plan] = planned()
    assert plan.ledger[0].overhead_bytes and plan.ledger[-1].overhead_bytes
    assert set(compare(plan, answer(plan)).differences.values()) == {0}


def test_a_device_that_the_binary_does_not_know_is_said():
    [plan] = planned()
    seen = compare(plan, MemoryReport({"Host": 60 * GIB}))
    assert seen.binary_bytes is None and "CUDA0" in seen.why
    assert "the gate decides" in summary("chat", seen)


def test_agreement_takes_one_question():
    binary = Binary()
    done = settled(binary)
    assert len(binary.asked) == 1
    assert done.results == tuple(planned()) and done.corrections == {}
    assert done.verified["m0"].rounds == 1 and done.verified["m0"].differences == {"GPU0": 0, "host": 0}


@pytest.mark.parametrize("more", [TOLERANCE_BYTES, -TOLERANCE_BYTES])
def test_a_difference_within_the_tolerance_changes_nothing(more):
    done = settled(Binary(CUDA0=more))
    assert done.results == tuple(planned())


def test_more_on_the_gpu_is_planned_around_and_asked_again():
    binary = Binary(CUDA0=3 * GIB)
    done = settled(binary)
    [before], [after] = planned(), done.results
    assert len(after.placement.spilled) > len(before.placement.spilled)
    assert binary.asked == [before.argv, after.argv]
    assert done.verified["m0"].extra_bytes == {"GPU0": 3 * GIB}
    assert done.verified["m0"].rounds == 2
    assert "2 rounds" in summary("m0", done.verified["m0"])


def test_less_on_the_gpu_is_used():
    [after] = settled(Binary(CUDA0=-3 * GIB)).results
    assert len(after.placement.spilled) < len(planned()[0].placement.spilled)


def test_the_same_flags_are_not_asked_twice():
    binary = Binary(host=GIB)
    done = settled(binary)
    assert len(binary.asked) == 1  # more host memory changes no flag
    assert done.results[0].host_bytes == planned()[0].host_bytes + GIB
    assert done.verified["m0"].differences == {"GPU0": 0, "host": 0}


def test_what_does_not_fit_after_all_is_refused_with_the_numbers():
    [refused] = settled(Binary(host=64 * GIB)).results
    assert isinstance(refused, Refusal)
    assert refused.needed_bytes > refused.available_bytes > 0


def grows(plan):
    """A difference that grows with the layers on the host, so that no correction is ever enough."""
    return (len(plan.placement.spilled) + 1) * 300 * MIB


def test_the_rounds_are_bounded():
    binary = Binary(CUDA0=grows)
    done = settled(binary)
    assert len(binary.asked) <= ROUNDS
    [plan] = done.results
    assert isinstance(plan, Refusal) or plan.ledger[0].free_bytes >= 0
    assert isinstance(plan, Refusal) or plan.argv in binary.asked


def test_a_plan_with_room_to_spare_is_not_swung_back():
    """After a correction upwards, free memory in the next plan is no reason for a third plan."""
    [first] = planned()
    binary = Binary(CUDA0=lambda plan: 3 * GIB if plan.argv == first.argv else GIB)
    done = settled(binary)
    assert len(binary.asked) == 2 and done.results[0].argv == binary.asked[1] != first.argv
    assert done.verified["m0"].differences["GPU0"] == -2 * GIB


def test_a_binary_that_tells_nothing_leaves_the_plan():
    done = reconcile(planned, lambda plan: MemoryReport(None, "it ended"), {}, lambda plan: False)
    assert done.results == tuple(planned())
    assert done.verified["m0"].binary_bytes is None and done.verified["m0"].why == "it ended"


def test_known_plans_are_not_asked_about():
    binary = Binary()
    assert settled(binary, is_known=lambda plan: True).verified == {}
    assert binary.asked == []


def test_of_two_instances_the_second_gets_what_the_first_really_leaves():
    two = planning.settings({"context_tokens": 4096}, {"context_tokens": 4096})
    how = {"layout": "Llama-3.2-3B", "settings": two, "gpus": [24564]}
    done = settled(Binary(CUDA0=lambda plan: GIB if plan.instance == "m0" else 0), **how)
    before, after = planned(**how), done.results
    assert all(isinstance(result, Plan) for result in after)
    assert after[1].ledger[0].capacity_bytes == before[1].ledger[0].capacity_bytes - GIB


def test_the_record_tells_both_numbers():
    done = settled(Binary(CUDA0=3 * GIB), {"m0": Correction({"GPU0": GIB})})
    record = done.verified["m0"].to_json()
    assert set(record) == {"ledger_bytes", "binary_bytes", "extra_bytes", "rounds", "why"}
    # The ledger's bytes are from the header alone, without the correction that the plan was made with.
    assert record["binary_bytes"]["GPU0"] - record["ledger_bytes"]["GPU0"] == 3 * GIB == record["extra_bytes"]["GPU0"]
    assert dataclasses.asdict(done.verified["m0"])["room"] is True
