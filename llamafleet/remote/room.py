"""Make room for a server that starts on demand: stop others that nobody uses, or wait for the end of their replies.

Contract: `room.py NAME`, the ExecCondition= of llama-server-NAME.service: exit 0 once there is room, 1 if there is none
within ROOM_SECONDS, with a line that says why; systemd then does not start the server, and calls nothing failed.
`make(name)` is the same for switch.py. What a server needs and what is there for all that start on demand stands in
plan.json's `demand`: {"needs_bytes", "room_bytes"}, by device. A server without connections is stopped at once; after
HOLD_AFTER_SECONDS new connections of those in the way are held where the kernel allows that (draining.py), and they are
stopped when no slot is at work and no request waits. What hands their connections on is frozen for the last look. So no
reply is cut, and nothing that is being switched is touched. The decision is made under a lock of the host. Root, the
standard library, Python 3.8; common.py, switch_lock.py, draining.py and what it needs lie beside it.

Decision 22: docs/decisions/0022-a-server-starts-when-it-is-asked.md.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import signal
import subprocess
import sys
import time
from functools import partial
from typing import Any, Callable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import common
import draining
from common import demand_units, plan_path, read_json, show, systemctl, unit_of
from switch_lock import unswitched

ROOM_SECONDS = 60.0  # then those who wait for the start are told to come back
HOLD_AFTER_SECONDS = 10.0
POLL_SECONDS = 0.2
MOST_CHOICES = 20_000  # sets of servers that are looked at
AGAIN_SECONDS = 1.0  # for a last look whether nothing is at work

Bytes = Mapping[str, int]


class Other(NamedTuple):
    """Another server on demand that has memory, or gets it; `since` is when it was started."""

    name: str
    needs: Optional[Bytes]  # None: its plan.json does not say
    serves: bool  # it can be stopped; one that starts or ends cannot
    since: int


def make(
    name: str, seconds: float = ROOM_SECONDS, besides: Sequence[str] = (), alone: bool = False
) -> Optional[str]:  # fmt: skip
    """Make room for this instance: None, or why there is none. `besides` stay; `alone`: all others leave. Raises
    OSError, SubprocessError."""
    began = time.monotonic()
    while True:
        with lock():
            passed = time.monotonic() - began
            others = present([name, *besides])
            find = partial(choices, name, others, alone)
            in_the_way = next(find())
            if not in_the_way:
                reserve(name)
                return None
            if stopped_some(find, others, 0.0 if passed < min(HOLD_AFTER_SECONDS, seconds / 2) else seconds - passed):
                continue
        if time.monotonic() - began >= seconds:
            units = ", ".join(map(unit_of, in_the_way))
            return f"no room for {unit_of(name)} within {seconds:.0f} s: {units} is at work, starts or ends"
        time.sleep(POLL_SECONDS)


def stopped_some(find: Callable[[], Iterator[Sequence[str]]], others: Sequence[Other], seconds: float) -> bool:
    """Stop as few as make room: of those that nobody uses, or else of all, if their replies end within `seconds`.
    `find` gives the sets that would do."""
    serving = {one.name for one in others if one.serves}
    unused = {one for one in serving if looks_unused(one)}
    for stoppable, wait in ((unused, 0.0), (serving, seconds)):
        found = next((names for names in find() if stoppable.issuperset(names)), None)
        if found and (wait or stoppable is unused):
            return leave(found, wait)
    return False


@contextlib.contextmanager
def lock() -> Iterator[None]:
    os.makedirs(common.RUN, exist_ok=True)
    with open(f"{common.RUN}/room.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- who is there, and who has to leave -----------------------------------------------------------------


def on_demand() -> List[str]:
    """The installed instances that start on demand."""
    begin, end = demand_units("*")[0].split("*")
    return [unit[len(begin) : -len(end)] for unit in common.listing(common.UNITS)
            if unit.startswith(begin) and unit.endswith(end)]  # fmt: skip


def present(besides: Sequence[str]) -> List[Other]:
    """The others that have memory, or have been given it, the longest there first."""
    found = (other(one) for one in on_demand() if one not in besides)
    return sorted((one for one in found if one), key=lambda one: one.since)


def other(name: str) -> Optional[Other]:
    """None where it neither runs nor is about to."""
    shown = show(unit_of(name), "ActiveState", "SubState", "InvocationID", "ActiveEnterTimestampMonotonic",
                 seconds=30.0)  # fmt: skip
    state = shown.get("ActiveState")
    waits = shown.get("SubState") == "condition" and reserved(name) != shown.get("InvocationID")
    if state in ("inactive", "failed") or waits:
        return None
    since = common.whole_number(shown.get("ActiveEnterTimestampMonotonic")) or 0
    return Other(name, sizes(name, "needs_bytes"), state == "active", since)


def sizes(name: str, key: str) -> Optional[Bytes]:
    """What plan.json's `demand` says; None where it does not."""
    demand = read_json(plan_path(name)).get("demand")
    found: Any = demand.get(key) if isinstance(demand, dict) else None
    if not isinstance(found, dict) or not all(type(size) is int for size in found.values()):
        return None
    return found


