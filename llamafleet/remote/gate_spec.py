"""What the gate reads: plan.json, and its own record of the last gate.

Part of gate.py and under its contract: Python 3.8, standard library; common.py beside it. Both files may be damaged,
edited by hand, or of another version of llamafleet. A plan.json that cannot be used is named with what is wrong with
it; what cannot be used of a record counts as never measured, and the next record replaces it.

Decision 16: docs/decisions/0016-records-are-versioned.md.
"""

from __future__ import annotations

import json
from typing import Any, Callable, Dict, Iterator, Tuple

from common import (
    GATE_SCHEMA,
    JSON_LIMIT_BYTES,
    PLAN_SCHEMA,
    PREFIX,
    SUFFIX,
    gate_record,
    instance_of,
    later_schema,
    read_json,
)  # fmt: skip

Form = Tuple[str, Callable[[Any], bool]]


class Unreadable(Exception):
    """A plan.json that the gate cannot use; the text has its path and what is wrong with it."""


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def is_unit(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(PREFIX) and value.endswith(SUFFIX) and "/" not in value


def is_path(value: Any) -> bool:
    return value is None or isinstance(value, str)


def is_speculation(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict) and isinstance(value.get("kind"), str) and is_number(value.get("least"))
        and is_path(value.get("kv_type"))
    )  # fmt: skip


def is_example(value: Any) -> bool:
    keys = ("query", "relevant", "irrelevant")
    return value is None or (isinstance(value, dict) and all(isinstance(value.get(key), str) for key in keys))


def is_prompt_files(value: Any) -> bool:
    keys = ("sha256", "served_sha256")
    return isinstance(value, dict) and all(
        isinstance(one, dict) and all(isinstance(one.get(key), str) for key in keys) for one in value.values()
    )


def is_adapters(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, dict) and isinstance(one.get("path"), str) and is_number(one.get("scale")) for one in value
    )


TEXT: Form = ("a text", lambda value: isinstance(value, str))
NUMBER: Form = ("a number", is_number)
PATH: Form = ("a path or null", is_path)
# Of plan.json's `gate`, of each of its GPUs, and of each of the model's files.
GATE: Dict[str, Form] = {
    "unit": ("the name of a unit of ours", is_unit), "argv": ("a list of texts", is_texts), "url": TEXT,
    "api_keys": PATH, "tls_certificate": PATH, "health_seconds": NUMBER, "context_tokens": NUMBER, "slots": NUMBER,
    "kv_type": PATH, "speed_floor_percent": NUMBER, "backend": TEXT,
    "socket": PATH, "gpus": ("a list of objects", lambda value: isinstance(value, list)),
    "speculation": ("null, or an object with kind, least and kv_type", is_speculation),
    "adapters": ("a list of objects with path and scale", is_adapters),
    "prompt_files": ("an object of objects with sha256 and served_sha256", is_prompt_files),
    "serves": ("chat, embedding or reranking", lambda value: value in ("chat", "embedding", "reranking")),
    "pooling": TEXT, "vector_elements": NUMBER,
    "rerank_example": ("an object with query, relevant and irrelevant, or null", is_example),
    "modalities": ("a list of texts", is_texts),
}  # fmt: skip
GPU = {"uuid": TEXT, "name": TEXT, "device": TEXT, **dict.fromkeys(
    ("planned_bytes", "weights_bytes", "kv_bytes", "compute_bytes", "staging_bytes"), NUMBER)}  # fmt: skip
SIZE: Form = ("a number or null", lambda value: value is None or is_number(value))  # null: the server did not tell it
FILE = {"path": TEXT, "size_bytes": SIZE, "sha256": PATH}
# What plans of earlier versions lack, and those of servers that need it not.
ABSENT: Dict[str, Any] = {
    "socket": None, "tls_certificate": None, "kv_type": None, "speed_floor_percent": 0, "prompt_files": {},
    "adapters": [], "modalities": [], "serves": "chat", "pooling": "", "vector_elements": 0, "rerank_example": None,
    "speculation": None,
}  # fmt: skip


def read_spec(path: str) -> Dict[str, Any]:
    """The plan's `gate` object with what the checks need beside it. Raises Unreadable."""
    try:
        with open(path) as file:
            text = file.read(JSON_LIMIT_BYTES + 1)
        if len(text) > JSON_LIMIT_BYTES:
            raise ValueError(f"it has more than {JSON_LIMIT_BYTES} characters")
        plan = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise Unreadable(f"{path}: {error}") from error
    problem = next(problems(plan), None)
    if problem:
        raise Unreadable(f"{path}: {problem}")
    gate = {**ABSENT, **plan["gate"]}
    instance = instance_of(gate["unit"])
    return {
        **gate, "files": plan.get("files", []), "identity": plan.get("identity"), "release": plan.get("release"),
        "commit": plan.get("commit"), "accept_slower": plan.get("accept_slower"),
        "predicted_tokens_per_s": predicted_speed(plan, gate["serves"]), "expected": expected_speed(plan),
        "record": gate_record(instance),
        "last": usable(read_json(gate_record(instance))), "measured": {},
    }  # fmt: skip


