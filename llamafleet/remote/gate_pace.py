"""Is a new build, driver or kernel as fast as the last good one, by one short workload on both?

Part of gate.py and under its contract: Python 3.8, standard library. `measure` gives a pace: {"key", "release",
"commit", "driver", "kernel", "prompt", "decode"}, the last two lists of tokens a second, one of each request. Around a
switch to another release the old server is measured before it is stopped (`gate.py pace PLAN.json`) and the new one
after its start, with the same fixed tokens. A pace of another model, other flags or other GPUs (`key`) is not compared.

A server is measured only while no slot works, and in a slot that has never held a conversation: no cached token of a
user is lost. Where there is no such slot, what the last gate recorded stands for it.

Decision 7: docs/decisions/0007-health-is-not-enough.md.
Decision 13: docs/decisions/0013-a-check-costs-no-user-anything.md.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from typing import Any, Dict, List, Optional, Sequence, Tuple  # the contract is Python 3.8, whose own are typing's

from gate_reply import Bad, complete, speed_key
from gate_server import ask, first_key, result, slots
from gate_sleep import is_asleep
from liveness_server import may_sleep

# Tokens read and written by each request, fewer where the context is small; and how many requests.
PROMPT_TOKENS, REPLY_TOKENS, REQUESTS = 128, 16, 5
# A slow server is measured with as many requests as fit, at least with LEAST.
LEAST, MOST_SECONDS = 3, 20.0
# A busy old server is waited for so long; a new one that seems slower is measured so often, as load may have passed.
IDLE_SECONDS, ROUNDS, PAUSE_SECONDS = 10.0, 3, 2.0
# A smaller difference is not counted, however certain: a host is as much quicker or slower from hour to hour.
LEAST_DIFFERENCE = 0.05
# Of a median of normal values: its standard error is 1.253 that of the mean; the median absolute deviation is 1/1.4826
# of their standard deviation. Three standard errors.
MEDIAN_ERROR, DEVIATION, ERRORS = 1.253, 1.4826, 3.0
KINDS = {"prompt": "prompt tokens/s read", "decode": "tokens/s written"}
WORDS = "the of and to in is was for on that with as by at from it an be this which or are not have had but one"


class Busy(Exception):
    """The server cannot be measured without cost to a user; the text says why."""


def measure(spec: Dict[str, Any]) -> Dict[str, Any]:
    """The server's pace. Raises Busy, Bad."""
    slot, over = free_slot(spec), time.monotonic() + MOST_SECONDS
    prompt = tokens(spec)
    read: List[float] = []
    written: List[float] = []
    complete(spec, prompt, 1, 0, id_slot=slot)  # what the first request allocates is not measured
    while len(read) < LEAST or (len(read) < REQUESTS and time.monotonic() < over):
        timings = complete(spec, prompt, REPLY_TOKENS, 0, id_slot=slot)["timings"]
        if timings["prompt_n"] != len(prompt):
            raise Bad(f"{len(prompt)} tokens read", timings["prompt_n"], "llama-server's API changed")
        read.append(float(timings["prompt_per_second"]))
        written.append(float(timings["predicted_per_second"]))
    return {**state(spec), "prompt": read, "decode": written}


def state(spec: Dict[str, Any]) -> Dict[str, Any]:
    """What a pace is of."""
    return {"key": speed_key(spec), "release": spec["release"], "commit": spec["commit"], "driver": driver(),
            "kernel": os.uname().release}  # fmt: skip


def driver(path: str = "/sys/module/nvidia/version") -> str:
    """The version of NVIDIA's driver; empty where there is none. Those of other GPUs come with the kernel."""
    try:
        with open(path) as file:
            return file.read(100).strip()
    except OSError:
        return ""


def free_slot(spec: Dict[str, Any]) -> int:
    """The last slot without a conversation, once no slot works. Raises Busy."""
    if may_sleep(spec["argv"]) and is_asleep(spec):
        raise Busy("it sleeps")
    over = time.monotonic() + IDLE_SECONDS
    while True:
        found = slots(spec)
        if not found:
            raise Busy("it does not tell its slots")
        if not any(slot.get("is_processing") for slot in found):
            break
        if time.monotonic() >= over:
            raise Busy("its slots are at work")
        time.sleep(PAUSE_SECONDS)
    bare = [slot for slot in found if slot.get("id_task") is None or slot.get("n_prompt_tokens") == 0]
    # Slots that share one cache: what is written for one may push out what another one keeps.
    if not bare or (len(bare) < len(found) and {"--kv-unified", "-kvu"} & set(spec["argv"])):
        raise Busy("each of its slots holds a conversation")
    return int(bare[-1]["id"])


def tokens(spec: Dict[str, Any]) -> List[int]:
    """The same tokens for the old server and the new one. Raises Bad."""
    status, told = ask(spec["url"], "/tokenize", first_key(spec), {"content": " ".join([WORDS] * 8)})
    found = told.get("tokens") if status == 200 and isinstance(told, dict) else None
    if not isinstance(found, list) or not found:
        raise Bad("the tokens of a text", f"status {status} of /tokenize", "llama-server's API changed")
    most = max(1, min(PROMPT_TOKENS, int(spec["context_tokens"]) - REPLY_TOKENS - 8))
    return [found[number % len(found)] for number in range(most)]


