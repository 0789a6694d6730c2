"""Does a server of embeddings answer as a healthy model does?

Part of gate.py and under its contract: Python 3.8, standard library. The check holds for any model, also for an
untrained one: it looks at the form of vectors and at distances between them, never at their meaning.

A distance is 1 less the cosine of two vectors: 0 for the same direction. llama-server gives pooled vectors the norm 1
(common/common.cpp, common_embd_normalize); with the pooling "none" it gives a vector for each token, as computed.
"""

from __future__ import annotations

import math
from typing import Any, List

from gate_reply import OTHER_PROMPT, PROMPT, SECONDS, Bad, hashed, model_of
from gate_server import ask, first_key, result

Vector = List[float]

NORM_ERROR = 1e-3
# A busy server computes inputs together, which rounds differently: the same text twice is as near as this.
SAME = 1e-3
# Two texts are farther apart than rounding makes one text from itself, or the input is not read.
OTHER = 1e-5
# Between two releases of llama.cpp, whose kernels round differently.
SINCE_LAST = 0.05
KEPT = 256  # elements of the vector that the record keeps for the next gate
CAUSE = "the backend computes garbage: a broken kernel, driver or GPU, or a damaged model file"


def check_embedding(spec: dict[str, Any]) -> dict[str, Any] | None:
    """Vectors must have the model's length, finite elements and the norm 1, be the same for the same text, differ
    between two texts, and agree with the last gate."""
    if spec["serves"] != "embedding":
        return None
    try:
        vector, again, other = (embedded(spec, text) for text in (PROMPT, PROMPT, OTHER_PROMPT))
        if distance(vector, again) > SAME:
            raise Bad("the same vector for the same text", f"a distance of {distance(vector, again):.4f}", CAUSE)
        apart = distance(vector, other)
        if apart < max(OTHER, 2 * distance(vector, again)):
            raise Bad("another vector for another text", f"a distance of {apart:.1e}",
                      "the file makes the same of every text, or the input is not read")  # fmt: skip
        before = spec["last"].get("first_vector", {})
        if before.get("model") == kept_as(spec) and distance(before["vector"], vector[:KEPT]) > SINCE_LAST:
            raise Bad("the vector of the last gate", f"a distance of {distance(before['vector'], vector[:KEPT]):.3f}",
                      "a regression in this llama.cpp, or a damaged model file; if the new vectors are the right ones: "
                      f"rm {spec['record']}, and deploy again")  # fmt: skip
    except Bad as bad:
        return result("embedding", False, *bad.args)
    spec["measured"]["first_vector"] = {"model": kept_as(spec), "vector": [round(one, 6) for one in vector[:KEPT]]}
    return result("embedding", True, f"vectors of {spec['vector_elements']} elements, another for another text",
                  f"a distance of {apart:.4f} between two texts")  # fmt: skip


def embedded(spec: dict[str, Any], text: str) -> Vector:
    """The vector of a text; of the vectors of its tokens their sum. Raises Bad if it is none that a model makes."""
    vectors = asked(spec, text)
    if spec["pooling"] == "none":
        tokens = len(tokenized(spec, text))
        if len(vectors) != tokens:
            raise Bad(f"a vector for each of {tokens} tokens", f"{len(vectors)} vectors", "llama-server's API changed")
        return [sum(column) for column in zip(*vectors)]  # noqa: B905 -- Python 3.10's; all have the model's length
    if len(vectors) != 1:
        raise Bad("one vector for a text", f"{len(vectors)} vectors", "llama-server's API changed")
    norm = math.sqrt(sum(one * one for one in vectors[0]))
    if abs(norm - 1) > NORM_ERROR:
        raise Bad("a vector of the norm 1", f"the norm {norm:.4f}", CAUSE)
    return vectors[0]


def asked(spec: dict[str, Any], text: str) -> list[Vector]:
    """The vectors of a text, each of the model's length. Raises Bad.

    /v1/embeddings refuses the pooling "none" (server_routes::handle_embeddings_impl).
    """
    if spec["pooling"] == "none":
        status, told = ask(spec["url"], "/embeddings", first_key(spec), {"content": text}, SECONDS)
        found = told[0].get("embedding") if status == 200 and isinstance(told, list) and told else None
    else:
        body = {"input": text, "encoding_format": "float"}
        status, told = ask(spec["url"], "/v1/embeddings", first_key(spec), body, SECONDS)
        data = told.get("data") if status == 200 and isinstance(told, dict) else None
        found = [data[0].get("embedding")] if isinstance(data, list) and data else None
    length = spec["vector_elements"]
    if not isinstance(found, list) or not found:
        raise Bad("200 and a vector", f"{status or 'no answer'}: {told!s:.300}", "its journal says why")
    for vector in found:
        if not is_vector(vector):
            raise Bad("a vector of finite numbers", f"{vector!s:.100}", CAUSE)
        if len(vector) != length:
            raise Bad(f"vectors of {length} elements", f"one of {len(vector)}", "another model is served")
    return found


def is_vector(value: Any) -> bool:
    """A number that is not finite arrives as null."""
    return isinstance(value, list) and all(
        isinstance(one, (int, float)) and not isinstance(one, bool) and math.isfinite(one) for one in value
    )


def tokenized(spec: dict[str, Any], text: str) -> list[Any]:
    """The tokens of an input, as the server reads it. Raises Bad."""
    body = {"content": text, "add_special": True, "parse_special": True}
    status, told = ask(spec["url"], "/tokenize", first_key(spec), body)
    tokens = told.get("tokens") if status == 200 and isinstance(told, dict) else None
    if not isinstance(tokens, list) or not tokens:
        raise Bad("200 and the tokens of a text", f"{status or 'no answer'}: {told!s:.300}", "its journal says why")
    return tokens


def distance(one: Vector, other: Vector) -> float:
    """1 less the cosine; 1 where a vector is zero."""
    product = sum(a * b for a, b in zip(one, other))  # noqa: B905 -- as above
    norms = math.sqrt(sum(a * a for a in one) * sum(b * b for b in other))
    return 1.0 - product / norms if norms else 1.0


def kept_as(spec: dict[str, Any]) -> str:
    """A hash of what decides the vectors: the model's content and the pooling."""
    return hashed([model_of(spec), spec["serves"], spec["pooling"]])
