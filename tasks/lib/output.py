"""Everything between hosts and the operator's terminal passes here, in both directions.

What pyinfra prints is cleaned: its log, what a failed command printed, names of operations, JSON. Colours that pyinfra
asks for are marked, so that no host's text can pass for one. What a host's command prints is read up to a limit, and
whatever bytes it is. `install` is called where `tasks.lib` is imported, and so by every stage, alone or not.

Decision 10: docs/decisions/0010-a-host-is-not-trusted.md.
"""

from __future__ import annotations

import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import click
import gevent
from gevent.queue import Queue
from pyinfra import logger
from pyinfra.api import output as pyinfra_output
from pyinfra.api.exceptions import ConnectError
from pyinfra.connectors import util
from pyinfra.connectors.ssh import SSHConnector

from llamafleet import causes
from llamafleet.printable import cleaned, err, finished, marked, print_exception, printable

# A message of more characters is cut. JSON, which pyinfra prints without logging it, is never cut.
LOGGED_CHARACTERS = 100_000
# Of a command's standard output or error, read or not: a survey has some 100 KB, an installation of packages some MB.
READ_BYTES = 32 * 2**20
CHUNK_BYTES = 65536
# Where a message has several lines, those after the first stand further in than a message: no host can forge one.
CONTINUED = " " * 8

_style, _echo, _connect = click.style, click.echo, SSHConnector.connect


def install() -> None:
    """Put ourselves in pyinfra's way; a second call does nothing."""
    if click.echo is echo:
        return
    click.style, click.echo = style, echo
    if pyinfra_output.is_output_active():  # in pyinfra's command, which hands click's functions to its own library
        pyinfra_output.set_formatter(style)
        pyinfra_output.set_echo(echo)
    # Beside pyinfra's own, whose messages pass `echo` too: those of other libraries, and of whatever has no handler.
    for one in (logger, logging.lastResort, *logging.getLogger().handlers):
        if one is not None:
            one.addFilter(_clean_record)
    # paramiko tells every broken greeting with a traceback, where nobody listens; pyinfra says it in a line.
    logging.getLogger("paramiko").addHandler(logging.NullHandler())
    sys.excepthook = print_exception
    gevent.get_hub().exception_stream = _Cleaning()
    util.read_buffer = read_buffer
    SSHConnector.connect = connect


def style(text: object, *arguments: Any, **named: Any) -> str:
    """`click.style` of the cleaned text, in colours that pass `echo`."""
    before, _, after = _style("\0", *arguments, **named).partition("\0")
    return marked(before) + cleaned(str(text)) + marked(after)


def echo(message: Any = None, *arguments: Any, **named: Any) -> None:
    """`click.echo` of the cleaned message."""
    if isinstance(message, bytes):
        message = message.decode("utf-8", "replace")
    _echo(finished(message) if isinstance(message, str) else message, *arguments, **named)


def connect(self: SSHConnector) -> None:
    """In place of pyinfra's method of this name, of which an error that it does not know ends the run for all hosts: a
    server may answer what paramiko cannot decode. Raises ConnectError with the cause and the way out."""
    try:
        _connect(self)
    except ConnectError as error:
        raise ConnectError(causes.of_connection(str(error))) from error
    except Exception as error:
        logger.debug(traceback.format_exc())
        raise ConnectError(causes.of_connection(f"SSH error ({type(error).__name__}: {error})")) from error


def _clean_record(record: logging.LogRecord) -> bool:
    """A filter of a logger, which changes the record and lets every one pass."""
    if getattr(record, "is_clean", False):
        return True
    text = cleaned(record.getMessage(), LOGGED_CHARACTERS)
    record.msg, record.args, record.is_clean = re.sub(r"\n(?=[^\n])", f"\n{CONTINUED}", text), (), True
    if record.exc_info:  # a formatter would print it as it is
        record.exc_text = printable("".join(traceback.format_exception(*record.exc_info)))
    return True


class _Cleaning:
    """Standard error for gevent, which prints there what a greenlet raised."""

    @staticmethod
    def write(text: str) -> None:
        err(text, end="")

    @staticmethod
    def flush() -> None:
        """`err` does it."""


def read_buffer(
    name: str, io: Any, output_queue: Queue[Any], print_output: bool = False,
    print_func: Callable[[str], str] | None = None,
) -> None:  # fmt: skip
    """In place of pyinfra's function of this name, which ends at the first byte that is no UTF-8, and reads without
    end."""
    for line in _lines(io):
        output_queue.put(util.OutputLine(name, line))
        if print_output:
            echo(print_func(line) if print_func else line, err=True)


def _lines(io: Any) -> Iterator[str]:
    """The lines of a stream, bytes that are no UTF-8 as lone surrogates. What comes after the limit is read, so that
    the command can end, and left out."""
    if hasattr(io, "FLAG_BINARY"):  # of paramiko, which else decodes strictly
        io._flags |= io.FLAG_BINARY
    left, line = READ_BYTES, bytearray()
    while chunk := io.readline(CHUNK_BYTES):
        line += chunk[:left]
        left -= min(left, len(chunk))
        if chunk.endswith(b"\n") and line:
            yield _text(line)
            line = bytearray()
    if line:
        yield _text(line)
    if not left:
        yield f"it printed more than {READ_BYTES >> 20} MiB, which is not read"


def _text(line: bytearray) -> str:
    return line.decode("utf-8", "surrogateescape").rstrip("\n")