# --- is it slower? --------------------------------------------------------------------------------


def middle(values: Sequence[float]) -> Tuple[float, float]:
    """The median, and its standard error as a share of it, by the median absolute deviation of the logarithms."""
    logs = [math.log(value) for value in values]
    median = statistics.median(logs)
    spread = DEVIATION * statistics.median(abs(one - median) for one in logs)
    return math.exp(median), MEDIAN_ERROR * spread / math.sqrt(len(logs))


def is_slower(old: Sequence[float], new: Sequence[float]) -> bool:
    """Whether the new speeds are lower by more than the spread of both, and by more than LEAST_DIFFERENCE."""
    (before, old_error), (now, new_error) = middle(old), middle(new)
    limit = max(-math.log(1 - LEAST_DIFFERENCE), ERRORS * math.hypot(old_error, new_error))
    return math.log(before / now) > limit


def slower(old: Dict[str, Any], new: Dict[str, Any]) -> List[str]:
    """The kinds of speed, of KINDS, at which the new pace is slower."""
    return [kind for kind in KINDS if is_slower(old[kind], new[kind])]


def said(pace: Dict[str, Any], kind: str) -> str:
    """A speed with its spread, and the build that has it."""
    median, error = middle(pace[kind])
    build = f"{str(pace['commit'])[:12]}, release {pace['release']}"
    return f"{median:.1f} ± {ERRORS * error * median:.1f} {KINDS[kind]} ({build}{under(pace)})"


def under(pace: Dict[str, Any]) -> str:
    return f", driver {pace['driver']}" if pace["driver"] else ""


def differs(old: Dict[str, Any], now: Dict[str, Any]) -> bool:
    """Whether a pace is of the same model and flags, but of another build, driver or kernel."""
    return old["key"] == now["key"] and any(old[one] != now[one] for one in ("release", "driver", "kernel"))


# --- the check ------------------------------------------------------------------------------------


def check_pace(spec: Dict[str, Any]) -> Optional[Dict[str, Any]]:
    """Of a server that writes, at a deploy of another build, driver or kernel: it is not slower than the last good one
    by more than the spread, unless `accept_slower` names its commit."""
    if spec["serves"] != "chat" or not spec["deploying"] or spec["speed_floor_percent"] == 0:
        return None
    old, now = spec["last"].get("pace"), state(spec)
    if old is not None and old["key"] == now["key"] and not differs(old, now):
        return None  # measured before
    try:
        new = measure(spec)
        worse = slower(old, new) if old is not None and differs(old, new) else []
        for _ in range(ROUNDS - 1 if worse else 0):
            time.sleep(PAUSE_SECONDS)
            new = measure(spec)
            worse = slower(old, new)
            if not worse:
                break
    except Busy as busy:
        return result("pace", True, "as fast as the last good one", f"not measured: {busy}")
    except Bad as bad:
        return result("pace", False, *bad.args)
    expected = ", ".join(said(old, kind) for kind in worse) or "as fast as the last good one"
    found = ", ".join(said(new, kind) for kind in worse or KINDS)
    accepted = spec["accept_slower"] is not None and spec["accept_slower"] == spec["commit"]
    if worse and not accepted:
        return result("pace", False, f"{expected}, by more than the spread no slower", found,
                      "a regression in this llama.cpp, the driver or the kernel, or other load; to accept "
                      f'it: accept_slower = "{spec["commit"]}" of this instance, and deploy again')  # fmt: skip
    spec["measured"]["pace"] = new
    return result("pace", True, expected, found, "slower, accepted by accept_slower" if worse else "")


def check_old_pace(spec: Dict[str, Any]) -> Optional[Dict[str, Any]]:
    """Measure the server that is to be replaced; its pace is kept for `check_pace`. It fails where nothing can be
    measured without cost to a user, or where no gate has passed yet."""
    expected = "a server that can be measured"
    if not spec["last"].get("ok") or spec["serves"] != "chat":
        return result("pace", False, expected, "none that a gate of text has passed")
    try:
        spec["measured"]["pace"] = measure(spec)
    except (Busy, Bad) as error:
        return result("pace", False, expected, str(error))
    found = ", ".join(said(spec["measured"]["pace"], kind) for kind in KINDS)
    return result("pace", True, expected, found, changed(spec["last"].get("pace"), spec["measured"]["pace"]))


def changed(old: Optional[Dict[str, Any]], new: Dict[str, Any]) -> str:
    """What an operator should know of one build under another driver or kernel; empty where it is no slower."""
    if old is None or not differs(old, new) or old["release"] != new["release"] or not slower(old, new):
        return ""
    speeds = ", ".join(f"{said(new, kind)} in place of {said(old, kind)}" for kind in slower(old, new))
    return f"slower since driver or kernel changed ({old['kernel']} to {new['kernel']}): {speeds}"
