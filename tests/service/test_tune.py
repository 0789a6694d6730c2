"""What of a host is measured and why, what the host is asked for it, and the record of what it told."""

import dataclasses
import json

import pytest

from llamafleet.host.learned import MeasuredSpeeds, measurements
from llamafleet.planner.result import Refusal
from llamafleet.service import tune
from llamafleet.service.desired import desire
from llamafleet.service.plan_inputs import plan_inputs
from llamafleet.tuning.race import Batch, Verdict
from llamafleet.tuning.rates import tuned_speeds
from llamafleet.tuning.record import Tuned, stale
from llamafleet.tuning.search import Course
from tasks.lib.templates import render
from tests.planner.test_vectors import header
from tests.planning import argument
from tests.service.test_changes import INSTANCE
from tests.service.test_desired import RUN, decided, reading, survey
from tests.service.test_measured import KV, record

STOPPED = dataclasses.replace(INSTANCE, active="inactive")
MEASURES = {"tune": "missing"}


def wish(read=None, *, as_set=True, models=(KV,), **asked):
    [one] = tune.wishes(decided(read, models=models, **{**MEASURES, **asked}), as_set=as_set)
    return one.is_measured, one.why


# --- which instances ------------------------------------------------------------------------------


def test_without_the_setting_a_deploy_measures_nothing_and_says_nothing():
    assert tune.wishes(decided(models=(KV,)), as_set=True) == ()
    [one] = tune.wishes(decided(models=(KV,)), as_set=False)  # the stage alone does
    assert one.is_measured


def test_what_was_never_measured_is():
    assert wish() == (True, "it was not measured yet; for 20 minutes at most")
    assert wish(survey(instances={"m0": STOPPED})) == (True, "it was not measured yet; for 20 minutes at most")


def test_what_was_measured_is_not_measured_again_unless_it_is_to_be_always():
    read = survey(tuned={"m0": record({"threads": 2})})
    assert wish(read) == (False, "it was measured already")
    assert wish(read, as_set=False) == (
        False, 'it was measured already: set tune = "always" to measure it again, or remove the record'
    )  # fmt: skip
    assert wish(read, tune="always") == (True, 'tune is "always"; for 20 minutes at most')


def test_what_no_longer_holds_is_measured_again_with_the_reason():
    read = survey(tuned={"m0": record({"threads": 2}, survey(machine={"ram_gib": 32}))})
    assert wish(read, tune_minutes=5) == (
        True, "another amount of RAM: 32.0 GiB before, 64.0 GiB now; for 5 minutes at most"
    )  # fmt: skip


@pytest.mark.parametrize("there", [{"active": "active"}, {"active": "inactive", "socket": "active"}])
def test_a_service_that_runs_is_left_alone_unless_it_may_be_stopped(there):
    read = survey(instances={"m0": dataclasses.replace(INSTANCE, **there)})
    why = "its service runs, and is not stopped for it: set tune_stops_service = True"
    assert wish(read) == wish(read, as_set=False) == (False, why)
    assert wish(read, tune_stops_service=True) == (
        True, "it was not measured yet; for 20 minutes at most, its service stopped"
    )  # fmt: skip
    said = wish(read, tune_stops_service=True, tune_window="02:00-05:00")[1]
    assert said.endswith("its service stopped within 02:00-05:00")


def test_the_lines_name_the_instances():
    found = tune.wishes(decided(models=(KV, {}), **MEASURES), as_set=True)
    assert list(tune.in_lines(found))[1] == "to do: measure m1: it was not measured yet; for 20 minutes at most"
    assert list(tune.in_lines([tune.Wish("m0", False, "why")])) == ["m0 is not measured: why"]


# --- what the host is asked -----------------------------------------------------------------------


def subject(read=None, name="m0", models=(KV,), run=RUN, **asked):
    return tune.subject(with_units(read or survey(), models, run, **asked), name)


