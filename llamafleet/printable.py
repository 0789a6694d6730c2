"""Texts from outside as a terminal, a log or a JSON file may have them: the one cleaner for every exit.

Names of processes and files, values of a model's header, log lines, messages of servers: whatever a host or the
network says may hold escape sequences that move the cursor, hide text or turn its direction. Nobody cleans where a
message is made; every exit does: `tasks/lib/output.py` for pyinfra, `out` and `err` for our commands. Imports nothing
of ours.

Decision 10: docs/decisions/0010-a-host-is-not-trusted.md.
"""

from __future__ import annotations

import json
import re
import secrets
import sys
import traceback
from types import TracebackType
from typing import Any, TextIO

# In the colours that we ask for ourselves. Nobody else can know it, so no other sequence passes as ours.
_MARK = str(secrets.randbelow(9 * 10**17) + 10**17)
_OURS = re.compile(rf"\x1b\[([0-9;]*);{_MARK}m")
_COLOUR = re.compile(r"\x1b\[([0-9;]*)m")  # ECMA-48, SGR


def printable(text: str, limit: int | None = None) -> str:
    r"""The text with everything that does not print as itself made visible: "\x1b", "\u202e".

    That is controls, marks of direction and of no width, odd blanks, lone surrogates, private and unassigned
    characters. Line feeds stay. `limit`: at most so many characters of the text, with a word about the rest.
    """
    if limit is not None and len(text) > limit:
        text = f"{text[:limit]}... ({len(text) - limit} more characters)"
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one == "\n" else _visible(one) for one in text)


def one_line(text: str, limit: int | None = None) -> str:
    """As `printable`, with line feeds made visible too."""
    return printable(text, limit).replace("\n", r"\n")


def _visible(character: str) -> str:
    # As JSON has it, which writes DEL as it is.
    return r"\u007f" if character == "\x7f" else character.encode("unicode_escape").decode()


def marked(text: str) -> str:
    """The text, which we made, with its colours marked as ours: `cleaned` lets them pass."""
    return _COLOUR.sub(lambda found: f"\x1b[{found[1]};{_MARK}m", text)


def coloured(text: str, colour: str) -> str:
    """The text in a colour of ECMA-48 ("31;1"), which passes the cleaner."""
    return marked(f"\x1b[{colour}m") + cleaned(text) + marked("\x1b[0m")


def cleaned(text: str, limit: int | None = None) -> str:
    """As `printable`, with the marked colours as they are."""
    if text.isprintable() and limit is None:
        return text
    parts = _OURS.split(text)  # texts and the numbers of our colours in turn
    kept = [printable(part, limit) if number % 2 == 0 else marked(f"\x1b[{part}m") for number, part in enumerate(parts)]
    return "".join(kept)


def finished(text: str) -> str:
    """The text as a terminal gets it: cleaned, with the colours that are ours."""
    return _OURS.sub(lambda found: f"\x1b[{found[1]}m", cleaned(text))


def json_text(value: Any) -> str:
    """The value as indented JSON, in characters that every terminal prints."""
    return json.dumps(value, indent=2).replace("\x7f", r"\u007f")


def out(text: str) -> None:
    """Print a text of several lines on standard output, cleaned."""
    _write(sys.stdout, finished(text) + "\n")


def redraw(text: str) -> None:
    """As `out`, on a terminal that is cleared (ECMA-48: CUP, ED)."""
    _write(sys.stdout, "\x1b[H\x1b[2J" + finished(text) + "\n")


def err(text: str, end: str = "\n") -> None:
    """Print a message on standard error, cleaned."""
    _write(sys.stderr, finished(text) + end)


def print_exception(kind: type[BaseException], error: BaseException, place: TracebackType | None) -> None:
    """For `sys.excepthook`: what nobody expected may have a text of a host in it."""
    err("".join(traceback.format_exception(kind, error, place)), end="")


def _write(stream: TextIO, text: str) -> None:
    """Characters that the stream's encoding does not have become visible as well."""
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()
