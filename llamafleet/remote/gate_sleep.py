"""Whether a server sleeps: then the gate looks no further, or, in a switch, wakes it first.

Part of gate.py and under its contract: Python 3.8, standard library; gate_server.py and liveness_server.py beside it.

A server that may sleep (`--sleep-idle-seconds`) frees its model's memory. /health, /props, /models and /metrics are
answered all the same; everything else, also /slots, wakes it (server_res_generator and server_routes::create_response
in tools/server/server-context.cpp).

Decision 13: docs/decisions/0013-a-check-costs-no-user-anything.md.
"""

from __future__ import annotations

import os
from typing import Any, Optional  # the contract is Python 3.8, whose own are typing's

from gate_server import ask, first_key, result, trust
from liveness_server import may_sleep

ANSWER_SECONDS = 5.0
NOBODY, SLEEPS = 65534, 10  # a user, and an exit status
ASLEEP = "asleep"  # the check after which there is none where the server sleeps


def check_asleep(spec: dict[str, Any]) -> dict[str, Any] | None:
    """None where the server is awake. One that sleeps is woken where `spec["wake"]` says so, as in a switch, which has
    just started it; else it sleeps on, and what was measured when it was awake stands."""
    if not may_sleep(spec["argv"]) or not is_asleep(spec):
        return None
    if not spec.get("wake"):
        return result(ASLEEP, True, "a server that is awake", "it sleeps, and is not woken")
    ask(spec["url"], "/slots", first_key(spec), seconds=spec["health_seconds"])
    if not is_asleep(spec):
        return None
    return result(ASLEEP, False, "a server that wakes up when it is asked", "it sleeps on", "its journal says why")


def is_asleep(spec: dict[str, Any]) -> bool:
    return says_asleep(spec["url"], first_key(spec))


def says_asleep(url: str, key: Optional[str]) -> bool:
    _, told = ask(url, "/props", key, seconds=ANSWER_SECONDS)
    return isinstance(told, dict) and told.get("is_sleeping") is True


def sleeps(spec: dict[str, Any]) -> bool:
    """The same for a program of root's that has no unit of its own: a child without root's rights reads the answer."""
    trust(spec)
    key = first_key(spec)
    "x".encode("idna")  # loads what sockets need: nobody may not be able to read Python's own files
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            os._exit(SLEEPS if says_asleep(spec["url"], key) else 0)
        finally:
            os._exit(1)
    return os.WEXITSTATUS(os.waitpid(child, 0)[1]) == SLEEPS


def ends(found: dict[str, Any]) -> bool:
    """Whether no check follows this one: it has failed, or the server sleeps."""
    return not found["ok"] or found["name"] == ASLEEP