def with_units(read, models=(KV,), run=RUN, **asked):
    """As `decided`, with real units."""
    settings, read, files = reading(read, models, **{**MEASURES, **asked})
    return desire(plan_inputs(settings, read, files), run, render)


def trial(candidate, seconds=2.0, took=4.0, stage=1, **more):
    return {"id": 0, "candidate": candidate, "label": "x", "stage": stage, "error": None, "seconds": seconds,
            "took_seconds": took, "prompt_tokens_per_s": 100.0, "decode_tokens_per_s": 10.0, **more}  # fmt: skip


def spec(one, trials=(), text=None, numbers=None):
    measured = tune.measured(trials)
    now = one.course(measured)
    return tune.spec(one, now, numbers or one.batch(now.step, measured), measured, render, run="r1", text=text)


def test_first_the_baseline_and_the_plan_are_measured_then_as_many_as_there_is_time_for():
    one = subject()
    assert [each["candidate"] for each in spec(one)["trials"]] == [0, 1]
    few = one.course(tune.measured([trial(0, took=200.0), trial(1, took=100.0)])).candidates
    many = one.course(tune.measured([trial(0), trial(1)])).candidates
    assert len(few) == 2 and len(many) == len(one.found) > 2


def test_the_trials_are_numbered_behind_those_that_are_measured_and_have_their_own_limits():
    one = subject(tune_minutes=10)
    asked = spec(one, [trial(0), trial(1, took=9.0)])
    assert [each["id"] for each in asked["trials"]] == list(range(2, len(asked["trials"]) + 2))
    assert (asked["trial_seconds"], asked["budget_seconds"]) == (36.0, 600.0) and spec(one)["trial_seconds"] == 180.0
    assert (asked["stops"], asked["window"], asked["run"], asked["text"]) == (False, None, "r1", None)


def test_a_batch_takes_about_a_minute():
    one = subject()
    step = Batch(tuple(range(12)), 1)
    assert one.batch(step, tune.measured([trial(0, took=10.0)] * 2)) == tuple(range(6))
    assert one.batch(step, tune.measured([trial(0, took=300.0)] * 2)) == (0, 1)


def test_command_lines_are_those_of_the_service_without_its_address_and_keys():
    one = subject(models=({**KV, "api_key_file": "/keys", "sleep_idle_seconds": 60},))
    shipped, planned = spec(one)["trials"]
    assert planned["argv"][0] == shipped["argv"][0] == f"{one.desired.build.release}/bin/llama-server"
    assert argument(planned["argv"], "--port") == "{port}" and argument(planned["argv"], "--host") == "{host}"
    assert not {"--api-key-file", "--sleep-idle-seconds"} & {*planned["argv"], *shipped["argv"]}
    assert argument(planned["argv"], "--fit") == "off" and argument(shipped["argv"], "--fit") is None
    assert argument(shipped["argv"], "--model") == argument(planned["argv"], "--model") is not None


def lines(of, name):
    return [line for line in of["directives"] if line.startswith(name + "=")]


def test_directives_are_those_of_the_unit_with_each_candidate_s_own_memory_and_cpus():
    hybrid = {"performance_cpus": "0-11"}
    one = subject(survey(machine={"cpu": hybrid}))
    numbers = tuple(range(len(one.found)))
    asked = spec(one, [trial(0), trial(1)], numbers=numbers)
    assert lines(asked["trials"][1], "CPUAffinity") == ["CPUAffinity=0-11"] != lines(asked["trials"][0], "CPUAffinity")
    limits = [lines(each, "MemoryMax")[0] for each in asked["trials"]]
    assert int(limits[0].partition("=")[2]) > 64 * 2**30 > int(limits[1].partition("=")[2])
    for name in ("User", "NoNewPrivileges", "SystemCallFilter", "ProtectSystem", "Environment"):
        assert lines(asked["trials"][1], name), name
    assert not [line for line in asked["trials"][1]["directives"] if line.startswith(("[", "WantedBy"))]


