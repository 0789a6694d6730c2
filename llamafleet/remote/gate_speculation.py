"""Does the server write the same text with guesses as without?

Part of gate.py and under its contract: Python 3.8, standard library. plan.json's `gate.speculation` has {"kind": the
setting, "most" and "least": tokens that are guessed at once, "kv_type": of the draft's cache, or null}.

No request can switch guessing off (tools/server/server-schema.cpp at b11434), but a reply of one token has nothing to
guess (server_slot::get_n_draft_max). So each token of a reply is asked for once more, alone, behind those before it.
"""

from __future__ import annotations

import math
from typing import Any, Dict, List, Optional

from gate_reply import Bad, complete, first_of
from gate_server import ask, first_key, result

# A passage that is repeated, so that there is something to guess from; any language model goes on with it.
PASSAGE = (
    "A river begins as a spring in the hills. It runs down to the plain, takes other rivers in, turns the wheels of "
    "mills, carries boats past towns and fields, grows slow and wide, and ends in the sea. The sun lifts its water "
    "into clouds, the wind carries them back over the hills, rain falls, the spring is fed again, and so the river "
    "never ends: it is always another water, and always the same river. "
)
PASSAGE_TOKENS = 80  # twice that and the beginning of a third fit a context of 256 tokens
TOKENS, MOST_TOKENS = 12, 48
# Nats between two tokens that are as good as equally likely: a batch of guesses and a single token are computed by
# other kernels, which round differently.
TIE_NATS = 0.5
TABLES = ("ngram",)  # guess only where the model repeats the text; others guess at every token


def check_speculation(spec: Dict[str, Any]) -> Optional[Dict[str, Any]]:
    """A reply with guesses must have the tokens that the model gives one by one, and guesses must have been made."""
    asked = spec.get("speculation")
    if not asked:
        return None
    try:
        prompt = tokens_of_prompt(spec)
        count = min(max(TOKENS, asked["least"] + 2), MOST_TOKENS)
        answer = complete(spec, prompt, count)
        drafted, accepted = guesses(answer)
        if not drafted and asked["kind"] not in TABLES and asked["least"] + 2 <= MOST_TOKENS:
            raise Bad("guessed tokens (timings.draft_n)", "none",
                      "llama-server could not use the draft, and goes on without it: its log says why")  # fmt: skip
        compare_one_by_one(spec, prompt, answer["tokens"])
    except Bad as bad:
        return result("speculation", False, *bad.args)
    spec["measured"]["speculation"] = {"drafted": drafted, "accepted": accepted}
    return result("speculation", True, f"the same {count} tokens with guesses and one by one",
                  f"the same; {accepted} of {drafted} guesses were right")  # fmt: skip


def tokens_of_prompt(spec: Dict[str, Any]) -> List[int]:
    status, told = ask(spec["url"], "/tokenize", first_key(spec), {"content": PASSAGE})
    tokens = told.get("tokens") if status == 200 and isinstance(told, dict) else None
    if not isinstance(tokens, list) or not tokens:
        raise Bad("the tokens of a text", f"status {status} of /tokenize", "llama-server's API changed")
    passage = tokens[:PASSAGE_TOKENS]
    return [*passage, *passage, *passage[: len(passage) // 3]]


def guesses(answer: Dict[str, Any]) -> List[int]:
    """How many tokens were guessed for a reply, and how many of them were right."""
    timings = answer.get("timings")
    found = [timings.get(name, 0) for name in ("draft_n", "draft_n_accepted")] if isinstance(timings, dict) else [0, 0]
    return [int(one) if isinstance(one, (int, float)) else 0 for one in found]


def compare_one_by_one(spec: Dict[str, Any], prompt: List[int], tokens: List[int]) -> None:
    """Raise Bad unless each token is the likeliest behind those before it, or as good as that."""
    for place, token in enumerate(tokens):
        # The first one is read from its beginning, so that nothing is left of what guesses wrote to the cache.
        alone = complete(spec, [*prompt, *tokens[:place]], 1, cache_prompt=place > 0)
        if alone["tokens"] == [token]:
            continue
        likely = first_of(alone)
        behind = max(likely.values()) - likely.get(token, -math.inf)
        if behind > TIE_NATS:
            raise Bad(
                f"token {alone['tokens'][0]} at place {place + 1} of a reply at temperature 0, as without guesses",
                f"token {token}, {behind:.1f} nats less likely",
                "speculation changes the reply: a fault of this llama.cpp or of its kernels for small batches; deploy "
                'with speculation = "none"',
            )
