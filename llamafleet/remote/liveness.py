"""Check that a running instance answers and makes progress, and restart it if not.

Contract: `liveness.py PLAN.json SECONDS`, run by the instance's timer. PLAN.json is plan.json, of which is read: `gate`
(unit, url, socket, api_keys, tls_certificate, argv, health_seconds, context_tokens, slots, serves, picture_ratio) and
`batch_tokens`, the most tokens that are computed in one piece; only unit and url must be there. A server is fine if it
sleeps, if a counter of a slot has moved since the last look, or if no slot works and no request waits; one that has no
cached token to lose must also give a token, and one of embeddings or scores a vector or a score. A server that is not
fine for SECONDS is wedged. systemd then restarts it: SIGTERM, after the unit's stop timeout SIGKILL. A unit is not
checked while it does not run (systemd restarts what has ended), loads, or is being switched.
Exit 0 nothing to do, 10 restarted; anything else is a check that failed, of which the last line on stderr says why.
Writes /run/llamafleet/liveness-NAME.json (the counters that it saw) and, on a restart, /var/lib/llamafleet/gate/
liveness/NAME.json {"restarts", "by_systemd", "time", "why"}: its own restarts, those of systemd before them, of which
systemd forgets the number with each of ours, and when and why the last one was. Where systemd has restarted a server
that has run well for SETTLED_SECONDS, the number goes there too, and systemd's pauses begin anew. A server without a
cached token that runs under another driver or kernel than before is measured, once (pace.py). Root, standard library;
common.py, gate_server.py, liveness_server.py, pace.py and switch_lock.py lie beside it.

`/health` can answer 200 on a server whose GPU hangs; `/slots` too, also while a batch is computed. So only counters
that move prove that a server at work gets on, and a long queue does not prove the contrary. Whether the GPU of a
server without work would answer is not asked: the next request shows it, whose counters then stand still.

Decision 7: docs/decisions/0007-health-is-not-enough.md.
Decision 13: docs/decisions/0013-a-check-costs-no-user-anything.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any, Optional, Tuple  # the contract is Python 3.8, whose own are typing's

import pace
from common import (
    PLAN_SCHEMA,
    RUN,
    command_line,
    gate_record,
    instance_of,
    later_schema,
    liveness_record,
    read_json,
    show,
    systemctl,
    whole_number,
    write_json,
)  # fmt: skip
from gate_server import main_pid, trust, unit_state
from liveness_server import (
    LARGEST,
    SMALLEST,
    NoAnswer,
    Refused,
    Slots,
    gives_token,
    is_asleep,
    may_sleep,
    queue,
    read_slots,
)
from switch_lock import unswitched

FINE, FAILED, RESTARTED = 0, 1, 10
POLL_SECONDS = 1.0
# No counter moves while a batch of a prompt is computed. This many times the expected duration of a batch, by the
# speed that the gate measured, is waited for even if SECONDS is less.
BATCH_PATIENCE = 3
# A server that has run so long counts as one that starts: systemd's pauses between its next starts begin anew.
SETTLED_SECONDS = 600.0
ENTERED = "ActiveEnterTimestampMonotonic"  # microseconds


def main(argv: list[str]) -> int:
    try:
        return check(read_spec(argv[0]), float(argv[1]))
    except (Refused, OSError, ValueError, subprocess.SubprocessError) as error:
        print(f"error: the liveness check could not look: {error}", file=sys.stderr)
        return FAILED
    except Exception as error:  # of a damaged plan.json, whose values may be anything: a line, and a failed unit
        print(f"error: the liveness check could not look: {argv[0]} is damaged ({error!r:.200}): run the deploy again",
              file=sys.stderr)  # fmt: skip
        return FAILED


def check(spec: dict[str, Any], seconds: float) -> int:
    """One check; the exit code. Raises Refused if the server answers but not us, OSError or ValueError if a file of
    ours cannot be read, SubprocessError if systemd does not answer."""
    trust(spec)
    os.makedirs(RUN, exist_ok=True)
    if unit_state(spec["unit"]) != "active/running":
        return FINE
    pid = main_pid(spec["unit"])
    # The process's own command line may not be readable here; then the plan's counts.
    spec["may_sleep"] = may_sleep(command_line(pid) or spec["argv"])
    before = noted(spec, pid)
    try:
        trouble, now = wait_for_life(spec, before, patience(spec, seconds))
    except Refused:
        with unswitched(instance_of(spec["unit"])) as held:
            if held:
                raise
        return FINE  # a deploy is at work, and the keys are already the new ones
    if trouble is None:
        note(spec, pid, now)
        begin_anew(spec["unit"])
        if spec.get("bare"):
            pace.measure_again(instance_of(spec["unit"]))
        return FINE
    return RESTARTED if restart(spec["unit"], pid, trouble) else FINE


def read_spec(path: str) -> dict[str, Any]:
    """What is needed of a plan.json. Earlier versions lack some of it. Raises ValueError if it is none."""
    try:
        with open(path) as file:
            plan = json.load(file)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): run the deploy again") from error
    gate = plan.get("gate") if isinstance(plan, dict) else None
    if not isinstance(gate, dict) or not all(isinstance(gate.get(key), str) for key in ("unit", "url")):
        raise ValueError(f"{path} has no gate with a unit and a url: run the deploy again")
    if later := later_schema(plan, PLAN_SCHEMA):
        raise ValueError(f"{path}: {later}")
    absent: dict[str, Any] = {"api_keys": None, "tls_certificate": None, "socket": None, "argv": []}
    spec = {**absent, **gate, "batch_tokens": plan.get("batch_tokens")}
    if spec.get("serves") not in SMALLEST:
        spec["serves"] = "chat"
    texts = [spec[key] for key in ("api_keys", "tls_certificate", "socket") if spec[key] is not None]
    if not isinstance(spec["argv"], list) or not all(isinstance(word, str) for word in [*texts, *spec["argv"]]):
        raise ValueError(f"{path}: its gate has paths or arguments that are no texts: run the deploy again")
    return spec


# --- how long is too long -----------------------------------------------------------------------


def patience(spec: dict[str, Any], seconds: float) -> float:
    """Seconds without progress before a restart: SECONDS, or more if this host needs more for a batch."""
    record = read_json(gate_record(instance_of(spec["unit"])))
    speed = positive(record.get("prompt_tokens_per_s"))
    # No counter moves either while a picture is encoded; the gate's was of the smallest size.
    picture = positive(record.get("picture_seconds")) * positive(spec.get("picture_ratio"))
    # A record of an earlier version lacks the number. No batch is longer than the context of all slots.
    whole = positive(spec.get("context_tokens")) * positive(spec.get("slots"))
    batch = positive(spec["batch_tokens"]) or whole
    return max(seconds, BATCH_PATIENCE * batch / speed if speed else 0.0, BATCH_PATIENCE * picture)


def unanswered_patience(spec: dict[str, Any], seconds: float) -> float:
    """The same while nothing is answered: a server that wakes up answers nothing until its model is loaded."""
    return max(seconds, positive(spec.get("health_seconds"))) if spec["may_sleep"] else seconds


def positive(value: Any) -> float:
    """The number, or 0.0 if it is none above 0 that counts anything."""
    usable = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if usable and 0 < value < LARGEST else 0.0


# --- does it get on? ----------------------------------------------------------------------------


def wait_for_life(spec: dict[str, Any], before: Slots, seconds: float) -> Tuple[Optional[str], Slots]:
    """Look until the server is fine, for SECONDS at most: (None or what is wrong, the counters seen last)."""
    began = time.monotonic()
    now: Slots = {}
    while True:
        try:
            limit, (trouble, now) = seconds, look(spec, before, seconds)
        except NoAnswer as error:
            limit, trouble = unanswered_patience(spec, seconds), str(error)
        if trouble is None:
            return None, now
        if time.monotonic() - began >= limit:
            return f"no sign of life within {limit:.0f} s: {trouble}", now
        before = before or now
        time.sleep(POLL_SECONDS)


def look(spec: dict[str, Any], before: Slots, seconds: float) -> Tuple[Optional[str], Slots]:
    """(what speaks against the server, None if nothing does; its counters if they were asked for)

    SECONDS is waited for a token where one is asked for. Raises NoAnswer, Refused.
    """
    if is_asleep(spec):
        return None, {}
    if spec["may_sleep"]:
        told = queue(spec)
        if not told.working:
            return waits(told.waiting), {}
    now, bare = read_slots(spec)
    spec["bare"] = bare
    keeps_prompts = spec["serves"] == "chat"
    if before and moved(before, now, keeps_prompts):
        return None, now
    working = [slot for slot, (_, at_work, _, _) in now.items() if at_work]
    if working:
        return f"slots at work whose counters stand still: {', '.join(working)}", now
    trouble = waits(queue(spec).waiting)
    may_ask = (bare or not keeps_prompts) and not spec["may_sleep"]
    if trouble is None and may_ask and not gives_token(spec, seconds):
        return "no slot works, and it gives no answer", now
    return trouble, now


def waits(waiting: int) -> str | None:
    return f"requests that wait although no slot works: {waiting}" if waiting else None


def moved(before: Slots, now: Slots, in_steps: bool = True) -> bool:
    """Has any slot made progress? A task that only began does not count, where one is computed in several steps. That
    of an embedding or a score is computed at once: its slot shows nothing until it ends, and then another one."""
    for slot, (task, working, read, written) in now.items():
        old_task, old_working, old_read, old_written = before.get(slot, [None, False, 0, 0])
        if task == old_task:
            if (working and (read, written) != (old_read, old_written)) or (old_working and not working):
                return True
        elif task is not None and (not working or read or written or not in_steps):
            return True
    return False


# --- what is remembered from one check to the next ------------------------------------------------


def noted(spec: dict[str, Any], pid: int) -> Slots:
    """The counters that the last check saw; empty if there is no usable note, or it is of another process."""
    found = read_json(f"{RUN}/liveness-{instance_of(spec['unit'])}.json")
    slots = found.get("slots")
    if found.get("pid") != pid or not isinstance(slots, dict):
        return {}
    return {slot: seen for slot, seen in slots.items() if isinstance(seen, list) and len(seen) == 4}


def note(spec: dict[str, Any], pid: int, slots: Slots) -> None:
    """Remember the counters. A full /run is no reason to fail: the next check then looks twice."""
    try:
        write_json(f"{RUN}/liveness-{instance_of(spec['unit'])}.json", {"pid": pid, "slots": slots})
    except OSError as error:
        print(f"the counters could not be noted: {error}", file=sys.stderr)


# --- the restart ----------------------------------------------------------------------------------


def restart(unit: str, pid: int, why: str) -> bool:
    """Restart the unit, unless a deploy holds its lock or its process has changed. True if restarted."""
    name = instance_of(unit)
    with unswitched(name) as held:
        if not held or unit_state(unit) != "active/running" or main_pid(unit) != pid:
            return False
        print(f"{unit} is wedged: {why}; restarting it", flush=True)
        before = restarts_by_systemd(unit)
        # Do not wait: a deploy that takes the lock next decides what runs.
        systemctl("restart", "--no-block", unit)
        count(name, why, before)
    return True


def restarts_by_systemd(unit: str) -> int:
    """Since the last start that was none of systemd's own; 0 where it does not say."""
    try:
        return whole_number(show(unit, "NRestarts", seconds=10.0).get("NRestarts"), 2**32) or 0
    except (OSError, subprocess.SubprocessError):
        return 0