def test_what_the_preflight_dropped_on_this_host_is_left_out():
    there = dataclasses.replace(STOPPED, preflight={"dropped": [{"directives": ["PrivateUsers=yes"], "why": "x"}, 7]})
    asked = spec(subject(survey(instances={"m0": there})))
    assert not lines(asked["trials"][1], "PrivateUsers") and lines(spec(subject())["trials"][1], "PrivateUsers")


def test_prompt_files_come_from_the_tune_s_own_folder():
    run = dataclasses.replace(RUN, secrets={"m0": {"chat-template": "{{ x }}", "api-keys": "k"}})
    one = subject(models=({**KV, "chat_template_file": "/t", "api_key_file": "/keys"},), run=run)
    assert tune.texts(one.tuning.asked, run.secrets["m0"]) == {"/var/lib/llamafleet/tune/m0/chat-template": "{{ x }}"}
    asked = spec(one)["trials"][1]
    assert "LoadCredential=chat-template:/var/lib/llamafleet/tune/m0/chat-template" in asked["directives"]
    assert argument(asked["argv"], "--chat-template-file") == "{credentials}/chat-template"


def test_the_workload_ends_within_the_context():
    one = subject(models=({"context_tokens": 4096, "prompt_tokens": 1000, "reply_tokens": 200, "live_tokens": 4096},))
    assert spec(one)["workload"] == {"prompt": 1000, "reply": 200, "depth": 4096 - 1200 - 16, "concurrency": 1}
    one = subject(models=({"context_tokens": 4096, "prompt_tokens": 100, "reply_tokens": 200, "live_tokens": 1000},))
    assert spec(one)["workload"]["depth"] == 800
    shared = {"context_tokens": 4096, "kv_unified": True, "pool_tokens": 4096, "concurrency": 4, "prompt_tokens": 300,
              "reply_tokens": 300, "live_tokens": 4096}  # fmt: skip
    assert spec(subject(models=(shared,)))["workload"]["depth"] == 1024 - 600 - 16


def test_a_server_of_embeddings_is_measured_as_such():
    settings, read, files = reading(None, ({"serves": "embedding"},), **MEASURES)
    files["m0"] = dataclasses.replace(files["m0"], header=header("bge-m3"))
    one = tune.subject(desire(plan_inputs(settings, read, files), RUN, render), "m0")
    assert spec(one)["serves"] == "embedding" and spec(one)["workload"]["reply"] == 0


def test_the_baseline_guesses_nothing_whatever_the_operator_chose():
    one = subject(models=({**KV, "speculation": "ngram"},))
    shipped, planned = spec(one)["trials"]
    assert "--spec-type" in planned["argv"] and not [word for word in shipped["argv"] if word.startswith("--spec")]


def test_the_key_is_of_what_is_measured_on_and_of_the_candidates():
    one = subject()
    assert one.key == subject(tune_minutes=1).key != subject(models=({},)).key
    assert one.key != subject(survey(machine={"ram_gib": 32})).key
    again = subject(survey(tuned={"m0": record({"threads": 2})}), tune="always")
    assert again.key != one.key and len(again.found) == len(one.found)


def test_an_instance_is_measured_as_the_operator_wrote_it_beside_others_as_they_are_served():
    models = (KV, KV)
    read = survey(tuned={name: record({"threads": 2}, models=models, of=n) for n, name in enumerate(("m0", "m1"))})
    one = subject(read, models=models, tune="always")
    mine, other = one.desired.settings.models
    assert (mine.threads, other.threads) == (None, 2)
    assert not isinstance(one, Refusal) and argument(one.found[1].plan.argv, "--threads") != "2"


# --- the record -----------------------------------------------------------------------------------


def recorded(step, trials, one=None):
    one = one or subject()
    made = tune.record(one, Course(one.found, step, 50), trials, 7.0)
    return made and Tuned.of(json.loads(json.dumps(made)))


