"""The files of a gateway: HAProxy's configuration, the list of models, and the secrets apart from both.

HAProxy 2.4 and later read it. Keys are in files of root's: those of clients as SHA-256 alone, those of servers as they
are. The folder's name is a digest of all.

Decision 24: docs/decisions/0024-a-gateway-of-standard-parts.md.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llamafleet.fleet.gateway import Secret, Server, by_model, common_key, record, sha256
from llamafleet.remote.common import GATEWAY, GATEWAY_RUN, GATEWAY_SOCKET, GATEWAY_STATE
from llamafleet.service.unit import Renderer
from llamafleet.settings.schema import Settings

TEMPLATE, UNIT_TEMPLATE = "haproxy.cfg.j2", "llamafleet-gateway.service.j2"
# What a client that found no free slot is told to wait, seconds.
RETRY_SECONDS = 10
# Of models in a message, in characters: a line of HAProxy's configuration ends at 2048.
LONGEST_NAMES = 800
# Weights end there in HAProxy.
MOST_WEIGHT = 256
# Paths of llama-server below /MODEL/ that show or change nothing of other users: with /v1/..., what may be asked
# (ctx_http.post in tools/server/server.cpp). Its /slots, /metrics, /props and /lora-adapters are the operator's.
PATHS = (
    "/apply-template", "/chat/completions", "/completion", "/completions", "/detokenize", "/embedding", "/embeddings",
    "/health", "/infill", "/rerank", "/reranking", "/responses", "/tokenize",
)  # fmt: skip


@dataclass(frozen=True)
class Files:
    """The files of a configuration by name, and its digest. `secrets` are for root alone."""

    digest: str
    texts: Mapping[str, str]
    secrets: Mapping[str, str] = field(repr=False)

    @property
    def folder(self) -> str:
        """Where the host has them."""
        return f"{GATEWAY}/{self.digest}"


@dataclass(frozen=True)
class Access:
    """The secrets of a gateway: the keys of its clients, its certificate with the key, and of each server, by host and
    instance, what the operator's machine knows."""

    client_keys: tuple[str, ...] = field(default=(), repr=False)
    certificate_and_key: str = field(default="", repr=False)
    of_servers: Mapping[tuple[str, str], Secret] = field(default_factory=dict, repr=False)
    # PEM certificates by which a server's is trusted, with the name that it must have; by the certificate's SHA-256.
    trusted: Mapping[str, tuple[str, str]] = field(default_factory=dict)


def files(render: Renderer, settings: Settings, servers: Sequence[Server], access: Access) -> Files:
    """The files of the gateway with these servers, of which no problem is known."""
    models = by_model(servers)
    keys = {name: common_key(ones, access.of_servers) for name, ones in models.items()}
    secrets = {
        "client-keys": "".join(f"{sha256(key).upper()}\n" for key in access.client_keys),
        "server-keys": "".join(f"{name} {key}\n" for name, key in keys.items() if key),
        "tls.pem": access.certificate_and_key,
    }
    texts = {
        "models": "".join(f"{name}\n" for name in models),
        "clients": "".join(f"{one}\n" for one in _clients(settings)),
        "models.json": json.dumps(listing(models)) + "\n",
        "servers.json": json.dumps(record(servers), indent=1, sort_keys=True) + "\n",
        **{f"trust-{digest[:16]}.pem": pem for digest, (pem, _) in access.trusted.items() if pem},
    }
    values = _values(settings, models, keys, access)
    in_no_folder = render(TEMPLATE, {**values, "folder": "", "digest": ""})
    content = json.dumps([in_no_folder, texts, secrets], sort_keys=True)
    digest = sha256(content)[:16]
    texts["haproxy.cfg"] = render(TEMPLATE, {**values, "folder": f"{GATEWAY}/{digest}", "digest": digest})
    return Files(digest, texts, {name: text for name, text in secrets.items() if text})


def listing(models: Mapping[str, Sequence[Server]]) -> dict[str, Any]:
    """What /v1/models answers, in OpenAI's form; `context_tokens` is the smallest of the model's servers."""
    return {"object": "list", "data": [entry(name, ones) for name, ones in models.items()]}


