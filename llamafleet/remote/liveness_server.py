"""What the liveness check asks a running llama-server, and how it reads the answers.

Part of liveness.py and under its contract: Python 3.8, standard library.

None of these requests takes a slot that holds cached tokens, wakes a server that sleeps, or keeps it awake:

- `/props` is answered by an HTTP thread, also while the server sleeps (server_routes::init_routes, get_props).
- `/slots` and `/metrics` go through the queue of tasks and take no slot. The main loop answers them, or its worker
  while the main loop computes a batch (server_queue::yield_to_queue; server_context_impl::process_single_task).
- `/slots` wakes a server and counts as use, `/metrics` does not (server_queue, task_resets_idle_timer). So a server
  that may sleep is asked for its slots only while one of them is at work.
- A server of embeddings or scores keeps no prompt: its smallest request costs nobody a cached token, and is asked while
  no slot works and nothing waits.
- `/metrics` begins a new window for its gauges of tokens per second (metrics_reset_bucket), so another server is asked
  for it only if no slot has worked since the last look.

Decision 13: docs/decisions/0013-a-check-costs-no-user-anything.md.
"""

from __future__ import annotations

import re
from typing import (  # Python 3.8 has no list[int] at run time
    Any,
    Dict,
    List,
    NamedTuple,
    Optional,
    Tuple,
    Type,
    TypeVar,
)

from gate_server import SLOTS_LIMIT, ask, first_key

ANSWER_SECONDS = 5.0
# Statuses of a server that works but does not answer this: wrong key, unknown address, not switched on.
NOT_OFFERED = (404, 501)
LARGEST = 2**63  # above what any counter has

# By slot: [task, is it under way, tokens read, tokens written].
Slots = Dict[str, List[Any]]
Kind = TypeVar("Kind")


class NoAnswer(Exception):
    """The server gave no answer that can be used; the text says to what, and what came instead."""


class Refused(Exception):
    """The server answers, but not this check; the text has the address and the status."""

    def __init__(self, address: str, status: int) -> None:
        super().__init__(f"{address} answers {status}")
        self.status = status


class Queue(NamedTuple):
    """Requests that slots work at, and requests that wait for a slot."""

    working: int
    waiting: int


def is_asleep(spec: dict[str, Any]) -> bool:
    """Has the server unloaded its model until the next request?"""
    return get(spec, "/props", dict).get("is_sleeping") is True


def may_sleep(argv: list[str]) -> bool:
    """Does this command line of llama-server let it sleep?"""
    return any(word.split("=")[0] == "--sleep-idle-seconds" for word in argv)


def queue(spec: dict[str, Any]) -> Queue:
    """The server's own count; none where it does not offer /metrics."""
    try:
        told = get(spec, "/metrics", str)
    except Refused as refused:
        if refused.status in NOT_OFFERED:
            return Queue(0, 0)
        raise
    found = dict(re.findall(r"^llamacpp:requests_(processing|deferred) (\d{1,9})$", told, re.MULTILINE))
    return Queue(int(found.get("processing", 0)), int(found.get("deferred", 0)))


def read_slots(spec: dict[str, Any]) -> tuple[Slots, bool]:
    """The counters of every slot, and whether no slot holds a cached token."""
    told = get(spec, "/slots", list)
    if len(told) > SLOTS_LIMIT:
        raise NoAnswer(f"/slots: {len(told)} slots, where llama-server has {SLOTS_LIMIT} at most")
    counters: Slots = {}
    bare = True
    for slot in told:
        task, working = number(slot, "id_task", None), slot.get("is_processing", False)
        if not isinstance(working, bool):
            raise NoAnswer(f"/slots: is_processing is {working!r:.40}")
        written = sum(number(one, "n_decoded") or 0 for one in tokens_of(slot))
        counters[str(number(slot, "id"))] = [task, working, number(slot, "n_prompt_tokens_processed"), written]
        # A slot that never had a task says nothing of its tokens.
        bare = bare and (task is None or number(slot, "n_prompt_tokens", None) == 0)
    return counters, bare


def tokens_of(slot: dict[str, Any]) -> list[Any]:
    told = slot.get("next_token", [])
    if not isinstance(told, (list, dict)):
        raise NoAnswer(f"/slots: next_token is {told!r:.40}")
    return told if isinstance(told, list) else [told]


def number(told: Any, key: str, default: Optional[int] = 0) -> Optional[int]:
    """A whole number of an object of /slots, or what it is where the server does not say it. Raises NoAnswer."""
    if not isinstance(told, dict):
        raise NoAnswer(f"/slots: {told!r:.40} where an object should be")
    value = told.get(key, default)
    if value is default or (type(value) is int and abs(value) < LARGEST):
        return value
    raise NoAnswer(f"/slots: {key} is {value!r:.40}")


# What is asked of a server without work, by what it serves. A token in the first slot: llama-server gives new
# conversations the last of its unused slots.
SMALLEST: Dict[str, Tuple[str, Dict[str, Any]]] = {
    "chat": ("/completion", {"prompt": "a", "n_predict": 1, "temperature": 0, "id_slot": 0}),
    "embedding": ("/embeddings", {"content": "a"}),
    "reranking": ("/rerank", {"query": "a", "documents": ["a"]}),
}


def gives_token(spec: dict[str, Any], seconds: float) -> bool:
    """Ask for one token, or for one vector or score."""
    path, body = SMALLEST[spec["serves"]]
    status, _ = ask(spec["url"], path, first_key(spec), body, seconds)
    return 200 <= status < 500 or status in NOT_OFFERED


def get(spec: dict[str, Any], path: str, kind: Type[Kind]) -> Kind:
    """The server's answer to a GET, of that type. Raises NoAnswer or Refused."""
    status, told = ask(spec["url"], path, first_key(spec), seconds=ANSWER_SECONDS)
    if 400 <= status < 500 or status in NOT_OFFERED:
        raise Refused(spec["url"] + path, status)
    if status != 200:
        raise NoAnswer(f"{path}: " + (f"status {status}" if status else f"no answer ({told!s:.80})"))
    if not isinstance(told, kind):
        raise NoAnswer(f"{path}: {told!r:.40}, which is no answer of llama-server")
    return told
