"""Measure a running llama-server with a workload: as many requests at a time, as deep in the context, as it says.

A module of tune.py and under its contract: Python 3.8, standard library; gate_server.py and tune_prompts.py lie beside
it. The server is of the tune alone. All requests of a turn begin together; where there are fewer slots than users,
those who find no slot free wait, as they would. Before a turn the server reads what is below the depth, for each user;
that is not measured. It chooses the slots itself, as for any client: what it put aside in RAM it finds again only so
(server_context::get_available_slot). Models that keep a state or a window instead of all cells cannot go back in their
cache (server_context::update_slots, checkpoints): they read that anew before each turn, and the request itself is
behind it. What the server reads again within a request is measured and told as `reread_tokens`.
"""

from __future__ import annotations

import threading
import time
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, TypeVar

from gate_server import ask
from tune_prompts import Failed, Prompt, Prompts

T = TypeVar("T")

# Tokens of a reply to words that are really written; longer replies are as quick for each token, at their depth.
MOST_REPLY = 128
WARM_REPLY = 8  # of the turn that warms up
FEWEST_REPLY = 8  # of a model that may end its reply: fewer say nothing of its speed
# Two words may begin with the same tokens.
ALIKE_TOKENS = 4


class Workload(NamedTuple):
    """A typical request, tokens, and how many come at once."""

    prompt: int
    reply: int
    depth: int  # tokens in the slot's cache before the request
    concurrency: int


class Reply(NamedTuple):
    """What one request took: tokens and milliseconds by the server's own clock, what was guessed ahead, and the seconds
    from the turn's beginning to the reply's end by ours."""

    prompt: int
    reread: int
    reply: int
    reply_ms: float
    drafted: int
    accepted: int
    felt_seconds: float

    @property
    def began_seconds(self) -> float:
        """When the prompt was read, and writing began."""
        return self.felt_seconds - self.reply_ms / 1000


def measure(prompts: Prompts, workload: Workload, seconds: float, turn: int) -> Dict[str, Any]:
    """The figures of one turn; of turn 0, which warms up, they mean nothing. Raises Failed where a request fails, or
    not all of it is done in this time."""
    over = time.monotonic() + seconds
    several = range(workload.concurrency)
    asked = [prompts.of(user, turn, workload.depth, workload.prompt) for user in several]
    if workload.depth:
        for user in several:
            post(prompts.url, {"prompt": asked[user].depth, "n_predict": 0, "cache_prompt": True}, over)

    def one(user: int, began: float) -> Reply:
        reply = request(prompts.url, asked[user], reply_tokens(workload, asked[user], turn), over)
        return reply._replace(felt_seconds=time.monotonic() - began)

    replies = together(workload.concurrency, one)
    return figures(workload, replies, slots(prompts.url)) if turn else {}


def together(users: int, one: Callable[[int, float], T]) -> List[T]:
    """What `one` gives for each user; all begin at the same moment, which is its second argument. Raises the first
    user's Failed."""
    began: List[float] = []
    barrier = threading.Barrier(users, action=lambda: began.append(time.monotonic()))
    found: List[Any] = [None] * users

    def work(user: int) -> None:
        barrier.wait()
        try:
            found[user] = one(user, began[0])
        except Failed as error:
            found[user] = error

    threads = [threading.Thread(target=work, args=(user,), daemon=True) for user in range(users)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for value in found:
        if isinstance(value, Failed):
            raise value
    return found


def reply_tokens(workload: Workload, prompt: Prompt, turn: int) -> int:
    """The most tokens of a reply that are written."""
    if prompt.is_text:
        return workload.reply
    return min(workload.reply, MOST_REPLY if turn else WARM_REPLY)


def figures(workload: Workload, replies: Sequence[Reply], slot_count: int) -> Dict[str, Any]:
    """Seconds until the last user has the whole reply, and tokens a second of all users together: until the last prompt
    was read, and while all write. What of a reply was not written has the pace of the reply that began last, which no
    other prompt held up."""
    last = max(replies, key=lambda one: one.began_seconds)
    each = last.reply_ms / 1000 / max(1, last.reply)
    read = last.began_seconds
    return {
        "seconds": max(one.felt_seconds + max(0, workload.reply - one.reply) * each for one in replies),
        "prompt_tokens_per_s": sum(one.prompt for one in replies) / read if read > 0 else None,
        "decode_tokens_per_s": min(slot_count, len(replies)) / each if each else None,
        "prompt_tokens": round(sum(one.prompt - one.reread for one in replies) / len(replies)),
        "reply_tokens": round(sum(one.reply for one in replies) / len(replies)),
        "reread_tokens": round(sum(one.reread for one in replies) / len(replies)),
        "drafted": sum(one.drafted for one in replies),
        "accepted": sum(one.accepted for one in replies),
    }


def slots(url: str) -> int:
    """How many requests the server works at together."""
    status, told = ask(url, "/props")
    count = told.get("total_slots") if status == 200 and isinstance(told, dict) else None
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise Failed(f"/props: {status or 'no answer'}: it names no total_slots")
    return count


def request(url: str, prompt: Prompt, count: int, over: float) -> Reply:
    """The request that is measured."""
    body = {"prompt": [*prompt.depth, *prompt.tokens], "n_predict": count, "cache_prompt": bool(prompt.depth),
            "ignore_eos": not prompt.is_text}  # fmt: skip
    timings = post(url, body, over).get("timings")
    if not isinstance(timings, dict):
        raise Failed("a reply without timings: llama-server's API changed")
    read, written = int(number(timings, "prompt_n")), int(number(timings, "predicted_n"))
    if written != count and not (prompt.is_text and FEWEST_REPLY <= written < count):
        what = "the model ends its reply to the text" if prompt.is_text else "a reply ends"
        raise Failed(f"{what} after {written} tokens in place of {count}: no speed can be told from that")
    if read < len(prompt.tokens) - ALIKE_TOKENS:
        raise Failed(f"{read} tokens of the prompt were read in place of {len(prompt.tokens)}: it was in the cache")
    return Reply(
        read, max(0, read - len(prompt.tokens)), written, number(timings, "predicted_ms"),
        int(number(timings, "draft_n", 0)), int(number(timings, "draft_n_accepted", 0)), 0.0,
    )  # fmt: skip


def number(timings: Dict[str, Any], key: str, default: Optional[float] = None) -> float:
    value = timings.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Failed(f"a reply without {key}: llama-server's API changed")
    return float(value)


def post(url: str, body: Dict[str, Any], over: float) -> Dict[str, Any]:
    """A completion with greedy sampling. Raises Failed."""
    fixed = {"temperature": 0, "seed": 1, "repeat_penalty": 1.0}
    seconds = max(1.0, over - time.monotonic())
    status, told = ask(url, "/completion", body={**fixed, **body}, seconds=seconds)
    if status != 200 or not isinstance(told, dict):
        raise Failed(f"/completion: {status or 'no answer'}: {said(told)}")
    return told


def said(told: Any) -> str:
    """llama-server's own words for an error."""
    error = told.get("error") if isinstance(told, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return str(message or told)[:200]