def entry(name: str, ones: Sequence[Server]) -> dict[str, Any]:
    """One model of `listing`."""
    told = {"serves": ones[0].serves, "context_tokens": min(one.context_tokens for one in ones), "servers": len(ones)}
    return {"id": name, "object": "model", "created": 0, "owned_by": "llamafleet", "meta": told}


def _values(
    settings: Settings, models: Mapping[str, Sequence[Server]], keys: Mapping[str, str | None], access: Access
) -> dict[str, Any]:  # fmt: skip
    """What the template names."""
    names = ", ".join(models) if len(", ".join(models)) <= LONGEST_NAMES else "those of /v1/models"
    body_kib = settings.gateway_body_kib
    return {
        "run": GATEWAY_RUN, "socket": GATEWAY_SOCKET, "state": GATEWAY_STATE,
        "bind": _bind(settings.gateway_listen, settings.gateway_port), "stats_port": settings.gateway_stats_port,
        "tls": bool(access.certificate_and_key), "guarded": bool(access.client_keys),
        "clients": settings.gateway_allowed_clients, "session_headers": settings.gateway_session_headers,
        "buffer_bytes": body_kib * 1024, "retry_seconds": RETRY_SECONDS,
        "queue_seconds": settings.gateway_queue_seconds, "queue_requests": settings.gateway_queue_requests,
        "reply_seconds": settings.gateway_reply_seconds, "paths": PATHS,
        "models": [_model(settings, name, ones, keys[name], access) for name, ones in models.items()],
        "error": {
            "key": error(401, "authentication_error", "the gateway does not know this API key: send one of its own, "
                         "as Authorization: Bearer KEY"),
            "late": error(400, "invalid_request_error", f"the first {body_kib} KiB of the body name no model: send "
                          f'"model" before "messages", or ask /MODEL/v1/... (models: {names})'),
            "unknown": error(404, "not_found_error", f"the gateway has no such model: it has {names}"),
            "path": error(404, "not_found_error", "the gateway has no such path: ask /v1/models, /v1/... with a "
                          '"model" in the body, or /MODEL/v1/...'),
            "full": error(503, "unavailable_error", "all slots of this model are taken, and its queue is full: try "
                          "again later"),
            "down": error(503, "unavailable_error", "no server of this model is ready: try again later"),
            "untaken": error(503, "unavailable_error", "no server of this model took the request, after %Tw ms in the "
                             "queue and %rc further tries: try again later"),
            "slow": error(504, "timeout_error", "the server of this model was silent for too long"),
        },
    }  # fmt: skip


def error(code: int, kind: str, message: str) -> str:
    """An error as llama-server writes one (format_error_response in tools/server/server-common.cpp), quoted for
    HAProxy's configuration."""
    text = json.dumps({"error": {"code": code, "message": message, "type": kind}})
    return "'" + text.replace("'", "\\u0027") + "'"


def _model(
    settings: Settings, name: str, ones: Sequence[Server], key: str | None, access: Access
) -> dict[str, Any]:  # fmt: skip
    on_demand = max((one.load_seconds for one in ones if one.on_demand), default=0)
    return {
        "name": name, "backend": ones[0].backend, "key": key is not None,
        "reply_seconds": settings.gateway_reply_seconds + on_demand,
        "entry": "'" + json.dumps(entry(name, ones)) + "'",
        "servers": [{"id": one.id, "address": _bind(one.address, one.port), "slots": one.slots,
                     "weight": min(MOST_WEIGHT, one.slots), "checked": not one.on_demand, **_tls(one, access)}
                    for one in ones],
    }  # fmt: skip


def _tls(one: Server, access: Access) -> dict[str, str]:
    if not one.certificate:
        return {"trust": "", "verify_host": ""}
    pem, name = access.trusted[one.certificate]
    return {"trust": f"trust-{one.certificate[:16]}.pem" if pem else "system", "verify_host": name}


def _bind(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _clients(settings: Settings) -> Iterator[str]:
    """Who may reach the gateway; nothing where everybody may."""
    if not settings.gateway_allowed_clients:
        return
    yield from ("127.0.0.0/8", "::1")
    listen = ipaddress.ip_address(settings.gateway_listen)
    if not (listen.is_loopback or listen.is_unspecified):
        yield str(listen)
    yield from settings.gateway_allowed_clients
