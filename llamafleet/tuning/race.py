"""Which of several command lines is the fastest on a host: what to measure next, given what was measured.

Pure: the state is the list of trials, so an interrupted race goes on where it was. A trial gives the seconds of the
whole workload with one candidate. Its noise is a factor: the host's speed drifts over minutes, and now and then
something else runs for the length of a trial.

Screening measures candidates in rounds, each round in the opposite order of the one before, and compares within a
round only, so that drift cancels. Each candidate changes one thing, its dimension. Who is clearly slower than another
of its dimension, or than no change at all, leaves. A trial that fails is measured again at the end of its round; who
fails twice leaves. What won in each dimension is then put together by the caller, and the combinations are screened
beside the leaders. The final measures the leader and the baseline again in pairs, with nothing of the screening
counted: whoever is the best of many by luck has no luck there. A pair with a trial that failed does not count.
Decided is at four points, each with a quarter of the rate of errors (Bonferroni), by Student's t on the logarithms of
the ratios.

Decision 23: docs/decisions/0023-tuned-by-measurement.md.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median, stdev

BASELINE = 0  # the number of the candidate that stays where none is proven faster
SINGLE, COMBINED, FINAL = 1, 2, 3  # stages of a race
# Of a hundred races whose leader is no faster than the baseline, at most one ends with the leader.
ERROR_RATE = 0.01
# Pairs after which the final is decided, with Student's one-sided 1 - ERROR_RATE / 4 quantile for so many less one.
LOOKS = {6: 4.773, 9: 3.833, 13: 3.428, 19: 3.197}
# A gain below this is not worth a change; with the leader's interval below it the final ends.
WORTH = math.log(1.02)
ROUNDS_BEFORE_A_CUT = 3
CUT = 2.5  # standard errors by which a candidate is slower than the leader when it leaves, after many rounds
# Factors by which a candidate must be slower in every round to leave before that: more than other load explains.
EARLY_CUTS = {1: math.log(2.0), 2: math.log(1.3)}
FEWEST_NOISE = 0.005  # of a trial's logarithm, where the trials seem to have less
CLOSE = math.log(1.01)  # two candidates that differ by less are alike: the screening ends
MOST_COMBINED = 3  # combinations
COMBINED_TRIALS = ROUNDS_BEFORE_A_CUT * (2 + MOST_COMBINED)  # that the first stage leaves to the second
FINAL_TRIALS = 2 * 13  # that the screening leaves to the final, or half of the budget
OUTLIER = 3.0  # robust standard deviations, beyond which a ratio counts as that many
FAILURES = 2  # trials of a candidate that fail before it is out; of the baseline, one after another


@dataclass(frozen=True)
class Trial:
    """One measurement: the candidate's number, and the workload's seconds; None where it crashed, hung or ran out of
    memory."""

    candidate: int
    seconds: float | None
    stage: int = SINGLE


@dataclass(frozen=True)
class Batch:
    """What to measure next, in this order, before anything is decided."""

    candidates: tuple[int, ...]
    stage: int


@dataclass(frozen=True)
class Verdict:
    """How the race ended: `gain` is the baseline's seconds by the winner's with its interval, 1 for the baseline."""

    winner: int
    gain: float
    low: float
    high: float
    why: str


@dataclass(frozen=True)
class Screened:
    """What screening found: who leads, who could not be told from a leader yet, and how each one that did not fail
    compares with the base: the logarithm of its seconds less the base's."""

    leader: int
    contenders: tuple[int, ...]
    effects: Mapping[int, float] = field(default_factory=dict)


Combine = Callable[[Screened], Sequence[int]]


def next_step(
    dimensions: Sequence[int], budget: int, trials: Sequence[Trial], combine: Combine, base: int = BASELINE
) -> Batch | Verdict:
    """What to do after these trials.

    `dimensions`: by candidate's number, which thing it changes; 0 of the baseline, 0, and of `base`, to which the
    changes are made. `budget`: trials, at most. `combine` gives the numbers of what is put together from the first
    stage's result.
    """
    by_stage = {stage: [trial for trial in trials if trial.stage == stage] for stage in (SINGLE, COMBINED, FINAL)}
    for_screening = int(max(budget / 2, budget - FINAL_TRIALS))
    of = dict(enumerate(dimensions))
    first = screened(of, base, SINGLE, for_screening - COMBINED_TRIALS, by_stage[SINGLE])
    if not isinstance(first, Screened):
        return first
    combined, left = combine(first), for_screening - len(by_stage[SINGLE])
    second = dict.fromkeys([BASELINE, first.leader, *combined, *first.contenders], 0)
    last: Screened | Batch | Verdict = first
    if combined or (len(second) > 2 and left >= ROUNDS_BEFORE_A_CUT * len(second)):
        one_dimension = {one: int(one != BASELINE) for one in second}
        last = screened(one_dimension, BASELINE, COMBINED, left, by_stage[COMBINED])
    if not isinstance(last, Screened):
        return last
    if last.leader == BASELINE:
        return Verdict(BASELINE, 1, 1, 1, "no candidate is faster")
    final = _of(last.leader, by_stage[FINAL])
    return _final(last.leader, budget - len(trials) + len(final), final)


