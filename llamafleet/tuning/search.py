"""A tune's course: which trials come next, how far it is, and what to install, from the trials that were measured.

Pure, and its state is the trials alone: a tune that was interrupted goes on where it was.

Decision 23: docs/decisions/0023-tuned-by-measurement.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from llamafleet.settings.schema import Instance
from llamafleet.tuning.candidates import DEFAULTS, PLANNED_NUMBER, Candidate, Planner, combined, dimensions
from llamafleet.tuning.race import (
    BASELINE,
    FINAL,
    LOOKS,
    WORTH,
    Batch,
    Screened,
    Trial,
    Verdict,
    next_step,
    so_far,
)

MOST_CANDIDATES = 14
# Rounds that each of the first candidates is in, before the others have left: what a small budget is divided by.
ROUNDS = 4


@dataclass(frozen=True)
class Measured:
    """A trial as the host recorded it: what it measured, and how long it took with loading."""

    trial: Trial
    took_seconds: float


@dataclass(frozen=True)
class Course:
    """Where a tune stands: all candidates so far, and the next batch or the verdict."""

    candidates: tuple[Candidate, ...]
    step: Batch | Verdict
    budget: int  # trials, at most

    @property
    def winner(self) -> Candidate | None:
        """What is to be installed; None: nothing was proven faster than llama-server as it ships, or it goes on."""
        if isinstance(self.step, Batch) or self.step.winner == BASELINE:
            return None
        return self.candidates[self.step.winner]


def affordable(found: Sequence[Candidate], budget_seconds: float, trial_seconds: float) -> tuple[Candidate, ...]:
    """The candidates that the budget has time for. In any case the baseline, the planner's best, and the plan with
    llama-server's own numbers, which is installed where the planner's best is slower than the baseline."""
    trials = budget_seconds / max(trial_seconds, 0.1)
    count = int(trials / 2 / ROUNDS)
    least = 1 + max(PLANNED_NUMBER, *(n for n, one in enumerate(found) if one.dimension == DEFAULTS), 0)
    return tuple(found[: max(least, min(count, MOST_CANDIDATES))])


def seconds_for(count: int, trial_seconds: float) -> float:
    """The budget that has time for so many candidates, at the seconds that a trial takes."""
    return count * 2 * ROUNDS * trial_seconds


def course(
    instance: Instance, planner: Planner, found: Sequence[Candidate], measured: Sequence[Measured],
    budget_seconds: float,
) -> Course:  # fmt: skip
    """What is next after these trials, within `budget_seconds` of measuring; the verdict where it is over."""
    several = list(found)
    trials = [one.trial for one in measured]

    def combine(screened: Screened) -> Sequence[int]:
        made = combined(instance, planner, found, screened)
        several[len(found) :] = made
        return range(len(found), len(several))

    budget = trials_of(measured[: len(found)], budget_seconds, len(found))
    step = next_step(dimensions(found), budget, trials, combine, PLANNED_NUMBER)
    spent = sum(one.took_seconds for one in measured)
    typical = median(one.took_seconds for one in measured) if measured else 0.0
    if isinstance(step, Batch) and spent + typical > budget_seconds:
        step = over(trials)
    return Course(tuple(several), step, budget)


def trials_of(first: Sequence[Measured], budget_seconds: float, count: int) -> int:
    """The trials that the budget has time for, by the first round; that round and a final until it is measured."""
    if len(first) < count:
        return 3 * count + 2 * 13
    return max(1, int(budget_seconds / max(0.1, median(one.took_seconds for one in first))))


def over(trials: Sequence[Trial]) -> Verdict:
    """The verdict where the time is over: what the pairs so far prove, else that nothing is proven."""
    final = [trial for trial in trials if trial.stage == FINAL]
    if len(final) >= 2 * min(LOOKS):
        return so_far(final)
    return Verdict(BASELINE, 1, 0, math.inf, "the time was over before anything was proven: set a larger tune_minutes")


# --- how far it is ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Progress:
    """Trials that were measured, of about how many; the best so far with its gain over the baseline, and seconds that
    are left at most."""

    done: int
    about: int
    best: str
    gain: float
    left_seconds: float


def progress(now: Course, measured: Sequence[Measured], budget_seconds: float) -> Progress:
    """How far the tune is, for a line of it."""
    spent = sum(one.took_seconds for one in measured)
    by_candidate: dict[int, list[float]] = {}
    for one in measured:
        if one.trial.seconds is not None:
            by_candidate.setdefault(one.trial.candidate, []).append(one.trial.seconds)
    typical = {candidate: median(seconds) for candidate, seconds in by_candidate.items()}
    best = min(typical, key=lambda candidate: typical[candidate], default=BASELINE)
    gain = typical[BASELINE] / typical[best] if BASELINE in typical else 1.0
    return Progress(
        len(measured), max(now.budget, len(measured)), now.candidates[best].label, gain,
        max(0.0, budget_seconds - spent),
    )  # fmt: skip


# --- what is installed ------------------------------------------------------------------------------


def installed(now: Course, trials: Sequence[Trial]) -> Candidate:
    """What is installed: the winner; else the plan, or where that was measured slower than llama-server as it ships,
    the first candidate that was not; where all were, the one that was slower by the least."""
    if now.winner is not None:
        return now.winner
    slower = _against_baseline(trials)
    if not slower:
        return now.candidates[PLANNED_NUMBER]
    number = next((one for one in sorted(slower) if slower[one] < WORTH), min(slower, key=lambda one: slower[one]))
    return now.candidates[number]


def _against_baseline(trials: Sequence[Trial]) -> dict[int, float]:
    """By candidate, the median of the logarithms of its seconds by those of the baseline's nearest trial. Those that
    failed are left out, once in their last trial."""
    base = [(n, one.seconds) for n, one in enumerate(trials) if one.candidate == BASELINE and one.seconds is not None]
    ratios: dict[int, list[float]] = {}
    for position, trial in enumerate(trials) if base else ():
        if trial.candidate == BASELINE:
            continue
        if trial.seconds is None:
            ratios.pop(trial.candidate, None)
            continue
        near = min(base, key=lambda item: abs(item[0] - position))[1]
        ratios.setdefault(trial.candidate, []).append(math.log(trial.seconds / near))
    return {candidate: median(found) for candidate, found in ratios.items()}
