"""Measure a running llama-server with a workload: as many requests at a time, as deep in the context, as it says.

Part of tune.py and under its contract: Python 3.8, standard library; gate_server.py lies beside it. The server is of
the tune alone. Prompts are fixed sequences of tokens, the same in every trial, cut from a text where there is one; what
is in the cache before a request is read first and not counted. No prompt is found in the cache, since each begins anew
with a token of its own behind what is there.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from gate_server import ask

# Tokens of a reply that are really written; longer replies are as quick for each token, at their depth.
MOST_REPLY = 128
# The seconds for one request are those that a trial has.
WORDS = "the of and to in is was for on that with as by at from it an be this which or are not have had but one"


class Failed(Exception):
    """The server does not do its work; the text says why."""


class Workload(NamedTuple):
    """A typical request, tokens, and how many come at once."""

    prompt: int
    reply: int
    depth: int  # tokens in the slot's cache before the request
    concurrency: int


class Reply(NamedTuple):
    """What one request took: tokens and milliseconds by the server's own clock, and what was guessed ahead."""

    prompt: int
    prompt_ms: float
    reply: int
    reply_ms: float
    drafted: int
    accepted: int


def measure(url: str, workload: Workload, text: str, seconds: float, turn: int) -> Dict[str, Any]:
    """One trial's figures. `text` is what prompts are cut from, "" for random words; `turn` counts the measurements of
    this server. Raises Failed where a request fails, or not all of it is done in this time."""
    over = time.monotonic() + seconds
    replies: List[Any] = [None] * workload.concurrency

    def one(slot: int) -> None:
        try:
            replies[slot] = request(url, slot, workload, tokens(url, workload, text, slot), turn, over)
        except Failed as error:
            replies[slot] = error

    for slot in range(workload.concurrency):  # one after another: none of this is measured
        fill(url, slot, workload, tokens(url, workload, text, slot), over)
    began = time.monotonic()
    threads = [threading.Thread(target=one, args=(slot,)) for slot in range(workload.concurrency)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall = time.monotonic() - began
    for reply in replies:
        if isinstance(reply, Failed):
            raise reply
    return figures(workload, replies, wall)


def figures(workload: Workload, replies: Sequence[Reply], wall: float) -> Dict[str, Any]:
    """Seconds of the workload, and tokens a second: while prompts are read and while replies are written, of all
    requests together."""
    prompt = max(reply.prompt_ms for reply in replies) / 1000
    each = statistics.mean(reply.reply_ms / max(1, reply.reply) for reply in replies) / 1000
    drafted = sum(reply.drafted for reply in replies)
    return {
        "seconds": prompt + each * workload.reply,
        "prompt_tokens_per_s": sum(reply.prompt for reply in replies) / prompt if prompt else None,
        "decode_tokens_per_s": len(replies) / each if each else None,
        "drafted": drafted,
        "accepted": sum(reply.accepted for reply in replies),
        "wall_seconds": wall,
    }


_known: Dict[Any, List[int]] = {}


def tokens(url: str, workload: Workload, text: str, slot: int) -> List[int]:
    """Tokens for a slot: of its depth and its prompt, the same whenever it is asked."""
    needed = workload.depth + workload.prompt
    key = (url, text, needed, slot)
    if key not in _known:
        words = WORDS.split()
        chance = random.Random(slot)  # noqa: S311 -- no secret: the same words in every trial
        material = text or " ".join(chance.choice(words) for _ in range(needed))
        status, told = ask(url, "/tokenize", body={"content": material, "add_special": False})
        found = told.get("tokens") if status == 200 and isinstance(told, dict) else None
        if not isinstance(found, list) or not found:
            raise Failed(f"/tokenize: {status or 'no answer'}: {str(told)[:200]}")
        start = slot * needed % len(found) if text else 0
        _known[key] = [found[(start + n) % len(found)] for n in range(needed)]
    return _known[key]


def fill(url: str, slot: int, workload: Workload, sequence: List[int], over: float) -> None:
    """Read what is in the slot's cache before the request."""
    if workload.depth:
        post(url, slot, {"prompt": sequence[: workload.depth], "n_predict": 0, "cache_prompt": True}, over)


def request(url: str, slot: int, workload: Workload, sequence: List[int], turn: int, over: float) -> Reply:
    """The request that is measured. Behind the depth comes a token that tells the turns apart, so that nothing of the
    prompt is in the cache."""
    own = [sequence[turn % len(sequence)]] if turn else []
    prompt = [*sequence[: workload.depth], *own, *sequence[workload.depth :]][: workload.depth + workload.prompt]
    count = min(workload.reply, MOST_REPLY)
    answer = post(url, slot, {"prompt": prompt, "n_predict": count, "cache_prompt": bool(workload.depth)}, over)
    timings = answer.get("timings")
    if not isinstance(timings, dict):
        raise Failed("a reply without timings: llama-server's API changed")
    reply = Reply(
        int(number(timings, "prompt_n")), number(timings, "prompt_ms"), int(number(timings, "predicted_n")),
        number(timings, "predicted_ms"), int(number(timings, "draft_n", 0)),
        int(number(timings, "draft_n_accepted", 0)),
    )  # fmt: skip
    if reply.reply != count:
        raise Failed(f"a reply of {reply.reply} tokens in place of {count}")
    if not workload.prompt - 1 <= reply.prompt <= workload.prompt + 1:
        raise Failed(f"{reply.prompt} tokens of the prompt were read in place of {workload.prompt}")
    return reply


def number(timings: Dict[str, Any], key: str, default: Optional[float] = None) -> float:
    value = timings.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Failed(f"a reply without {key}: llama-server's API changed")
    return float(value)


def post(url: str, slot: int, body: Dict[str, Any], over: float) -> Dict[str, Any]:
    """A completion in that slot, with greedy sampling. Raises Failed."""
    fixed = {"temperature": 0, "seed": 1, "ignore_eos": True, "id_slot": slot, "repeat_penalty": 1.0}
    status, told = ask(url, "/completion", body={**fixed, **body}, seconds=max(1.0, over - time.monotonic()))
    if status != 200 or not isinstance(told, dict):
        raise Failed(f"/completion: {status or 'no answer'}: {str(told)[:200]}")
    return told
