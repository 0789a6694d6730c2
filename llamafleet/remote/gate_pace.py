"""Is a new build as fast as the last good one, by one short workload on both? And under another driver or kernel?

Part of gate.py and under its contract: Python 3.8, standard library; ground.py beside it. gate_slower.py has the
statistics. `measure` gives a pace: {"key", "release", "commit", "driver", "kernel", "time": unix time, "tokens": [read,
written by a request], "prompt", "decode", "others"}, the last three lists with a value for each request: tokens a
second, and the CPUs that other programs used meanwhile. Around a switch to another release the old server is measured
before it is stopped (`gate.py pace PLAN.json`) and the new one after its start, with the same fixed tokens. A pace of
another model, other flags or other GPUs (`key`) is not compared.

Only a pair that was measured in one switch can fail the check: nothing but the build differs. After another driver or
kernel has booted, nobody can measure the old one any more; then what the last gate recorded is compared, and a
difference is told, not turned away (`gate.py again PLAN.json`, which the liveness check runs).

A server is measured only while no slot works. The oldest conversation in its cache may make way: the switch ends all.

Decision 7: docs/decisions/0007-health-is-not-enough.md.
Decision 13: docs/decisions/0013-a-check-costs-no-user-anything.md.
"""

from __future__ import annotations

import os
import statistics
import time
from typing import Any, Dict, List, Optional, Tuple  # the contract is Python 3.8, whose own are typing's

import ground
from gate_nvml import used_by_others
from gate_reply import SECONDS, Bad, complete, speed_key
from gate_server import WORDS, ask, first_key, main_pid, result, slots
from gate_sleep import is_asleep
from gate_slower import KINDS, differs, figure, is_pair, most_others, said, said_slower, slower, typical
from liveness_server import may_sleep

# Each request reads and writes for about so long, by the speeds that the gate has measured.
REQUEST_SECONDS = 0.5
LEAST_PROMPT, MOST_PROMPT, LEAST_REPLY, MOST_REPLY = 32, 512, 8, 64
# Requests of a pace, fewer where they take longer than MOST_SECONDS.
REQUESTS, LEAST, MOST_SECONDS = 8, 3, 20.0
# An old server that hangs is not waited for.
OLD_SECONDS = 60.0
# So long is waited for requests to end, and are requests tried that do not count.
IDLE_SECONDS, PAUSE_SECONDS, QUIET_SECONDS = 10.0, 1.0, 40.0
# A new server that seems slower is measured anew so often, or for so long. It fails if it was slower each time.
ROUNDS, ROUND_PAUSE_SECONDS, ROUNDS_SECONDS = 3, 3.0, 60.0
GPU_IDLE_PERCENT = 10
EXPECTED = "as fast as the last good one"


class Busy(Exception):
    """The server cannot be measured now; the text says why."""


def measure(spec: Dict[str, Any], like: Optional[Dict[str, Any]] = None, seconds: float = SECONDS) -> Dict[str, Any]:
    """The server's pace. One that is to be compared with the pace `like` reads and writes as many tokens, and its
    requests count only while others compute no more. `seconds`: for one request. Raises Busy, Bad."""
    idle(spec)
    sizes = like["tokens"] if like else sizes_for(spec)
    prompt = tokens(spec, sizes[0])
    complete(spec, prompt, 1, 0, seconds=seconds)  # what the first request allocates is not measured
    most, counted, lost = most_others(like, cpus()), 0.0, 0.0  # seconds of the requests that count and of the others
    found: Dict[str, List[Any]] = {"prompt": [], "decode": [], "others": []}
    while len(found["prompt"]) < (LEAST if counted >= MOST_SECONDS else REQUESTS):
        began = time.monotonic()
        one = request(spec, prompt, sizes[1], seconds)
        others, took = one["others"] or 0.0, time.monotonic() - began
        if others > most:
            lost += took
            if lost >= QUIET_SECONDS:
                raise Busy(f"other programs use {others:.1f} of {cpus()} CPUs")
            continue
        counted += took
        for kind, values in found.items():
            values.append(one[kind])
    idle(spec)
    return {**state(spec), "tokens": sizes, **found}


