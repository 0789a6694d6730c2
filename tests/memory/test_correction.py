"""What the binary said of a plan is in the next one: in its ledger and in its choice."""

from llamafleet.memory.ledger import Adjustment
from llamafleet.planner.result import Refusal
from tests import planning
from tests.planning import MIB

ASKED = planning.settings({"context_tokens": 8192})
GIB = 1024 * MIB


def planned(adjustments, *, gpus=(16376,), layout="gpt-oss-120b", asked=ASKED, **machine):
    return planning.plans(planning.machine(list(gpus), **machine), [(layout,)] * len(asked.models), asked, adjustments)


def used(answer):
    return {row.device: row.used_bytes for row in answer.ledger}


def test_more_on_the_gpu_moves_experts_to_the_host():
    [before], [after] = planned({}), planned({"m0": Adjustment({"GPU0": 4 * GIB})})
    assert len(after.placement.spilled) > len(before.placement.spilled)
    assert after.ledger[0].free_bytes >= 0


def test_less_on_the_gpu_brings_experts_back():
    [before], [after] = planned({}), planned({"m0": Adjustment({"GPU0": -3 * GIB})})
    assert len(after.placement.spilled) < len(before.placement.spilled)


def test_the_difference_is_counted_as_compute_and_nothing_else_moves():
    [before], [after] = (
        planned({}, gpus=[98304]),
        planned({"m0": Adjustment({"GPU0": MIB, "host": 2 * MIB})}, gpus=[98304]),
    )
    assert after.argv == before.argv
    assert after.ledger[0].compute_bytes == before.ledger[0].compute_bytes + MIB
    assert used(after) == {"GPU0": used(before)["GPU0"] + MIB, "host": used(before)["host"] + 2 * MIB}
    assert after.ledger[0].free_bytes == before.ledger[0].free_bytes - MIB
    assert after.host_bytes == before.host_bytes + 2 * MIB


def test_more_on_the_host_than_it_has_is_refused():
    [answer] = planned({"m0": Adjustment({"host": 64 * GIB})})
    assert isinstance(answer, Refusal)
    assert answer.device == "host"
    assert answer.needed_bytes > answer.available_bytes


def test_what_was_said_of_one_instance_touches_the_next_only_by_the_room_it_leaves():
    two = planning.settings({"context_tokens": 4096}, {"context_tokens": 4096})
    before = planned({}, layout="Llama-3.2-3B", asked=two, gpus=[24564])
    after = planned({"m0": Adjustment({"GPU0": GIB})}, layout="Llama-3.2-3B", asked=two, gpus=[24564])
    assert used(after[1]) == used(before[1])
    assert after[1].ledger[0].capacity_bytes == before[1].ledger[0].capacity_bytes - GIB
