"""Read and check secrets on the operator's machine, from a file or an environment variable.

Messages name the setting, the file or variable, and the line, never the secret.

Decision 11: docs/decisions/0011-secrets-never-travel-in-the-open.md.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from llamafleet.remote.common import keeps_secrets

# How an operator makes a key file; printed by messages that miss one.
MAKE_KEYS = "(umask 077; openssl rand -hex 32 >FILE)"
VARIABLE = "env:"  # begins a place that is an environment variable: "env:NAME"
LIMIT = 2**20  # characters of a file: ten thousand keys
SHORTEST_KEY = 8  # characters: clients can try keys without limit


class SecretError(ValueError):
    """A secret is missing, readable by others, or invalid; the message says what to do."""


# Values by name of the variables that `take` removed from the environment. Programs that we start do not inherit them.
_taken: dict[str, str] = {}


def take(name: str, environment: MutableMapping[str, str] = os.environ) -> str | None:
    """Remove the variable from the environment and return its value; None if it is unset or empty."""
    if name in environment:
        _taken[name] = environment.pop(name)
    return _taken.get(name) or None


def read(place: str, setting: str) -> str:
    """The secret, without blanks around it. `place` is a path or "env:NAME". Raises `SecretError`."""
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
    try:
        path = Path(place).expanduser()
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise SecretError(f"{setting}: {place} is not a file")
        # The group may read it, because operators share a file that way.
        if mode & (stat.S_IRWXO | stat.S_IWGRP):
            raise SecretError(
                f"{setting}: {place} has mode {stat.S_IMODE(mode):04o}, others may read or change it: chmod 600 {place}"
            )
        with path.open() as file:
            text = file.read(LIMIT + 1)
        if len(text) > LIMIT:
            raise SecretError(f"{setting}: {place} has more than {LIMIT} characters, which no secret has")
        return text
    except FileNotFoundError as error:
        make = f"; make one: {MAKE_KEYS.replace('FILE', place)}" if setting.endswith("api_key_file") else ""
        raise SecretError(f"{setting}: there is no file {place}{make}") from error
    except OSError as error:
        raise SecretError(f"{setting}: cannot read {place}: {error.strerror}") from error
    except RuntimeError as error:  # "~name" of no user
        raise SecretError(f"{setting}: cannot read {place}: {error}") from error
    except UnicodeDecodeError as error:
        raise SecretError(f"{setting}: {place} is not text") from error


def token(place: str, setting: str) -> str:
    """A secret that is a single word, such as a token. Raises `SecretError`."""
    text = read(place, setting)
    if len(text.split()) != 1 or not text.isascii() or not text.isprintable():
        raise SecretError(f"{setting}: {place} should hold one token, without blanks or further lines")
    return text


def hub_token(place: str | None, endpoint: str) -> str | None:
    """The Hub token from `place` (the setting `hub_token_file`), else from HF_TOKEN; None if there is none.

    Raises `SecretError`, also where others could read it on its way to `endpoint` (the setting `hub_endpoint`).
    """
    value = take("HF_TOKEN") if place is None else token(place, "hub_token_file")
    if value is not None and not keeps_secrets(endpoint):
        name = "HF_TOKEN" if place is None else "hub_token_file"
        raise SecretError(
            f"{name}: hub_endpoint {endpoint[:250]} is neither https nor this machine, so others could read the token "
            "on its way: use https, or take the token away"
        )
    return value


def api_keys(place: str, setting: str) -> str:
    """The content of llama-server's key file, one key on each line. Raises `SecretError`.

    llama-server does not trim lines (a blank or CR would become part of a key), and it ignores lines that begin with #
    (`--api-key-file` in common_params_parser_init). A file that has only comments would let everybody in.
    """
    lines = [(number, line.strip()) for number, line in enumerate(read(place, setting).splitlines(), 1)]
    keys = [(number, key) for number, key in lines if key and not key.startswith("#")]
    if not keys:
        raise SecretError(f"{setting}: {place} has comments only, so llama-server would let everybody in: add a key")
    if problems := list(_unusable(keys)):
        raise SecretError(f"{setting}: {place}: {'; '.join(problems)}")
    # A single key is written twice: llama-server logs the last four characters of a single key, but of several keys
    # only their number (server_http_context::init_listener).
    return "".join(f"{key}\n" for _, key in (keys if len(keys) > 1 else keys * 2))


def _unusable(keys: list[tuple[int, str]]) -> Iterator[str]:
    """A sentence for each invalid key, with its line number."""
    seen: dict[str, int] = {}
    for number, key in keys:
        if not key.isascii() or not key.isprintable() or " " in key:
            yield f"line {number}: a key should be printable ASCII without blanks"
        elif len(key) < SHORTEST_KEY:
            yield f"line {number}: a key should have at least {SHORTEST_KEY} characters"
        if key in seen:
            yield f"line {number}: the same key as in line {seen[key]}"
        seen.setdefault(key, number)
