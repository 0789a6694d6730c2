"""What a report is made of: all that is known of a host and its instances."""

from __future__ import annotations

from dataclasses import dataclass

from llamafleet.cli.status import HostStatus, InstanceStatus
from llamafleet.host.learned import GatedSpeed
from llamafleet.host.machine import Machine
from llamafleet.memory.ledger import LedgerRow
from llamafleet.planner.curves import Curves
from llamafleet.settings.workload import Workload
from llamafleet.tuning.record import Tuned


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
    problems: tuple[str, ...] = ()  # of its tune's records


@dataclass(frozen=True)
class HostFacts:
    """What is known of one host; `machine` is None where it was not reached."""

    status: HostStatus
    machine: Machine | None = None
    instances: tuple[InstanceFacts, ...] = ()