# --- screening --------------------------------------------------------------------------------------


def screened(
    dimensions: Mapping[int, int], base: int, stage: int, limit: int, trials: Sequence[Trial]
) -> Batch | Verdict | Screened:
    """The rest of the round, or what was found. `limit`: trials, at most, but for the least number of rounds."""
    alive, at = list(dimensions), 0
    rounds: list[dict[int, float]] = []
    failures: Counter[int] = Counter()
    while True:
        order = alive if len(rounds) % 2 == 0 else alive[::-1]
        seconds, missing, at = _round(order, failures, trials, at)
        if missing:
            return Batch(missing, stage)
        alive = [one for one in alive if one in seconds]
        if BASELINE not in seconds:
            return _without_baseline(seconds, compared=bool(rounds))
        rounds.append(seconds)
        alive = _cut(alive, dimensions, base, rounds)
        contenders = _contenders(alive, dimensions)
        enough = len(rounds) >= ROUNDS_BEFORE_A_CUT and (at + len(alive) > limit or not contenders)
        if enough or alive == [BASELINE]:
            measured = [one for one in dimensions if one in rounds[0] and failures[one] < FAILURES]
            effects = _effects(measured, alive, rounds)
            leader = min(alive, key=lambda one: effects[one])
            rest = tuple(one for one in contenders if effects[one] < effects[BASELINE])
            known = effects.get(base, effects[BASELINE])
            return Screened(leader, rest, {one: effect - known for one, effect in effects.items()})


def _round(
    order: Sequence[int], failures: Counter[int], trials: Sequence[Trial], at: int
) -> tuple[dict[int, float], tuple[int, ...], int]:
    """A round from trial `at` on: logarithms of seconds by candidate, who is still to be measured, and where it ends.
    Who failed is counted, and comes again at the end, but for those who are out."""
    seconds: dict[int, float] = {}
    waiting = list(order)
    while waiting and at < len(trials):
        trial, at = trials[at], at + 1
        if trial.candidate not in waiting:  # of a tune with another budget
            continue
        waiting.remove(trial.candidate)
        if trial.seconds is not None:
            seconds[trial.candidate] = math.log(trial.seconds)
            continue
        failures[trial.candidate] += 1
        if failures[trial.candidate] < FAILURES:
            waiting.append(trial.candidate)
    if BASELINE in seconds:
        failures[BASELINE] = 0
    return seconds, tuple(waiting), at


def _without_baseline(seconds: Mapping[int, float], *, compared: bool) -> Verdict:
    """The verdict where the baseline fails: the fastest wins only where the baseline never ran."""
    if compared:
        return Verdict(BASELINE, 1, 0, math.inf, "the baseline fails now, so that nothing can be proven")
    if not seconds:
        return Verdict(BASELINE, 1, 1, 1, "no candidate runs")
    fastest = min(seconds, key=lambda one: seconds[one])
    return Verdict(fastest, math.inf, math.inf, math.inf, "the baseline does not run")


def combinations(screened: Screened, dimensions: Mapping[int, int]) -> list[tuple[int, ...]]:
    """What won in its dimension, put together: the best of each that seems faster than the base; then, one at a time,
    with the second best in place of the best, the closest pairs first; MOST_COMBINED in all."""
    ranked: dict[int, list[int]] = {}
    for one in sorted(dimensions, key=lambda one: screened.effects.get(one, math.inf)):
        if dimensions[one] and screened.effects.get(one, math.inf) < 0:
            ranked.setdefault(dimensions[one], []).append(one)
    best = [members[0] for members in ranked.values()]
    if len(best) < 2:
        return []
    gaps = {members[0]: members[1] for members in ranked.values() if len(members) > 1}
    close = sorted(gaps, key=lambda one: screened.effects[gaps[one]] - screened.effects[one])
    others = [tuple(gaps[one] if one == first else one for one in best) for first in close]
    weak = max(best, key=lambda one: screened.effects[one])  # perhaps it is none
    less = [tuple(one for one in best if one != weak)] if len(best) > 2 else []
    return [tuple(best), *less, *others][:MOST_COMBINED]


def _contenders(alive: Sequence[int], dimensions: Mapping[int, int]) -> list[int]:
    """Those of dimensions that have several."""
    of = [dimensions[one] for one in alive]
    return [one for one in alive if dimensions[one] and of.count(dimensions[one]) > 1]


