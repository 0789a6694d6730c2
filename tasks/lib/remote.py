"""Running commands on a host, over whatever connector pyinfra has for it: each with a deadline, none in a way that
could end another host's run."""

from __future__ import annotations

import contextlib
import getpass
import shlex
import time
import traceback
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import gevent
from gevent.lock import RLock
from paramiko import SSHException
from pyinfra import logger
from pyinfra.api.arguments import CONNECTOR_ARGUMENT_KEYS, pop_global_arguments
from pyinfra.api.command import StringCommand
from pyinfra.api.exceptions import ConnectError
from pyinfra.api.host import Host
from pyinfra.api.state import State
from pyinfra.connectors.util import CommandOutput, OutputLine, remove_any_sudo_askpass_file

from llamafleet import causes
from llamafleet.host.answers import AnswerError
from llamafleet.remote.common import JOBS, OPT, helper
from tasks.lib import ends

# How often a broken connection is made again before we give up, and the seconds between.
RECONNECTS, RECONNECT_SECONDS = 20, 3.0
# What a command may take that names no deadline of its own: a look at the host, an answer of systemd.
COMMAND_SECONDS = 120.0
# The survey asks GPU drivers, up to 20 s each, and systemd about every instance, up to 30 s each.
SURVEY_SECONDS = 600.0
# After the deadline: for the host to end the command, first by SIGTERM, and to say so. Then it counts as silent.
KILL_SECONDS, SILENT_SECONDS = 5.0, 15.0

T = TypeVar("T")


class RemoteError(Exception):
    """A program on the host failed; the text has what it printed, and for known failures the way out."""


class LostError(RemoteError):
    """The host cannot be reached any more; what runs there may go on."""


class NoAnswerError(LostError):
    """Nothing came from the host within the deadline, not even that the command was ended there."""


class Interpreter(str):
    """The word of a command that stands for the host's Python. Where the command is sent, the host's setting `python`
    takes its place."""


PYTHON = Interpreter("python3")


class HostCommand(StringCommand):
    """A program with its arguments, run on a host without a shell of ours, and with a deadline there and here.

    `purpose` is named where it fails, `seconds` is the deadline, and `stdin` goes to its standard input as one line.
    In an operation, whatever goes wrong is output of a failed command: the host fails, the others go on.
    """

    def __init__(
        self, words: Sequence[str], *, purpose: str, seconds: float = COMMAND_SECONDS, stdin: str | None = None
    ) -> None:  # fmt: skip
        # No terminal where something is sent: it would not end.
        super().__init__(shlex.join(words), **({} if stdin is None else {"_stdin": stdin, "_get_pty": False}))
        self.words, self.purpose, self.seconds, self.stdin = list(words), purpose, seconds, stdin

    def execute(self, state: State, host: Host, connector_arguments: Any) -> tuple[bool, CommandOutput]:
        try:
            printing = {"print_output": state.print_output, "print_input": state.print_input}
            ok, output = reconnecting(host, lambda: _sent(host, self, {**connector_arguments}, **printing))
            if not ok:
                text = failed(host, output.stdout_lines, output.stderr_lines)
                ends.note(host.name, text)
                if state.print_output:  # pyinfra has printed the output itself, and prints no more
                    logger.error(f"{host.print_prefix}{text}")
                output = CommandOutput([OutputLine("stderr", line) for line in text.splitlines()])
            return ok, output
        except Exception as error:  # whatever it is, the other hosts' run must go on
            logger.debug(traceback.format_exc())
            ends.note(host.name, said(error))
            return False, CommandOutput([OutputLine("stderr", line) for line in said(error).splitlines()])


def words(name: str, *arguments: str) -> list[str]:
    """The command, as a list, that runs one of our installed helpers."""
    return [PYTHON, "-s", "-E", "-B", helper(name), *arguments]


def python_of(host: Host) -> str:
    """The setting `python` of the host. Where it cannot be used, which refuses the host later, the default."""
    python = host.data.dict().get("python")
    return python if isinstance(python, str) and python.startswith("/") else PYTHON


def for_host(host: Host, command: HostCommand) -> HostCommand:
    """The command with the host's own Python."""
    if not any(isinstance(word, Interpreter) for word in command.words) or (python := python_of(host)) == PYTHON:
        return command
    words = [python if isinstance(word, Interpreter) else word for word in command.words]
    return HostCommand(words, purpose=command.purpose, seconds=command.seconds, stdin=command.stdin)


def program(name: str, *arguments: str, seconds: float = COMMAND_SECONDS, stdin: str | None = None) -> HostCommand:
    """The command that runs one of our installed helpers."""
    purpose = " ".join([name, *(one[:60] for one in arguments[:2] if not one.startswith(("{", "--")))])
    return HostCommand(words(name, *arguments), purpose=purpose, seconds=seconds, stdin=stdin)