def test_the_record_has_the_winner_with_its_gain_and_holds_where_it_was_measured():
    one = subject()
    trials = [trial(0, 3.0), trial(2, 2.0), trial(0, 3.2), trial(2, None, error="it crashed"), trial(2, 2.2)]
    found = recorded(Verdict(2, 1.5, 1.4, 1.6, "faster in 6 pairs"), trials, one)
    assert found.settings == dict(one.found[2].settings) and found.winner.label == one.found[2].label
    assert (found.winner.gain, found.winner.low, found.winner.high) == (1.5, 1.4, 1.6)
    assert found.winner.seconds == pytest.approx(2.1) and found.raw["baseline"]["seconds"] == pytest.approx(3.1)
    assert stale(found, one.tuning.fingerprint) == () and len(found.raw["trials"]) == 5
    assert found.ended == 7.0 and found.raw["budget_minutes"] == 20


def test_where_nothing_is_faster_the_plan_is_recorded_and_said_to_be_no_faster():
    found = recorded(Verdict(0, 1, 0.97, 1.01, "no gain that is worth a change"), [trial(0, 3.0), trial(1, 3.0)])
    assert found.settings == {} and found.winner.gain == 1.0 and found.winner.label == "the plan"


def test_a_baseline_that_does_not_run_has_no_ratio():
    found = recorded(Verdict(2, float("inf"), float("inf"), float("inf"), "the baseline does not run"), [trial(2)])
    assert (found.winner.gain, found.winner.low, found.winner.high) == (None, None, None)


def test_the_record_says_what_was_expected_of_the_plan_by_which_rates():
    one = subject()
    figures = {"decode_tokens_per_s": 5.0, "prompt_tokens_per_s": 50.0}
    trials = [{**trial(1, 3.0), **figures}, {**trial(2, 1.0), **figures}, {**trial(1, 3.0), **figures}]
    found = recorded(Verdict(2, 1.5, 1.4, 1.6, "faster in 6 pairs"), trials, one)
    [speeds] = tuned_speeds(one.desired.machine, {"m0": found.raw}, {})
    assert speeds == MeasuredSpeeds("m0", 5.0, 50.0, one.found[1].plan.at_work)
    assert one.desired.inputs.measured() == measurements(None, [])  # before it lies on the host
    later = decided(survey(tuned={"m0": dict(found.raw)}), models=(KV,), **MEASURES)
    assert later.inputs.measured() == measurements(None, [], [speeds]) != measurements(None, [])


def test_what_the_budget_had_no_time_for_is_told_with_the_minutes_that_would_do():
    one = subject(models=({**KV, "threads": None},), tune_minutes=20)
    # A trial takes two minutes: of ten, in four rounds and as many trials for the final, one is less than the least.
    trials = [trial(0, 3.0, took=110.0), trial(1, 3.0, took=120.0)]
    some = one.course(tune.measured(trials)).candidates
    left = tune.without_time(one, Course(some, Verdict(0, 1, 1, 1, ""), 10), trials)
    assert [each.label for each in left] == [each.label for each in one.found[len(some) :]] != []
    minutes = 2 * 4 * 2 * (len(some) + 1)
    assert left[0].why == f"tune_minutes = 20 has no time for it; about {minutes} would do"
    enough = subject(models=({**KV, "threads": None},), tune_minutes=minutes)
    assert len(enough.course(tune.measured(trials)).candidates) == len(some) + 1
    made = tune.record(one, Course(some, Verdict(0, 1, 1, 1, ""), 10), trials, 7.0)
    assert {"label": left[0].label, "why": left[0].why} in made["not_run"]
    assert tune.without_time(one, Course(one.found, Verdict(0, 1, 1, 1, ""), 10), trials) == []


def test_what_never_ran_is_not_recorded():
    assert recorded(Verdict(0, 1, 1, 1, "no candidate runs"), [trial(0, None), trial(1, None)]) is None