def choices(name: str, others: Sequence[Other], alone: bool = False) -> Iterator[Sequence[str]]:
    """Sets of servers without which this one fits, the smallest first; the first is empty where it fits beside all.
    `alone`: the set of all."""
    needs, room = (None, None) if alone else (sizes(name, "needs_bytes"), sizes(name, "room_bytes"))
    sets = (gone for size in range(len(others)) for gone in itertools.combinations(others, size))
    for gone in itertools.islice(sets, MOST_CHOICES):
        if needs and room and fits(room, [needs, *(one.needs for one in others if one not in gone)]):
            yield [one.name for one in gone]
    yield [one.name for one in others]


def fits(room: Bytes, needs: Sequence[Optional[Bytes]]) -> bool:
    """Whether these have room together; one of unknown size has room with none."""
    known = [one for one in needs if one is not None]
    within = all(sum(one.get(device, 0) for one in known) <= size for device, size in room.items())
    return within and len(known) == len(needs)


def reserve(name: str) -> None:
    """Note that this start, of those that wait, has been given its room."""
    path = f"{common.RUN}/room-{name}"
    with open(path, "w") as file:
        file.write(os.environ.get("INVOCATION_ID", ""))


def reserved(name: str) -> str:
    return (common.read_file(f"{common.RUN}/room-{name}") or b"").decode("ascii", "replace")


# --- letting others leave --------------------------------------------------------------------------------


def leave(names: Sequence[str], seconds: float) -> bool:
    """Stop these servers if nobody uses them, or if their running replies end within `seconds`; whether they have."""
    with contextlib.ExitStack() as stack:
        if not all(stack.enter_context(unswitched(name)) for name in names):
            return False
        servers = [one for one in map(draining.running, names) if one is not None]
        for one in servers:
            if one.listener is not None:
                stack.callback(one.listener.close)
        if len(servers) < len(names) or not all(map(draining.door_of, names)):
            return False
        if seconds:
            for one in servers:
                draining.hold(one)
                stack.callback(draining.release, one)
            if not draining.wait(servers, seconds, certain=True):
                return False
        # Frozen, a process accepts no connection: whoever comes now is kept by the socket, which systemd has too.
        processes = [pid for name in names for pid in processes_of(draining.door_of(name))]
        frozen = stack.enter_context(contextlib.ExitStack())
        for pid in processes:
            send(pid, signal.SIGSTOP)
            frozen.callback(send, pid, signal.SIGCONT)
        if any(map(connections, processes)) and not (seconds and draining.wait(servers, AGAIN_SECONDS, certain=True)):
            return False
        print(f"stopping {', '.join(map(unit_of, names))} to make room", flush=True)
        frozen.pop_all()
        for pid in processes:  # not by a signal that it would wake up for
            send(pid, signal.SIGKILL)
        systemctl("stop", *map(unit_of, names))
        return True


def send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def looks_unused(name: str) -> bool:
    """Whether no client has a connection, also none that nobody has accepted yet."""
    door = draining.door_of(name)
    return door > 0 and not any(map(connections, processes_of(door))) and not waiting(door)


def processes_of(pid: int) -> List[int]:
    """A process and its children."""
    found = [pid]
    for one in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError, IndexError, ValueError), open(f"/proc/{one}/stat") as file:
            if int(file.read().rpartition(")")[2].split()[1]) == pid:
                found.append(int(one))
    return found


def connections(pid: int) -> int:
    """TCP connections of a process."""
    return sum(state != draining.LISTEN for state, _ in own_sockets(pid))


def waiting(pid: int) -> int:
    """Connections to a process that nobody has accepted."""
    return sum(queued for state, queued in own_sockets(pid) if state == draining.LISTEN)


def own_sockets(pid: int) -> Iterator[Tuple[str, int]]:
    """State and what is unread of the TCP sockets of a process."""
    inodes = set()
    with contextlib.suppress(OSError):
        for number in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                inodes.add(os.readlink(f"/proc/{pid}/fd/{number}"))
    return ((state, queued) for state, inode, queued in draining.sockets(pid) if f"socket:[{inode}]" in inodes)


def main(argv: List[str]) -> int:
    os.umask(0o022)  # the server's unit has another one
    try:
        why = make(argv[0])
    except (OSError, subprocess.SubprocessError) as error:
        why = str(error)
    if why:
        print(why, flush=True)
    return 1 if why else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
