"""The race for the fastest command line, against simulated hosts whose truth is known."""

from __future__ import annotations

import math
import random

import pytest

from llamafleet.tuning.race import BASELINE, ERROR_RATE, Measure, Trial, Verdict, interval, next_step


class Host:
    """A host that measures with noise: each trial's own, a drift over minutes, and spikes of other load."""

    def __init__(self, truth, seed, *, noise=0.02, drift=0.1, spikes=0.05):
        self.truth, self.noise, self.drift, self.spikes = truth, noise, drift, spikes
        self.random = random.Random(seed)
        self.level, self.number = 0.0, 0
        self.phase, self.period = self.random.uniform(0, 2 * math.pi), self.random.uniform(20, 80)

    def seconds(self, candidate):
        self.number += 1
        self.level = 0.98 * self.level + self.random.gauss(0, 0.01)
        wave = self.drift / 2 * math.sin(self.phase + 2 * math.pi * self.number / self.period)
        factor = math.exp(self.random.gauss(0, self.noise) + self.level + wave)
        if self.random.random() < self.spikes:
            factor *= self.random.uniform(1.1, 1.6)
        return self.truth[candidate] * factor


def race(host, budget, trials=(), lost=()):
    """The verdict and all trials. `lost`: candidates that crash."""
    trials = list(trials)
    while isinstance(step := next_step(len(host.truth), budget, trials), Measure):
        seconds = None if step.candidate in lost else host.seconds(step.candidate)
        trials.append(Trial(step.candidate, seconds, step.final))
    return step, trials


def truths(seed, count, spread=0.15):
    """Seconds of candidates around those of the baseline."""
    chance = random.Random(seed)
    return [10.0, *(10.0 * math.exp(chance.gauss(0, spread)) for _ in range(count - 1))]


@pytest.mark.parametrize(("count", "budget"), [(12, 80), (12, 60), (20, 120)])
def test_the_best_within_two_percent_wins_in_95_of_100_races(count, budget):
    right = 0
    for seed in range(100):
        host = Host(truths(seed, count), seed)
        verdict, trials = race(host, budget)
        right += host.truth[verdict.winner] <= 1.02 * min(host.truth)
        assert len(trials) <= budget
    assert right >= 95


@pytest.mark.parametrize(
    ("races", "noise"),
    [(100, 0.02), *(pytest.param(1000, noise, marks=pytest.mark.long) for noise in (0.01, 0.02, 0.05))],
)
def test_what_is_no_faster_is_hardly_ever_installed(races, noise):
    """Nor what is a little slower: the leader of many is mostly the luckiest. Twice the stated rate is chance."""
    for slower in (1.0, 1.005):
        wins = sum(race(Host([10.0, *[10.0 * slower] * 11], seed, noise=noise), 80)[0].winner != BASELINE
                   for seed in range(races))  # fmt: skip
        assert wins <= 2 * ERROR_RATE * races


def test_an_interrupted_race_goes_on_where_it_was():
    host = Host(truths(3, 8), 3)
    whole, trials = race(host, 60)
    for cut in (1, 7, 20, len(trials) - 1):
        replay = iter(trials[cut:])
        kept = list(trials[:cut])
        while isinstance(step := next_step(8, 60, kept), Measure):
            following = next(replay)
            assert (step.candidate, step.final) == (following.candidate, following.final)
            kept.append(following)
        assert step == whole


def test_a_candidate_that_crashes_is_lost_and_not_the_race():
    host = Host([10.0, 5.0, 8.0, 9.0], 1)
    verdict, trials = race(host, 60, lost={1})
    assert verdict.winner == 2 and sum(trial.candidate == 1 for trial in trials) == 1
    assert 1.1 < verdict.low <= verdict.gain <= verdict.high < 1.4


def test_a_candidate_that_crashes_in_the_final_does_not_win():
    host = Host([10.0, 5.0], 1)
    _, trials = race(host, 60)
    first = next(n for n, trial in enumerate(trials) if trial.final and trial.candidate == 1)
    verdict = next_step(2, 60, [*trials[:first], Trial(1, None, final=True)])
    assert verdict == Verdict(BASELINE, 1, 1, 1, "candidate 1 failed in the final")


def test_a_baseline_that_does_not_run_loses_to_what_does():
    verdict, trials = race(Host([10.0, 12.0, 11.0], 1), 60, lost={0})
    assert verdict.winner == 2 and verdict.why == "the baseline does not run" and len(trials) == 3
    assert race(Host([10.0, 12.0], 1), 60, lost={0, 1})[0].winner == BASELINE


def test_a_clear_gain_needs_few_trials():
    verdict, trials = race(Host([10.0, 5.0], 2), 200)
    assert verdict.winner == 1 and len(trials) < 30 and verdict.low < 2 < verdict.high


def test_no_gain_ends_early():
    _, trials = race(Host([10.0, 14.0, 13.0, 15.0], 2), 200)
    assert len(trials) < 40


def test_a_budget_too_small_for_a_final_changes_nothing():
    verdict, trials = race(Host([10.0, 5.0], 2), 8)
    assert verdict.winner == BASELINE and "budget" in verdict.why and len(trials) <= 8


def test_an_outlier_is_drawn_in():
    ratios = [0.10, 0.11, 0.09, 0.10, 0.12, 2.0]
    low, middle, high = interval(ratios, 4.773)
    assert low < 0.105 < high and middle < 0.2
