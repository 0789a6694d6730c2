"""Which of several command lines is the fastest on a host: what to measure next, given what was measured.

Pure: the state is the list of trials, so an interrupted race goes on where it was. A trial gives the seconds of the
whole workload with one candidate. Its noise is a factor: the host's speed drifts over minutes, and now and then
something else runs for the length of a trial.

Screening measures all candidates in rounds, each round in the opposite order of the one before, and compares within a
round only, so that drift cancels. Who is clearly slower leaves. The final measures the leader and the baseline again in
pairs, with nothing of the screening counted: whoever is the best of many by luck has no luck there. Decided is at four
points, each with a quarter of the rate of errors (Bonferroni), by Student's t on the logarithms of the ratios.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev

BASELINE = 0  # the number of the candidate that stays where none is proven faster
# Of a hundred races whose leader is no faster than the baseline, at most one ends with the leader.
ERROR_RATE = 0.01
# Pairs after which the final is decided, with Student's one-sided 1 - ERROR_RATE / 4 quantile for so many less one.
LOOKS = {6: 4.773, 9: 3.833, 13: 3.428, 19: 3.197}
# A gain below this is not worth a change; with the leader's interval below it the final ends.
WORTH = math.log(1.02)
ROUNDS_BEFORE_A_CUT = 3
CUT = 2.5  # standard errors by which a candidate is slower than the leader when it leaves, after many rounds
FEWEST_NOISE = 0.005  # of a trial's logarithm, where the trials seem to have less
CLOSE = math.log(1.01)  # two candidates that differ by less are alike: the screening ends
FINAL_TRIALS = 2 * 13  # that the screening leaves to the final, or half of the budget
OUTLIER = 3.0  # robust standard deviations, beyond which a ratio counts as that many


@dataclass(frozen=True)
class Trial:
    """One measurement: the candidate's number, and the workload's seconds; None where it crashed, hung or ran out of
    memory."""

    candidate: int
    seconds: float | None
    final: bool = False


@dataclass(frozen=True)
class Measure:
    """What to measure next."""

    candidate: int
    final: bool


@dataclass(frozen=True)
class Verdict:
    """How the race ended: `gain` is the baseline's seconds by the winner's with its interval, 1 for the baseline."""

    winner: int
    gain: float
    low: float
    high: float
    why: str


def next_step(candidates: int, budget: int, trials: Sequence[Trial]) -> Measure | Verdict:
    """What to do after these trials. `budget`: trials, at most. Candidate 0 is the baseline."""
    screening = [trial for trial in trials if not trial.final]
    final = [trial for trial in trials if trial.final]
    if not final:
        step = _screened(candidates, budget, screening)
        if isinstance(step, Measure | Verdict):
            return step
        leader = step
    else:
        leader = next(trial.candidate for trial in final if trial.candidate != BASELINE)
    return _final(leader, budget - len(screening), final)


# --- screening --------------------------------------------------------------------------------------


def _screened(candidates: int, budget: int, trials: Sequence[Trial]) -> Measure | Verdict | int:
    """The next trial, or the leader that goes to the final."""
    alive, at, number = list(range(candidates)), 0, 0
    rounds: list[dict[int, float]] = []
    while True:
        order = alive if number % 2 == 0 else alive[::-1]
        seconds: dict[int, float] = {}
        for candidate in order:
            if at == len(trials):
                return Measure(candidate, final=False)
            if (found := trials[at].seconds) is not None:
                seconds[candidate] = math.log(found)
            at += 1
        lost = [one for one in alive if one not in seconds]
        alive = [one for one in alive if one in seconds]
        rounds.append(seconds)
        number += 1
        if BASELINE in lost and alive:
            fastest = min(alive, key=lambda one: seconds[one])
            return Verdict(fastest, math.inf, math.inf, math.inf, "the baseline does not run")
        if not alive:
            return Verdict(BASELINE, 1, 1, 1, "no candidate runs")
        leader, alive = _cut(alive, rounds)
        others = [one for one in alive if one not in (leader, BASELINE)]
        enough = number >= ROUNDS_BEFORE_A_CUT and (
            at + len(alive) > max(budget / 2, budget - FINAL_TRIALS) or not others
        )
        if enough or alive == [BASELINE]:
            return Verdict(BASELINE, 1, 1, 1, "no candidate is faster") if leader == BASELINE else leader


def _cut(alive: list[int], rounds: Sequence[Mapping[int, float]]) -> tuple[int, list[int]]:
    """The leader, and who stays. The baseline always does."""
    means = {one: _effect(one, alive, rounds) for one in alive}
    leader = min(alive, key=lambda one: means[one])
    if len(rounds) < ROUNDS_BEFORE_A_CUT:
        return leader, alive
    error = _noise(alive, rounds, means) * math.sqrt(2 / len(rounds))
    # With few rounds a single spike counts for much.
    cut = CUT * (1 + 3 / len(rounds))
    slower = {one for one in alive if means[one] - means[leader] > cut * error}
    alike = {one for one in alive if one > leader and means[one] >= means[leader] and 2 * error < CLOSE}
    return leader, [one for one in alive if one == BASELINE or one not in slower | alike]


def _effect(candidate: int, alive: Sequence[int], rounds: Sequence[Mapping[int, float]]) -> float:
    """The logarithm of a candidate's seconds less the median of those who are alive, over the rounds."""
    return _middle([found[candidate] - median(found[one] for one in alive) for found in rounds])