def request(spec: Dict[str, Any], prompt: List[int], reply: int, seconds: float) -> Dict[str, Any]:
    """The speeds of one request, and the CPUs that others used meanwhile. Raises Busy, Bad."""
    if any(slot.get("is_processing") for slot in slots(spec) or []):
        raise Busy("its slots are at work")
    pid = main_pid(spec["unit"])
    before, began = others_seconds(pid), time.monotonic()
    timings = complete(spec, prompt, reply, 0, seconds=seconds)["timings"]
    after, took = others_seconds(pid), time.monotonic() - began
    if timings["prompt_n"] != len(prompt):
        raise Bad(f"{len(prompt)} tokens read", timings["prompt_n"], "llama-server's API changed")
    others = None if before is None or after is None else max(0.0, after - before) / took
    return {"prompt": float(timings["prompt_per_second"]), "decode": float(timings["predicted_per_second"]),
            "others": others}  # fmt: skip


def state(spec: Dict[str, Any]) -> Dict[str, Any]:
    """What a pace is of."""
    return {"key": speed_key(spec), "release": spec["release"], "commit": spec["commit"], "driver": driver(),
            "kernel": os.uname().release, "time": time.time()}  # fmt: skip


def driver() -> str:
    """The version of NVIDIA's driver; empty where there is none. Those of other GPUs come with the kernel."""
    return ground.driver() or ""


def cpus() -> int:
    return os.cpu_count() or 1


def others_seconds(pid: int, proc: str = "/proc") -> Optional[float]:
    """CPU seconds since the host's start of all programs but this one, and of other guests of the machine (steal); None
    where the kernel does not show them."""
    try:
        with open(f"{proc}/stat") as file:
            ticks = [int(one) for one in file.readline().split()[1:9]]
        with open(f"{proc}/{pid}/stat") as file:
            own = file.read().rpartition(")")[2].split()[11:13]
        user, nice, system, _, _, irq, softirq, steal = ticks
        return (user + nice + system + irq + softirq + steal - sum(map(int, own))) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None


def idle(spec: Dict[str, Any]) -> None:
    """Wait until no slot works. Raises Busy where one works on, the server sleeps, or others use its GPUs."""
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
    if spec["gpus"] and spec["backend"] == "cuda":
        time.sleep(PAUSE_SECONDS)  # NVML tells the last second
        for name, percent in used_by_others([gpu["uuid"] for gpu in spec["gpus"]]).items():
            if percent > GPU_IDLE_PERCENT:
                raise Busy(f"other programs use {percent} % of {name}")


def sizes_for(spec: Dict[str, Any]) -> List[int]:
    """Tokens that a request reads and writes: about REQUEST_SECONDS each."""
    last, now = spec["last"], spec["measured"]
    read = now.get("prompt_tokens_per_s") or last.get("prompt_tokens_per_s") or 0.0
    speeds = last.get("speeds")
    written = now.get("decode_tokens_per_s") or (statistics.median(speeds) if speeds else 0.0)
    reply = between(LEAST_REPLY, written * REQUEST_SECONDS, MOST_REPLY)
    room = max(1, int(spec["context_tokens"]) - reply - 8)
    return [min(room, between(LEAST_PROMPT, read * REQUEST_SECONDS, MOST_PROMPT)), reply]


def between(least: int, value: float, most: int) -> int:
    return int(max(least, min(value, most)))


def tokens(spec: Dict[str, Any], count: int) -> List[int]:
    """The same tokens for the old server and the new one. Raises Bad."""
    status, told = ask(spec["url"], "/tokenize", first_key(spec), {"content": WORDS}, OLD_SECONDS)
    found = told.get("tokens") if status == 200 and isinstance(told, dict) else None
    if not isinstance(found, list) or not found:
        raise Bad("the tokens of a text", f"status {status} of /tokenize", "llama-server's API changed")
    return [found[number % len(found)] for number in range(count)]


# --- the checks -----------------------------------------------------------------------------------


def counts(spec: Dict[str, Any]) -> bool:
    """Whether the speed of this server counts, and is one of writing."""
    return bool(spec["serves"] == "chat" and spec["speed_floor_percent"] != 0)


