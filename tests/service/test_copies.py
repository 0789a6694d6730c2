"""Copies as services of their own: units, ports, plans, and what a change of their number does."""

import dataclasses
import json

from llamafleet.host.recorded import PlanRecord
from llamafleet.planner.copies import with_copies
from llamafleet.service.changes import changes_needed
from llamafleet.service.succession import handovers
from tests import planning
from tests.service.test_changes import INSTANCE
from tests.service.test_desired import decide, reading, survey

TWO = [24564, 24564]
CUDA = {"driver": {"nvidia": "580.159.04", "cuda": "13.0"}}


def decided(read, copies, **model):
    settings, read, files = reading(read, models=[{"name": "m", "port": 8080, "copies": copies, **model}])
    expanded = with_copies(settings, read.machine)
    return decide(expanded, read, dict.fromkeys((one.name for one in expanded.models), next(iter(files.values()))))


def installed(desired, **other):
    """The same host with what was decided installed and running."""
    there = {
        one.name: dataclasses.replace(
            INSTANCE, active="active", record=PlanRecord.of(dict(one.record)), argv=one.service.argv
        )
        for one in desired.servings
    }
    return dataclasses.replace(
        desired.inputs.survey, installed=dataclasses.replace(desired.installed, instances=there, **other)
    )


def test_a_copy_for_each_gpu_is_a_unit_with_a_port_and_a_gpu_of_its_own():
    desired = decided(survey(TWO, CUDA), "per_gpu")
    found = [(one.service.unit, one.instance.port, [gpu.uuid for gpu in one.plan.gpus]) for one in desired.servings]
    assert found == [("llama-server-m-1.service", 8080, ["GPU-0"]), ("llama-server-m-2.service", 8081, ["GPU-1"])]
    for one in desired.servings:
        gate = json.loads(one.service.plan_json)["gate"]
        assert gate["url"].endswith(str(one.instance.port)) and gate["unit"] == one.service.unit
        assert planning.argument(one.service.argv, "--port") == str(one.instance.port)
        assert planning.argument(one.service.argv, "--alias") == one.name
    assert len({one.folder for one in desired.servings}) == 1  # downloaded once


def test_one_more_copy_leaves_the_others_alone():
    cpu = survey()
    two = decided(cpu, 2)
    three = decided(installed(two), 3)
    changes = changes_needed(three, three.installed)
    assert "m-3" in changes.services and changes.removed == ()
    assert [one.plan.argv for one in three.servings[:2]] == [one.plan.argv for one in two.servings]
    assert [one.service.identity for one in three.servings[:2]] == [one.service.identity for one in two.servings]


def test_a_copy_less_leaves_with_the_highest_number():
    two = decided(survey(), 3)
    changes = changes_needed(after := decided(installed(two), 2), after.installed)
    assert changes.removed == ("m-3",)


def test_between_one_and_two_the_first_takes_the_port_in_one_switch():
    one = decided(survey(), 1)
    assert [serving.name for serving in one.servings] == ["m"]
    two = decided(installed(one), 2)
    changes = changes_needed(two, two.installed)
    assert changes.removed == ("m",) and set(changes.services) == {"m-1", "m-2"}
    first = next(switch for switch in handovers(two, changes) if "m-1" in switch.names)
    assert first.leaving == ("m",)  # comes back where m-1 fails
    back = decided(installed(two), 1)
    changes = changes_needed(back, back.installed)
    assert changes.removed == ("m-1", "m-2")
    [switch] = handovers(back, changes)
    assert switch.names == ("m",) and "m-1" in switch.leaving
