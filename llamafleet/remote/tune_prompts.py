"""The prompts of a tune's trials: the operator's messages, or words by chance.

A module of tune.py and under its contract: Python 3.8, standard library; gate_server.py beside it.

A message goes through the model's chat template, as a client's does. Words by chance are others for each user and each
turn, and the same in every trial: a server keeps what it has read, and a table of n-grams is one for all users, so that
a second reading of the same prompt would be guessed.
"""

from __future__ import annotations

import random
from typing import Any, Dict, List, NamedTuple, Sequence

from gate_server import WORDS, ask

DIVIDER = "%"  # a line of the text that is this alone stands between two messages
DEPTH_TURN = -1  # the words below the depth are the same in each turn


class Failed(Exception):
    """The server does not do its work; the text says why."""


class Prompt(NamedTuple):
    """Tokens that are in the cache before the request, and those of the request itself."""

    depth: List[int]
    tokens: List[int]
    is_text: bool


def messages(text: str) -> List[str]:
    """The messages of a text, without those that are blank."""
    found: List[List[str]] = [[]]
    for line in text.split("\n"):
        if line.rstrip("\r") == DIVIDER:
            found.append([])
        else:
            found[-1].append(line)
    joined = ("\n".join(lines) for lines in found)
    return [one for one in joined if one.strip()]


class Prompts:
    """The prompts for one server. Raises Failed where it does not answer as llama-server does."""

    def __init__(self, url: str, texts: Sequence[str] = ()) -> None:
        self.url = url
        self.texts = texts
        self.known: Dict[Any, List[int]] = {}

    def of(self, user: int, turn: int, depth: int, length: int) -> Prompt:
        """What this user sends; `depth` and `length` in tokens. In turn 0, which warms up, all send words."""
        before = self.words(user, DEPTH_TURN, depth) if depth else []
        if turn and user < len(self.texts):
            return Prompt(before, self.message(user, not depth), True)
        return Prompt(before, self.words(user, turn, length), False)

    def message(self, user: int, at_begin: bool) -> List[int]:
        key = ("message", user, at_begin)
        if key not in self.known:
            asked = {"messages": [{"role": "user", "content": self.texts[user]}]}
            text = self.answer("/apply-template", asked, "prompt", str)
            self.known[key] = self.tokens(text, add_special=at_begin)
        return self.known[key]

    def words(self, user: int, turn: int, count: int) -> List[int]:
        """So many tokens of words by chance."""
        key = (user, turn, count)
        if key not in self.known:
            found = self.tokens(words(user, turn, count), add_special=False)
            self.known[key] = [found[n % len(found)] for n in range(count)]
        return self.known[key]

    def tokens(self, text: str, add_special: bool) -> List[int]:
        asked = {"content": text, "add_special": add_special, "parse_special": True}
        found: List[int] = self.answer("/tokenize", asked, "tokens", list)
        return found

    def answer(self, path: str, body: Dict[str, Any], key: str, kind: type) -> Any:
        status, told = ask(self.url, path, body=body)
        found = told.get(key) if status == 200 and isinstance(told, dict) else None
        if not isinstance(found, kind) or not found:
            raise Failed(f"{path}: {status or 'no answer'}: {str(told)[:200]}")
        return found


def words(user: int, turn: int, count: int) -> str:
    """So many words. Those of two turns differ from the first one on: what a server has read of a turn before, or has
    put aside (server_prompt_cache), is not the beginning of this one."""
    chance = random.Random(f"{user} {turn}")  # noqa: S311 -- no secret: the same words in every trial
    known = WORDS.split()
    return " ".join([known[turn % len(known)], *(chance.choice(known) for _ in range(count - 1))])
