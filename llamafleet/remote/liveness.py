"""Check that a running instance still produces tokens, and restart it if not.

Contract: `liveness.py PLAN.json SECONDS`, run by the instance's timer. PLAN.json is plan.json, of which is read: `gate`
(unit, url, api_keys, context_tokens, slots) and `batch_tokens`, the most tokens that are computed in one piece. A
server that has worked since the last check is left alone; an idle one is asked for one token. A server is wedged if
for SECONDS it does not answer and none of its slots makes progress. systemd then restarts it: SIGTERM, after the
unit's stop timeout SIGKILL, and no more often than the unit's start limit allows. A unit is not checked while it does
not run (systemd restarts what has ended), loads, or is being switched. Exit 0 nothing to do, 1 restarted.
Writes /run/llamafleet/liveness-NAME.json (what was seen) and, on a restart, /var/lib/llamafleet/gate/liveness/
NAME.json {"restarts", "time", "why"}. Root, standard library; common.py and gate_server.py lie beside it.

`/health` can answer 200 on a server whose GPU hangs; `/slots` too, also while a batch is computed. So only counters
that move prove that a server works, and a long queue does not prove the contrary.

Decision 7: docs/decisions/0007-health-is-not-enough.md.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import threading
import time
from typing import Any, Dict, List  # the contract is Python 3.8, whose own are typing's

from common import RUN, gate_record, instance_of, liveness_record, read_json, systemctl, write_json
from gate_server import ask, first_key, main_pid, slots, trust, unit_state

POLL_SECONDS = 1.0
# No counter moves while a batch of a prompt is computed. This many times the expected duration of a batch, by the
# speed that the gate measured, is waited for even if SECONDS is less.
BATCH_PATIENCE = 3

Slots = Dict[str, List[Any]]


def main(argv: list[str]) -> int:
    with open(argv[0]) as file:
        plan = json.load(file)
    spec = {**plan["gate"], "batch_tokens": plan.get("batch_tokens")}
    trust(spec)
    name = instance_of(spec["unit"])
    os.makedirs(RUN, exist_ok=True)
    if unit_state(spec["unit"]) != "active/running":
        return 0
    pid = main_pid(spec["unit"])
    before = read_json(f"{RUN}/liveness-{name}.json")
    now = counters(spec)
    if now is not None and before.get("pid") == pid and moved(before["slots"], now):
        write_json(f"{RUN}/liveness-{name}.json", {"pid": pid, "slots": now})
        return 0
    why = wait_for_token(spec, patience(spec, float(argv[1])), now)
    if why is None:
        write_json(f"{RUN}/liveness-{name}.json", {"pid": pid, "slots": counters(spec) or {}})
        return 0
    return 1 if restart(spec["unit"], pid, why) else 0


def patience(spec: dict[str, Any], seconds: float) -> float:
    """Seconds without progress before a restart: SECONDS, or more if this host needs more for a batch."""
    speed = read_json(gate_record(instance_of(spec["unit"]))).get("prompt_tokens_per_s")
    # A record of an earlier version lacks the number. No batch is longer than the context of all slots.
    batch = spec["batch_tokens"] or spec["context_tokens"] * spec["slots"]
    return max(seconds, BATCH_PATIENCE * batch / speed) if speed else seconds


def counters(spec: dict[str, Any]) -> Slots | None:
    """By slot: [task, is it under way, tokens read, tokens written]; None if the server does not answer."""
    told = slots(spec)
    if told is None:
        return None
    return {str(slot["id"]): [slot.get("id_task"), bool(slot.get("is_processing")),
                              slot.get("n_prompt_tokens_processed", 0),
                              sum(one.get("n_decoded", 0) for one in slot.get("next_token", []))]
            for slot in told}  # fmt: skip


def moved(before: Slots, now: Slots) -> bool:
    """Has any slot made progress? A task that only began, such as our own request, does not count."""
    for slot, (task, working, read, written) in now.items():
        old_task, old_working, old_read, old_written = before.get(slot, [None, False, 0, 0])
        if task == old_task:
            if (working and (read, written) != (old_read, old_written)) or (old_working and not working):
                return True
        elif task is not None and (not working or read or written):
            return True
    return False


def wait_for_token(spec: dict[str, Any], seconds: float, seen: Slots | None) -> str | None:
    """Wait for a token, or for progress of other requests: None if either comes, else what was seen instead."""
    asked = TokenRequest(spec, seconds)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        asked.done.wait(POLL_SECONDS)
        if asked.done.is_set():
            if 200 <= asked.status < 500:  # 4xx: the server works, though it refuses our request
                return None
            time.sleep(POLL_SECONDS)
            asked = TokenRequest(spec, max(POLL_SECONDS, deadline - time.monotonic()))
        now = counters(spec)
        if now is not None and seen is not None and moved(seen, now):
            return None
        seen = now if seen is None else seen
    said = f"its last answer was {asked.status}" if asked.done.is_set() and asked.status else "no answer"
    return f"no token within {seconds:.0f} s, {said}, and no slot made progress"


class TokenRequest:
    """A request for one token that a thread of its own waits for."""

    def __init__(self, spec: dict[str, Any], seconds: float) -> None:
        self.status = 0
        self.done = threading.Event()
        # A daemon thread does not keep this program alive after it has given up.
        threading.Thread(target=self._ask, args=(spec, seconds), daemon=True).start()

    def _ask(self, spec: dict[str, Any], seconds: float) -> None:
        body = {"prompt": "a", "n_predict": 1, "temperature": 0}
        self.status, _ = ask(spec["url"], "/completion", first_key(spec), body, seconds)
        self.done.set()


def restart(unit: str, pid: int, why: str) -> bool:
    """Restart the unit, unless a deploy holds its lock or its process has changed. True if restarted."""
    name = instance_of(unit)
    with open(f"{RUN}/switch-{name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if unit_state(unit) != "active/running" or main_pid(unit) != pid:
            return False
        print(f"{unit} is wedged: {why}; restarting it", flush=True)
        path = liveness_record(name)
        count = read_json(path).get("restarts", 0) + 1
        write_json(path, {"restarts": count, "why": why, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
        # Do not wait: a deploy that takes the lock next decides what runs.
        systemctl("restart", "--no-block", unit)
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