def check_pace(spec: Dict[str, Any]) -> Optional[Dict[str, Any]]:
    """At a deploy, of a server that writes: it is not slower than the build before it by more than the spread, unless
    `accept_slower` names its commit."""
    if not counts(spec) or not spec["deploying"]:
        return None
    old, now = spec["last"].get("pace"), state(spec)
    if old is not None and old["key"] != now["key"]:
        old = None
    if old is not None and not differs(old, now):
        return None  # measured before
    try:
        new, worse = measured_against(spec, old)
    except Busy as busy:
        return result("pace", True, EXPECTED, f"not measured: {busy}", "nothing was compared" if old else "")
    except Bad as bad:
        return result("pace", False, *bad.args)
    return compared(spec, old, new, worse)


def measured_against(spec: Dict[str, Any], old: Optional[Dict[str, Any]]) -> Tuple[Dict[str, Any], List[str]]:
    """The server's pace, and the kinds of speed at which it is slower than the old one. Raises Busy, Bad."""
    over = time.monotonic() + ROUNDS_SECONDS
    for number in range(ROUNDS):
        time.sleep(ROUND_PAUSE_SECONDS if number else 0.0)
        new = measure(spec, old)
        worse = slower(old, new, cpus()) if old else []
        if not old or not worse or not is_pair(old, new) or time.monotonic() >= over:
            break
    return new, worse


def compared(
    spec: Dict[str, Any], old: Optional[Dict[str, Any]], new: Dict[str, Any], worse: List[str]
) -> Dict[str, Any]:
    """The check's result; the new pace is kept unless it fails."""
    found = ", ".join(said(new, kind) for kind in worse or KINDS)
    if old is None or not worse:
        spec["measured"]["pace"] = new
        return result("pace", True, EXPECTED, found)
    expected = " and ".join(said(old, kind) for kind in worse)
    if not is_pair(old, new):
        hint = "slower, but the old one was not measured in this switch, so the cause may be the host"
    elif spec["accept_slower"] is not None and spec["accept_slower"] == spec["commit"]:
        hint = "slower, accepted by accept_slower"
    else:
        return result("pace", False, f"{expected}, and no slower by more than the spread", found,
                      f"each time{beside(old, new)}: a regression in this llama.cpp; to accept it: "
                      f'accept_slower = "{spec["commit"]}" of this model, and deploy again')  # fmt: skip
    spec["measured"]["pace"] = new
    return result("pace", True, expected, found, hint)


def beside(old: Dict[str, Any], new: Dict[str, Any]) -> str:
    """How much others computed beside both servers."""
    before, now = typical(old), typical(new)
    if before is None or now is None:
        return ""
    return f", while other programs used {now:.2f} of {cpus()} CPUs ({before:.2f} beside the old one)"


def check_old_pace(spec: Dict[str, Any]) -> Dict[str, Any]:
    """Measure the server that is to be replaced; its pace is kept for `check_pace`. It fails where nothing can be
    measured now, or where no gate has passed yet."""
    expected = "a server that can be measured"
    if not spec["last"].get("ok") or spec["serves"] != "chat":
        return result("pace", False, expected, "none that a gate of text has passed")
    try:
        spec["measured"]["pace"] = measure(spec, seconds=OLD_SECONDS)
    except (Busy, Bad) as error:
        return result("pace", False, expected, str(error))
    return result("pace", True, expected, ", ".join(figure(spec["measured"]["pace"], kind) for kind in KINDS))


def is_due(spec: Dict[str, Any]) -> bool:
    """Whether a build runs under another driver or kernel than at its gate, and was not measured under these."""
    old, again, now = spec["last"].get("pace"), spec["last"].get("pace_again"), state(spec)
    if not counts(spec) or not old or old["release"] != now["release"] or not differs(old, now):
        return False
    return again is None or any(again[one] != now[one] for one in ("key", "release", "driver", "kernel"))


def check_again(spec: Dict[str, Any]) -> Dict[str, Any]:
    """Measure a build that runs under another driver or kernel than before, and keep what an operator should know. It
    fails where that cannot be measured now."""
    expected = "a server that can be measured, under another driver or kernel than the last gate's"
    if not is_due(spec):
        return result("pace", False, expected, "it was measured under these")
    try:
        new = measure(spec, spec["last"]["pace"])
    except (Busy, Bad) as error:
        return result("pace", False, expected, str(error))
    old = spec["last"]["pace"]
    told = said_slower(old, new, slower(old, new, cpus()))
    spec["measured"].update(pace_again=new, slower=told)
    return result("pace", True, expected, told or "no slower")
