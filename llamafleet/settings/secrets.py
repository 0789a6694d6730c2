"""Secrets on the operator's machine: read from a file or a variable, checked, never shown.

A message names the setting, the place and the line, never the content.

Decision 11: docs/decisions/0011-secrets-never-travel-in-the-open.md.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, MutableMapping
from pathlib import Path

VARIABLE = "env:"
# A key that clients send over the network can be tried as often as they like.
SHORTEST_KEY = 8


class SecretError(ValueError):
    """A secret that is missing, readable by others, or unusable; the text gives the way out."""


# Values that `take` removed from the environment; programs that we start do not inherit them.
_taken: dict[str, str] = {}


def take(name: str, environment: MutableMapping[str, str] = os.environ) -> str | None:
    """The variable's value, which is removed from the environment; None where it is unset or empty."""
    if name in environment:
        _taken[name] = environment.pop(name)
    return _taken.get(name) or None


def read(place: str, setting: str) -> str:
    """The text of a secret, stripped; `place` is a path or "env:NAME". Raises `SecretError`."""
    text = _variable(place, setting) if place.startswith(VARIABLE) else _file(place, setting)
    if not text.strip():
        raise SecretError(f"{setting}: {place} is empty; put the secret in it, or set {setting} to None")
    return text.strip()


def _variable(place: str, setting: str) -> str:
    value = take(place.removeprefix(VARIABLE))
    if value is None:
        raise SecretError(f"{setting}: {place}: your environment has no such variable, or it is empty")
    return value


def _file(place: str, setting: str) -> str:
    path = Path(place).expanduser()
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise SecretError(f"{setting}: {place} is not a file")
        # Group-readable is let pass: operators who deploy as a group share the file so.
        if mode & (stat.S_IRWXO | stat.S_IWGRP):
            raise SecretError(
                f"{setting}: {place} has mode {stat.S_IMODE(mode):04o}, others may read or change it: chmod 600 {place}"
            )
        return path.read_text()
    except OSError as error:
        raise SecretError(f"{setting}: cannot read {place}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SecretError(f"{setting}: {place} is not text") from error


def token(place: str, setting: str) -> str:
    """A secret of one word."""
    text = read(place, setting)
    if len(text.split()) != 1 or not text.isascii() or not text.isprintable():
        raise SecretError(f"{setting}: {place} should hold one token, without blanks or further lines")
    return text


def hub_token(place: str | None) -> str | None:
    """The operator's Hub token: from where the setting `hub_token_file` says, else from HF_TOKEN."""
    return take("HF_TOKEN") if place is None else token(place, "hub_token_file")


def api_keys(place: str, setting: str) -> str:
    """API keys, one a line, as llama-server needs them: it trims no line (a stray blank or CR would be
    part of a key) and ignores a line that begins with # (`--api-key-file` in common_params_parser_init), so that a
    file of comments alone would let everybody in.
    """
    numbered = enumerate(read(place, setting).splitlines(), 1)
    keys = [(number, line.strip()) for number, line in numbered]
    keys = [(number, key) for number, key in keys if key and not key.startswith("#")]
    if not keys:
        raise SecretError(f"{setting}: {place} has comments only: llama-server would let everybody in")
    if problems := list(_unusable(keys)):
        raise SecretError(f"{setting}: {place}: {'; '.join(problems)}")
    # llama-server logs the last four characters of a single key, but of several keys only their number
    # (server_http_context::init_listener): so a single key is written twice.
    return "".join(f"{key}\n" for _, key in (keys if len(keys) > 1 else keys * 2))


def _unusable(keys: list[tuple[int, str]]) -> Iterator[str]:
    seen: dict[str, int] = {}
    for number, key in keys:
        if not key.isascii() or not key.isprintable() or " " in key:
            yield f"line {number}: a key should be printable ASCII without blanks"
        elif len(key) < SHORTEST_KEY:
            yield f"line {number}: a key should have at least {SHORTEST_KEY} characters"
        if key in seen:
            yield f"line {number}: the same key as in line {seen[key]}"
        seen.setdefault(key, number)
