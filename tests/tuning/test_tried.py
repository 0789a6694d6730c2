"""What a record's trials say: speeds beside the baseline, spreads, energy, and what was lost."""

from dataclasses import replace

import pytest

from llamafleet.tuning.record import Tuned
from llamafleet.tuning.tried import NotRun, not_run, tried, why_ended
from tests.reporting import trial
from tests.tuning.test_record import value

SHIPPED, PLAN = (0, "as it ships"), (1, "the plan")


def of(*trials):
    """By label, what a record with these trials says."""
    record = Tuned.of(value())
    return {one.label: one for one in tried(replace(record, raw={**record.raw, "trials": list(trials)}))}


def test_each_trial_is_compared_with_the_baseline_s_nearest():
    """The host becomes twice as slow halfway: beside the nearest baseline the candidate is always twice as fast."""
    found = of(trial(*SHIPPED, 10.0), trial(*PLAN, 5.0), trial(*PLAN, 10.0), trial(*SHIPPED, 20.0))
    assert (found["the plan"].speed.middle, found["the plan"].speed.low, found["the plan"].speed.high) == (2, 2, 2)
    assert (found["the plan"].seconds.low, found["the plan"].seconds.high) == (5, 10)
    base = found["as it ships"].speed  # beside its own median, 15
    assert (base.low, base.middle, base.high) == pytest.approx((0.75, 1.125, 1.5))


def test_a_candidate_that_is_lost_has_its_reason_and_comes_last():
    found = of(trial(*SHIPPED, 10.0), trial(2, "2 slots", None, "out of memory"), trial(*PLAN, 12.0),
               trial(2, "2 slots", None, "it hung"))  # fmt: skip
    assert list(found) == ["as it ships", "the plan", "2 slots"]
    lost = found["2 slots"]
    assert (lost.trials, lost.lost, lost.why_lost, lost.speed, lost.seconds) == (0, 2, "it hung", None, None)
    assert found["the plan"].lost == 0 and found["the plan"].why_lost == ""


def test_the_fastest_comes_first_behind_the_baseline():
    found = of(trial(3, "slow", 20.0), trial(*SHIPPED, 10.0), trial(2, "fast", 4.0), trial(*PLAN, 8.0))
    assert list(found) == ["as it ships", "fast", "the plan", "slow"] and found["as it ships"].is_baseline


def test_without_a_baseline_that_ran_there_are_seconds_and_no_speed():
    found = of(trial(*SHIPPED, None, "it crashed"), trial(*PLAN, 8.0))
    assert found["the plan"].speed is None and found["the plan"].seconds.middle == 8


def test_energy_is_tokens_of_all_requests_by_joules_where_a_meter_was_read():
    metered = {**trial(*PLAN, 8.0), "prompt_tokens": 90, "reply_tokens": 10, "joules": 50.0}
    found = of(trial(*SHIPPED, 10.0), metered)
    assert found["the plan"].tokens_per_joule.middle == 2 and found["as it ships"].tokens_per_joule is None
    record = Tuned.of(value())
    four = replace(record.fingerprint, workload=replace(record.fingerprint.workload, concurrency=4))
    [one] = tried(replace(record, fingerprint=four, raw={"trials": [metered]}))
    assert one.tokens_per_joule.middle == 8


def test_guesses_and_slowed_hosts_are_counted_over_all_trials():
    slowed = {"throttled": None, "gpus": {"GPU-1": {"throttled": "too warm"}}}
    found = of({**trial(*PLAN, 8.0), "drafted": 100, "accepted": 50, "state": slowed},
               {**trial(*PLAN, 8.0), "drafted": 100, "accepted": 70}, trial(*SHIPPED, 9.0))  # fmt: skip
    assert found["the plan"].accepted == 0.6 and found["as it ships"].accepted is None
    assert (found["the plan"].throttled, found["as it ships"].throttled) == (1, 0)


@pytest.mark.parametrize(
    "broken",
    [None, 5, [], {}, {"candidate": -1}, {"label": 5}, {"seconds": "8"}, {"seconds": 0.0},
     {"seconds": 1e300}, {"error": "both"}, {"seconds": None}, {"joules": "x"}, {"drafted": 1.5}],
)  # fmt: skip
def test_a_trial_that_cannot_be_used_is_left_out(broken):
    bad = {**trial(*PLAN, 1.0), **broken} if isinstance(broken, dict) and broken else broken
    assert of(trial(*SHIPPED, 10.0), bad, trial(*PLAN, 5.0))["the plan"].speed.middle == 2


@pytest.mark.parametrize("trials", [None, {}, "x", 5])
def test_a_record_without_trials_says_nothing(trials):
    record = Tuned.of(value())
    assert tried(replace(record, raw={"trials": trials})) == () and tried(replace(record, raw={})) == ()


def test_what_did_not_fit_was_not_run_and_says_why():
    record = Tuned.of({**value(), "not_run": [{"label": "4 slots", "why": "it does not fit"}, {"label": 5}, None]})
    assert not_run(record) == (NotRun("4 slots", "it does not fit"),)
    assert not_run(Tuned.of(value())) == () == not_run(Tuned.of({**value(), "not_run": {"label": "x"}}))


def test_the_end_names_candidates_by_their_labels():
    trials = [trial(*SHIPPED, 10.0), trial(3, "2 threads", 9.9)]
    record = Tuned.of({**value(), "trials": trials, "why": "candidate 3: not proven faster in 19 pairs"})
    assert why_ended(record) == "2 threads: not proven faster in 19 pairs"
    assert (
        why_ended(Tuned.of({**value(), "why": "candidate 7 failed in the final"})) == "candidate 7 failed in the final"
    )
    assert why_ended(Tuned.of(value())) == "" == why_ended(Tuned.of({**value(), "why": 5}))
