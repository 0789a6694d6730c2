"""A plan as llama-server's command line, and an argument as systemd writes it.

Every flag is one of common/arg.cpp at b11434. Lists stay lists: nothing is quoted here but by
`unit_escape`, once, where the unit is written.
"""

from __future__ import annotations

from llamafleet.planner.result import Plan
from llamafleet.settings import extra_flags as extra
from llamafleet.settings.schema import Instance


class FlagError(ValueError):
    """A value that cannot be an argument; the message names the flag and the value."""


def argv(plan: Plan, instance: Instance, model_path: str) -> list[str]:
    """All of llama-server's arguments, without the program and without what `credentials` adds. Raises
    `FlagError` for unusable values."""
    return [
        *("--model", _value("--model", model_path)),
        *("--alias", _value("--alias", instance.name)),
        *("--host", _value("--host", instance.listen)),
        *("--port", str(instance.port)),
        *plan.argv,
        *("--metrics", "--slots", "--no-ui", "--offline"),
        # The load log names every device's bytes, which the gate reads; prompts are logged from 5 on.
        *(("--log-verbosity", "4") if plan.gpus else ()),
        *_cors(instance),
        *extra.words(instance.extra_flags),
        *extra.words(instance.dangerous_flags),
    ]


def _cors(instance: Instance) -> tuple[str, ...]:
    """Web pages of other sites may not use the server: by default llama-server echoes every origin
    (tools/server/server-http.cpp:332). "none" is nobody's origin; "null" would be that of sandboxed frames."""
    asked = any(flag.startswith("--cors-origins ") for flag in instance.dangerous_flags)
    return ("--no-cors-credentials",) if asked else ("--cors-origins", "none", "--no-cors-credentials")


def credentials(instance: Instance) -> list[str]:
    """The arguments that name the unit's credentials: keys and certificate never are arguments themselves."""
    folder = f"/run/credentials/{instance.unit}"
    found = ["--api-key-file", f"{folder}/api-keys"] if instance.api_key_file else []
    if instance.tls_certificate_file:
        found += ["--ssl-cert-file", f"{folder}/tls-certificate", "--ssl-key-file", f"{folder}/tls-key"]
    return found


def _value(flag: str, value: str) -> str:
    if not value or value.startswith("-"):
        raise FlagError(f"{flag}: should not be empty or begin with a dash, is {value!r}")
    if any(ord(character) < ord(" ") for character in value):
        raise FlagError(f"{flag}: should have no control characters, is {value!r}")
    return value


def unit_escape(argument: str) -> str:
    """An argument as one word of ExecStart= (systemd.service, "Command lines"; systemd.unit, specifiers).

    Raises `FlagError` for what a unit file cannot hold.
    """
    if any(ord(character) < ord(" ") or character == "\x7f" for character in argument):
        raise FlagError(f"should have no control characters in a unit, is {argument!r}")
    inner = argument.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{inner}"'
