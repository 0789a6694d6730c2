"""A plan as llama-server's command line, and an argument as a unit file holds it.

Every flag is from common/arg.cpp at b11434. Lists stay lists: only `unit_escape` quotes, once, where the unit is
written.

Decision 3: docs/decisions/0003-flags-are-static.md.
Decision 11: docs/decisions/0011-secrets-never-travel-in-the-open.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from llamafleet.planner.result import Plan
from llamafleet.remote.common import CHAT_TEMPLATE, GRAMMAR, JSON_SCHEMA, server_socket
from llamafleet.settings import extra_flags
from llamafleet.settings.companions import DRAFT, PROJECTOR, adapter
from llamafleet.settings.prompt_files import SETTINGS
from llamafleet.settings.schema import DEMAND, Instance
from llamafleet.settings.speculation import WITH_DRAFT

# Flags of files that are loaded beside a model, by their parts.
FILE_FLAGS = {PROJECTOR: "--mmproj", DRAFT: "--spec-draft-model"}
# ... and of the operator's, by the names of their credentials.
TEXT_FLAGS = {
    CHAT_TEMPLATE: "--chat-template-file", GRAMMAR: "--grammar-file", JSON_SCHEMA: "--json-schema-file",
}  # fmt: skip


class FlagError(ValueError):
    """A value that cannot be an argument; the message names the flag and the value."""


def argv(
    plan: Plan, instance: Instance, model_path: str, companion_paths: Mapping[str, str] = MappingProxyType({})
) -> list[str]:
    """llama-server's arguments, without the program and without `credential_flags`.

    `companion_paths`: where the files beside the model lie on the host, by their parts.
    Raises `FlagError` for unusable values.
    """
    return [
        *("--model", _value("--model", model_path)),
        *("--alias", _value("--alias", instance.name)),
        *("--host", _value("--host", server_socket(instance.name) if instance.start == DEMAND else instance.listen)),
        *("--port", str(instance.port)),
        *plan.argv,
        *_companions(companion_paths, instance),
        *("--metrics", "--slots", "--no-ui", "--offline"),
        *(("--sleep-idle-seconds", str(instance.sleep_idle_seconds)) if instance.sleep_idle_seconds else ()),
        # At 4 the log has the bytes of every device, which the gate reads; from 5 on it has prompts.
        *(("--log-verbosity", "4") if plan.gpus else ()),
        *_cors(instance),
        *extra_flags.words(instance.extra_flags),
        *extra_flags.words(instance.dangerous_flags),
    ]


def _companions(paths: Mapping[str, str], instance: Instance) -> Iterator[str]:
    """The flags that name the files beside the model. Adapters are numbered by llama-server in this order, from 0."""
    for part, flag in FILE_FLAGS.items():
        if part in paths and (part != DRAFT or instance.speculation in WITH_DRAFT):
            yield from (flag, _value(flag, paths[part]))
    numbered = [(adapter(number), one) for number, one in enumerate(instance.adapters, 1)]
    scaled = [f"{_path(paths[part])}:{one.scale!r}" for part, one in numbered if part in paths]
    yield from ("--lora-scaled", ",".join(scaled)) if scaled else ()


def _path(path: str) -> str:
    """A path between the commas and colons of --lora-scaled (common/arg.cpp, parse_csv_row)."""
    if marks := [mark for mark in ',:"' if mark in path]:
        raise FlagError(f"--lora-scaled: a path should have no {marks[0]}, is {path!r}")
    return _value("--lora-scaled", path)


def _cors(instance: Instance) -> tuple[str, ...]:
    """Keep web pages of other sites from using the server: by default llama-server echoes every origin
    (`server_http_context::init_listener` in tools/server/server-http.cpp). No page has the origin "none", while
    sandboxed frames have "null"."""
    asked = any(flag.startswith("--cors-origins ") for flag in instance.dangerous_flags)
    return ("--no-cors-credentials",) if asked else ("--cors-origins", "none", "--no-cors-credentials")


def credential_flags(instance: Instance) -> list[str]:
    """The arguments with the paths of the unit's credentials: keys, certificate and prompt files are never arguments
    themselves."""
    folder = f"/run/credentials/{instance.unit}"
    flags = ["--api-key-file", f"{folder}/api-keys"] if instance.api_key_file else []
    if instance.tls_certificate_file:
        flags += ["--ssl-cert-file", f"{folder}/tls-certificate", "--ssl-key-file", f"{folder}/tls-key"]
    for name, setting in SETTINGS.items():
        flags += [TEXT_FLAGS[name], f"{folder}/{name}"] if getattr(instance, setting) else []
    return flags


def _value(flag: str, value: str) -> str:
    if not value or value.startswith("-"):
        raise FlagError(f"{flag}: should not be empty or begin with a dash, is {value!r}")
    if any(ord(character) < ord(" ") for character in value):
        raise FlagError(f"{flag}: should have no control characters, is {value!r}")
    return value


def unit_escape(argument: str) -> str:
    """The argument as a single word of ExecStart= (systemd.service, "Command lines"; systemd.unit, specifiers).

    Raises `FlagError` for what a unit file cannot hold.
    """
    if any(ord(character) < ord(" ") or character == "\x7f" for character in argument):
        raise FlagError(f"should have no control characters in a unit, is {argument!r}")
    inner = argument.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{inner}"'
