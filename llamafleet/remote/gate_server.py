"""How the gate and the liveness check talk to a unit and its server.

Part of gate.py and liveness.py and under their contracts: Python 3.8, standard library.
"""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from typing import Any

from common import show

TEXT_CHARACTERS = 2**14  # of an answer that is no JSON; /metrics has 4 kB


def result(name: str, ok: bool, expected: object, found: object, hint: str = "") -> dict[str, Any]:
    return {"name": name, "ok": ok, "expected": expected, "found": found, "hint": hint}


def main_pid(unit: str) -> int:
    return int(show(unit, "MainPID").get("MainPID") or 0)


def unit_state(unit: str) -> str:
    """Such as "active/running", "activating/start-post" or "activating/auto-restart"."""
    shown = show(unit, "ActiveState", "SubState")
    return f"{shown.get('ActiveState')}/{shown.get('SubState')}"


def is_alive(state: str) -> bool:
    """Can a unit in this state still begin to serve? A unit that systemd restarts has failed already."""
    return state.startswith(("active/", "activating/")) and state != "activating/auto-restart"


# By the server's URL: what its certificate is checked with.
_trusted: dict[str, ssl.SSLContext] = {}


def trust(spec: dict[str, Any]) -> None:
    """Accept from now on the installed certificate and no other, whoever signed it. Its name is not compared, since
    the host asks by address."""
    if not spec.get("tls_certificate"):
        return
    end = "-----END CERTIFICATE-----"
    with open(spec["tls_certificate"]) as file:
        own = file.read().partition(end)[0] + end  # the rest is its chain
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=own)
    context.verify_flags |= 0x80000  # X509_V_FLAG_PARTIAL_CHAIN, which Python names from 3.10 on
    _trusted[spec["url"]] = context


def ask(
    url: str, path: str, key: str | None = None, body: dict[str, Any] | None = None, seconds: float = 120.0
) -> tuple[int, Any]:
    """(HTTP status, JSON or text); status 0 if nothing answered."""
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = "Bearer " + key
    data = json.dumps(body).encode() if body is not None else None
    # A proxy of the environment must not stand between the host and its own server.
    handlers = (urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=_trusted.get(url)))
    opener = urllib.request.build_opener(*handlers)
    try:
        with opener.open(urllib.request.Request(url + path, data, headers), timeout=seconds) as answer:
            status, text = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read()
    except (OSError, ValueError) as error:
        return 0, str(error)
    try:
        return status, json.loads(text)
    except ValueError:
        return status, text.decode("utf-8", "replace")[:TEXT_CHARACTERS]


def first_key(spec: dict[str, Any]) -> str | None:
    if not spec["api_keys"]:
        return None
    with open(spec["api_keys"]) as file:
        return file.readline().strip()


def slots(spec: dict[str, Any], seconds: float = 5.0) -> list[dict[str, Any]] | None:
    """What each slot is doing; None if the server does not answer.

    The server's own thread answers this also while a batch is computed (server_context, yield_to_queue).
    """
    status, told = ask(spec["url"], "/slots", first_key(spec), seconds=seconds)
    return told if status == 200 and isinstance(told, list) else None
