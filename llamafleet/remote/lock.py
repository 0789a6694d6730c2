"""The host's lock: one run at a time changes a host.

Contract: `lock.py take HOLDER [--over RUN]`, `lock.py refresh RUN`, `lock.py release RUN`.
HOLDER is a JSON object with `run` (unique), `who`, `machine` and `pid` of the operator's side.
Exit 0: done. Exit 1: somebody else holds it; stdout has that holder with `age_seconds` since it
was last refreshed. A holder that has not refreshed for LEASE_SECONDS has lost the lock, and
`--over RUN` takes it from a run that the operator's machine knows to be dead. Standard library; common.py beside it.

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

LEASE_SECONDS = 900  # longer than the longest step that does not refresh: an apt-get install


def read(path: str = PATH) -> dict[str, Any] | None:
    """The holder with its `age_seconds`, or None where nobody holds the lock."""
    holder = read_json(path)
    if "run" not in holder:
        return None
    holder["age_seconds"] = max(0.0, time.time() - os.stat(path).st_mtime)
    return holder if holder["age_seconds"] < LEASE_SECONDS else None


def take(holder: dict[str, Any], over: str | None = None, path: str = PATH) -> dict[str, Any] | None:
    """Take the lock: None, or the other run that holds it."""
    other = read(path)
    if other and other["run"] not in (holder["run"], over):
        return other
    write_json(path, holder)
    return None


def refresh(run: str, path: str = PATH) -> dict[str, Any] | None:
    """None if the lock was refreshed; else its present holder, or an object that says that the lock was lost."""
    other = read(path)
    if other and other["run"] == run:
        os.utime(path)
        return None
    return other or {"run": None, "who": "nobody: the lock was lost", "age_seconds": 0.0}


def release(run: str, path: str = PATH) -> None:
    other = read(path)
    if other and other["run"] == run:
        os.unlink(path)


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
    if other:
        print(json.dumps(other))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
