"""Whose turn it is to switch: so many hosts at a time that each model goes on to be served by others.

pyinfra runs an operation on all hosts at once. A host that replaces a running server waits here until few enough others
do: `switch_at_once` of them, or, without that setting, as many as leave each model with half of its hosts. A host that
starts what it did not serve before waits for nobody. In a rollout nothing more is switched after a host has failed.

Decision 12: docs/decisions/0012-a-fleet-moves-in-waves.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import gevent
from pyinfra.api.host import Host
from pyinfra.api.state import BaseStateCallback, State

from llamafleet.fleet import waves
from llamafleet.settings.copies import model_of
from llamafleet.settings.schema import CUT, Settings
from tasks.lib import decision, gateway_drains, remote

LOOK_SECONDS = 0.2

# By name, the hosts that switch now, each with the models that it does not serve meanwhile.
_away: dict[str, frozenset[str]] = {}
_failed: list[str] = []
_told: set[str] = set()
_in_rollout = False


@dataclass(frozen=True)
class Options:
    """How a host's servers are stopped: the settings `drain_seconds`, `drain_overdue` and `switch_at_once`."""

    drain_seconds: int
    drain_overdue: str
    at_once: int | None

    @classmethod
    def of(cls, settings: Settings) -> Options:
        return cls(settings.drain_seconds, settings.drain_overdue, settings.switch_at_once)

    def words(self) -> list[str]:
        """As options of switch.py on the host."""
        if not self.drain_seconds:
            return []
        overdue = [] if self.drain_overdue == CUT else ["--overdue", self.drain_overdue]
        return ["--drain", str(self.drain_seconds), *overdue]


class _Failures(BaseStateCallback):
    @staticmethod
    def operation_host_error(
        state: State, host: Host, op_hash: str, retry_count: int = 0, max_retries: int = 0
    ) -> None:
        _failed.append(host.name)


def begin_rollout() -> None:
    """From here on the runs of this process are waves of a rollout."""
    global _in_rollout  # noqa: PLW0603 -- one process, one rollout
    _in_rollout = True


def in_rollout() -> bool:
    """Whether this run is a wave of a rollout."""
    return _in_rollout


@contextlib.contextmanager
def turn(host: Host, names: Collection[str], at_once: int | None) -> Iterator[None]:
    """A block in which the host switches these instances; entered when it may. Raises `RemoteError` in a rollout where
    another host has failed."""
    if not any(isinstance(handler, _Failures) for handler in host.state.callback_handlers):
        host.state.add_callback_handler(_Failures())
    there = installed(host, names)
    models, said = frozenset(replaced(host, there)), False
    most = {model: waves.most_away(hosts_of(host, model)) for model in models}
    while models and not _may_switch(most, at_once):
        if not said:
            host.log(f"waiting for {', '.join(sorted(_away))} to switch first")
            said = True
        gevent.sleep(LOOK_SECONDS)
    if _in_rollout and _failed:
        raise remote.RemoteError(f"nothing is switched here, because {_failed[0]} failed before: a rollout ends there")
    _away[host.name] = models
    try:
        is_alone = any(hosts_of(host, model) < 2 for model in models)
        with gateway_drains.drained(host, there, strict=_in_rollout, even_last=is_alone):
            yield
    finally:
        del _away[host.name]


def not_a_rollout(host: Host, names: Iterable[str], at_once: int | None) -> Iterator[str]:
    """Outside a rollout, a sentence for each model of these instances of the host that other hosts of the run serve as
    well; each once in a run."""
    for model in sorted(set(replaced(host, names))):
        count = sum(one is host or model in wanted(one) for one in decision.hosts_of_run(host.state))
        if _in_rollout or count < 2 or model in _told:
            continue
        _told.add(model)
        limit = at_once or waves.most_away(hosts_of(host, model))
        yield (
            f"this is no rollout: {count} hosts of this run serve {model}, and replace it at most {limit} at a time, "
            "also after one of them has failed. llamafleet rollout goes wave by wave, and ends with the first failure"
        )


def installed(host: Host, names: Iterable[str]) -> list[str]:
    """Those of these instances that the host has already."""
    now = decision.of(host)
    there = now.desired.installed.instances if now is not None else {}
    return [name for name in names if name in there]


def replaced(host: Host, names: Iterable[str]) -> Iterator[str]:
    """The models of those of these instances that the host has already, without the numbers of copies."""
    yield from (model_of(name, wanted(host)) for name in installed(host, names))


def wanted(host: Host) -> frozenset[str]:
    """The names of the models in the host's data."""
    return frozenset(name for name, _ in decision.wanted_models(host))


def _may_switch(most: Mapping[str, int], at_once: int | None) -> bool:
    """`most`: by model, how many hosts may be away."""
    others = [away for away in _away.values() if away]
    if at_once is not None:
        return len(others) < at_once
    return all(sum(model in away for away in others) < count for model, count in most.items())


def hosts_of(host: Host, model: str) -> int:
    """How many hosts of the inventory are to serve the model, or are this one."""
    return sum(one is host or model in wanted(one) for one in host.state.inventory)
