"""Run long work on this host so that it goes on without the connection.

Contract: `job.py start NAME [--secret PATH] [--proxy URL] [--no-proxy NAME]... [--certificates] -- COMMAND...` starts
COMMAND as the transient unit `llamafleet-job-NAME.service`, or attaches to it where it still runs; `job.py follow NAME
--seen LINE --seconds N` waits until the job ends, says something new, or N seconds pass. Both print one JSON object:
{"state": "running" | "ended" | "absent", "exit_code": int | null, "how": how it ended, in words, "line": last line of
the log, "tail": [lines]}. `job.py told NAME` prints the lines of the log that begin with `told: `. What fails is said
on stderr after `error: `, with exit status 1. NAME has letters, digits and . _ - only.

`--secret PATH`: the file comes by standard input, in the form of receive.py, is there before COMMAND starts, and is
removed when that has ended, however it ends. systemd itself runs `job.py ended NAME [PATH]`, which notes how the job
ended: `--collect` forgets a unit as soon as it has ended.

`--proxy`: the job's programs read from the network by it, but not from what `--no-proxy` names. `--certificates`: a
file of certificates comes by standard input too, behind the secret, and they trust these beside the public ones.

Root, systemd, the standard library; common.py, job_limits.py, network.py, prune.py and receive.py beside it.

Decision 17: docs/decisions/0017-long-work-runs-detached-under-a-lease.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from typing import Any, BinaryIO, Dict, List, Mapping, Optional, Sequence, Tuple

import job_limits
import network
import prune
import receive
from common import JOBS, RUN, read_json, replace_file, show, transient_unit, unit_words, write_json

TAIL_LINES = 40
# Seconds between two lines of progress, so that a long build does not fill the screen.
TELL_SECONDS = 10.0
# Between two questions to systemd whether a job runs.
ASK_SECONDS = 5.0
# With less free space than this a log or an exit code may have been lost.
FULL_BYTES = 65536
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
# Words that systemd's own parser of commands takes as they are.
PLAIN = re.compile(r"[A-Za-z0-9_./@:=+-]+")
# systemd's words for the result of a service (systemd.exec(5)) that say more than an exit code does.
RESULTS = {
    "timeout": "it was ended at its time limit", "oom-kill": "it was killed, because memory ran out",
    "watchdog": "it was ended by the watchdog", "resources": "systemd could not start it",
    "exec-condition": "systemd could not start it", "start-limit-hit": "systemd could not start it",
}  # fmt: skip


def log_of(name: str) -> str:
    return os.path.join(JOBS, f"{name}.log")


def exit_files(name: str) -> Tuple[str, str]:
    """Where it is noted how a job ended: on the disk, or, if that is full, in memory."""
    return os.path.join(JOBS, f"{name}.exit"), os.path.join(RUN, f"{name}.exit")


def is_running(name: str) -> bool:
    """Raises OSError or SubprocessError where systemd cannot be asked."""
    state = show(transient_unit("job", name), "ActiveState", seconds=60.0).get("ActiveState")
    return state in ("active", "activating", "deactivating", "reloading")


def start(
    name: str, command: List[str], secret: Optional[str], stream: BinaryIO, *,
    proxy: Optional[str] = None, no_proxy: Sequence[str] = (), certificates: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Start the job, or attach to the one that runs; returns what `look` says."""
    if not NAME.fullmatch(name):
        raise ValueError(f"a job's name has letters, digits and . _ - only, not {name!r}")
    os.makedirs(JOBS, mode=0o750, exist_ok=True)
    if is_running(name):
        return look(name)
    prune.prune()
    for stale in (*exit_files(name), log_of(name)):
        if os.path.exists(stale):
            os.unlink(stale)
    sent = receive.contents(stream) if secret or certificates else []
    variables = network.variables(proxy, no_proxy, None)
    if certificates:
        variables.update(trusting(sent[-1][1]))
    if secret:
        mode, data = sent[0]
        replace_file(secret, data, mode)
    try:
        subprocess.run([*systemd_run(name, secret, variables), *unit_words(command)], check=True)
    except BaseException:
        if secret:
            os.unlink(secret)
        raise
    return look(name)


def trusting(own: bytes) -> Dict[str, str]:
    """Write the files by which programs trust these certificates too, and give the variables that name them."""
    bundle, apt = os.path.join(RUN, "certificates.pem"), os.path.join(RUN, "apt.conf")
    os.makedirs(RUN, mode=0o755, exist_ok=True)
    replace_file(bundle, network.bundle(own))
    replace_file(apt, network.apt_settings(bundle).encode())
    return {**network.variables(None, (), bundle), "APT_CONFIG": apt}


def systemd_run(name: str, secret: Optional[str], variables: Mapping[str, str]) -> List[str]:
    """The words before a command that make it the job of that name, with these variables in its environment."""
    ended = [sys.executable, "-s", "-E", "-B", os.path.abspath(__file__), "ended", name]
    ended += [secret] if secret else []
    for word in ended:
        if not PLAIN.fullmatch(word):
            raise ValueError(f"{word!r} cannot stand in a unit's ExecStopPost=")
    return [
        "systemd-run", "--quiet", "--collect", f"--unit={transient_unit('job', name)}", "--property=Type=exec",
        f"--property=StandardOutput=append:{log_of(name)}", f"--property=StandardError=append:{log_of(name)}",
        *(f"--property={one}" for one in job_limits.for_job(name)),
        *(f"--setenv={one}={value}" for one, value in sorted(variables.items())),
        f"--property=ExecStopPost={' '.join(ended)}",
    ]  # fmt: skip


