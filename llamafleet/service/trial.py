"""What a host needs to know of a command line in order to try it and to watch it, without knowing llama-server's flags.

The programs in `llamafleet/remote/` name no flag that the plan decides: a renamed flag changes this side alone. The
keys stand in plan.json beside its `identity`, which does not cover them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Words that the host replaces: the path of its tiny model, a free port, and the path of a socket.
MODEL, PORT, SOCKET = "{model}", "{port}", "{socket}"
# In a trial that is measured: an address of loopback, and the folder of the unit's credentials.
HOST, CREDENTIALS = "{host}", "{credentials}"
CREDENTIALS_FOLDER = "/run/credentials/"  # systemd's, with one for each unit
# Of a trial that is measured no other program asks, and it has an address of its own.
SECRET_FLAGS = ("--api-key-file", "--ssl-cert-file", "--ssl-key-file")
# They decide what is written. Words by chance are followed by anything.
SHAPING_FLAGS = ("--grammar-file", "--json-schema-file")
# Flags of the plan that are tried with their values; all others are about the real model.
CARRIED = ("--device", "--split-mode", "--cache-type-k", "--cache-type-v", "--flash-attn", "--load-mode", "--fit")


def told_to_host(argv: Sequence[str], alone: bool) -> dict[str, Any]:
    """Keys of plan.json, from the service's whole command line: `trial` for hardening_trial.py and preflight.py, and
    `batch_tokens` for liveness.py. `alone`: the host is to have this instance and no other."""
    return {"trial": {**trial(argv), "alone": alone}, "batch_tokens": batch_tokens(argv)}


def trial(argv: Sequence[str]) -> dict[str, Any]:
    """How the release is tried: what lists its devices, which must be listed, and what serves the tiny model on them.

    One thread, since a busy host is not what is tried; on the loopback of the service's address family, `host`, or, of
    a server that listens at a path, at one.
    """
    devices = (value_of(argv, "--device") or "none").replace("none", "").split(",")
    devices = [name for name in devices if name]
    asked = value_of(argv, "--host") or ""
    host = "::1" if ":" in asked else "127.0.0.1"
    listen = SOCKET if asked.startswith("/") else host
    serve = [argv[0], "--model", MODEL, "--host", listen, "--port", PORT, "--ctx-size", "256", "--parallel", "1",
             "--threads", "1", "--cache-ram", "0", "--offline", "--no-ui",
             "--n-gpu-layers", "99" if devices else "0"]  # fmt: skip
    carried = [(flag, value) for flag in CARRIED if (value := value_of(argv, flag)) is not None]
    return {
        "host": host,
        "devices": devices,
        "list_devices": [argv[0], "--list-devices"],
        "serve": [*serve, *(word for pair in carried for word in pair)],
    }


def measured(argv: Sequence[str], has_text: bool) -> dict[str, Any]:
    """The keys "host" and "argv" of a trial of a tune (remote/tune.py), from the service's whole command line: without
    keys and certificates, at the loopback of the same address family, or at a path where the service listens at one.
    `has_text`: the prompts are the operator's, so that what shapes replies, such as a grammar, stays."""
    asked = value_of(argv, "--host") or ""
    replaced = {"--host": SOCKET if asked.startswith("/") else HOST, "--port": PORT}
    left_out = (*SECRET_FLAGS, *(() if has_text else SHAPING_FLAGS))
    words: list[str] = []
    for before, word in zip(("", *argv), argv, strict=False):
        if word in left_out or before in left_out:
            continue
        kept = replaced.get(before, word)
        words.append(CREDENTIALS + kept[kept.rindex("/") :] if kept.startswith(CREDENTIALS_FOLDER) else kept)
    return {"host": "::1" if ":" in asked else "127.0.0.1", "argv": words}


def batch_tokens(argv: Sequence[str]) -> int:
    """The most tokens that are computed in one piece; no prompt, and so no batch, is longer than the context."""
    return min(int(value_of(argv, flag) or 0) for flag in ("--batch-size", "--ctx-size"))


def value_of(argv: Sequence[str], flag: str) -> str | None:
    """The value of a flag on a command line; None where it is not given."""
    return argv[argv.index(flag) + 1] if flag in argv[:-1] else None
