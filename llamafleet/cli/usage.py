"""How to use what was deployed: the address of an instance, a request to copy, and what the gate measured of it."""

from __future__ import annotations

import ipaddress
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llamafleet.cli.tables import rate
from llamafleet.host.answers import Gate
from llamafleet.host.learned import GatedSpeed
from llamafleet.planner.roofline import Prediction
from llamafleet.settings.schema import Instance
from llamafleet.settings.secrets import VARIABLE

LOCAL = "@local"  # pyinfra's name of this machine
# By what an instance serves: where it is asked, and a request to copy.
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64}),
    "embedding": ("/v1/embeddings", {"input": "Hello"}),
    "reranking": ("/v1/rerank", {"query": "Hello", "documents": ["Good morning", "Good night"]}),
}
# The pooling "none" gives a vector for each token, which OpenAI's API does not have.
OF_TOKENS: tuple[str, dict[str, Any]] = ("/embeddings", {"content": "Hello"})


def url(instance: Instance, host: str) -> str:
    """Where clients reach the instance. `host`: by which name or address this machine reaches the host."""
    listen = ipaddress.ip_address(instance.listen)
    name = instance.listen
    if listen.is_unspecified:
        name = host if host != LOCAL else "::1" if listen.version == 6 else "127.0.0.1"
    name = f"[{name}]" if ":" in name else name
    return f"{'https' if instance.tls_certificate_file else 'http'}://{name}:{instance.port}"


def lines(instance: Instance, host: str, gate: Gate | None, predicted: Prediction) -> Iterator[str]:
    """The sentences for the operator, without the host's name."""
    where = ""
    if ipaddress.ip_address(instance.listen).is_loopback and host != LOCAL:
        there = instance.listen if ":" not in instance.listen else f"[{instance.listen}]"
        where = f", on the host itself; from here by ssh -L {instance.port}:{there}:{instance.port} {host}"
    yield f"{instance.name} serves at {url(instance, host)}{where}"
    yield f"{instance.name}, to try it: {request(instance, host)}"
    read = gate.record.get("prompt_tokens_per_s") if gate else None
    if gate is not None and instance.serves != "chat" and isinstance(read, int | float):
        predicted_read = rate(predicted.prefill_tokens_per_s)
        yield f"{instance.name}, measured: {speeds(GatedSpeed(None, read))}; predicted were {predicted_read}"
    elif gate is not None and gate.decode_tokens_per_s is not None:
        measured = GatedSpeed(gate.decode_tokens_per_s, read if isinstance(read, int | float) else None)
        yield (
            f"{instance.name}, measured: {speeds(measured)}; predicted were {rate(predicted.decode_tokens_per_s)} and"
            f" {rate(predicted.prefill_tokens_per_s)}"
        )


def speeds(measured: GatedSpeed | None) -> str:
    """What gates measured, in words; empty where nothing was measured."""
    if measured is None:
        return ""
    if measured.decode_tokens_per_s is None:
        return f"{rate(measured.prompt_tokens_per_s or 0)} tokens/s read"
    read = f", {rate(measured.prompt_tokens_per_s)} read" if measured.prompt_tokens_per_s else ""
    return f"{rate(measured.decode_tokens_per_s)} tokens/s written{read}"


def request(instance: Instance, host: str) -> str:
    """A command for a POSIX shell on the operator's machine, or on the host for an instance on loopback. A key is in no
    argument: curl reads it from standard input."""
    asked_at, body = OF_TOKENS if instance.pooling == "none" else REQUESTS[instance.serves]
    words = ["curl", "-H", "Content-Type: application/json", "-d", json.dumps(body)]
    if instance.tls_certificate_file:
        words += ["--cacert", str(Path(instance.tls_certificate_file).expanduser())]
    key = ""
    if place := instance.api_key_file:
        words += ["-H", "@-"]
        if place.startswith(VARIABLE):
            key = f"printf 'Authorization: Bearer %s\\n' \"${place.removeprefix(VARIABLE)}\" | "
        else:
            path = shlex.quote(str(Path(place).expanduser()))
            key = f"sed '/^#/d; s/^/Authorization: Bearer /; q' {path} | "
    return key + shlex.join([*words, f"{url(instance, host)}{asked_at}"])