def ended(name: str, secret: Optional[str]) -> None:
    """Note how the job ended, as systemd tells it in the environment; remove its secret."""
    if secret:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(secret)
    code, status = os.environ.get("EXIT_CODE", ""), os.environ.get("EXIT_STATUS", "")
    noted = {"code": int(status) if code == "exited" and status.isdigit() else None,
             "signal": status if code in ("killed", "dumped") else "",
             "result": os.environ.get("SERVICE_RESULT", "")}  # fmt: skip
    disk, memory = exit_files(name)
    try:
        write_json(disk, noted)
    except OSError:
        write_json(memory, noted)


def look(name: str) -> dict[str, Any]:
    """The state of the job now."""
    tail = tail_of(log_of(name))
    found = {"exit_code": None, "how": "", "line": tail[-1] if tail else "", "tail": tail}
    if is_running(name):
        return {"state": "running", **found}
    noted = [path for path in exit_files(name) if os.path.exists(path)]
    code, how = how_it_ended(noted[0]) if noted else (None, "it was killed, or the host restarted")
    if code != 0 and is_full(JOBS):
        how += f"; the disk of {JOBS} has no space left"
    return {**found, "state": "ended" if noted else "absent", "exit_code": code, "how": how}


def how_it_ended(path: str) -> Tuple[Optional[int], str]:
    """The exit code that was noted, if any, and how the job ended, in words."""
    noted = read_json(path)
    if not noted:  # llamafleet 0.1.0 wrote the number alone
        try:
            with open(path) as file:
                text = file.read(16).strip()
        except (OSError, ValueError):
            text = ""
        if not re.fullmatch(r"[0-9]{1,3}", text):
            return None, f"its exit code is lost: {path} is empty or damaged"
        noted = {"code": int(text)}
    code, result, signal = noted.get("code"), noted.get("result"), noted.get("signal")
    if isinstance(result, str) and result in RESULTS:
        return (None, RESULTS[result])
    if isinstance(code, int) and not isinstance(code, bool):
        return code, f"exit code {code}"
    return None, f"it was killed by SIG{signal}" if signal else "it was killed"


def is_full(folder: str) -> bool:
    """Whether the disk of the folder has hardly a byte left."""
    try:
        disk = os.statvfs(folder)
    except OSError:
        return False
    return disk.f_bavail * disk.f_frsize < FULL_BYTES


def tail_of(path: str) -> List[str]:
    """The last lines of a log, progress that was overwritten by a carriage return left out; none if it cannot be
    read."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - 16384))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    # Not splitlines(), which takes a carriage return for the end of a line as well.
    lines = [line.rstrip().rsplit("\r", 1)[-1] for line in text.split("\n")]
    return [line for line in lines if line][-TAIL_LINES:]


def follow(name: str, seen: str, seconds: float) -> dict[str, Any]:
    """Wait until the job has ended, has a new line, or the time is over."""
    began = time.monotonic()
    asked = None
    while True:
        now = time.monotonic()
        # A note of its end tells as much as systemd, whose answer takes more; one that was killed may have none.
        if asked is None or now - asked >= ASK_SECONDS or any(map(os.path.exists, exit_files(name))):
            asked, found = now, look(name)
            if found["state"] != "running":
                return found
        line = (tail_of(log_of(name)) or [""])[-1]
        if now - began >= seconds or (line != seen and now - began >= min(seconds, TELL_SECONDS)):
            return look(name)
        time.sleep(0.5)


def told(name: str) -> List[str]:
    """The lines of the log for the operator's program, as verify.py writes them."""
    return [line for line in tail_of(log_of(name)) if line.startswith("told: ")]


def parsed(argv: List[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run long work that outlives the connection.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    starting = verbs.add_parser("start")
    starting.add_argument("name")
    starting.add_argument("--secret")
    starting.add_argument("--proxy")
    starting.add_argument("--no-proxy", action="append", default=[])
    starting.add_argument("--certificates", action="store_true")
    starting.add_argument("command", nargs="+")
    following = verbs.add_parser("follow")
    following.add_argument("name")
    following.add_argument("--seen", default="")
    following.add_argument("--seconds", type=float, default=15.0)
    telling = verbs.add_parser("told")
    telling.add_argument("name")
    ending = verbs.add_parser("ended")
    ending.add_argument("name")
    ending.add_argument("secret", nargs="?")
    return parser.parse_args(argv)


def main(argv: List[str], stream: BinaryIO) -> int:
    asked = parsed(argv)
    try:
        if asked.verb == "start":
            print(json.dumps(start(asked.name, asked.command, asked.secret, stream, proxy=asked.proxy,
                                   no_proxy=asked.no_proxy, certificates=asked.certificates)))  # fmt: skip
        elif asked.verb == "follow":
            print(json.dumps(follow(asked.name, asked.seen, asked.seconds)))
        elif asked.verb == "told":
            print("\n".join(told(asked.name)))
        else:
            ended(asked.name, asked.secret)
    except (OSError, ValueError, subprocess.SubprocessError, receive.Failed) as error:
        print(f"error: the job {asked.name}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], sys.stdin.buffer))
