"""Run long work on this host so that it goes on without the connection.

Contract: `job.py start NAME -- COMMAND...` starts COMMAND as the transient unit
`llamafleet-job-NAME.service`, or attaches to it where it still runs; `job.py follow NAME --seen LINE
--seconds N` waits until the job ends, says something new, or N seconds pass. Both print one JSON
object: {"state": "running" | "ended" | "absent", "exit_code": int | null, "line": last line of
the log, "tail": [lines]}. Root, systemd, the standard library; common.py, job_limits.py and prune.py beside it.

Decision 17: docs/decisions/0017-long-work-runs-detached-under-a-lease.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

import job_limits
import prune
from common import JOBS, show, transient_unit

TAIL_LINES = 40
# Seconds between two lines of progress, so that a long build does not fill the screen.
TELL_SECONDS = 10.0


def log_of(name: str) -> str:
    return os.path.join(JOBS, f"{name}.log")


def exit_code_file(name: str) -> str:
    return os.path.join(JOBS, f"{name}.exit")


def is_running(name: str) -> bool:
    state = show(transient_unit("job", name), "ActiveState").get("ActiveState")
    return state in ("active", "activating", "deactivating", "reloading")


def start(name: str, command: list[str]) -> dict[str, Any]:
    """Start the job, or attach to the one that runs; returns what `look` says."""
    os.makedirs(JOBS, mode=0o750, exist_ok=True)
    if not is_running(name):
        prune.prune()
        for stale in (exit_code_file(name), log_of(name)):
            if os.path.exists(stale):
                os.unlink(stale)
        # The shell notes the exit code: `--collect` forgets a unit as soon as it has ended.
        script = f'"$@"; code=$?; echo $code > {exit_code_file(name)}.new; ' \
                 f"mv {exit_code_file(name)}.new {exit_code_file(name)}; exit $code"  # fmt: skip
        subprocess.run(
            ["systemd-run", "--quiet", "--collect", f"--unit={transient_unit('job', name)}",
             "--property=Type=exec", f"--property=StandardOutput=append:{log_of(name)}",
             f"--property=StandardError=append:{log_of(name)}",
             *(f"--property={one}" for one in job_limits.for_job(name)),
             "/bin/sh", "-c", script, "sh", *command],
            check=True,
        )  # fmt: skip
    return look(name)


def look(name: str) -> dict[str, Any]:
    """The state of the job now."""
    running = is_running(name)
    code = None
    if not running and os.path.exists(exit_code_file(name)):
        with open(exit_code_file(name)) as file:
            code = int(file.read())
    tail = tail_of(log_of(name))
    state = "running" if running else "absent" if code is None else "ended"
    return {"state": state, "exit_code": code, "line": tail[-1] if tail else "", "tail": tail}


def tail_of(path: str) -> list[str]:
    """The last lines of a log, progress that was overwritten by a carriage return left out."""
    if not os.path.exists(path):
        return []
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - 16384))
        text = file.read().decode("utf-8", "replace")
    # Not splitlines(), which takes a carriage return for the end of a line as well.
    lines = [line.rstrip().rsplit("\r", 1)[-1] for line in text.split("\n")]
    return [line for line in lines if line][-TAIL_LINES:]


def follow(name: str, seen: str, seconds: float) -> dict[str, Any]:
    """Wait until the job has ended, has a new line, or the time is over."""
    deadline = time.monotonic() + seconds
    while True:
        found = look(name)
        if found["state"] != "running" or time.monotonic() >= deadline:
            return found
        if found["line"] != seen and time.monotonic() >= deadline - seconds + min(seconds, TELL_SECONDS):
            return found
        time.sleep(0.5)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Run long work that outlives the connection.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    starting = verbs.add_parser("start")
    starting.add_argument("name")
    starting.add_argument("command", nargs="+")
    following = verbs.add_parser("follow")
    following.add_argument("name")
    following.add_argument("--seen", default="")
    following.add_argument("--seconds", type=float, default=15.0)
    asked = parser.parse_args(argv)
    found = start(asked.name, asked.command) if asked.verb == "start" else follow(asked.name, asked.seen, asked.seconds)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
