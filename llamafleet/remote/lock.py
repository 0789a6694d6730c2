"""The host's lock: one run at a time changes a host.

Contract: `lock.py take HOLDER [--over RUN]`, `lock.py refresh RUN`, `lock.py release RUN`.
HOLDER is a JSON object of the operator's side with `run` (unique), `who`, `machine`, `pid` and others that are kept as
they are, and with `lease_seconds` where the lease is shorter than LEASE_SECONDS. Exit 0: done; `take` then prints the
run that released the lock last, if any did in this boot, with `age_seconds`, the time since. Exit 1: another run holds
the lock; stdout has that holder with `age_seconds`, the time since it last refreshed. A holder that has not refreshed
for its lease has lost the lock to whoever takes it first; until then it may refresh again. `--over RUN` takes the lock
from a run that the operator's machine knows to be dead. Standard library; common.py beside it.

The age is measured on the clock of this boot, which runs on while the host sleeps and which nobody sets: no change of
the time of day ends a lease or makes one longer. llamafleet 0.1.0 wrote no such time, its locks have the age of their
file; it reads the locks of this version by the age of their file, too.

Decision 17: docs/decisions/0017-long-work-runs-detached-under-a-lease.md.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import sys
import time
from typing import Any

from common import LOCK as PATH
from common import read_json, write_json

LEASE_SECONDS = 900.0  # a run refreshes every fifth of it: it may lose its connection for twelve minutes
SHORTEST_SECONDS = 1.0
BOOT_ID = "/proc/sys/kernel/random/boot_id"
# What this program writes beside what the holder says of itself.
BOOT, REFRESHED, LEASE = "host_boot", "refreshed_seconds", "lease_seconds"


def now() -> float:
    """Seconds since this boot, those included in which the host slept."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def boot() -> str:
    """The id of this boot; empty where the kernel gives none."""
    try:
        with open(BOOT_ID) as file:
            return file.read().strip()
    except OSError:
        return ""


def written(path: str) -> dict[str, Any] | None:
    """What the lock's file says, whatever its age; None where there is no readable one."""
    holder = read_json(path)
    return holder if isinstance(holder.get("run"), str) else None


def age_seconds(holder: dict[str, Any], path: str) -> float:
    """The time since the holder last refreshed; endless if that was in another boot."""
    refreshed = holder.get(REFRESHED)
    if isinstance(refreshed, (int, float)) and not isinstance(refreshed, bool):
        return max(0.0, now() - refreshed) if holder.get(BOOT) == boot() else float("inf")
    # llamafleet 0.1.0. Its file may be of a future time, if the clock was set back since: by more than a lease, and
    # nobody refreshes it.
    return abs(time.time() - os.stat(path).st_mtime)


def lease_seconds(holder: dict[str, Any]) -> float:
    """How long the holder may be silent, in bounds."""
    asked = holder.get(LEASE)
    if isinstance(asked, bool) or not isinstance(asked, (int, float)):
        return LEASE_SECONDS
    return min(max(float(asked), SHORTEST_SECONDS), LEASE_SECONDS)


def read(path: str = PATH) -> dict[str, Any] | None:
    """The holder with its `age_seconds`, or None where nobody holds the lock."""
    holder = written(path)
    if holder is None:
        return None
    try:
        age = age_seconds(holder, path)
    except OSError:  # released in this moment
        return None
    return {**holder, "age_seconds": age} if age < lease_seconds(holder) else None


def write(holder: dict[str, Any], path: str) -> None:
    """Name the holder, as of now."""
    write_json(path, {**holder, LEASE: lease_seconds(holder), BOOT: boot(), REFRESHED: now()})


def take(holder: dict[str, Any], over: str | None = None, path: str = PATH) -> dict[str, Any] | None:
    """Take the lock: None, or the other run that holds it."""
    other = read(path)
    if other and other["run"] not in (holder["run"], over):
        return other
    write(holder, path)
    return None


def refresh(run: str, path: str = PATH) -> dict[str, Any] | None:
    """None if the lock was refreshed; else its present holder, or an object that says that the lock was lost.

    A lease that has ended is refreshed as well where nobody took the lock since: the file still names this run.
    """
    holder = written(path)
    if holder and holder["run"] == run:
        write(holder, path)
        return None
    return read(path) or {"run": "", "who": "nobody: the lock was lost", "age_seconds": 0.0}


def release(run: str, path: str = PATH) -> None:
    """Give the lock back, if this run has it; note that it did."""
    holder = written(path)
    if holder and holder["run"] == run:
        write(holder, last_path(path))
        os.unlink(path)


def last_path(path: str) -> str:
    return path + ".last"


def last_run(path: str = PATH) -> dict[str, Any] | None:
    """The run that released the lock last in this boot, with the time since as `age_seconds`."""
    last = written(last_path(path))
    age = age_seconds(last, last_path(path)) if last else float("inf")
    return {**last, "age_seconds": age} if last and age < float("inf") else None


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="The host's lock.")
    parser.add_argument("verb", choices=("take", "refresh", "release"))
    parser.add_argument("what")
    parser.add_argument("--over")
    asked = parser.parse_args(argv)
    os.makedirs(os.path.dirname(PATH), mode=0o755, exist_ok=True)
    with open(PATH + ".guard", "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        other = None
        if asked.verb == "take":
            other = take(json.loads(asked.what), asked.over)
        elif asked.verb == "refresh":
            other = refresh(asked.what)
        else:
            release(asked.what)
        last = last_run() if asked.verb == "take" and not other else None
    if other or last:
        print(json.dumps(other or last))
    return 1 if other else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
