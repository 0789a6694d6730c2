"""What was measured of the instances of a fleet, and whether it still holds, as a table and as JSON."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llamafleet.cli.tables import aligned
from llamafleet.printable import one_line
from llamafleet.tuning.record import Tuned
from llamafleet.tuning.records import Kept, Tuning

COLUMNS = ("host", "instance", "state", "winner", "gain", "interval", "measured", "minutes")
# A record of the operator's, of what the inventory does not have, or of a host that does not answer.
NOT_COMPARED = "not compared"
STATES = {"used": "holds", "stale": "stale", "unusable": "unusable", "none": "not measured"}


@dataclass(frozen=True)
class Row:
    """One instance: the record that counts for it, and whether that holds."""

    state: str
    record: Tuned | None = None
    where: str = ""  # who measured it, where that is not this instance on this host
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, tuning: Tuning) -> Row:
        """From what is known of an instance."""
        record = tuning.record or tuning.own
        return cls(STATES[tuning.state], record, tuning.where, tuple(tuning.sentences()))

    def to_json(self) -> dict[str, Any]:
        """For `--json`; without the trials, which the record itself has."""
        record = self.record
        raw = record.raw if record else {}
        told = ("settings", "winner", "baseline", "why", "ended", "budget_minutes", "fingerprint")
        return {"state": self.state, "where": self.where, "notes": list(self.notes),
                **{key: raw.get(key) for key in told}}  # fmt: skip


@dataclass(frozen=True)
class HostRows:
    """The instances of a host by name; `problem`: why it could not be read, or its records could not be compared."""

    instances: Mapping[str, Row]
    problem: str = ""

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {"problem": self.problem, "instances": {name: row.to_json() for name, row in self.instances.items()}}


def with_kept(hosts: Mapping[str, HostRows], kept: Kept, *, whole: bool) -> dict[str, HostRows]:
    """The hosts with the operator's records of instances that are in no row. `whole`: the inventory was not limited, so
    that records of other hosts are of none of its hosts, and are shown too."""
    found = dict(hosts)
    for host, records in kept.records.items():
        if host not in hosts and not whole:
            continue
        there = found.get(host, HostRows({}))
        more = {name: Row(NOT_COMPARED, record) for name, record in records.items() if name not in there.instances}
        found[host] = HostRows({**there.instances, **more}, there.problem)
    return found


def table(hosts: Mapping[str, HostRows]) -> str:
    """A line for each instance, and below them a line for each note and problem."""
    rows = [COLUMNS, *(tuple(map(one_line, row)) for host, found in hosts.items() for row in _rows(host, found))]
    remarks = (one_line(f"{host}: {remark}") for host, found in hosts.items() for remark in _remarks(found))
    return "\n".join([*aligned(rows), *remarks])


def _rows(host: str, found: HostRows) -> Iterator[tuple[str, ...]]:
    for name, row in found.instances.items():
        state = f"{row.state}, measured {row.where}" if row.where else row.state
        yield (host, name, state, *(_figures(row.record) if row.record else [""] * 5))
    if not found.instances:
        yield (host, "-", "unknown" if found.problem else "no instances", *[""] * 5)


def _figures(record: Tuned) -> tuple[str, ...]:
    winner = record.winner
    gain = "default fails" if winner.gain is None else f"{winner.gain:.2f}"
    span = "" if winner.low is None or winner.high is None else f"{winner.low:.2f} to {winner.high:.2f}"
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.ended))
    return winner.label, gain, span, when, str(record.raw.get("budget_minutes", ""))


def _remarks(found: HostRows) -> Iterator[str]:
    if found.problem:
        yield found.problem
    for name, row in found.instances.items():
        yield from (f"{name}: {note}" for note in row.notes)
