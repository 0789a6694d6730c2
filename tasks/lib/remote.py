"""Running our helper programs on a host, over whatever connector pyinfra has for it."""

from __future__ import annotations

import contextlib
import getpass
import os
import shlex
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import psutil
from paramiko import SSHException
from pyinfra import logger
from pyinfra.api.arguments import CONNECTOR_ARGUMENT_KEYS, pop_global_arguments
from pyinfra.api.command import StringCommand
from pyinfra.api.exceptions import ConnectError
from pyinfra.api.host import Host

from llamafleet.host.answers import AnswerError
from llamafleet.host.installed import Holder
from llamafleet.remote.common import helper

# How often a broken connection is made again before we give up, and the seconds between.
RECONNECTS, RECONNECT_SECONDS = 20, 3.0

T = TypeVar("T")


class RemoteError(Exception):
    """A program on the host failed; the text has what it printed, and for known failures the way out."""


def words(name: str, *arguments: str) -> list[str]:
    """The command, as a list, that runs one of our installed helpers with the host's own Python."""
    return ["python3", "-s", "-E", "-B", helper(name), *arguments]


def program(name: str, *arguments: str) -> StringCommand:
    """The command that runs one of our installed helpers, for a shell."""
    return StringCommand(shlex.join(words(name, *arguments)))


def run(host: Host, command: StringCommand | str) -> tuple[bool, list[str], list[str]]:
    """Run a command with the host's own sudo settings: success, stdout lines, stderr lines."""
    if isinstance(command, str):
        command = StringCommand(command)
    ok, output = reconnecting(host, lambda: host.run_shell_command(command, **_arguments(host)))
    return ok, output.stdout_lines, output.stderr_lines


def run_json(host: Host, command: StringCommand | str, read: Callable[[str], T]) -> T:
    """The value that a command prints as JSON on its last line; `RemoteError` where it fails or prints something else.

    `read` is the function of `llamafleet/host/answers.py` for the program.
    """
    ok, out, err = run(host, command)
    if not ok:
        raise RemoteError(explain(out, err))
    return last(out, read)


def last(lines: Sequence[str], read: Callable[[str], T]) -> T:
    """The value of the last line that a program printed, by a function of `llamafleet/host/answers.py`; `RemoteError`
    where the line is unusable."""
    try:
        return read(lines[-1] if lines else "")
    except AnswerError as error:
        raise RemoteError(str(error)) from error


def explain(out: list[str], err: list[str]) -> str:
    """What a failed command printed; for known failures the way out."""
    text = "\n".join(line for line in [*err, *out] if line.strip()) or "it printed nothing"
    if "python3" in text and "not found" in text:
        return "python3 is missing on the host: install it (apt-get install python3, dnf install python3)"
    if "sudo" in text and ("password is required" in text or "not in the sudoers" in text):
        return f"sudo does not work for this user ({text}): allow it, or connect as root (ssh_user)"
    return text


def upload(host: Host, content: bytes, path: str) -> None:
    """Put bytes into a file of the host, as the connecting user; nothing is logged."""
    if not reconnecting(host, lambda: host.put_file(BytesIO(content), path)):
        raise RemoteError(f"cannot write {path} on the host: is its disk full or read-only?")


def temporary(host: Host, suffix: str) -> str:
    """A fresh path in the host's temporary folder."""
    return host.get_temp_filename(f"llamafleet-{uuid.uuid4()}") + suffix


def reconnecting(host: Host, action: Callable[[], T]) -> T:
    """The action's result. Where the connection breaks, connect again and repeat the action."""
    for attempt in range(RECONNECTS):
        try:
            return action()
        except (OSError, EOFError, SSHException, ConnectError) as error:
            if attempt == RECONNECTS - 1:
                raise RemoteError(f"the connection is lost and does not come back: {error}") from error
            logger.warning(f"{host.print_prefix}the connection broke ({error}); connecting again")
            time.sleep(RECONNECT_SECONDS)
            _connect_again(host)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _connect_again(host: Host) -> None:
    # Closing a broken connection may fail; what counts is the new one.
    with contextlib.suppress(OSError, EOFError, SSHException):
        host.disconnect()
    host.connected = False
    host.connect(reason="again", show_errors=False)


def _arguments(host: Host) -> dict[str, Any]:
    """sudo, su and the like for this host, as pyinfra resolves them for an operation."""
    arguments, _ = pop_global_arguments(host.state, host, {})
    return {key: value for key, value in arguments.items() if key in CONNECTOR_ARGUMENT_KEYS}


def this_run() -> dict[str, Any]:
    """Who this run is, for the host's lock: others that find it held are shown this."""
    return _THIS_RUN


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


_THIS_RUN: dict[str, Any] = {
    "run": str(uuid.uuid4()),
    "who": f"{getpass.getuser()}@{socket.gethostname()}",
    # The same machine and boot: then we can see whether the holder's process is still there.
    "machine": f"{socket.gethostname()} {_boot_id()}",
    "pid": os.getpid(),
    "pid_started": psutil.Process().create_time(),
    "began": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
}


def is_ours_or_dead(holder: Holder) -> bool:
    """Whether we may take the lock from this holder: it is this run, or a process of this machine that has ended."""
    if holder.run == _THIS_RUN["run"]:
        return True
    if holder.machine != _THIS_RUN["machine"]:
        return False
    try:
        return abs(psutil.Process(holder.pid).create_time() - holder.pid_started) > 1.0
    except psutil.NoSuchProcess:
        return True