def begin_anew(unit: str) -> None:
    """Where systemd has restarted a server that has run well since: record how often, and let the pause before its next
    restart be the first one again. By itself systemd lengthens it from one restart to the next for ever."""
    restarts = restarts_by_systemd(unit)
    if not restarts or ran_seconds(unit) < SETTLED_SECONDS:
        return
    path = liveness_record(instance_of(unit))
    before = read_json(path)
    try:
        write_json(path, {**before, "by_systemd": int(positive(before.get("by_systemd"))) + restarts})
    except OSError:
        return  # its count stays with systemd
    systemctl("reset-failed", unit, check=False)


def ran_seconds(unit: str) -> float:
    """Since the server answered at its start; 0 where systemd does not say."""
    try:
        since = whole_number(show(unit, ENTERED, seconds=10.0).get(ENTERED))
    except (OSError, subprocess.SubprocessError):
        return 0.0
    return time.monotonic() - since / 1e6 if since else 0.0


def count(name: str, why: str, by_systemd: int) -> None:
    """Record the restart, and how many systemd made since the last one that was no restart of its own. A full disk must
    not keep a wedged server from being restarted, so this comes after it."""
    path = liveness_record(name)
    before = read_json(path)
    restarts = int(positive(before.get("restarts"))) + 1
    by_systemd += int(positive(before.get("by_systemd")))
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    try:
        write_json(path, {"restarts": restarts, "by_systemd": by_systemd, "why": why, "time": now})
    except OSError as error:
        print(f"the restart could not be recorded: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
