"""How a run begins and ends: not without a host, by Ctrl-C within seconds, and with the names of hosts that failed.

`install` is called where `tasks.lib` is imported. In pyinfra's own command it also takes over Ctrl-C, for which pyinfra
waits until the hosts' commands have ended, and then exits with 0; our commands ask for that by `take_interrupts`.

Exit status 130 after Ctrl-C, as shells have it. Jobs on hosts go on, see decision 17.

Decision 17: docs/decisions/0017-long-work-runs-detached-under-a-lease.md.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from typing import Any

import gevent
import pyinfra
from pyinfra.api.exceptions import PyinfraError
from pyinfra.api.host import Host
from pyinfra.api.state import BaseStateCallback, State

from llamafleet.printable import err, one_line

INTERRUPTED = 130
# After Ctrl-C: to release the locks of hosts on which nothing goes on, and until the process ends whatever happens.
RELEASE_SECONDS, END_SECONDS = 2.0, 2.7
# Of a host's message, where all failed hosts are named at the end.
REASON_CHARACTERS = 300

_init = State.init
_reasons: dict[str, str] = {}  # why hosts failed, by name
_ending: list[gevent.Greenlet] = []  # what still may ask hosts after Ctrl-C
_interrupted = False
_hosts = 0  # of the inventory


class NoHostsError(PyinfraError):
    """The run would do nothing, and look like a success."""


class _Connections(BaseStateCallback):
    @staticmethod
    def host_connect_error(state: State, host: Host, error: Exception) -> None:
        note(host.name, f"cannot be reached: {error}")


def install() -> None:
    """Put ourselves in pyinfra's way; a second call does nothing."""
    if State.init is init:
        return
    State.init = init
    if pyinfra.is_cli:
        take_interrupts()
        atexit.register(tell_failed)


def init(self: State, inventory: Any, config: Any, initial_limit: list[Host] | None = None) -> None:
    """In place of pyinfra's method, which goes on without a host and succeeds. Raises `NoHostsError`."""
    if not len(inventory):
        raise NoHostsError('the inventory has no host: it should have lists of hosts, such as hosts = ["@local"]')
    if initial_limit is not None and not initial_limit:
        known = sorted({host.name for host in inventory} | {group for host in inventory for group in host.groups})
        raise NoHostsError(f"--limit and --exclude leave no host; known hosts and groups: {', '.join(known)}")
    global _hosts  # noqa: PLW0603 -- one process, one run
    _hosts = len(inventory)
    _init(self, inventory, config, initial_limit=initial_limit)
    self.add_callback_handler(_Connections())


def note(host: str, reason: str) -> None:
    """Remember why a host failed; the first reason counts, since others follow from it."""
    _reasons.setdefault(host, reason)


def reason(host: str) -> str:
    """Why the host failed; empty where it did not."""
    return _reasons.get(host, "")


def forget() -> None:
    """Forget why hosts failed, before all of them are asked again."""
    _reasons.clear()


def tell_failed() -> None:
    """After all that pyinfra prints, a line for each host that failed: in a fleet other hosts' lines are in between."""
    if not _reasons or _hosts < 2:
        return
    err(f"{len(_reasons)} of {_hosts} hosts failed:")
    for host, why in sorted(_reasons.items()):
        err(f"    {host}: {one_line(why, REASON_CHARACTERS)}")


# --- Ctrl-C -----------------------------------------------------------------------------------------


def take_interrupts() -> None:
    """End this process within seconds of Ctrl-C."""
    signal.signal(signal.SIGINT, _on_interrupt)


def stop_if_interrupted() -> None:
    """After Ctrl-C nothing more is begun on a host: whoever comes here waits for the end of the process."""
    if _interrupted and gevent.getcurrent() not in _ending:
        gevent.sleep(60)


def _on_interrupt(number: int, frame: object) -> None:
    global _interrupted  # noqa: PLW0603 -- one process, one Ctrl-C
    if _interrupted:
        os._exit(INTERRUPTED)
    _interrupted = True
    err("\ninterrupted")
    signal.signal(signal.SIGALRM, lambda *_: os._exit(INTERRUPTED))
    signal.setitimer(signal.ITIMER_REAL, END_SECONDS)
    hub = gevent.get_hub()
    if gevent.getcurrent() is hub.parent:  # which waits for input, or computes, and lets nobody else run
        _end()
    else:
        gevent.spawn(_end)


def _end() -> None:
    """Say what goes on, release the locks of the other hosts, and end the process. Its usual end would wait for every
    command on a host."""
    try:
        host_lock = sys.modules.get("tasks.lib.host_lock")  # where it is not imported no lock is held
        hosts = list(host_lock.held()) if host_lock else []
        _ending.extend(gevent.spawn(host_lock.leave, host) for host in hosts)  # type: ignore[union-attr]
        gevent.joinall(_ending, timeout=RELEASE_SECONDS)
        for host, one in zip(hosts, _ending, strict=True):
            if not one.ready():
                err(f"{host.print_prefix}the host's lock could not be released in time; it expires by itself")
    finally:
        sys.stdout.flush()
        os._exit(INTERRUPTED)