def _cut(
    alive: list[int], dimensions: Mapping[int, int], base: int, rounds: Sequence[Mapping[int, float]]
) -> list[int]:
    """Who stays. The baseline and the base always do."""
    means = _effects(alive, alive, rounds)
    best = {dimension: min(means[one] for one in alive if dimensions[one] == dimension)
            for dimension in {dimensions[one] for one in alive}}  # fmt: skip
    ahead = {one: means[one] - min(best[dimensions[one]], means.get(base, math.inf)) for one in alive}
    error = _noise(alive, rounds, means) * math.sqrt(2 / len(rounds))
    if len(rounds) < ROUNDS_BEFORE_A_CUT:
        cut = EARLY_CUTS[len(rounds)]
        slower = {one for one in alive if all(found[one] - _fastest(found, dimensions, one, base) > cut
                                              for found in rounds)}  # fmt: skip
    else:
        # With few rounds a single spike counts for much.
        slower = {one for one in alive if ahead[one] > CUT * (1 + 3 / len(rounds)) * error}
        if 2 * error < CLOSE:  # the rest of a dimension is alike
            first = {dimensions[one]: one for one in sorted(alive, key=lambda one: -means[one])}
            slower |= {one for one in alive if one != first[dimensions[one]]}
    return [one for one in alive if not dimensions[one] or one not in slower]


def _fastest(found: Mapping[int, float], dimensions: Mapping[int, int], candidate: int, base: int) -> float:
    """The least of a round among the candidate's dimension and the base."""
    return min(seconds for one, seconds in found.items() if one == base or dimensions[one] == dimensions[candidate])


def _effects(
    candidates: Sequence[int], alive: Sequence[int], rounds: Sequence[Mapping[int, float]]
) -> dict[int, float]:
    """The logarithm of each candidate's seconds less the median of those who are alive, over its rounds."""
    levels = [median(found[one] for one in alive) for found in rounds]
    return {
        candidate: _middle([found[candidate] - level for found, level in zip(rounds, levels, strict=True)
                            if candidate in found])
        for candidate in candidates
    }  # fmt: skip


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


def _final(leader: int, budget: int, trials: Sequence[Trial]) -> Batch | Verdict:
    """Pairs of leader and baseline, in turn begun by the one and the other."""
    failed = Counter(trial.candidate for trial in trials if trial.seconds is None)
    if failed[leader] >= FAILURES:
        return Verdict(BASELINE, 1, 1, 1, f"candidate {leader} failed in the final")
    if failed[BASELINE] >= FAILURES:
        return _without_baseline({}, compared=True)
    ratios = pairs(trials)
    lost = len(trials) // 2 - len(ratios)
    points = [look for look in LOOKS if 2 * (look + lost) <= budget]
    for look in points:
        if look > len(ratios):
            ahead = [one for number in range(look + lost) for one in _pair(leader, number)]
            return Batch(tuple(ahead[len(trials) :]), FINAL)
        low, middle, high = interval(ratios[:look], LOOKS[look])
        last = look == points[-1]
        if low > 0 and middle >= WORTH:
            return Verdict(leader, math.exp(middle), math.exp(low), math.exp(high), f"faster in {look} pairs")
        if high < WORTH or last:
            why = "not proven faster" if high >= WORTH else "no gain that is worth a change"
            return Verdict(BASELINE, 1, math.exp(low), math.exp(high), f"candidate {leader}: {why} in {look} pairs")
    return Verdict(BASELINE, 1, 0, math.inf, "the budget is too small for a final")


def _of(leader: int, trials: Sequence[Trial]) -> list[Trial]:
    """The leader's pairs; those of another one are of a tune with another budget."""
    kept: list[Trial] = []
    for one in trials:
        if one.candidate == _pair(leader, len(kept) // 2)[len(kept) % 2]:
            kept.append(one)
        elif one.candidate not in (leader, BASELINE):
            kept = kept[: len(kept) // 2 * 2]  # the other half of this pair is not the leader's
    return kept


def _pair(leader: int, number: int) -> tuple[int, int]:
    return (leader, BASELINE) if number % 2 == 0 else (BASELINE, leader)


def so_far(trials: Sequence[Trial]) -> Verdict:
    """What these trials of a final prove, where no more will come."""
    leader = next((trial.candidate for trial in trials if trial.candidate != BASELINE), BASELINE)
    step = _final(leader, len(trials), trials)
    assert isinstance(step, Verdict), "a final asks for no more trials than its budget"
    return step


def pairs(trials: Sequence[Trial]) -> list[float]:
    """Logarithms of the baseline's seconds by the leader's; pairs with a trial that failed are left out."""
    ratios = []
    for one, other in zip(trials[::2], trials[1::2], strict=False):
        if one.seconds is not None and other.seconds is not None:
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
