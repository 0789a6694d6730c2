"""Have the gate measure a server's pace: before another build takes its place, and under another driver or kernel.

Contract: a module of switch.py and liveness.py. Runs gate.py, which prints and records (gate_pace.py); what cannot be
measured is no failure. Root, the standard library, Python 3.8; common.py, switch_lock.py and what the gate needs lie
beside it.

Decision 7: docs/decisions/0007-health-is-not-enough.md.
Decision 13: docs/decisions/0013-a-check-costs-no-user-anything.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any, Dict, Optional  # the contract is Python 3.8, whose own are typing's

import common
from common import read_json, unit_of
from gate_pace import driver
from switch_lock import unswitched

GATE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "gate.py")


def measure_old(name: str, staged: str) -> None:
    """Measure a server that runs, where the staged plan.json gives it another build whose speed counts."""
    old, new = read_json(common.plan_path(name)), read_json(staged)
    if not old or not new or old.get("release") == new.get("release"):
        return
    gate: Any = new.get("gate")
    if not isinstance(gate, dict) or not gate.get("speed_floor_percent") or gate.get("serves", "chat") != "chat":
        return
    if check := measured("pace", name):
        found = check["found"] if check["ok"] else f"not measured: {check['found']}"
        print(f"{unit_of(name)} before the switch: {found}", flush=True)


def measure_again(name: str) -> None:
    """Where the host runs another driver or kernel than when the gate measured this server: measure it again, with no
    switch at work. The gate decides whether that is due."""
    pace = read_json(common.gate_record(name)).get("pace")
    if not isinstance(pace, dict) or (pace.get("kernel"), pace.get("driver")) == (os.uname().release, driver()):
        return
    with unswitched(name) as held:
        check = measured("again", name) if held else None
    if check and check["ok"]:
        print(f"{unit_of(name)} under another driver or kernel: {check['found']}", flush=True)


def measured(verb: str, name: str) -> Optional[Dict[str, Any]]:
    """The result of the gate's one check "pace" or "again"; None where the gate itself fails."""
    done = subprocess.run(
        [sys.executable, "-s", "-E", "-B", GATE, verb, common.plan_path(name)], stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    try:
        found = json.loads(done.stdout)["checks"][0]
        return {key: found[key] for key in ("ok", "found")}
    except (ValueError, TypeError, KeyError, IndexError):
        return None
