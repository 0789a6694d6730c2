"""What trials of tunes say about a host's rates: the planner's best, measured and expected, on the same hardware."""

import json

import pytest

from llamafleet.host.learned import Expected, MeasuredSpeeds, measurements
from llamafleet.host.speeds import MEASURED
from llamafleet.planner.plan import plan_host
from llamafleet.tuning.rates import tuned_speeds
from llamafleet.tuning.record import Tuned
from tests import planning
from tests.tuning.test_record import fingerprint, value

MACHINE = planning.machine((24564,))
EXPECTED = Expected(10.0, 100.0, "host", 20e9, 1e12)


def trial(decode, prompt, candidate=1, **more):
    return {"candidate": candidate, "error": None, "decode_tokens_per_s": decode, "prompt_tokens_per_s": prompt,
            "drafted": 0, **more}  # fmt: skip


def record(*trials, expected=EXPECTED, of=None):
    return {**value(of=of), "trials": list(trials), "expected": json.loads(json.dumps(expected.to_json()))}


GOOD = (trial(15.0, 50.0), trial(90.0, 900.0, candidate=0), trial(14.0, 40.0), trial(16.0, 60.0), trial(None, None))


def test_the_medians_of_the_planner_s_best_count():
    assert tuned_speeds(MACHINE, {"chat": record(*GOOD)}, {}) == (MeasuredSpeeds("chat", 15.0, 50.0, EXPECTED),)


@pytest.mark.parametrize(
    "other",
    [
        record(*GOOD, of=fingerprint(gpus=())),
        record(*GOOD, of=fingerprint(cpu={"model": "EPYC"})),
        record(*GOOD, of=fingerprint(cpu={"physical_cores": 4})),
        record(*GOOD, of=fingerprint(driver={"nvidia": "590.1", "cuda": "13.0"})),
        record(trial(90.0, 900.0, candidate=0)),
        record(trial(90.0, 900.0, drafted=12)),  # tokens that were guessed tell nothing of the rates
        {**record(), "trials": [7, trial("fast", -1.0), trial(True, None)]},
        {**record(*GOOD), "expected": {**EXPECTED.to_json(), "host_flops": 0.0}},
        {**record(*GOOD), "expected": None},
        {**record(*GOOD), "trials": None},
        value(),  # of an earlier version
        {"schema": 9},
        7,
    ],
)
def test_other_hardware_and_what_cannot_be_used_tell_nothing(other):
    assert tuned_speeds(MACHINE, {"chat": other}, {}) == ()


def test_another_build_or_kernel_tells_the_rates_all_the_same():
    of = fingerprint(build="c" * 16, os={"id": "debian", "version": "13", "arch": "x86_64", "libc": "2", "kernel": "7"})
    assert len(tuned_speeds(MACHINE, {"chat": record(*GOOD, of=of)}, {})) == 1


def test_hosts_that_are_alike_count_where_a_host_has_no_record_of_its_own():
    others = {"a": {"chat": Tuned.of(record(trial(30.0, 300.0)))},
              "b": {"chat": Tuned.of(record(trial(7.0, 70.0), of=fingerprint(gpus=())))}}  # fmt: skip
    assert [one.decode_tokens_per_s for one in tuned_speeds(MACHINE, {}, others)] == [30.0]
    assert [one.decode_tokens_per_s for one in tuned_speeds(MACHINE, {"m": record(*GOOD)}, others)] == [15.0]


@pytest.mark.parametrize(("gpus", "where"), [([], "host"), ([24564], "gpus")])
def test_a_tune_of_one_model_corrects_the_predictions_for_another(gpus, where):
    """A host of half the bandwidth and a third of the arithmetic that the planner expects."""
    machine, [instance] = planning.machine(gpus), planning.settings({"context_tokens": 8192}).models

    def planned(layout, known):
        [plan] = plan_host(machine, [(instance, planning.header(layout))], planning.settings({}), known=known)
        return plan

    none = measurements(None, [])
    at = planned("Qwen3-8B", none).at_work
    assert at.computed_on == where
    speeds = MeasuredSpeeds("a", at.decode_tokens_per_s / 2, at.prompt_tokens_per_s / 3, at)
    before, after = (planned("Llama-3.1-8B", known).predicted for known in (none, measurements(None, [], [speeds])))
    assert after.decode_tokens_per_s == pytest.approx(before.decode_tokens_per_s / 2, rel=0.15)
    assert after.prefill_tokens_per_s == pytest.approx(before.prefill_tokens_per_s / 3, rel=0.15)
    assert (after.decode_source, after.prefill_source) == (MEASURED, MEASURED)


def test_attention_on_the_processor_is_as_much_slower_as_the_weights():
    """At a depth at which reading is mostly attention, too."""
    machine = planning.machine([])
    [instance] = planning.settings({"context_tokens": 32768, "live_tokens": 16384, "prompt_tokens": 512}).models

    def planned(known):
        [plan] = plan_host(machine, [(instance, planning.header("Qwen3-8B"))], planning.settings({}), known=known)
        return plan

    at = planned(measurements(None, [])).at_work
    half = MeasuredSpeeds("a", at.decode_tokens_per_s / 2, at.prompt_tokens_per_s / 2, at)
    found = planned(measurements(None, [], [half])).predicted
    assert found.prefill_tokens_per_s == pytest.approx(at.prompt_tokens_per_s / 2, rel=0.03)
    assert found.decode_tokens_per_s == pytest.approx(at.decode_tokens_per_s / 2, rel=0.03)


def test_a_tune_counts_more_than_gates():
    gate = MeasuredSpeeds("a", 5.0, 10.0, EXPECTED)
    tune = MeasuredSpeeds("b", 20.0, None, EXPECTED)
    found = measurements(None, [gate], [tune])
    assert (found.host_bytes_per_s, found.host_flops) == (40e9, 1e11)  # the tune read no prompt
