"""What is known of a host for a report: planned where it can be, else as installed; with the record of its tune."""

import dataclasses
import json

import pytest

from llamafleet.cli.report import page
from llamafleet.cli.reported import host_facts, not_read
from llamafleet.cli.status import of_host
from llamafleet.host.learned import GatedSpeed
from llamafleet.host.recorded import PlanRecord
from llamafleet.service.changes import changes_needed
from llamafleet.service.desired import desire
from llamafleet.service.plan_inputs import plan_inputs
from llamafleet.tuning.records import Kept
from tasks.lib.state import wanted
from tests.service.test_changes import INSTANCE
from tests.service.test_desired import RUN, decided, reading, survey
from tests.service.test_measured import KV, record
from tests.tuning.test_record import value

NOBODY = Kept()


def facts(read, kept=NOBODY, *, planned=True, name="box1"):
    """Of a host with one instance, m0, and its facts."""
    desired = planned_with(read, kept) if planned else None
    status = of_host(read.installed, {}, wanted(desired, changes_needed(desired, read.installed)) if planned else None)
    found = host_facts(name, status, read, desired, kept)
    assert page("x", {name: found}, 0.0).lines[0].instance == "m0"
    return found.instances[0], found


def planned_with(read, kept):
    settings, read, files = reading(read, (KV,))
    return desire(plan_inputs(settings, read, files, kept), RUN, lambda template, values: template)


def installed(read=None, **changes):
    """A survey of a host that has m0 as it is planned, with changes of its plan.json."""
    [serving] = decided(read or survey(), models=(KV,)).servings
    value = {**json.loads(serving.service.plan_json), **changes}
    return survey(instances={"m0": dataclasses.replace(INSTANCE, record=PlanRecord.of(value))})


def with_trials(value, label="as it ships"):
    trial = {"candidate": 0, "label": label, "seconds": 2.0, "error": None}
    return {**value, "trials": [trial]}


def test_a_planned_instance_has_its_plan_its_reasons_and_its_predictions():
    [serving] = decided(survey(), models=(KV,)).servings
    one, found = facts(survey())
    assert (one.argv, one.ledger, one.why) == (serving.plan.argv, serving.plan.ledger, serving.plan.why)
    assert one.work.live_tokens > 0 and len(one.curves.by_depth) == 9 and one.source == serving.instance.source
    assert one.measured is None and one.gated is None and found.machine == survey().machine
    assert one.status.state == "not installed"


def test_without_a_plan_the_installed_one_is_shown():
    read = installed()
    read = dataclasses.replace(
        read, installed=dataclasses.replace(read.installed, gated={"m0": GatedSpeed(31.0, 200.0)})
    )
    planned, _ = facts(read)
    one, _ = facts(read, planned=False)
    assert (one.argv, one.ledger) == (planned.argv, planned.ledger) and one.ledger
    assert one.curves is None and one.work is None and one.why == ()
    assert one.gated == planned.gated == GatedSpeed(31.0, 200.0)


def test_a_query_of_an_address_is_not_shown():
    read = survey()
    desired = decided(read, models=({**KV, "source": "https://x.example/m.gguf?token=hidden", "sha256": "a" * 64},))
    status = of_host(read.installed, {}, wanted(desired, changes_needed(desired, read.installed)))
    found = host_facts("box1", status, read, desired, NOBODY)
    assert found.instances[0].source == "https://x.example/m.gguf"


@pytest.mark.parametrize(
    "ledger",
    [None, 5, {}, [5], [{}], [{"device": "host"}], "text", [None], "huge", "many"],
)  # fmt: skip
def test_a_damaged_ledger_is_left_out(ledger):
    good = json.loads(decided(survey(), models=(KV,)).servings[0].service.plan_json)["plan"]
    if ledger == "huge":
        ledger = [{**good["ledger"][0], "weights_bytes": 10**400}]
    if ledger == "many":
        assert len(facts(installed(plan={**good, "ledger": good["ledger"] * 1000}), planned=False)[0].ledger) == 257
        return
    one, _ = facts(installed(plan={**good, "ledger": ledger}), planned=False)
    assert one.ledger == ()


def test_a_record_that_is_planned_with_holds():
    read = survey(tuned={"m0": record({"threads": 2})})
    one, _ = facts(read)
    assert one.measured.stale == () and one.measured.where == "" and one.measured.record.settings == {"threads": 2}
    assert one.why[0].startswith("measured here")


def test_trials_come_from_the_operator_s_copy():
    """What a host says of its records has none."""
    kept_value = with_trials(record({"threads": 2}))
    told = {key: value for key, value in kept_value.items() if key != "trials"}
    kept = Kept.of({"box1": ("tuned/box1.json", {"m0": kept_value})})
    one, _ = facts(survey(tuned={"m0": told}), kept)
    assert one.measured.record.raw["trials"] == kept_value["trials"]
    other = Kept.of({"box1": ("tuned/box1.json", {"m0": {**kept_value, "ended": 2.0}})})
    own, _ = facts(survey(tuned={"m0": {**told, "ended": 5.0}}), other)
    assert own.measured.record.ended == 5.0 and "trials" not in own.measured.record.raw


def test_the_record_of_another_host_is_named():
    kept = Kept.of({"gpu2": ("tuned/gpu2.json", {"m0": with_trials(record({"threads": 2}))})})
    one, _ = facts(survey(), kept)
    assert one.measured.where == "on gpu2" and one.measured.stale == () and one.measured.record.raw["trials"]


@pytest.mark.parametrize("place", ["host", "operator"])
def test_an_own_record_that_no_longer_holds_says_what_differs(place):
    then = record({"threads": 2}, survey(machine={"ram_gib": 32}))
    read = survey(tuned={"m0": then} if place == "host" else {})
    kept = Kept.of({"box1": ("tuned/box1.json", {"m0": then})} if place == "operator" else {})
    one, _ = facts(read, kept)
    assert one.measured.stale == ("another amount of RAM: 32.0 GiB before, 64.0 GiB now",)
    assert one.argv == decided(survey(), models=(KV,)).servings[0].plan.argv


def test_where_the_host_cannot_be_planned_nobody_knows_whether_its_record_holds():
    read = installed()
    read = dataclasses.replace(
        read, installed=dataclasses.replace(read.installed, tuned={"m0": record({"threads": 2})})
    )
    one, _ = facts(read, planned=False)
    assert one.measured.stale is None and one.measured.record.settings == {"threads": 2}


def test_damaged_records_are_named_and_hide_nothing():
    kept = Kept.of({"box1": ("tuned/box1.json", None)})
    one, found = facts(survey(tuned={"m0": {"schema": 1}}), kept)
    assert one.measured is None and "is damaged" in one.problems[0]
    assert found.status.problems == ("tuned/box1.json is damaged: its records are not used; restore or remove it",)


def test_a_host_that_was_not_read_has_the_operator_s_records():
    kept = Kept.of({"box1": ("tuned/box1.json", {"chat": value(), "code": value()})})
    found = not_read("box1", "cannot be reached", kept)
    assert [one.name for one in found.instances] == ["chat", "code"] and found.status.problem == "cannot be reached"
    assert all(one.measured.stale is None and one.status is None for one in found.instances)
    assert not_read("box2", "cannot be reached", kept).instances == ()
