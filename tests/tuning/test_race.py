"""The race for the fastest command line, against simulated hosts whose truth is known."""

from __future__ import annotations

import math
import random

import pytest

from llamafleet.tuning.race import (
    BASELINE,
    ERROR_RATE,
    FINAL,
    SINGLE,
    Batch,
    Screened,
    Trial,
    Verdict,
    combinations,
    interval,
    next_step,
    so_far,
)  # fmt: skip
from llamafleet.tuning.search import over


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


def nothing(screened):
    """Nothing is put together."""
    return ()


def race(host, budget, trials=(), lost=(), dimensions=None, combine=nothing):
    """The verdict and all trials. `lost`: candidates that crash; `dimensions`: of the first stage's candidates."""
    trials = list(trials)
    dimensions = dimensions or [0, *[1] * (len(host.truth) - 1)]
    while isinstance(step := next_step(dimensions, budget, trials, combine), Batch):
        for one in step.candidates:
            trials.append(Trial(one, None if one in lost else host.seconds(one), step.stage))
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
    for cut in range(len(trials)):
        step = next_step([0, *[1] * 7], 60, trials[:cut], nothing)
        following = trials[cut : cut + len(step.candidates)]
        assert [(trial.candidate, trial.stage) for trial in following] == [(one, step.stage) for one in step.candidates]
    assert next_step([0, *[1] * 7], 60, trials, nothing) == whole


def test_a_candidate_that_crashes_is_lost_and_not_the_race():
    host = Host([10.0, 5.0, 8.0, 9.0], 1)
    verdict, trials = race(host, 60, lost={1})
    assert verdict.winner == 2 and sum(trial.candidate == 1 for trial in trials) == 2
    assert 1.1 < verdict.low <= verdict.gain <= verdict.high < 1.4


def test_a_candidate_that_crashes_in_the_final_does_not_win():
    host = Host([10.0, 5.0], 1)
    _, trials = race(host, 60)
    first = next(n for n, trial in enumerate(trials) if trial.stage == FINAL and trial.candidate == 1)
    once = [*trials[:first], Trial(1, None, FINAL), Trial(0, 10.0, FINAL)]
    step = next_step([0, 1], 60, once, nothing)
    assert isinstance(step, Batch) and step.candidates[:2] == (0, 1), "one failure costs a pair"
    verdict = next_step([0, 1], 60, [*once, Trial(0, 10.0, FINAL), Trial(1, None, FINAL)], nothing)
    assert verdict == Verdict(BASELINE, 1, 1, 1, "candidate 1 failed in the final")


def test_a_baseline_that_fails_in_the_final_proves_nothing():
    """One failure costs a pair; with two the leader is not installed without a proof."""
    _, trials = race(Host([10.0, 5.0], 1), 60)
    before = [trial for trial in trials if trial.stage != FINAL]
    lost = [Trial(1, 5.0, FINAL), Trial(0, None, FINAL)]
    verdict, _ = race(Host([10.0, 5.0], 2), 60, [*before, *lost])
    assert verdict.winner == 1 and 1.8 < verdict.low < verdict.high < 2.2
    verdict = next_step([0, 1], 60, [*before, *lost, Trial(0, None, FINAL), Trial(1, 5.0, FINAL)], nothing)
    assert verdict.winner == BASELINE and "proven" in verdict.why


def test_a_baseline_that_ran_and_fails_later_proves_nothing():
    ran = [Trial(0, 10.0), Trial(1, 5.0), Trial(2, 8.0)]
    verdict = next_step([0, 1, 1], 60, [*ran, Trial(2, 8.0), Trial(1, 5.0), Trial(0, None), Trial(0, None)], nothing)
    assert verdict.winner == BASELINE and "proven" in verdict.why


def test_a_candidate_that_fails_once_may_win():
    host = Host([10.0, 5.0, 8.0], 1)
    once = [Trial(0, 10.0), Trial(1, None), Trial(2, 8.0)]
    assert next_step([0, 1, 1], 60, once, nothing) == Batch((1,), SINGLE), "in the same round"
    assert race(host, 60, once)[0].winner == 1


def test_trials_of_another_budget_break_nothing():
    """What is measured with one budget is read with another: the winner is the one whose pairs were measured."""
    wrong = 0
    for seed in range(40):
        host = Host(truths(seed, 12, 0.05), seed)
        _, trials = race(host, 120)
        for budget in (40, 60, 90, 200):
            verdict, _ = race(Host(host.truth, seed + 1), budget, trials)
            wrong += host.truth[verdict.winner] > 10.0
    assert wrong == 0


