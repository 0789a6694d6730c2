"""How the gate and the liveness check talk to a unit and its server.

Part of gate.py and liveness.py and under their contracts: Python 3.8, standard library.

Decision 20: docs/decisions/0020-what-comes-from-outside-is-bounded.md.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import threading
import time
from typing import Any, Iterator  # the contract is Python 3.8, whose own Iterator is typing's
from urllib.parse import urlsplit

from common import show, whole_number

# Of an answer. The largest is that of /props with the chat template, which has below 100 kB in real models.
ANSWER_LIMIT_BYTES = 8 * 2**20
TEXT_CHARACTERS = 2**14  # of an answer that is no JSON; /metrics has 4 kB
SLOTS_LIMIT = 256  # LLAMA_MAX_SEQ
KEY_LIMIT_BYTES = 64 * 2**10
CERTIFICATE_LIMIT_BYTES = 2**20
# What prompts are made of, to measure a speed.
WORDS = "the of and to in is was for on that with as by at from it an be this which or are not have had but one"


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


# By the server's URL: what its certificate is checked with, and the path of its own socket where it has one.
_trusted: dict[str, ssl.SSLContext] = {}
_sockets: dict[str, str] = {}


def trust(spec: dict[str, Any]) -> None:
    """Accept from now on the installed certificate and no other, whoever signed it. Its name is not compared, since
    the host asks by address. A server that starts on demand is asked at its own socket: a connection to the address
    that clients use would start it."""
    if spec.get("socket"):
        _sockets[spec["url"]] = spec["socket"]
    if not spec.get("tls_certificate"):
        return
    end = "-----END CERTIFICATE-----"
    with open(spec["tls_certificate"]) as file:
        own = file.read(CERTIFICATE_LIMIT_BYTES).partition(end)[0] + end  # the rest is its chain
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=own)
    context.verify_flags |= 0x80000  # X509_V_FLAG_PARTIAL_CHAIN, which Python names from 3.10 on
    _trusted[spec["url"]] = context


def trusted(url: str) -> ssl.SSLContext | None:
    """What the certificate of this server is checked with, as `trust` made it; None for one without TLS."""
    return _trusted.get(url)


def ask(
    url: str, path: str, key: str | None = None, body: dict[str, Any] | None = None, seconds: float = 120.0
) -> tuple[int, Any]:
    """(HTTP status, JSON or text); status 0 and why, if no whole answer came in this time.

    The server may have been taken over: the time is for everything, from the connection to the last byte, and no more
    than ANSWER_LIMIT_BYTES are read.
    """
    headers = {"Content-Type": "application/json", **({"Authorization": "Bearer " + key} if key else {})}
    data = json.dumps(body).encode() if body is not None else None
    over = time.monotonic() + seconds
    try:
        with connected(url, seconds) as connection:
            connection.request("GET" if data is None else "POST", path, data, headers)
            answer = connection.getresponse()
            text = answer.read(ANSWER_LIMIT_BYTES + 1)
        if len(text) > ANSWER_LIMIT_BYTES:
            return 0, f"the answer to {path} has more than {ANSWER_LIMIT_BYTES} bytes"
        if answer.length:  # what is missing of Content-Length; None where the server sends until it closes
            raise OSError("the answer ended too early")
        if time.monotonic() >= over:  # then our own end of the connection looks like the server's
            raise OSError("too late")
    except (OSError, ValueError, http.client.HTTPException) as error:
        late = time.monotonic() >= over
        return 0, f"no whole answer within {seconds:.0f} s" if late else f"{type(error).__name__}: {error}"[:300]
    try:
        return answer.status, json.loads(text, parse_int=bounded)
    except (ValueError, RecursionError):
        return answer.status, text[: 4 * TEXT_CHARACTERS].decode("utf-8", "replace")[:TEXT_CHARACTERS]


def bounded(digits: str) -> int:
    """A whole number of an answer. Raises ValueError for one that no counter has: long ones take long to read."""
    number = whole_number(digits.lstrip("-"), 2**64)
    if number is None:
        raise ValueError("a number of more than 64 bits")
    return -number if digits.startswith("-") else number


@contextlib.contextmanager
def connected(url: str, seconds: float) -> Iterator[http.client.HTTPConnection]:
    """A connection to the host's own server, by no proxy, that is shut down after `seconds`, whatever it does then."""
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    path = _sockets.get(url)
    sock = unix_connection(path, seconds) if path else socket.create_connection((host, port), timeout=seconds)
    second = sock.dup()  # TLS takes the first descriptor over
    timer = threading.Timer(seconds, shut_down, [second])
    timer.daemon = True
    timer.start()
    connection = http.client.HTTPConnection(host, port)
    try:
        if parts.scheme == "https":
            context = _trusted.get(url) or ssl.create_default_context()
            sock = context.wrap_socket(sock, server_hostname=host)
        connection.sock = sock
        yield connection
    finally:
        timer.cancel()
        connection.close()
        sock.close()
        second.close()


def unix_connection(path: str, seconds: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(seconds)
        sock.connect(path)
    except OSError:
        sock.close()
        raise
    return sock


def shut_down(sock: socket.socket) -> None:
    """Wake up whoever reads from this connection."""
    with contextlib.suppress(OSError):  # it has ended meanwhile
        sock.shutdown(socket.SHUT_RDWR)


def found_status(status: int, told: Any) -> str:
    """What `ask` returned, for a check's `found`: the status, or why there is none."""
    return f"status {status}" if status else f"no answer: {told}"


def first_key(spec: dict[str, Any]) -> str | None:
    if not spec["api_keys"]:
        return None
    with open(spec["api_keys"]) as file:
        return file.readline(KEY_LIMIT_BYTES).strip()


def slots(spec: dict[str, Any], seconds: float = 5.0) -> list[dict[str, Any]] | None:
    """What each slot is doing, an object each; None if the server does not answer so.

    The server's own thread answers this also while a batch is computed (server_context, yield_to_queue).
    """
    status, told = ask(spec["url"], "/slots", first_key(spec), seconds=seconds)
    is_list = status == 200 and isinstance(told, list) and len(told) <= SLOTS_LIMIT
    return told if is_list and all(isinstance(slot, dict) for slot in told) else None
