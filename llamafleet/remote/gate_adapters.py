"""Does the server have the planned LoRA adapters, and do they change its answers?

Part of gate.py and under its contract: Python 3.8, standard library. plan.json's `gate.adapters` is a list of
{"path", "scale"} in llama-server's order; it is missing where there are none.
"""

from __future__ import annotations

import math
from typing import Any, Dict, List, Optional

from gate_reply import PROMPT, Bad, complete, first_of
from gate_server import ask, first_key, found_status, result

OFF, ON = 0.0, 1.0
TOLERANCE = 1e-6  # llama-server keeps a scale in 32 bits


def check_adapters(spec: Dict[str, Any]) -> Optional[Dict[str, Any]]:
    """The adapters and their scales must be the planned ones, and each must change the answer to a request that asks
    for it. One that waits for its own words (aLoRA) changes nothing before they come. Requests for vectors and scores
    choose no adapters."""
    planned = spec.get("adapters", [])
    if not planned:
        return None
    status, told = ask(spec["url"], "/lora-adapters", first_key(spec))
    if not is_planned(planned, told if isinstance(told, list) else []):
        return result("adapters", False, shown(planned), shown(told) if is_list(told) else found_status(status, told),
                      "a client has set other scales (POST /lora-adapters): start the unit again")  # fmt: skip
    if spec.get("serves", "chat") != "chat":
        return result("adapters", True, shown(planned), "loaded, with these scales")
    try:
        dead = changing_nothing(spec, told)
    except Bad as bad:
        return result("adapters", False, *bad.args)
    if dead:
        return result("adapters", False, f"another answer with {dead[0]} than without", "the same likelihoods",
                      "the adapter changes nothing: its weights are zero")  # fmt: skip
    return result("adapters", True, shown(planned), "each changes the answer")


def changing_nothing(spec: Dict[str, Any], told: List[Dict[str, Any]]) -> List[str]:
    """The paths of the adapters that leave a token's likelihoods as they are. Raises Bad where the server does not
    answer with one."""
    without = answer(spec, len(told), None)
    same = [answer(spec, len(told), number) == without for number in range(len(told))]
    waits = [bool(one.get("alora_invocation_tokens")) for one in told]
    return [str(one["path"]) for number, one in enumerate(told) if same[number] and not waits[number]]


def answer(spec: Dict[str, Any], count: int, number: Optional[int]) -> Dict[int, float]:
    """The likelihoods of the first token with one adapter at full scale, or with none. Raises Bad."""
    scales = [{"id": one, "scale": ON if one == number else OFF} for one in range(count)]
    return first_of(complete(spec, PROMPT, 1, lora=scales))


def is_list(told: Any) -> bool:
    return isinstance(told, list) and all(isinstance(one, dict) for one in told)


def is_planned(planned: List[Dict[str, Any]], told: List[Any]) -> bool:
    return len(planned) == len(told) and is_list(told) and all(
        want["path"] == one.get("path") and isinstance(one.get("scale"), (int, float))
        and math.isclose(want["scale"], one["scale"], rel_tol=TOLERANCE, abs_tol=TOLERANCE)
        for want, one in zip(planned, told)  # noqa: B905 -- `strict` is Python 3.10's; they are as many
    )  # fmt: skip


def shown(adapters: List[Any]) -> str:
    return ", ".join(f"{one.get('path')} at {one.get('scale')}" for one in adapters) or "none"