def run(host: Host, command: HostCommand) -> tuple[bool, list[str], list[str]]:
    """Run a command with the host's own sudo settings: success, stdout lines, stderr lines.

    Where the connection breaks, it is made again and the command repeated. Raises `RemoteError` where it stays
    broken, and where the command did not end within its deadline.
    """
    ok, output = reconnecting(host, lambda: _sent(host, command, _arguments(host)))
    out, err = output.stdout_lines, output.stderr_lines
    if not ok and (left := space_left(host, "\n".join([*err, *out]))):
        err = [*err, left]
    return ok, out, err


def run_json(host: Host, command: HostCommand, read: Callable[[str], T]) -> T:
    """The value that a program prints as its last line, by a function of `llamafleet/host/answers.py`; `RemoteError`
    where the program fails, or the line is unusable."""
    ok, out, err = run(host, command)
    if not ok or not out:
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
    """What a failed command printed; for known failures the cause and the way out."""
    return causes.of_command("\n".join(line for line in [*err, *out] if line.strip()) or "it printed nothing")


def failed(host: Host, out: list[str], err: list[str]) -> str:
    """As `explain`, with the space that is left where a disk is full."""
    text = explain(out, err)
    left = space_left(host, text)
    return f"{text}\n{left}" if left else text


def space_left(host: Host, text: str) -> str:
    """Where a text says that a disk is full: how many bytes are free there, by `df` on the host; else empty."""
    if not causes.is_full(text):
        return ""
    paths = [*causes.paths_in(text), OPT, JOBS, "/tmp", "/etc"]  # noqa: S108 -- asked about, not written to
    try:
        _, output = _in_time(
            host, HostCommand(["sh", "-c", _DF, "sh", *paths], purpose="df", seconds=20), _arguments(host)
        )
    except Exception as error:  # the first failure is the one to be told
        logger.debug(f"{host.print_prefix}df: {error}")
        return ""
    return causes.space(output.stdout_lines)


# Of each path, or of the nearest folder above it that is there: bytes and files (inodes) of its file system.
_DF = """\
for path; do
    there=$path
    while [ ! -e "$there" ]; do there=${there%/*}; [ -n "$there" ] || there=/; done
    echo "bytes $path $(df -P -B1 "$there" | tail -n 1)"
    echo "files $path $(df -P -i "$there" | tail -n 1)"
done 2>/dev/null
"""


def said(error: Exception) -> str:
    """An error as one line for the operator; with its kind where it is none that we expect."""
    text = str(error)
    if isinstance(error, RemoteError | ConnectError) and text:  # of a connection, `output.connect` has said the cause
        return text
    named = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return causes.of_connection(named) if isinstance(error, BROKEN) else named


def guarded(action: Callable[..., bool]) -> Callable[..., bool]:
    """A function of pyinfra's, by state and host, in which whatever goes wrong fails the host with a line."""

    @wraps(action)
    def guard(state: State, host: Host, *args: Any, **kwargs: Any) -> bool:
        try:
            return action(state, host, *args, **kwargs)
        except Exception as error:  # whatever it is, the other hosts' run must go on
            logger.debug(traceback.format_exc())
            return fail(host, said(error))

    return guard


def fail(host: Host, text: str) -> bool:
    """Log why the host fails; False, for pyinfra."""
    ends.note(host.name, text)
    host.log_styled(text, fg="red", log_func=logger.error)
    return False


# --- connections and deadlines ----------------------------------------------------------------


def _sent(host: Host, command: HostCommand, arguments: dict[str, Any], **printing: bool) -> tuple[bool, CommandOutput]:
    """Run the command with what goes to its standard input; else as `_in_time`."""
    if command.stdin is None or not arguments.get("_su_password"):
        return _in_time(host, command, arguments, **printing)
    # su reads its password from there. So what is sent lies in a file of the connecting user meanwhile, which nobody
    # else can read or replace: /tmp is sticky, and the file is made by mktemp.
    plain = {key: value for key, value in arguments.items() if not key.startswith(("_su", "_use_su", "_preserve_su"))}
    park = ["sh", "-c", 'umask 077; file=$(mktemp) && cat >"$file" && echo "$file"']
    ok, output = _in_time(host, HostCommand(park, purpose=command.purpose, stdin=command.stdin), plain)
    if not ok or not output.stdout_lines:
        raise RemoteError(explain(output.stdout_lines, output.stderr_lines))
    path = output.stdout_lines[-1]
    try:
        words = ["sh", "-c", 'exec "$@" <"$0"', path, *command.words]
        return _in_time(
            host, HostCommand(words, purpose=command.purpose, seconds=command.seconds), arguments, **printing
        )
    finally:
        _in_time(host, HostCommand(["rm", "-f", path], purpose="rm"), plain)


