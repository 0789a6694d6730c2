"""Read and check the operator's chat template, grammar and JSON schema, which go to the host with an instance.

They are no secrets: anybody may read them, and a change of them is shown. llama-server reads each file as it is, so
that it travels byte for byte. Messages name the setting, the file, and what is wrong.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from llamafleet.remote.common import CHAT_TEMPLATE, GRAMMAR, JSON_SCHEMA

# systemd refuses a unit whose credentials have more than 1 MiB together (CREDENTIALS_TOTAL_SIZE_MAX); these three leave
# five eighths of it for keys and certificate. The longest published chat templates have some 30 kB.
LIMIT_BYTES = 128 * 2**10
# Which setting has the file of a credential.
SETTINGS = {CHAT_TEMPLATE: "chat_template_file", GRAMMAR: "grammar_file", JSON_SCHEMA: "json_schema_file"}


# Flags of `extra_flags` that say the same as a file, or make llama-server read it otherwise.
CLASHES = {
    "chat_template_file": {
        "--chat-template": "it names another template than the file's",
        "--no-jinja": "llama-server then knows its built-in templates alone",
    },
}


class PromptFileError(ValueError):
    """A file cannot be used; the message names it and says what to do."""


def clashes(files: Mapping[str, str | None], serves: str, extra_flags: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What is wrong with an instance's `files`, by setting, beside its other settings: setting and sentence each."""
    given = [setting for setting, place in files.items() if place is not None]
    if serves != "chat":
        yield from ((one, f"a server of kind {serves!r} writes no text: leave it out") for one in given)
    if {"grammar_file", "json_schema_file"} <= set(given):
        yield "json_schema_file", "grammar_file constrains the replies already: leave one of them out"
    names = {flag.partition(" ")[0] for flag in extra_flags}
    for setting in given:
        for flag, why in CLASHES.get(setting, {}).items():
            if flag in names:
                yield "extra_flags", f"{flag} and {setting} exclude each other: {why}"


def read(place: str, setting: str, kind: str) -> str:
    """The text of a file; `kind` is its credential's name, `setting` what messages call it.

    Raises `PromptFileError` where it is missing, unreadable, empty, too long, no UTF-8, or not what its kind should be.
    """
    text = text_of(place, setting)
    if kind == JSON_SCHEMA:
        _is_schema(text, f"{setting}: {place}")
    elif kind == GRAMMAR:
        _is_grammar(text, f"{setting}: {place}")
    return text


def as_served(kind: str, text: str) -> str:
    """The text as llama-server tells it: of a template with plain line ends, without the last (common/jinja/lexer.cpp,
    tokenize)."""
    if kind != CHAT_TEMPLATE:
        return text
    return text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")


def text_of(place: str, setting: str, limit_bytes: int = LIMIT_BYTES) -> str:
    """The text of a file of no particular kind. Raises as `read` does."""
    try:
        path = Path(place).expanduser()
        if not stat.S_ISREG(path.stat().st_mode):
            raise PromptFileError(f"{setting}: {place} is not a file")
        with path.open("rb") as file:
            data = file.read(limit_bytes + 1)
    except FileNotFoundError as error:
        raise PromptFileError(f"{setting}: there is no file {place} on this machine") from error
    except OSError as error:
        raise PromptFileError(f"{setting}: cannot read {place}: {error.strerror}") from error
    except (RuntimeError, ValueError) as error:  # "~name" of no user, a zero byte
        raise PromptFileError(f"{setting}: cannot read {place}: {error}") from error
    if len(data) > limit_bytes:
        raise PromptFileError(f"{setting}: {place} has more than {limit_bytes >> 10} KiB, the most that is sent")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        where = f"byte {error.start} is {data[error.start]:#04x}"
        raise PromptFileError(f"{setting}: {place} is no UTF-8: {where}") from error
    if not text.strip():
        raise PromptFileError(f"{setting}: {place} is empty; put the text in it, or set it to None")
    if "\0" in text:
        raise PromptFileError(f"{setting}: {place} has a zero byte, at which llama-server would stop reading it")
    return text


def _is_schema(text: str, where: str) -> None:
    """common/arg.cpp, --json-schema-file: a text that is no JSON ends the start."""
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PromptFileError(f"{where} is no JSON: {error}") from error
    if not isinstance(schema, dict):
        raise PromptFileError(f'{where}: a schema is a JSON object, such as {{"type": "object"}}')


def _is_grammar(text: str, where: str) -> None:
    """Every grammar begins with its rule `root` (common_sampler_init), wherever that stands in the file."""
    if text.lstrip().startswith("{"):
        raise PromptFileError(f"{where} looks like a JSON schema: give it as json_schema_file")
    if text.startswith("%llguidance"):
        raise PromptFileError(f"{where} is a grammar of llguidance, which the build lacks: write it as GBNF")
    if not re.search(r"^\s*root\s*::=", text, re.MULTILINE):
        raise PromptFileError(f"{where} has no rule root, with which a grammar (GBNF) begins: root ::= ...")
