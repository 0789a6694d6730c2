"""Does a server of embeddings or scores read as fast as it should?

Part of gate.py and under its contract: Python 3.8, standard library. Such a server writes nothing: its speed is the
tokens of an input by the time until the answer. It is kept apart from the speed of servers that write.
"""

from __future__ import annotations

import time
from typing import Any

from gate_reply import PROMPT, Bad, best_of_tries, floor, load
from gate_scores import scored
from gate_server import result
from gate_vectors import asked, tokenized

TOKENS = 128  # of the input, about; less where the context is small
LONGEST_SECONDS = 60.0  # that a deploy may wait for the answer to the longest input
FEW = 16  # tokens that a query and what is between it and a document take


def check_reading(spec: dict[str, Any]) -> dict[str, Any] | None:
    """Compare the best of several tries with the floor, as check_speed does for servers that write."""
    if spec["serves"] == "chat":
        return None
    least, why = floor(spec, "read_speeds")
    expected = f"at least {least:.1f} tokens/s read ({why})"
    try:
        text, tokens = long_input(spec)
        best, busy = best_of_tries(spec, least, lambda: tokens / seconds_of(spec, text))
    except Bad as bad:
        return result("speed", False, *bad.args)
    if busy:
        return result("speed", True, expected, f"not measured: {busy} slots are busy")
    if best < least:
        return result("speed", False, expected, f"{best:.1f} tokens/s{load()}",
                      "a regression in this llama.cpp, other load (look again when the host is idle) or throttling; "
                      f"to accept it: rm {spec['record']}, and deploy again")  # fmt: skip
    spec["measured"]["read_tokens_per_s"] = best
    # The liveness check waits accordingly for a batch.
    spec["measured"]["prompt_tokens_per_s"] = best
    return result("speed", True, expected, f"{best:.1f} tokens/s read")


def check_longest(spec: dict[str, Any]) -> dict[str, Any] | None:
    """At a deploy, an input that fills the context must get its answer: only then llama-server takes all the memory for
    the results of its tokens (llama_context::output_reserve). Not where that would take long."""
    speed = spec["measured"].get("read_tokens_per_s")
    if spec["serves"] == "chat" or not spec["deploying"] or not speed:
        return None
    expected = f"an answer to an input of about {spec['context_tokens']} tokens"
    seconds = spec["context_tokens"] / speed
    if seconds > LONGEST_SECONDS:
        return result("longest input", True, expected, f"not asked: it would take about {seconds:.0f} s")
    try:
        text, tokens = long_input(spec, spec["context_tokens"])
        seconds_of(spec, text)
    except Bad as bad:
        hint = f"{bad.args[2]}; where memory ran out, a smaller context_tokens takes less"
        return result("longest input", False, expected, bad.args[1], hint)
    return result("longest input", True, expected, f"an answer to {tokens} tokens")


def long_input(spec: dict[str, Any], wanted: int = TOKENS) -> tuple[str, int]:
    """A text and its tokens: as many as wanted, and as the context takes. Raises Bad."""
    once = len(tokenized(spec, PROMPT))
    times = max(1, min(wanted, spec["context_tokens"] - FEW) // once)
    text = " ".join([PROMPT] * times)
    return text, len(tokenized(spec, text))


def seconds_of(spec: dict[str, Any], text: str) -> float:
    """The time of one request with this input. Raises Bad."""
    began = time.monotonic()
    if spec["serves"] == "reranking":
        scored(spec, "a", [text])
    else:
        asked(spec, text)
    return max(time.monotonic() - began, 1e-6)