def _in_time(
    host: Host, command: HostCommand, arguments: dict[str, Any], **printing: bool
) -> tuple[bool, CommandOutput]:
    """The command's success and output. Raises `RemoteError` where it did not end in time.

    The host ends it at its deadline, by `timeout` of coreutils, which also ends a stopped program. Where nothing comes
    of that either, pyinfra's own limit ends our waiting, and, where pyinfra waits without one, ours.
    """
    ends.stop_if_interrupted()
    command = for_host(host, command)
    began = time.monotonic()
    limit = command.seconds + KILL_SECONDS + SILENT_SECONDS
    ended = f"{command.purpose}: it did not end within {command.seconds:g} s"
    arguments = {**arguments, **command.connector_arguments, "_timeout": limit}
    timed = StringCommand("timeout", "-k", f"{KILL_SECONDS:g}", f"{command.seconds:g}", command)
    try:
        with gevent.Timeout(limit + KILL_SECONDS, NoAnswerError(f"{ended}: the host does not answer")):
            ok, output = host.run_shell_command(timed, **printing, **arguments)
        if not ok and _is_closed(host):  # paramiko then has no exit status, which looks like a failure
            raise SSHException("the connection is closed")
        ends.stop_if_interrupted()  # which has ended the command, too, where it ran on this machine
    except TimeoutError as error:
        if time.monotonic() - began < limit:  # not pyinfra's limit: the connection's
            raise
        raise NoAnswerError(f"{ended}: the host does not answer") from error
    except (EOFError, OSError) as error:  # also where pyinfra asks for sudo's password, and nobody is there to give it
        if any(frame.filename == getpass.__file__ for frame in traceback.extract_tb(error.__traceback__)):
            raise RemoteError(explain([], ["sudo: a password is required"])) from error
        raise
    except AttributeError as error:
        if "NoneType" not in str(error):
            raise
        raise SSHException("the connection is closed") from error  # paramiko's transport is gone
    if not ok and time.monotonic() - began >= command.seconds:
        raise RemoteError(f"{ended}, and was stopped; {explain(output.stdout_lines[-5:], output.stderr_lines[-5:])}")
    return ok, output


def _is_closed(host: Host) -> bool:
    """Whether the SSH connection has ended, as after a power cut; other connectors have none."""
    transport = getattr(getattr(host.connector, "client", None), "get_transport", lambda: None)()
    return transport is not None and not transport.is_active()


# What a connection that does not carry on raises.
BROKEN = (OSError, EOFError, SSHException, ConnectError)


def reconnecting(host: Host, action: Callable[[], T]) -> T:
    """The action's result. Where the connection breaks, connect again and repeat the action. Raises `LostError` where
    it stays broken."""
    for attempt in range(RECONNECTS):
        connection = _connections.get(host, 0)
        try:
            if attempt and not host.connected:  # the last attempt to connect failed: the reason is more than the next
                raise ConnectError(_refusals.get(host, "the connection is closed"))
            return action()
        except BROKEN as error:
            if attempt == RECONNECTS - 1:
                raise LostError(f"the connection is lost and does not come back: {said(error)}") from error
            if not attempt:
                logger.warning(f"{host.print_prefix}the connection broke ({error or said(error)}); connecting again")
            time.sleep(RECONNECT_SECONDS)
            connect_again(host, connection)
    raise AssertionError("unreachable: the last attempt returns or raises")


# How often each host was connected to again: of two commands on one broken connection, the first one makes it again.
_connections: dict[Host, int] = {}
_connecting: dict[Host, RLock] = {}
# Why the last attempt to connect again failed.
_refusals: dict[Host, str] = {}


def connect_again(host: Host, connection: int | None = None) -> None:
    """Connect to the host again, unless that was done since the connection of this number."""
    with _connecting.setdefault(host, RLock()):
        if connection is not None and _connections.get(host, 0) != connection and host.connected:
            return
        # Closing a broken connection may fail or hang; what counts is the new one.
        with contextlib.suppress(OSError, EOFError, SSHException), gevent.Timeout(SILENT_SECONDS, False):
            host.connector.disconnect()
        host.connected = False
        try:
            host.connect(reason="again", show_errors=False, raise_exceptions=True)
        except ConnectError as error:
            _refusals[host] = str(error)
        _connections[host] = _connections.get(host, 0) + 1
        if host.connected:  # the host may have restarted, and lost the program that gives sudo its password
            with contextlib.suppress(OSError, EOFError, SSHException), gevent.Timeout(SILENT_SECONDS, False):
                remove_any_sudo_askpass_file(host)


def _arguments(host: Host) -> dict[str, Any]:
    """sudo, su and the like for this host, as pyinfra resolves them for an operation."""
    arguments, _ = pop_global_arguments(host.state, host, {})
    return {key: value for key, value in arguments.items() if key in CONNECTOR_ARGUMENT_KEYS}
