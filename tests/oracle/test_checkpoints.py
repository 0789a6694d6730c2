"""Compare size and number of a real llama-server's context checkpoints with the plan's upper bounds.

More cases: bench/results/checkpoints.csv.
"""

import pytest

from bench.checkpoints import PRINTED_MIB, SLOT_TOKENS, Case, made
from llamafleet.memory.checkpoints import checkpoint_bytes
from llamafleet.memory.context import Context
from llamafleet.model.gguf import read_path
from llamafleet.model.shape import Shape
from llamafleet.planner.plan import plan_host
from sandbox import models
from tests import planning
from tests.planning import MIB

pytestmark = pytest.mark.oracle
RECORDS_MIB = 0.005  # counted for the records beside the copied rows
CASES = {
    "windows": Case("windowed", Context(SLOT_TOKENS, 1, "f16", 64)),
    "windows, q8_0, slots that share a cache": Case("windowed", Context(SLOT_TOKENS, 4, "q8_0", 64, unified=True)),
    "windows, no flash attention": Case("windowed", Context(SLOT_TOKENS, 2, "f16", 64, flash_attention=False)),
    "a context no larger than the window": Case("windowed", Context(256, 2, "f16", 64)),
    "state beside attention": Case("hybrid", Context(SLOT_TOKENS, 2, "f16", 64)),
    "state alone": Case("recurrent", Context(SLOT_TOKENS, 1, "f16", 64)),
}


SHORT = ("windows", "state beside attention")  # the others in `make test-long`


@pytest.mark.parametrize(
    "name", [name if name in SHORT else pytest.param(name, marks=pytest.mark.long) for name in CASES]
)
def test_a_checkpoint_takes_what_is_planned_and_never_more(name, tmp_path):
    case = CASES[name]
    planned, full = case.planned_mib(tmp_path), case.context.tokens - 1
    checkpoints = case.made(tmp_path, [100, full])
    assert {checkpoint.slot for checkpoint in checkpoints} == set(range(case.context.slots))
    largest = max(checkpoint.mib for checkpoint in checkpoints)
    assert largest - PRINTED_MIB / 2 <= planned
    last_tokens = 5 / case.context.tokens * planned  # the last tokens of a prompt come after its last checkpoint
    assert planned <= largest + PRINTED_MIB / 2 + RECORDS_MIB + last_tokens


def test_all_slots_together_keep_no_more_checkpoints_than_the_plan_counts(tmp_path):
    model, given_mib = models.tiny(tmp_path, "windowed"), 4
    header = read_path(model)
    limits = {"slots": 3, "context_tokens": SLOT_TOKENS, "threads": 1, "ubatch_tokens": 64}
    plans = []
    for mib in (0, given_mib):
        settings = planning.settings({**limits, "context_checkpoints_mib": mib, "prompt_cache_mib": 0})
        plans += plan_host(planning.machine(ram_gib=16), [(settings.models[0], header)], settings)
    counted_mib = (plans[1].host_bytes - plans[0].host_bytes) / MIB
    kept_mib, checkpoints = {}, made(model, plans[1].argv, 3, [500, 900, 1300, 1700, 2000])
    for checkpoint in checkpoints:
        kept_mib[checkpoint.slot] = checkpoint.number * checkpoint.mib
        assert checkpoint.number <= checkpoint.most == plans[1].checkpoints
        rounding_mib = len(kept_mib) * checkpoint.number * PRINTED_MIB / 2
        assert sum(kept_mib.values()) - rounding_mib <= counted_mib <= given_mib
    assert len(checkpoints) > 3 * plans[1].checkpoints > 3  # more were made than kept, and several for each slot
    assert len(kept_mib) == 3 and sum(kept_mib.values()) > 0.99 * counted_mib
    assert counted_mib == pytest.approx(
        6 * checkpoint_bytes(Shape.of(header), Context(SLOT_TOKENS, 3, "f16", 64)) / MIB
    )
