"""What the trials of tunes say about a host's rates, whatever the model: they correct the predictions for other models.

Of each record the planner's best counts, as it was planned, which each tune measures most often: the record says which
speed was expected of it, and by which rates (`expected`). Pure; a record comes from a host or from a file that somebody
may have edited, and one that cannot be used tells nothing.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from llamafleet.host.learned import Expected, MeasuredSpeeds
from llamafleet.host.machine import Machine
from llamafleet.tuning.candidates import PLANNED_NUMBER
from llamafleet.tuning.record import Tuned, is_of_hardware
from llamafleet.tuning.records import read

MOST_TOKENS_PER_S = 1e9


def tuned_speeds(
    machine: Machine, own: Mapping[str, object], others: Mapping[str, Mapping[str, Tuned]]
) -> tuple[MeasuredSpeeds, ...]:
    """The speeds of the host's `own` records (JSON values, by instance), or, where none tells one, of the operator's of
    hosts with the same hardware (by host and instance)."""
    return tuple(_speeds(machine, _usable(own))) or tuple(
        _speeds(machine, ((name, one) for records in others.values() for name, one in records.items()))
    )


def _usable(values: Mapping[str, object]) -> Iterator[tuple[str, Tuned]]:
    for name, value in values.items():
        record = read(value, name)
        if isinstance(record, Tuned):
            yield name, record


def _speeds(machine: Machine, records: Iterable[tuple[str, Tuned]]) -> Iterator[MeasuredSpeeds]:
    for name, record in records:
        if is_of_hardware(record.fingerprint, machine) and (speeds := _planned(name, record.raw)):
            yield speeds


def _planned(name: str, raw: Mapping[str, Any]) -> MeasuredSpeeds | None:
    """The median speeds of the planner's best; None where it has none, or guessed tokens ahead, which tells nothing of
    the rates."""
    try:
        expected = _adapter().validate_python(raw.get("expected"))
    except ValidationError:
        return None
    found = raw.get("trials")
    trials = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
    trials = [one for one in trials if one.get("candidate") == PLANNED_NUMBER and not one.get("drafted")]
    decode, prompt = (
        [float(one[key]) for one in trials if _is_speed(one.get(key))]
        for key in ("decode_tokens_per_s", "prompt_tokens_per_s")
    )
    if not decode:
        return None
    return MeasuredSpeeds(name, statistics.median(decode), statistics.median(prompt) if prompt else None, expected)


def _is_speed(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < MOST_TOKENS_PER_S


@functools.cache
def _adapter() -> TypeAdapter[Expected]:
    return TypeAdapter(Expected)
