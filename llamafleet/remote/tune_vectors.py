"""Measure a server of embeddings or scores: the seconds until all users have theirs for an input of the workload.

A module of tune.py and under its contract: Python 3.8, standard library; gate_server.py, tune_measure.py and
tune_prompts.py lie beside it. Each input is read once, so that there is neither a depth nor a reply.
"""

from __future__ import annotations

import time
from typing import Any, Dict, List, Tuple

from gate_server import ask
from tune_measure import Workload, said, together
from tune_prompts import Failed, Prompts

QUERY = "which of these is it"
MEASURED_SECONDS = 2.0  # of a turn at least, by as many inputs one after another
MOST_INPUTS = 256  # of a user in a turn
# Left of a document's tokens: those of the query, and what the model puts between both.
QUERY_TOKENS = 24


class Vectors:
    """Measures one server. Each user sends one input after another."""

    def __init__(self, prompts: Prompts, kind: str) -> None:
        self.prompts = prompts
        self.kind = kind
        self.inputs = 1  # of a user in a turn

    def measure(self, workload: Workload, seconds: float, turn: int) -> Dict[str, Any]:
        """The figures of one turn; turn 0 warms up and sets how many inputs the others have. Raises Failed."""
        over = time.monotonic() + seconds
        bodies = [[self.body(workload, user, turn, n) for n in range(self.inputs)]
                  for user in range(workload.concurrency)]  # fmt: skip
        wall = self.together(bodies, over)
        if turn == 0:
            wall = self.together(bodies, over)  # the first one reads the model from the disk, and the like
            self.inputs = max(1, min(MOST_INPUTS, int(MEASURED_SECONDS / max(wall, 1e-3))))
            return {}
        each = wall / self.inputs
        return {
            "seconds": each,
            "inputs_per_s": workload.concurrency / each,
            "prompt_tokens_per_s": workload.concurrency * workload.prompt / each,
            "prompt_tokens": workload.prompt,
            "reply_tokens": 0,
            "reread_tokens": 0,
        }

    def body(self, workload: Workload, user: int, turn: int, number: int) -> Tuple[str, Dict[str, Any]]:
        """An input of the workload's length that no other one is like."""
        own = turn * MOST_INPUTS + number
        if self.kind == "embedding":
            return "/v1/embeddings", {"input": self.prompts.words(user, own, workload.prompt)}
        tokens = self.prompts.words(user, own, max(1, workload.prompt - QUERY_TOKENS))
        document = self.prompts.answer("/detokenize", {"tokens": tokens}, "content", str)
        return "/v1/rerank", {"query": QUERY, "documents": [document]}

    def together(self, bodies: List[List[Tuple[str, Dict[str, Any]]]], over: float) -> float:
        """Seconds until all users have the answers to all of theirs."""

        def one(user: int, began: float) -> float:
            for path, body in bodies[user]:
                post(self.prompts.url, path, body, over)
            return time.monotonic() - began

        return max(together(len(bodies), one))


def post(url: str, path: str, body: Dict[str, Any], over: float) -> None:
    status, told = ask(url, path, body=body, seconds=max(1.0, over - time.monotonic()))
    key = "data" if path == "/v1/embeddings" else "results"
    if status != 200 or not isinstance(told, dict) or not told.get(key):
        raise Failed(f"{path}: {status or 'no answer'}: {said(told)}")
