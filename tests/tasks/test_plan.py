"""What a run says of a host before anything is changed: a line where it is as planned, plans where something is new."""

from __future__ import annotations

import dataclasses
import json

import pytest

from llamafleet.host.installed import InstalledInstance
from llamafleet.host.learned import GatedSpeed
from llamafleet.host.left import Left
from llamafleet.host.recorded import PlanRecord
from llamafleet.service.changes import Changes
from tasks.lib.decision import Decision
from tasks.plan import lines
from tests.service.test_changes import INSTANCE
from tests.service.test_desired import decided, survey

NOTHING = Changes(helpers=False, user=False, packages=(), toolkit=False, build=False, models={}, services={}, refreshed={},
                  liveness={}, removed=(), current=False, paths={})  # fmt: skip
GATED = GatedSpeed(30.16, 151.2)
PREDICTED, MEASURED = "predicted", "measured by its gate: 30.2 tokens/s written, 151 read"


def installed(desired, **changed) -> InstalledInstance:
    record = json.loads(desired.servings[0].service.plan_json)
    return dataclasses.replace(INSTANCE, record=PlanRecord.of({**record, **changed}))


@pytest.fixture
def host():
    """A host that serves m0 as planned, with what its gate measured; the second: what would be printed there."""
    there = installed(decided())

    def said(*, gated=GATED, everything=False, record=there, left=Left(), **changes):
        read = survey(instances={"m0": record}, gated={"m0": gated} if gated else {}, left=left)
        now = Decision(decided(read), dataclasses.replace(NOTHING, **changes))
        return list(lines(now, "gpu1", "10.0.0.7", everything=everything))

    return said


def test_a_host_without_changes_has_one_line_with_what_was_measured(host):
    assert host() == [
        "nothing to do: everything is as planned: m0 at http://127.0.0.1:9000 (30.2 tokens/s written, 151 read, measured)"
    ]
    assert host(gated=None) == ["nothing to do: everything is as planned: m0 at http://127.0.0.1:9000"]


def test_all_plans_are_printed_where_that_is_asked_for(host):
    table, line, why = host(everything=True)
    assert table.startswith("m0 on gpu1\n") and MEASURED in table and PREDICTED not in table
    assert line.startswith("nothing to do: ") and why == "kept: the same inputs give the installed plan"


def test_the_plan_of_an_instance_that_is_new_or_changed_is_printed(host):
    table, _, to_do = host(services={"m0": ("it is failed",)})
    assert table.startswith("m0 on gpu1\n") and to_do == "to do: serve m0: it is failed"


def test_what_changes_beside_the_plans_prints_none(host):
    assert host(liveness={"m0": ("its liveness timer is inactive",)}) == [
        "kept: the same inputs give the installed plan",
        "to do: install the liveness check of m0: its liveness timer is inactive",
    ]


def test_another_plan_than_the_gate_s_has_its_prediction(host):
    plan = json.loads(decided().servings[0].service.plan_json)["plan"]
    by_inputs = installed(decided(models=({"context_tokens": 8192},)))
    by_flags = installed(decided(), plan={**plan, "argv": [*plan["argv"], "--poll", "0"]})
    for other in (by_inputs, by_flags):
        table = host(everything=True, record=other)[0]
        assert MEASURED not in table and PREDICTED in table


def test_what_is_left_to_do_is_said_where_nothing_is_changed_and_else_at_the_end(host):
    left = Left(reboot="packages want a reboot")
    assert host(left=left)[1:] == ["left to do: reboot the host: packages want a reboot"]
    assert not [line for line in host(left=left, services={"m0": ("it is failed",)}) if "left to do" in line]
