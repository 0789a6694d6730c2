"""The locks of hosts that this run holds, each refreshed for as long as the run lives.

A lease is the holder's life, not its work: pyinfra lets all hosts wait for the slowest one after each operation, and
the locks of those that wait are refreshed like the others.

Decision 17: docs/decisions/0017-long-work-runs-detached-under-a-lease.md.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field

import gevent
from gevent.event import Event
from pyinfra import logger
from pyinfra.api.host import Host
from pyinfra.api.state import BaseStateCallback, State

from llamafleet.host import answers
from llamafleet.host.installed import Holder
from llamafleet.remote.common import transient_unit
from llamafleet.service.refusals import held_by
from tasks.lib import remote, sending
from tasks.lib.this_run import is_ours_or_dead, this_run

# As lock.py on the host has it, which lets a holder ask for less. Refreshed every fifth of it.
LEASE_SECONDS = 900.0
PURPOSE = "the host's lock"
RELEASE_SECONDS = 30.0  # at the end of a run, which waits no longer for a host that is gone


@dataclass
class _Held:
    """The lock of one host."""

    refreshed: float  # by `now`
    lost: str = ""  # why, where another run has it
    job: str = ""  # what runs on the host, and goes on without us
    ended: Event = field(default_factory=Event)


_held: dict[Host, _Held] = {}


class _Release(BaseStateCallback):
    """A host that failed is out of the run, and a run that ends has no host: release their locks at once."""

    @staticmethod
    def operation_host_error(
        state: State, host: Host, op_hash: str, retry_count: int = 0, max_retries: int = 0
    ) -> None:
        leave(host)

    @staticmethod
    def host_disconnect(state: State, host: Host) -> None:
        leave(host)


def is_held(host: Host) -> bool:
    """Whether this run has taken the host's lock and not released it."""
    return host in _held


def take(state: State, host: Host) -> Holder | None:
    """Take the host's lock, and keep it until it is released. The run that held it last, if that is known, with the
    seconds since as `age_seconds`. Raises `RemoteError` where another run holds it, with that run's name, and as
    `sending.run_helper` does."""
    if not any(isinstance(handler, _Release) for handler in state.callback_handlers):
        state.add_callback_handler(_Release())
    asked = json.dumps({**this_run(), "lease_seconds": LEASE_SECONDS})
    over: list[str] = []
    for _ in range(2):
        ok, out, err = sending.run_helper(host, "lock.py", "take", asked, *over, purpose=PURPOSE)
        if ok:
            _held[host] = _Held(now())
            gevent.spawn(_keep, host, _held[host])
            return remote.last(out, answers.holder) if out else None
        if not out:
            raise remote.RemoteError(f"the host's lock cannot be taken: {remote.explain(out, err)}")
        other = remote.last(out, answers.holder)
        if not is_ours_or_dead(other):
            raise remote.RemoteError(held_by(other))
        over = ["--over", other.run]
    raise remote.RemoteError("the host's lock was taken by another run in the same moment: try again")


def check(host: Host) -> None:
    """Before a change: this run still holds the host's lock. Raises `RemoteError` where another run has it now."""
    held = _held[host]
    if not held.lost and now() - held.refreshed > LEASE_SECONDS / 2:  # this machine slept, or the host was away
        _refresh(host, held)
    if held.lost:
        raise remote.RemoteError(held.lost)


def working(host: Host, job: str) -> None:
    """Note the job that runs on the host, which goes on if we are gone: the lock then ends by itself, not before. An
    empty name where it has ended."""
    _held[host].job = job


def release(host: Host) -> None:
    """Release the host's lock, if this run holds it. Raises as `sending.run_helper` does."""
    held = _held.pop(host, None)
    if held is None:
        return
    held.ended.set()
    if not held.lost:
        sending.run_helper(host, "lock.py", "release", this_run()["run"], purpose=PURPOSE, seconds=30)


def held() -> tuple[Host, ...]:
    """The hosts whose locks this run holds."""
    return tuple(_held)


def leave(host: Host) -> None:
    """At the end of a run, or after Ctrl-C: release the host's lock; a job that goes on keeps it, and is named."""
    try:
        if host in _held and _held[host].job and not _held[host].lost:
            host.log(goes_on(_held[host].job), logger.warning)
            _held.pop(host).ended.set()
        elif host.connected:
            with gevent.Timeout(RELEASE_SECONDS, remote.NoAnswerError("the host does not answer")):
                release(host)
    except Exception as error:  # whatever it is, the other hosts' run must go on
        host.log(f"the host's lock could not be released ({remote.said(error)}); it expires by itself", logger.warning)


def goes_on(job: str) -> str:
    """The sentence for a job that this run no longer follows."""
    return (
        f"{job} goes on there, under the host's lock: run the same again to join it, or stop it on the host by "
        f"systemctl stop {transient_unit('job', job)}"
    )


def _keep(host: Host, held: _Held) -> None:
    """Refresh the lock until it is released or lost."""
    while not held.ended.wait(LEASE_SECONDS / 5) and not held.lost:
        try:
            _refresh(host, held)
        except Exception as error:  # the next try may reach the host, and `check` says so where it is lost
            logger.debug(f"{host.print_prefix}the host's lock was not refreshed: {remote.said(error)}")


def _refresh(host: Host, held: _Held) -> None:
    began = now()
    try:
        ok, out, err = sending.run_helper(host, "lock.py", "refresh", this_run()["run"], purpose=PURPOSE, seconds=30)
    except remote.NoAnswerError:
        remote.connect_again(host)
        raise
    if ok:
        held.refreshed = began
    elif not out:
        raise remote.RemoteError(f"the host's lock cannot be refreshed: {remote.explain(out, err)}")
    elif not held.ended.is_set():
        held.lost = f"this run lost the host's lock to {remote.last(out, answers.holder).who}: run again"


def now() -> float:
    """Seconds on a clock that runs on while this machine sleeps, where it has one."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
