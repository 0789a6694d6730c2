"""What a host needs to know of a command line in order to try it and to watch it, without knowing llama-server's flags.

The programs in `llamafleet/remote/` name no flag that the plan decides: a renamed flag changes this side alone. The
keys stand in plan.json beside its `identity`, which does not cover them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Words that the host replaces: the path of its tiny model, a free port, and the path of a socket.
MODEL, PORT, SOCKET = "{model}", "{port}", "{socket}"
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


def batch_tokens(argv: Sequence[str]) -> int:
    """The most tokens that are computed in one piece; no prompt, and so no batch, is longer than the context."""
    return min(int(value_of(argv, flag) or 0) for flag in ("--batch-size", "--ctx-size"))


def value_of(argv: Sequence[str], flag: str) -> str | None:
    """The value of a flag on a command line; None where it is not given."""
    return argv[argv.index(flag) + 1] if flag in argv[:-1] else None
