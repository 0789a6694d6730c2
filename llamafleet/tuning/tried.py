"""What a tune tried, from the trials in its record: how fast each candidate was beside llama-server as it ships, with
the spread; what it took in energy; and which were lost.

The trials were written by a host, which is not trusted: one that cannot be used is left out. Their form is that of
`llamafleet/remote/tune.py`.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from llamafleet.host.machine import Count, Message
from llamafleet.tuning.race import BASELINE
from llamafleet.tuning.record import Tuned
from llamafleet.validation import Whole

T = TypeVar("T")

MOST_TRIALS = 10_000
MOST_WHY = 1000  # characters
Positive = Annotated[float, Field(strict=True, gt=0, le=1e12, allow_inf_nan=False)]
Number = Annotated[Whole, Field(ge=0, le=2**40)]


@dataclass(frozen=True)
class TrialRecord:
    """One trial as its record has it. `seconds` of the workload, None where it was lost, with the reason in `error`."""

    candidate: Count
    label: Message
    seconds: Positive | None = None
    error: Message | None = None
    prompt_tokens_per_s: Positive | None = None
    decode_tokens_per_s: Positive | None = None
    prompt_tokens: Number | None = None  # of one request as it was measured
    reply_tokens: Number | None = None
    drafted: Number | None = None
    accepted: Number | None = None
    joules: Positive | None = None  # of all requests at once
    state: Any = None  # of the host meanwhile

    @property
    def was_throttled(self) -> bool:
        """Did the host's processors or GPUs run slower than they can, being too warm or short of power?"""
        several = [self.state, *(_mapping(_mapping(self.state).get("gpus")).values())]
        return any(_mapping(one).get("throttled") for one in several)

    def tokens_per_joule(self, concurrency: int) -> float | None:
        """Tokens that were read and written for a joule; None where no meter was read."""
        tokens = concurrency * ((self.prompt_tokens or 0) + (self.reply_tokens or 0))
        return tokens / self.joules if self.joules and tokens else None


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


@dataclass(frozen=True)
class Range:
    """The median of some measurements, the lowest and the highest of them."""

    middle: float
    low: float
    high: float


@dataclass(frozen=True)
class Tried:
    """One candidate: all of its trials that were measured, and those that were lost.

    `speed` is the seconds of llama-server as it ships by the candidate's, each trial beside the nearest one of it; None
    where one of the two was never measured. `seconds` are of the workload. `throttled` counts the trials during which
    the host was slowed. `accepted` is the share of the guessed tokens that were right, None where none were guessed.
    """

    label: str
    is_baseline: bool
    trials: int
    throttled: int
    lost: int
    why_lost: str
    seconds: Range | None
    speed: Range | None
    prompt_tokens_per_s: Range | None
    decode_tokens_per_s: Range | None
    tokens_per_joule: Range | None
    accepted: float | None


@dataclass(frozen=True)
class NotRun:
    """A candidate that was not run, because it does not fit, and why."""

    label: Message
    why: Message


def tried(record: Tuned) -> tuple[Tried, ...]:
    """Every candidate of the record, the baseline first, then the fastest, those without a speed last."""
    found = trials(record.raw)
    several: dict[int, list[TrialRecord]] = {}
    for one in found:
        several.setdefault(one.candidate, []).append(one)
    speeds = _speeds(found)
    at_once = record.fingerprint.workload.concurrency
    made = [_tried(number, own, speeds.get(number, ()), at_once) for number, own in several.items()]
    return tuple(sorted(made, key=_order))


def not_run(record: Tuned) -> tuple[NotRun, ...]:
    """The candidates that were not run."""
    return tuple(_valid(NotRun, record.raw.get("not_run")))


def why_ended(record: Tuned) -> str:
    """Why the tune ended as it did, with the labels of candidates for their numbers; empty where nothing says so."""
    why = record.raw.get("why")
    labels = {one.candidate: one.label for one in trials(record.raw)}
    if not isinstance(why, str):
        return ""
    return re.sub(r"candidate ([0-9]{1,6})", lambda found: labels.get(int(found[1]), found[0]), why[:MOST_WHY])


def trials(record: Mapping[str, Any]) -> tuple[TrialRecord, ...]:
    """The record's trials, in order, without those that cannot be used."""
    found = _valid(TrialRecord, record.get("trials"))
    return tuple(one for one in found if (one.seconds is None) != (one.error is None))


def _valid(schema: type[T], values: object) -> Iterator[T]:
    """Those of a list's values that are as they should be."""
    adapter = TypeAdapter(schema)
    for value in values[:MOST_TRIALS] if isinstance(values, list) else ():
        with contextlib.suppress(ValidationError):
            yield adapter.validate_python(value)


def _speeds(found: Sequence[TrialRecord]) -> dict[int, list[float]]:
    """By candidate, the baseline's seconds by its own, each trial beside the baseline's nearest one; the baseline's own
    beside their median."""
    base = [(n, one.seconds) for n, one in enumerate(found) if one.candidate == BASELINE and one.seconds]
    if not base:
        return {}
    usual = median(seconds for _, seconds in base)
    speeds: dict[int, list[float]] = {}
    for position, one in enumerate(found):
        if one.seconds is None:
            continue
        near = usual if one.candidate == BASELINE else min(base, key=lambda item: abs(item[0] - position))[1]
        speeds.setdefault(one.candidate, []).append(near / one.seconds)
    return speeds


def _tried(number: int, own: Sequence[TrialRecord], speeds: Sequence[float], at_once: int) -> Tried:
    measured = [one for one in own if one.seconds is not None]
    lost = [one for one in own if one.error is not None]
    drafted = sum(one.drafted or 0 for one in measured)
    return Tried(
        label=own[0].label,
        is_baseline=number == BASELINE,
        trials=len(measured),
        throttled=sum(one.was_throttled for one in measured),
        lost=len(lost),
        why_lost=lost[-1].error or "" if lost else "",
        seconds=_range([one.seconds for one in measured]),
        speed=_range(speeds),
        prompt_tokens_per_s=_range([one.prompt_tokens_per_s for one in measured]),
        decode_tokens_per_s=_range([one.decode_tokens_per_s for one in measured]),
        tokens_per_joule=_range([one.tokens_per_joule(at_once) for one in measured]),
        accepted=min(1.0, sum(one.accepted or 0 for one in measured) / drafted) if drafted else None,
    )


def _range(values: Sequence[float | None]) -> Range | None:
    known = [value for value in values if value is not None]
    return Range(median(known), min(known), max(known)) if known else None


def _order(one: Tried) -> tuple[bool, float, str]:
    return not one.is_baseline, -one.speed.middle if one.speed else math.inf, one.label
