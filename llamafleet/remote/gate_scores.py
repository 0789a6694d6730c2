"""Does a reranking server score as a healthy model does?

Part of gate.py and under its contract: Python 3.8, standard library. Scores are the model's own numbers: any finite
ones are right, where the operator gives no example that must come out in order.
"""

from __future__ import annotations

import math
from typing import Any, List

from gate_reply import SECONDS, Bad
from gate_server import ask, first_key, result
from gate_vectors import CAUSE, kept_as

QUERY = "What is the capital of France?"
DOCUMENTS = ["Paris is the capital of France.", "One, two, three, four, five, six, seven."]
# A busy server computes inputs together, which rounds differently; of a score, or of 1 where that is more.
SAME, SINCE_LAST = 0.02, 0.1
# Two documents whose scores differ by less are not told apart: files without the right classifier score all with 1e-20
# or so (llama.cpp #16407).
OTHER = 1e-6


def check_scores(spec: dict[str, Any]) -> dict[str, Any] | None:
    """Scores must be finite, the same for the same documents, differ between two documents, rank the operator's example
    rightly, and agree with the last gate."""
    if spec["serves"] != "reranking":
        return None
    try:
        scores, again = scored(spec, QUERY, DOCUMENTS), scored(spec, QUERY, DOCUMENTS)
        if not near(scores, again, SAME):
            raise Bad("the same scores for the same documents", f"{scores}, then {again}", CAUSE)
        if abs(scores[0] - scores[1]) < OTHER:
            hint = "the file has no classifier, or that of another model: convert it again as a reranker"
            raise Bad("different scores for different documents", f"{scores}", hint)
        check_example(spec)
        before = spec["last"].get("first_scores", {})
        if before.get("model") == kept_as(spec) and not near(before["scores"], scores, SINCE_LAST):
            raise Bad(f"the scores of the last gate, {before['scores']}", f"{scores}",
                      "a regression in this llama.cpp, or a damaged model file; if the new scores are the right ones: "
                      f"rm {spec['record']}, and deploy again")  # fmt: skip
    except Bad as bad:
        return result("scores", False, *bad.args)
    spec["measured"]["first_scores"] = {"model": kept_as(spec), "scores": scores}
    shown = " and ".join(f"{score:.4g}" for score in scores)
    return result("scores", True, "finite scores, different for different documents", f"{shown} for two documents")


def check_example(spec: dict[str, Any]) -> None:
    """Raise Bad unless the operator's relevant text scores higher than the irrelevant one."""
    example = spec["rerank_example"]
    if not example:
        return
    relevant, irrelevant = scored(spec, example["query"], [example["relevant"], example["irrelevant"]])
    if relevant <= irrelevant:
        raise Bad(
            "a higher score for the relevant text of rerank_example",
            f"{relevant:.4g}, and {irrelevant:.4g} for the irrelevant one",
            "the file was converted wrongly, or the model needs a prompt of its own",
        )


def scored(spec: dict[str, Any], query: str, documents: List[str]) -> List[float]:
    """The documents' scores, in their order. Raises Bad."""
    body = {"query": query, "documents": documents}
    status, told = ask(spec["url"], "/v1/rerank", first_key(spec), body, SECONDS)
    rows = told.get("results") if status == 200 and isinstance(told, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise Bad("200 and scores", f"{status or 'no answer'}: {told!s:.300}", "its journal says why")
    found = {row.get("index"): row.get("relevance_score") for row in rows if isinstance(row.get("index"), int)}
    scores = [found.get(number) for number in range(len(documents))]
    if not all(isinstance(score, (int, float)) and math.isfinite(score) for score in scores):
        raise Bad(f"finite scores of {len(documents)} documents", f"{scores}", CAUSE)
    return [float(score) for score in scores if score is not None]


def near(one: List[float], other: List[float], error: float) -> bool:
    pairs = zip(one, other)  # noqa: B905 -- Python 3.10's; the lengths are compared
    return len(one) == len(other) and all(abs(a - b) <= error * max(1.0, abs(a)) for a, b in pairs)
