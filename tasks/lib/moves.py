"""Instances that leave a host because another host of the run takes them over: they leave when it serves.

pyinfra runs an operation on all hosts at once, and all that change have one between switches and removals: by then
every host has switched or failed. With --no-wait a host waits here for the others; with --serial, and with --limit,
those that are not at work are not waited for. A host waits only before its removals, which come after all its switches,
so that no two wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import gevent
from pyinfra.api.host import Host
from pyinfra.api.state import BaseStateCallback, State

from llamafleet.service.record import without_query
from llamafleet.service.succession import Handover, kept
from tasks.lib import decision

LOOK_SECONDS = 0.2

# By host name: the instances that serve as planned, hosts that failed, hosts that are past their switches, and the
# handovers that were made.
_passed: set[tuple[str, str]] = set()
_failed: set[str] = set()
_switched: set[str] = set()
_made: dict[str, list[Handover]] = {}


class _Failures(BaseStateCallback):
    """With --no-wait pyinfra leaves a host that failed among the active ones."""

    @staticmethod
    def operation_host_error(
        state: State, host: Host, op_hash: str, retry_count: int = 0, max_retries: int = 0
    ) -> None:
        _failed.add(host.name)


def watch(state: State) -> None:
    """Take note of hosts that fail from here on."""
    if not any(isinstance(handler, _Failures) for handler in state.callback_handlers):
        state.add_callback_handler(_Failures())


def passed(host: Host, handover: Handover) -> None:
    """Note that these instances serve as planned."""
    _passed.update((host.name, name) for name in handover.names)
    _made.setdefault(host.name, []).append(handover)


def serves(host: Host, name: str) -> bool:
    """Whether the instance serves as planned by now."""
    return (host.name, name) in _passed and host.name not in _failed


def switched(host: Host) -> None:
    """Note that the host makes no more switches in this run."""
    if host.state.is_executing:
        _switched.add(host.name)


def is_taken_over(host: Host, names: tuple[str, ...]) -> bool:
    """Whether another host of the run is to serve one of these instances of the host, and does not yet."""
    new = _new(decision.hosts_of_run(host.state))
    return any(_successors(host, name, new) for name in names)


@dataclass(frozen=True)
class Missing:
    """Why an instance stays: the host that was to serve it, and what became of that."""

    host: str
    instance: str
    why: str

    def __str__(self) -> str:
        return f"{self.instance} does not serve on {self.host}: {self.why}"


def staying(host: Host) -> dict[str, Missing]:
    """Of the host's instances that leave those that must stay, with the reason. Waits for the hosts that take over."""
    hosts = {one.name: one for one in decision.hosts_of_run(host.state)}
    new = _new(hosts.values())
    successors = {(one.name, name): _successors(one, name, new) for one in hosts.values() for name in _leaving(one)}
    for place in (one for ones in successors.values() for one in ones):
        while place not in _passed and _why_not(hosts[place[0]]) is None:
            gevent.sleep(LOOK_SECONDS)
    together = {
        (one, name): frozenset((one, leaving) for leaving in handover.leaving)
        for one, handovers in _made.items()
        for handover in handovers
        for name in handover.names
    }
    found = kept(successors, _passed, together)
    return {
        name: Missing(other, instance, _why_not(hosts[other]) or "it gave it back, since another host failed")
        for (one, name), (other, instance) in found.items()
        if one == host.name
    }


def _why_not(host: Host) -> str | None:
    """Why the host will not serve anything new in this run; None while it is at work."""
    if host.name in _failed or host not in host.state.active_hosts:
        return "the host was refused, failed or could not be reached"
    if host.name in _switched:
        return "the host did not switch to it"
    results = host.state.get_results_for_host(host)
    return None if results.ops or results.error_ops else "the host has not had its turn in this run"


def _leaving(host: Host) -> tuple[str, ...]:
    now = decision.of(host)
    return now.changes.removed if now is not None else ()


# Instances that hosts of this run are to serve and have not had before, as far as that is known: place among the run's
# hosts and among the host's models, host, instance; by ("name", its name) and by ("source", its source).
_New = Mapping[tuple[str, str], Sequence[tuple[int, int, str, str]]]


def _new(hosts: Iterable[Host]) -> _New:
    found: dict[tuple[str, str], list[tuple[int, int, str, str]]] = {}
    for place, host in enumerate(hosts):
        for number, (name, source) in enumerate(_wanted(host)):
            if _is_new(host, name):
                for key in (("name", name), ("source", source)):
                    found.setdefault(key, []).append((place, number, host.name, name))
    return found


def _successors(host: Host, name: str, new: _New) -> tuple[tuple[str, str], ...]:
    """The instances of other hosts of this run that are to serve in place of the host's instance of that name: new ones
    of the same name or source, in the order of the run's hosts."""
    now = decision.of(host)
    installed = now.desired.installed.instances.get(name) if now is not None else None
    source = installed.record.source if installed is not None and installed.record is not None else None
    if now is not None and any(_is_new(host, one) for one, its_source in _wanted(host) if its_source == source):
        return ()  # it goes on under another name, such as that of a copy
    found = {*new.get(("name", name), ()), *(new.get(("source", source), ()) if source is not None else ())}
    return tuple((other, one) for _, _, other, one in sorted(found) if other != host.name)


def _wanted(host: Host) -> Iterable[tuple[str, str]]:
    """Name and source of what the host is to serve, each copy by its own name where the host was read."""
    now = decision.of(host)
    if now is None:
        return decision.wanted_models(host)
    return [(one.name, without_query(one.source)) for one in now.desired.settings.models]


def _is_new(host: Host, name: str) -> bool:
    now = decision.of(host)
    return now is None or (name in now.changes.services and name not in now.desired.installed.instances)
