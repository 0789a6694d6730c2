"""Jobs on a host, under this run's lock there.

A job is one of our helper programs, detached: the connection only follows it. The host's lock is taken before and
refreshed meanwhile; where the host fails, the lock is released at once.

Decision 17: docs/decisions/0017-long-work-runs-detached-under-a-lease.md.
"""

from __future__ import annotations

import json

from pyinfra import logger
from pyinfra.api import StringCommand
from pyinfra.api.host import Host
from pyinfra.api.state import BaseStateCallback, State

from llamafleet.host import answers
from llamafleet.remote.common import JOBS
from llamafleet.service.refusals import held_by
from tasks.lib import remote

# Hosts whose lock this run holds.
_holding: set[Host] = set()


class _ReleaseLockOnFailure(BaseStateCallback):
    """A host that failed is out of the run: release its lock at once."""

    @staticmethod
    def operation_host_error(
        state: State, host: Host, op_hash: str, retry_count: int = 0, max_retries: int = 0
    ) -> None:
        try:
            if host.connected and host in _holding:
                remote.run(host, release())
        except Exception as error:  # whatever it is, the other hosts' run must go on
            host.log(f"the host's lock could not be released ({error}); it expires by itself", logger.warning)
        _holding.discard(host)


def release() -> StringCommand:
    """The command that releases the host's lock."""
    return remote.program("lock.py", "release", remote.this_run()["run"])


def take_lock(state: State, host: Host) -> bool:
    """Take the host's lock; where another run holds it, fail with a line that names that run."""
    if not any(isinstance(handler, _ReleaseLockOnFailure) for handler in state.callback_handlers):
        state.add_callback_handler(_ReleaseLockOnFailure())
    try:
        return _take_lock(host)
    except remote.RemoteError as error:
        return _fail(host, f"the host's lock cannot be taken: {error}")


def _take_lock(host: Host) -> bool:
    holder = remote.this_run()
    over: list[str] = []
    for _ in range(2):
        ok, out, err = remote.run(host, remote.program("lock.py", "take", json.dumps(holder), *over))
        if ok:
            _holding.add(host)
            return True
        if not out:
            return _fail(host, f"the host's lock cannot be taken: {remote.explain(out, err)}")
        other = remote.last(out, answers.holder)
        if not remote.is_ours_or_dead(other):
            return _fail(host, held_by(other))
        over = ["--over", other.run]
    return _fail(host, "the host's lock was taken by another run in the same moment: try again")


def _fail(host: Host, text: str) -> bool:
    host.log_styled(text, fg="red", log_func=logger.error)
    return False


def follow(state: State, host: Host, job: str, command: list[str]) -> bool:
    """Start the job, or join it where it runs already; log its progress; where it fails, log the end of its log.

    A stage that is run alone holds the host's lock for its job only.
    """
    try:
        if host in _holding:
            return _follow_locked(host, job, command)
        if not take_lock(state, host):
            return False
        try:
            return _follow_locked(host, job, command)
        finally:
            remote.run(host, release())
            _holding.discard(host)
    except remote.RemoteError as error:
        return _fail(host, f"{job}: {error}; what was started goes on there, run again to follow it")


def _follow_locked(host: Host, job: str, command: list[str]) -> bool:
    seen = remote.run_json(host, remote.program("job.py", "start", job, "--", *command), answers.job)
    logged = ""
    while seen.state == "running":
        if seen.line != logged and seen.line:
            logged = seen.line
            host.log(logged[:200])
        kept, out, err = remote.run(host, remote.program("lock.py", "refresh", remote.this_run()["run"]))
        if not kept:
            return _fail(host, f"this run lost the host's lock, the job goes on: {remote.explain(out, err)}")
        look = remote.program("job.py", "follow", job, f"--seen={logged}", "--seconds", "15")
        seen = remote.run_json(host, look, answers.job)
    if seen.state == "ended" and seen.exit_code == 0:
        for line in seen.tail:
            if line.startswith("note: "):  # what the operator should know although all went well
                host.log(line.removeprefix("note: "))
        return True
    how = f"exit code {seen.exit_code}" if seen.state == "ended" else "it was killed"
    tail = seen.tail
    errors = [number for number, line in enumerate(tail) if line.startswith("error: ")]
    text = "\n".join(tail[max(0, errors[-1] - 15) :] if errors else tail[-15:])
    return _fail(host, f"{job} failed ({how}): {text}\nwhole log: {JOBS}/{job}.log")
