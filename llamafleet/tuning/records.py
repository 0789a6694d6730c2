"""Which record an instance is planned with: its host's own, or another one that holds here too; else why there is none.

Pure: what lies on the host and in the operator's folder was read before.

Decision 23: docs/decisions/0023-tuned-by-measurement.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from pydantic import TypeAdapter, ValidationError

from llamafleet.remote.common import tuned_path
from llamafleet.settings.schema import Instance
from llamafleet.tuning.record import Fingerprint, LaterRecordError, Tuned, fitting, stale

# A record that cannot be used leaves the instance without one.
WAY_OUT = "the instance is planned without it: measure again (tasks.tune.tune), or remove it"


@dataclass(frozen=True)
class Kept:
    """The operator's records: by host and instance, and a sentence for each that cannot be used."""

    records: Mapping[str, Mapping[str, Tuned]] = field(default_factory=dict)
    problems: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # by host

    @classmethod
    def of(cls, files: Mapping[str, tuple[str, object]]) -> Kept:
        """By host, the path of its file and the JSON value in it; None where the file is damaged."""
        records: dict[str, dict[str, Tuned]] = {}
        problems: dict[str, tuple[str, ...]] = {}
        for host, (path, value) in files.items():
            if not isinstance(value, dict):
                problems[host] = (f"{path} is damaged: its records are not used; restore or remove it",)
                continue
            for name, one in value.items():
                record = read(one, f"{path}: {name}")
                if isinstance(record, Tuned):
                    records.setdefault(host, {})[name] = record
                else:
                    problems[host] = (*problems.get(host, ()), record)
        return cls(records, problems)


def read(value: object, place: str) -> Tuned | str:
    """The record, or a sentence why it cannot be used; `place` is where it lies."""
    try:
        record = Tuned.of(value)
    except LaterRecordError as error:
        return f"{place}: {error}; {WAY_OUT}"
    return f"{place} is damaged; {WAY_OUT}" if record is None else record


@dataclass(frozen=True)
class Tuning:
    """What measurements say of one instance: the record that it is planned with, or why there is none."""

    asked: Instance  # as the operator wrote it
    instance: Instance  # with the settings of its record
    fingerprint: Fingerprint  # of now
    record: Tuned | None = None
    where: str = ""  # who measured it, where that is not this instance on this host: "on gpu2", "with chat-1"
    own: Tuned | None = None  # what this host has measured of it, whether it holds or not
    stale: tuple[str, ...] = ()  # what differs from when that was measured
    problems: tuple[str, ...] = ()

    @property
    def state(self) -> str:
        """In a word: "used", "stale", "unusable", "none"."""
        if self.record is not None:
            return "used"
        return "stale" if self.stale else "unusable" if self.problems else "none"

    def sentences(self) -> Iterator[str]:
        """What an operator should know of records that are not used."""
        yield from self.problems
        if self.stale and self.record is None:
            yield f"what was measured no longer holds: {'; '.join(self.stale)}; measure again: tasks.tune.tune"


def over(record: Tuned, instance: Instance) -> Instance:
    """The instance with the record's settings, checked as an inventory's are. Raises `ValidationError` where they do
    not go together, as in a record that somebody edited."""
    checked: Instance = _ADAPTER.validate_python(vars(record.over(instance)))
    return checked


_ADAPTER: TypeAdapter[Instance] = TypeAdapter(Instance)


def tuning_of(instance: Instance, now: Fingerprint, there: Mapping[str, object], kept: Kept) -> Tuning:
    """The record for an instance. `there`: the JSON values of the host's own records, by instance."""
    own: Tuned | None = None
    problems: list[str] = []
    if instance.name in there:
        found = read(there[instance.name], f"{tuned_path(instance.name)} on the host")
        if isinstance(found, Tuned):
            own = found
        else:
            problems.append(found)
    bare = Tuning(
        instance, instance, now, own=own, stale=stale(own, now) if own else (), problems=tuple(problems)
    )  # fmt: skip
    chosen = fitting(own, dict(_others(instance.name, now, there, kept)), now)
    if chosen is None:
        return bare
    where, record = chosen
    try:
        return replace(bare, instance=over(record, instance), record=record, where=where)
    except ValidationError:
        wrong = f"what was measured {where or 'here'} has settings that do not go together; {WAY_OUT}"
        return replace(bare, problems=(*problems, wrong))


def _others(name: str, now: Fingerprint, there: Mapping[str, object], kept: Kept) -> Iterator[tuple[str, Tuned]]:
    """Records that hold of other instances of this host, and then of hosts, one of each, by who measured them. This
    host is among these too, with copies of its own."""
    for other, value in sorted(there.items()):
        record = read(value, "") if other != name else ""
        if isinstance(record, Tuned) and not stale(record, now):
            yield f"with {other}", record
    for host, records in sorted(kept.records.items()):
        in_order = sorted(records, key=lambda one: (one != name, one))
        if found := next((records[one] for one in in_order if not stale(records[one], now)), None):
            yield f"on {host}", found


def without(tuning: Tuning, why: str) -> Tuning:
    """The instance without its record, which cannot be planned with now."""
    wrong = f"what was measured {tuning.where or 'here'} cannot be planned now ({why}); {WAY_OUT}"
    return replace(tuning, instance=tuning.asked, record=None, where="", problems=(*tuning.problems, wrong))


def reason(tuning: Tuning) -> str:
    """Why an instance with a record has its plan, a sentence."""
    record = tuning.record
    assert record is not None, "the plan of an instance without a record has the planner's reasons alone"
    return f"measured{f' {tuning.where}' if tuning.where else ' here'}: {in_words(record)}"


def in_words(record: Tuned) -> str:
    """What won, with its gain and interval: "ubatch 1024: 1.31 times as fast as llama-server as it ships (1.22 to
    1.40)"."""
    winner = record.winner
    if winner.gain is None:
        return f"{winner.label}: llama-server as it ships does not run here"
    if winner.low is None or winner.high is None or winner.gain == 1:
        return f"{winner.label}: nothing was proven faster than llama-server as it ships"
    span = f"{winner.low:.2f} to {winner.high:.2f}"
    return f"{winner.label}: {winner.gain:.2f} times as fast as llama-server as it ships ({span})"