def _noise(alive: Sequence[int], rounds: Sequence[Mapping[int, float]], means: Mapping[int, float]) -> float:
    """The standard deviation of a trial's logarithm, without what its round and its candidate explain, robustly."""
    rest = []
    for found in rounds:
        level = median(found[one] - means[one] for one in alive)
        rest += [abs(found[one] - means[one] - level) for one in alive]
    # Medians explain some of the noise themselves, more so with few rounds.
    freedom = len(rest) / max(1, (len(rounds) - 1) * (len(alive) - 1))
    return max(FEWEST_NOISE, 1.4826 * median(rest) * math.sqrt(freedom))


def _middle(values: Sequence[float]) -> float:
    """The median of the values, or from five on the mean of the middle half."""
    if len(values) < 5:
        return median(values)
    trimmed = sorted(values)[len(values) // 4 : len(values) - len(values) // 4]
    return fmean(trimmed)


# --- the final --------------------------------------------------------------------------------------


def _final(leader: int, budget: int, trials: Sequence[Trial]) -> Measure | Verdict:
    """Pairs of leader and baseline, in turn begun by the one and the other."""
    if any(trial.seconds is None for trial in trials):
        lost = next(trial.candidate for trial in trials if trial.seconds is None)
        if lost == leader:
            return Verdict(BASELINE, 1, 1, 1, f"candidate {leader} failed in the final")
        return Verdict(leader, math.inf, math.inf, math.inf, "the baseline does not run")
    pairs = _pairs(trials)
    points = [look for look in LOOKS if 2 * look <= budget]
    for look in points:
        if look > len(pairs):
            break
        low, middle, high = interval(pairs[:look], LOOKS[look])
        last = look == points[-1]
        if low > 0 and middle >= WORTH:
            return Verdict(leader, math.exp(middle), math.exp(low), math.exp(high), f"faster in {look} pairs")
        if high < WORTH or last:
            why = "not proven faster" if high >= WORTH else "no gain that is worth a change"
            return Verdict(BASELINE, 1, math.exp(low), math.exp(high), f"candidate {leader}: {why} in {look} pairs")
    if not points:
        return Verdict(BASELINE, 1, 0, math.inf, "the budget is too small for a final")
    number = len(trials) // 2
    first, second = (leader, BASELINE) if number % 2 == 0 else (BASELINE, leader)
    return Measure(first if len(trials) % 2 == 0 else second, final=True)


def _pairs(trials: Sequence[Trial]) -> list[float]:
    """Logarithms of the baseline's seconds by the leader's."""
    ratios = []
    for one, other in zip(trials[::2], trials[1::2], strict=False):
        assert one.seconds is not None and other.seconds is not None
        sign = 1 if one.candidate == BASELINE else -1
        ratios.append(sign * math.log(one.seconds / other.seconds))
    return ratios


def interval(ratios: Sequence[float], quantile: float) -> tuple[float, float, float]:
    """Low end, middle and high end for the mean of logarithms, outliers drawn in."""
    middle = median(ratios)
    width = OUTLIER * 1.4826 * median(abs(ratio - middle) for ratio in ratios)
    near = [min(max(ratio, middle - width), middle + width) for ratio in ratios] if width else list(ratios)
    mean, error = fmean(near), stdev(near) / math.sqrt(len(near))
    return mean - quantile * error, mean, mean + quantile * error
