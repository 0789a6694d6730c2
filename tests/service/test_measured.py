"""What a host serves with what tunes measured: the record's settings in the command line, and the same build."""

import dataclasses
import json

from llamafleet.host.recorded import PlanRecord
from llamafleet.service.changes import changes_needed
from llamafleet.service.measured import chance, fingerprint, to_json, with_commit
from llamafleet.service.plan_inputs import plan_inputs
from llamafleet.tuning.records import Kept
from tests.planning import argument
from tests.service.test_changes import INSTANCE
from tests.service.test_desired import RUN, decide, decided, reading, survey
from tests.tuning.test_record import value

KV = {"kv_types": ["f16", "q8_0"]}


def record(settings, read=None, models=(KV,), of=0, **asked):
    """What a tune of the instance would have recorded on this host."""
    settings_, read, files = reading(read, models, **asked)
    inputs = plan_inputs(settings_, read, files)
    build = decide(settings_, read, files).build.key
    return value(settings, of=fingerprint(inputs, settings_.models[of], build))


def with_record(settings, models=(KV,), read=None, **asked):
    read = read or survey()
    there = {"m0": record(settings, read, models, **asked)}
    installed = dataclasses.replace(read.installed, tuned=there)
    return decided(dataclasses.replace(read, installed=installed), models=models, **asked)


def argv(desired):
    return desired.servings[0].plan.argv


def test_the_record_s_settings_are_planned_and_the_build_is_the_same():
    plain, tuned = decided(models=(KV,)), with_record({"threads": 2, "ubatch_tokens": 256, "kv_types": ["q8_0"]})
    assert argument(argv(tuned), "--threads") == "2" and argument(argv(tuned), "--ubatch-size") == "256"
    assert argument(argv(tuned), "--cache-type-k") == "q8_0" != argument(argv(plain), "--cache-type-k")
    assert tuned.build == plain.build and tuned.build.kv_types == ("f16", "q8_0")
    assert tuned.servings[0].record["inputs"]["key"] != plain.servings[0].record["inputs"]["key"]
    assert tuned.servings[0].service.identity != plain.servings[0].service.identity
    assert tuned.servings[0].plan.why[0].startswith("measured here: 2 threads: 1.50 times as fast as")


def test_without_records_nothing_of_a_plan_differs():
    plain = decided(models=(KV,))
    other = with_record({"threads": 2}, read=survey())
    read = survey(tuned={"gone": record({"threads": 2}, models=({"context_tokens": 8192},))})
    left = decided(read, models=(KV,))
    assert left.servings[0].record == plain.servings[0].record != other.servings[0].record
    assert left.servings[0].service.unit_text == plain.servings[0].service.unit_text
    assert left.inputs.notes == plain.inputs.notes == ()


def test_a_plan_made_with_a_record_is_kept_by_the_next_run():
    tuned = with_record({"threads": 2})
    there = {"m0": dataclasses.replace(INSTANCE, record=PlanRecord.of(json.loads(tuned.servings[0].service.plan_json)))}
    again = with_record({"threads": 2}, read=survey(instances=there))
    assert argv(again) == argv(tuned) and again.why == "kept: the same inputs give the installed plan"
    assert again.servings[0].record == tuned.servings[0].record
    assert changes_needed(again, again.installed).note == ()
    gone = decided(survey(instances=there), models=(KV,))  # the record was removed
    assert argument(argv(gone), "--threads") != "2"


def test_a_record_that_no_longer_holds_is_named_and_the_plan_is_as_without_it():
    stale = record({"threads": 2}, survey(machine={"ram_gib": 32}))
    found = decided(survey(tuned={"m0": stale}), models=(KV,))
    assert argv(found) == argv(decided(models=(KV,)))
    assert found.inputs.notes == (
        "models: m0: tuned: what was measured no longer holds: another amount of RAM: 32.0 GiB before, 64.0 GiB now; "
        "measure again: tasks.tune.tune",
    )
    assert to_json(found.inputs.tunings["m0"])["state"] == "stale"


def test_another_commit_or_workload_makes_it_stale_by_name():
    read = survey(tuned={"m0": record({"threads": 2})})
    [note] = decided(read, dataclasses.replace(RUN, commit="d" * 40), models=(KV,)).inputs.notes
    assert "another build of llama.cpp: " in note
    [note] = decided(read, models=({**KV, "reply_tokens": 77},)).inputs.notes
    assert "another workload: reply_tokens " in note and " 77 now" in note


def test_another_host_s_record_is_used_where_the_host_is_alike():
    kept = Kept.of({"gpu2": ("tuned/gpu2.json", {"other": record({"threads": 2})})})
    settings, read, files = reading(None, (KV,))
    inputs = plan_inputs(settings, read, files, kept)
    planned, unknown = with_commit(inputs, RUN.commit)
    [plan] = planned[1].results
    assert argument(plan.argv, "--threads") == "2" and plan.why[0].startswith("measured on gpu2: ") and not unknown
    assert with_commit(inputs, "d" * 40)[0][1].results[0].argv == inputs.keep_or_replan({}).results[0].argv


def test_a_record_that_does_not_fit_any_more_is_left_out_and_named():
    """As the operator's own setting it would be refused."""
    tuned = with_record({"slots": 64}, models=({**KV, "concurrency": 64},), read=survey(machine={"ram_gib": 12}))
    [note] = tuned.inputs.notes
    assert "models: m0: tuned: what was measured here cannot be planned now (m0: " in note
    assert tuned.inputs.tunings["m0"].state == "unusable" and int(argument(argv(tuned), "--parallel")) < 64


def test_of_several_only_the_one_that_does_not_fit_is_left_out():
    models = ({**KV, "concurrency": 64}, KV)
    read = survey(machine={"ram_gib": 24})
    there = {"m0": record({"slots": 64}, read, models), "m1": record({"threads": 2}, read, models, of=1)}
    found = decided(
        dataclasses.replace(read, installed=dataclasses.replace(read.installed, tuned=there)), models=models
    )
    states = {name: tuning.state for name, tuning in found.inputs.tunings.items()}
    assert states == {"m0": "unusable", "m1": "used"}
    assert argument(found.servings[1].plan.argv, "--threads") == "2"


def test_the_plan_says_what_a_tune_would_try_where_none_is_to_come():
    found = decided(models=(KV,))
    said = chance(found.inputs, found.servings[0].plan)
    assert said.startswith(
        "not measured: `pyinfra INVENTORY tasks.tune.tune` would try other threads, threads for prompts, "
    )
    assert "for 20 minutes at most; whether any serves faster here, only measuring tells" in said
    assert chance(decided(models=(KV,), tune="missing").inputs, found.servings[0].plan) == ""
    guesses = decided(models=({**KV, "speculation": "auto"},))
    assert "speculation" not in chance(guesses.inputs, guesses.servings[0].plan)
    with_text = decided(models=({**KV, "speculation": "auto", "tune_prompt_file": "/prompts"},))
    assert "would try other speculation, threads" in chance(with_text.inputs, with_text.servings[0].plan)
    tuned = with_record({"threads": 2})
    assert chance(tuned.inputs, tuned.servings[0].plan) == ""
