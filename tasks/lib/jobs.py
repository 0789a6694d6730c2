"""Jobs on a host, under this run's lock there.

A job is one of our helper programs, detached: the connection only follows it.

Decision 17: docs/decisions/0017-long-work-runs-detached-under-a-lease.md.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pyinfra.api.host import Host
from pyinfra.api.state import State

from llamafleet.host import answers
from llamafleet.hub.network import Network
from llamafleet.remote.common import JOBS
from tasks.lib import decision, host_lock, remote, sending
from tasks.lib.this_run import this_run

# One look at a job: the time that the host waits for news, and that it may take besides.
LOOK_SECONDS, LATE_SECONDS = 15.0, 60.0
# Looks in a row without an answer, each followed by a new connection, until the host counts as lost.
SILENT_LOOKS = 5
LONGEST_NAME = 120  # of a unit: 255 with what systemd and we add


@dataclass(frozen=True)
class Secret:
    """A file that is on the host only while a job runs there."""

    path: str
    text: str = field(repr=False)


def name_of(kind: str, what: str) -> str:
    """The name of a job, for a unit, a file and a shell alike: what it does and to what. Where a character has no place
    in it, or it is too long, a hash keeps names of different things apart."""
    name = f"{kind}-{what}"
    plain = re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:LONGEST_NAME]
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def spec_path(job: str) -> str:
    """Where a host has what a job is asked for; the job's name is as `name_of` gives it."""
    return f"{JOBS}/{job}.json"


def sent_spec(job: str, spec: Mapping[str, Any]) -> remote.HostCommand:
    """The command that gives the host what a job is asked for."""
    return sending.received({spec_path(job): (0o644, json.dumps(spec).encode())})


def hold(state: State, host: Host) -> bool:
    """Take the host's lock, unless this run holds it, and look again at what was decided before. Raises `RemoteError`
    where another run holds it, where this run lost it, and where the host is not what was decided about."""
    if host_lock.is_held(host):
        host_lock.check(host)
        return True
    last = host_lock.take(state, host)
    try:
        if last is None or last.run != this_run()["run"]:  # nobody was there since this run was at work
            decision.check_unchanged(host, last)
    except Exception:
        host_lock.release(host)
        raise
    return True


def follow(
    state: State, host: Host, job: str, command: Sequence[str], secret: Secret | None = None,
    network: Network | None = None,
) -> bool:  # fmt: skip
    """Start the job, or join it where it runs already; log its progress; where it fails, log the end of its log.

    `network`: the way out, of a job that reads from the network.
    """
    try:
        seen = ended(state, host, job, command, secret, network)
    except remote.RemoteError as error:
        return remote.fail(host, str(error))
    return told(host, job, seen)


def ended(
    state: State, host: Host, job: str, command: Sequence[str], secret: Secret | None = None,
    network: Network | None = None,
) -> answers.Job:  # fmt: skip
    """As `follow`, with how the job ended, of which nothing is said. Raises `remote.RemoteError` where it cannot be
    followed, also as `hold` does."""
    hold(state, host)
    try:
        seen = _until_ended(host, job, command, secret, network or Network())
    except remote.LostError as error:
        raise remote.LostError(f"{job}: {error}; what was started goes on there, run again to follow it") from error
    except remote.RemoteError as error:
        raise remote.RemoteError(f"{job}: {error}") from error
    host_lock.working(host, "")
    return seen


def _until_ended(
    host: Host, job: str, command: Sequence[str], secret: Secret | None, network: Network
) -> answers.Job:  # fmt: skip
    """What the host says of the job once that has ended."""
    options = ["--secret", secret.path] if secret else []
    options += ["--proxy", network.proxy, *(f"--no-proxy={one}" for one in network.no_proxy)] if network.proxy else []
    options += ["--certificates"] if network.ca_file else []
    files = [(0o600, secret.text.encode())] if secret else []
    files += [(0o644, network.certificates().encode())] if network.ca_file else []
    sent = sending.packed(files) if files else None
    start = remote.program("job.py", "start", job, *options, "--", *command, stdin=sent)
    host_lock.working(host, job)  # from here on it does not end with us, also where no answer comes
    try:
        seen = remote.run_json(host, start, answers.job)
    except remote.LostError:
        raise
    except remote.RemoteError:
        host_lock.working(host, "")
        raise
    logged, silent = "", 0
    while seen.state == "running":
        if seen.line != logged and seen.line:
            logged = seen.line
            host.log(logged[:200])
        host_lock.check(host)
        look = remote.program("job.py", "follow", job, f"--seen={logged}", "--seconds", f"{LOOK_SECONDS:.0f}",
                              seconds=LOOK_SECONDS + LATE_SECONDS)  # fmt: skip
        try:
            seen, silent = remote.run_json(host, look, answers.job), 0
        except remote.NoAnswerError:
            silent += 1
            if silent == SILENT_LOOKS:
                raise
            remote.connect_again(host)
    return seen


def told(host: Host, job: str, seen: answers.Job) -> bool:
    """Whether the job did its work; what it noted, or why it failed, is logged."""
    tail = seen.tail
    if seen.state == "ended" and seen.exit_code == 0:
        for line in tail:
            if line.startswith("note: "):  # what the operator should know although all went well
                host.log(line.removeprefix("note: "))
        return True
    errors = [number for number, line in enumerate(tail) if line.startswith("error: ")]
    text = "\n".join(tail[max(0, errors[-1] - 15) :] if errors else tail[-15:])
    how = seen.how or (f"exit code {seen.exit_code}" if seen.state == "ended" else "it was killed")
    lines = (f"{job} failed ({how}): {text}", remote.space_left(host, f"{how} {text}"), f"whole log: {JOBS}/{job}.log")
    return remote.fail(host, "\n".join(line for line in lines if line))