def problems(plan: Any) -> Iterator[str]:
    """What keeps the gate from using a plan.json."""
    if not isinstance(plan, dict):
        yield "it is no JSON object"
        return
    later = later_schema(plan, PLAN_SCHEMA)
    if later:
        yield later
        return
    gate = plan.get("gate")
    yield from wrong("gate", {**ABSENT, **gate} if isinstance(gate, dict) else gate, GATE)
    gpus = gate.get("gpus") if isinstance(gate, dict) else None
    for place, values, forms in (("gate.gpus", gpus, GPU), ("files", plan.get("files", []), FILE)):
        for number, value in enumerate(values if isinstance(values, list) else [values]):
            yield from wrong(f"{place}[{number}]", value, forms)


def wrong(place: str, value: Any, forms: Dict[str, Form]) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{place}: should be an object"
        return
    for key, (what, is_so) in forms.items():
        if key not in value:
            yield f"{place}.{key} is missing: another version of llamafleet made it"
        elif not is_so(value[key]):
            yield f"{place}.{key}: should be {what}"


def predicted_speed(plan: Dict[str, Any], serves: str = "chat") -> float:
    """Tokens a second that are written, or read by a server that writes none; 0 where the plan does not say."""
    found: Any = plan
    for key in ("plan", "predicted", "decode_tokens_per_s" if serves == "chat" else "prefill_tokens_per_s"):
        found = found.get(key) if isinstance(found, dict) else None
    return float(found) if is_number(found) else 0.0


def expected_speed(plan: Dict[str, Any]) -> Any:
    """What the plan expects of the gate's own request, for the record; null where the plan does not say."""
    found = plan.get("plan")
    return found.get("expected") if isinstance(found, dict) else None


def is_first(value: Any) -> bool:
    """The likelihoods of a first token, as gate_reply.py keeps them."""
    top = value.get("top") if isinstance(value, dict) else None
    return isinstance(top, dict) and bool(top) and all(
        token.isascii() and token.isdigit() and len(token) < 10 and is_number(one) for token, one in top.items()
    )  # fmt: skip


def is_kept(value: Any, key: str) -> bool:
    """Numbers that gate_vectors.py or gate_scores.py keep."""
    numbers = value.get(key) if isinstance(value, dict) else None
    return isinstance(numbers, list) and bool(numbers) and all(map(is_number, numbers))


def is_pace(value: Any) -> bool:
    """A pace, as gate_pace.py keeps it."""
    if not isinstance(value, dict) or not isinstance(value.get("key"), str):
        return False
    texts = all(isinstance(value.get(one), str) for one in ("driver", "kernel"))
    sizes = value.get("tokens")
    return (
        texts
        and {"release", "commit"} <= value.keys()
        and is_number(value.get("time"))
        and isinstance(sizes, list) and len(sizes) == 2 and all(type(one) is int and 0 < one < 2**20 for one in sizes)
        and all(is_speeds(value.get(kind)) for kind in ("prompt", "decode"))
        and isinstance(value.get("others"), list)
        and all(one is None or (is_number(one) and 0 <= one < 2**20) for one in value["others"])
    )  # fmt: skip


def is_speeds(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(
        is_number(one) and 0 < one < 1e18 for one in value
    )  # fmt: skip


# What later gates compare with.
COMPARED: Dict[str, Callable[[Any], bool]] = {
    "speeds": lambda value: isinstance(value, list) and all(map(is_number, value)),
    "prompt_tokens_per_s": lambda value: is_number(value) and value > 0,
    "first": is_first,
    "read_speeds": lambda value: isinstance(value, list) and all(map(is_number, value)),
    "pace": is_pace,
    "pace_again": is_pace,
    "slower": lambda value: isinstance(value, str),
    "first_vector": lambda value: is_kept(value, "vector"),
    "first_scores": lambda value: is_kept(value, "scores"),
}


def usable(record: Dict[str, Any]) -> Dict[str, Any]:
    """What a later gate can use of the last gate's record."""
    if later_schema(record, GATE_SCHEMA):
        return {}
    return {key: value for key, value in record.items() if key not in COMPARED or COMPARED[key](value)}
