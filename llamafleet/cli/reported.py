"""What a report is made of: all that is known of a host and its instances, from what was read of it.

Hosts are not trusted, and their records may be of another version: what cannot be used is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pydantic import TypeAdapter, ValidationError

from llamafleet.cli.status import HostStatus, InstanceStatus
from llamafleet.host.installed import Survey
from llamafleet.host.learned import GatedSpeed
from llamafleet.host.machine import Machine
from llamafleet.host.recorded import PlanRecord
from llamafleet.memory.ledger import LedgerRow
from llamafleet.planner.curves import Curves, curves
from llamafleet.service.desired import Desired, Serving
from llamafleet.service.measured import chance
from llamafleet.service.record import without_query
from llamafleet.settings.workload import Workload
from llamafleet.tuning.record import Tuned, stale
from llamafleet.tuning.records import Kept, Tuning, read

MOST_ROWS = 257  # of a ledger: GPUs, and the host
MOST_BYTES = 2**64


@dataclass(frozen=True)
class Measured:
    """A tune's record. `where` is who measured it, "" for the very instance; `stale` is what differs now, None where
    that is not known."""

    record: Tuned
    where: str = ""
    stale: tuple[str, ...] | None = None


@dataclass(frozen=True)
class InstanceFacts:
    """What is known of one instance; `status` is None where its host was not reached."""

    name: str
    status: InstanceStatus | None = None
    source: str = ""
    argv: tuple[str, ...] = ()  # the planned flags
    why: tuple[str, ...] = ()  # the reasons of the plan
    ledger: tuple[LedgerRow, ...] = ()
    work: Workload | None = None
    curves: Curves | None = None
    gated: GatedSpeed | None = None
    measured: Measured | None = None
    chance: str = ""  # what a tune would try, where nothing was measured
    problems: tuple[str, ...] = ()  # of its tune's records


@dataclass(frozen=True)
class HostFacts:
    """What is known of one host; `machine` is None where it was not reached."""

    status: HostStatus
    machine: Machine | None = None
    instances: tuple[InstanceFacts, ...] = ()


def host_facts(name: str, status: HostStatus, survey: Survey, desired: Desired | None, kept: Kept) -> HostFacts:
    """What is known of a host of that name that was read. `desired` is None where it cannot be what the inventory asks
    for; `kept` are the operator's records of tunes."""
    servings = {serving.name: serving for serving in desired.servings} if desired else {}
    records = _records(name, survey, kept)
    instances = []
    for one in status.instances:
        facts = _installed(one, survey)
        if desired and one.name in servings:
            tuning = desired.inputs.tunings.get(one.name)
            facts = _planned(facts, desired, servings[one.name])
            measured = _measured(tuning, records.get(one.name), kept)
            facts = replace(facts, measured=measured, problems=tuning.problems if tuning else ())
        elif record := records.get(one.name):
            facts = replace(facts, measured=Measured(_with_trials(record, kept)))
        instances.append(facts)
    damaged = kept.problems.get(name, ())
    status = replace(status, problems=(*status.problems, *damaged)) if damaged else status
    return HostFacts(status, survey.machine, tuple(instances))


def not_read(name: str, problem: str, kept: Kept) -> HostFacts:
    """What is known of a host that was not read: why, and what was measured there before."""
    records = kept.records.get(name, {})
    facts = tuple(InstanceFacts(one, measured=Measured(record)) for one, record in records.items())
    return HostFacts(HostStatus(problem=problem, problems=kept.problems.get(name, ())), None, facts)


def _installed(status: InstanceStatus, survey: Survey) -> InstanceFacts:
    """An instance as it is installed."""
    there = survey.installed.instances.get(status.name)
    record = (there.record if there else None) or PlanRecord({})
    return InstanceFacts(
        status.name, status, source=record.source or "", argv=record.plan.argv if record.plan else (),
        ledger=_ledger(record), gated=survey.installed.gated.get(status.name),
    )  # fmt: skip


def _ledger(record: PlanRecord) -> tuple[LedgerRow, ...]:
    """The ledger of an installed plan; empty where the record has none that can be used."""
    plan = record.raw.get("plan")
    value = plan.get("ledger") if isinstance(plan, dict) else None
    try:
        rows = _LEDGER.validate_python(value if isinstance(value, list) else [])
    except ValidationError:
        return ()
    sizes = [size for row in rows for size in vars(row).values() if not isinstance(size, str)]
    return tuple(rows[:MOST_ROWS]) if all(abs(size) <= MOST_BYTES for size in sizes) else ()


_LEDGER = TypeAdapter(list[LedgerRow])


def _planned(facts: InstanceFacts, desired: Desired, serving: Serving) -> InstanceFacts:
    """The instance as it is planned, which is as it is installed where nothing differs."""
    plan, instance, inputs = serving.plan, serving.instance, desired.inputs
    headers = inputs.companions().get(serving.name, {})
    return replace(
        facts, source=without_query(instance.source), argv=plan.argv, why=plan.why, ledger=plan.ledger,
        work=Workload.of(instance, plan.context_tokens),
        curves=curves(plan, instance, serving.model.header, desired.machine, inputs.measured(), headers),
        gated=inputs.measured_by_gate(plan), chance=chance(inputs, plan),
    )  # fmt: skip


def _records(host: str, survey: Survey, kept: Kept) -> dict[str, Tuned]:
    """The records of this host's own tunes by instance: the host's, and the operator's where the host has none."""
    there = {name: read(value, "") for name, value in survey.installed.tuned.items()}
    return {**kept.records.get(host, {}), **{name: one for name, one in there.items() if isinstance(one, Tuned)}}


def _measured(tuning: Tuning | None, own: Tuned | None, kept: Kept) -> Measured | None:
    """The record that the instance is planned with, else its own with what differs now."""
    if tuning and tuning.record:
        return Measured(_with_trials(tuning.record, kept), tuning.where, ())
    if own is None:
        return None
    return Measured(_with_trials(own, kept), "", stale(own, tuning.fingerprint) if tuning else None)


def _with_trials(record: Tuned, kept: Kept) -> Tuned:
    """The record with its trials, which the operator's copy has and what a host says of its own has not."""
    if "trials" in record.raw:
        return record
    return next((one for one in _every(kept) if _is_copy(one, record)), record)


def _every(kept: Kept) -> Iterator[Tuned]:
    return (one for several in kept.records.values() for one in several.values())


def _is_copy(one: Tuned, record: Tuned) -> bool:
    return (one.instance, one.ended, one.winner, one.fingerprint) == (
        record.instance, record.ended, record.winner, record.fingerprint,
    )  # fmt: skip
