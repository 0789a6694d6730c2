"""A correction, the difference between llama-server's figures and the ledger's, changes the next plan and its ledger."""

from llamafleet.memory.ledger import Correction
from llamafleet.planner.result import Refusal
from tests import planning
from tests.planning import MIB

SETTINGS = planning.settings({"context_tokens": 8192})
GIB = 1024 * MIB


def planned(corrections, *, gpus=(16376,), layout="gpt-oss-120b", settings=SETTINGS, **machine):
    headers = [(layout,)] * len(settings.models)
    return planning.plans(planning.machine(list(gpus), **machine), headers, settings, corrections)


def used(plan):
    return {row.device: row.used_bytes for row in plan.ledger}


def test_more_on_the_gpu_moves_experts_to_the_host():
    [before], [after] = planned({}), planned({"m0": Correction({"GPU0": 4 * GIB})})
    assert len(after.placement.spilled) > len(before.placement.spilled)
    assert after.ledger[0].free_bytes >= 0


def test_less_on_the_gpu_brings_experts_back():
    [before], [after] = planned({}), planned({"m0": Correction({"GPU0": -3 * GIB})})
    assert len(after.placement.spilled) < len(before.placement.spilled)


def test_the_difference_is_counted_as_compute_and_nothing_else_moves():
    [before], [after] = (
        planned({}, gpus=[98304]),
        planned({"m0": Correction({"GPU0": MIB, "host": 2 * MIB})}, gpus=[98304]),
    )
    assert after.argv == before.argv
    assert after.ledger[0].compute_bytes == before.ledger[0].compute_bytes + MIB
    assert used(after) == {"GPU0": used(before)["GPU0"] + MIB, "host": used(before)["host"] + 2 * MIB}
    assert after.ledger[0].free_bytes == before.ledger[0].free_bytes - MIB
    assert after.host_bytes == before.host_bytes + 2 * MIB


def test_more_on_the_host_than_it_has_is_refused():
    [result] = planned({"m0": Correction({"host": 64 * GIB})})
    assert isinstance(result, Refusal)
    assert result.device == "host"
    assert result.needed_bytes > result.available_bytes


def test_a_correction_of_an_instance_changes_only_the_capacity_left_for_the_next():
    two = planning.settings({"context_tokens": 4096}, {"context_tokens": 4096})
    before = planned({}, layout="Llama-3.2-3B", settings=two, gpus=[24564])
    after = planned({"m0": Correction({"GPU0": GIB})}, layout="Llama-3.2-3B", settings=two, gpus=[24564])
    assert used(after[1]) == used(before[1])
    assert after[1].ledger[0].capacity_bytes == before[1].ledger[0].capacity_bytes - GIB