def test_where_no_more_trials_come_the_pairs_so_far_decide():
    _, trials = race(Host([10.0, 9.0], 4, noise=0.05), 80)
    final = [trial for trial in trials if trial.stage == FINAL]
    assert so_far([trial for trial in final if trial.candidate == 1][:1]).winner == BASELINE
    clear = [Trial(one, seconds, FINAL) for _ in range(3)
             for one, seconds in ((7, 5.0), (0, 10.0), (0, 10.1), (7, 5.1))]  # fmt: skip
    verdict = so_far(clear)
    assert verdict.winner == 7 and 1.9 < verdict.low < 2.1
    assert so_far(clear[:-1]).winner == BASELINE, "five pairs are too few"


def test_a_baseline_that_does_not_run_loses_to_what_does():
    verdict, trials = race(Host([10.0, 12.0, 11.0], 1), 60, lost={0})
    assert verdict.winner == 2 and verdict.why == "the baseline does not run" and len(trials) == 4
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


def test_a_baseline_that_fails_once_runs_the_next_time():
    host = Host([10.0, 5.0, 8.0], 1)
    trials = [Trial(0, None, SINGLE), Trial(1, 5.0, SINGLE), Trial(2, 8.0, SINGLE)]
    verdict, _ = race(host, 60, trials)
    assert verdict.winner == 1 and 1.5 < verdict.gain < 2.5


# --- what is put together ---------------------------------------------------------------------------


class Dimensions:
    """Candidates that each change one of three things, and what is made of the best of each."""

    def __init__(self, seed):
        chance = random.Random(seed)
        self.effects = [math.exp(chance.gauss(0, 0.12)) for _ in range(9)]  # of 1 to 9; three of each dimension
        self.truth = [10.0, *(10.0 * effect for effect in self.effects), 10.0]
        self.made = None

    def combine(self, screened):
        """Numbers from 10 on: what `combinations` puts together."""
        made = combinations(screened, {one: (one + 2) // 3 for one in range(1, 10)})
        self.truth[10:] = [10.0 * math.prod(self.effects[one - 1] for one in members) for members in made]
        return range(10, 10 + len(made))

    @property
    def best(self):
        """The least seconds that any candidate or combination of the best has."""
        best = [min(1.0, *self.effects[3 * number : 3 * number + 3]) for number in range(3)]
        return 10.0 * math.prod(best)


def test_what_won_apart_is_put_together_and_wins():
    """The best of all that was measured, within 2 %; and hardly ever far from the best that could be put together."""
    right = near = 0
    for seed in range(100):
        several = Dimensions(seed)
        host = Host(several.truth, seed)
        verdict, trials = race(host, 100, dimensions=[0, 1, 1, 1, 2, 2, 2, 3, 3, 3], combine=several.combine)
        right += host.truth[verdict.winner] <= 1.02 * min(host.truth)
        near += host.truth[verdict.winner] <= 1.05 * several.best
        assert len(trials) <= 100
    assert right >= 95 and near >= 95, (right, near)


def test_combinations():
    """The best of each dimension, without the weakest, and with second bests where they are close."""
    found = Screened(3, (), {0: 0.0, 1: -0.10, 2: -0.09, 3: -0.3, 4: -0.02, 5: 0.1, 6: -0.01})
    dimensions = {0: 0, 1: 1, 2: 1, 3: 2, 4: 3, 5: 3, 6: 3}
    assert combinations(found, dimensions) == [(3, 1, 4), (3, 1), (3, 1, 6)]
    assert combinations(Screened(1, (), {0: 0.0, 1: -0.1, 5: 0.2}), {0: 0, 1: 1, 5: 3}) == []


def test_the_end_of_the_time_names_the_leader_whose_pairs_were_measured():
    """Never another one that led while the screening was shorter."""
    named = 0
    for seed in range(30):
        host, trials = Host(truths(seed, 12, 0.05), seed), []
        while isinstance(step := next_step([0, 0, *[1] * 10], 120, trials, nothing, 1), Batch):
            trials += [Trial(one, host.seconds(one), step.stage) for one in step.candidates]
        final = [trial for trial in trials if trial.stage == FINAL][:12]
        if len(final) == 12:
            winner = over([trial for trial in trials if trial.stage != FINAL] + final).winner
            assert winner in {trial.candidate for trial in final}
            named += winner != BASELINE
    assert named >= 10
