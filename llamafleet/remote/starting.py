"""Stop and start the units of instances and of their liveness checks, and ask the gate.

Contract: a module of switch.py and switch_back.py. Raises CalledProcessError where systemctl fails. Root, systemd, the
standard library, Python 3.8; common.py, transaction.py, draining.py, room.py and what the gate needs lie beside it.

Decision 7: docs/decisions/0007-health-is-not-enough.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import List, Optional, Sequence  # the contract is Python 3.8, whose own are typing's

import common
import room
import transaction
from common import demand_units, liveness_units, systemctl, unit_of
from draining import Draining

FOLDER = os.path.dirname(os.path.realpath(__file__))  # of the helpers of this version, not `current`
GATE = f"{FOLDER}/gate.py"


def timer_of(name: str) -> str:
    return liveness_units(name)[1]


def unwatch(name: str) -> None:
    """Stop the liveness check, if there is one, so that it restarts nothing during the switch."""
    timer = f"{common.UNITS}/{timer_of(name)}"
    if os.path.exists(timer):
        systemctl("disable", "--quiet", "--now", timer_of(name), check=not is_empty(timer))


def is_empty(path: str) -> bool:
    """Of a unit file that a power cut has emptied: systemd takes it for masked, and refuses to disable it."""
    return os.path.exists(path) and os.path.getsize(path) == 0


def start_watching(name: str, *options: str, check: bool = True) -> None:
    if os.path.exists(f"{common.UNITS}/{timer_of(name)}"):
        # That of a server on demand which does not run starts with it.
        now = () if common.is_on_demand(name) and not serving_since(name) else ("--now",)
        systemctl("enable", "--quiet", *now, *options, timer_of(name), check=check)
        transaction.sync_enabled(name)


def enable(name: str) -> None:
    """Let the instance start with the host, or, on demand, at the first connection after the host's start."""
    if common.is_on_demand(name):
        transaction.remove_files([f"{common.UNITS}/{transaction.WANTED_BY}/{unit_of(name)}"])
        systemctl("enable", "--quiet", demand_units(name)[0])
    else:
        transaction.remove_files([transaction.socket_link(name)])
        systemctl("enable", "--quiet", unit_of(name))
    transaction.sync_enabled(name)


def open_door(name: str, *options: str, check: bool = True) -> None:
    """Let clients connect to an instance that starts on demand."""
    if common.is_on_demand(name):
        systemctl("start", *options, demand_units(name)[0], check=check)


def doors(names: Sequence[str]) -> List[str]:
    """The sockets of those of these instances that start on demand, or did before their files were replaced."""
    return [demand_units(name)[0] for name in names
            if common.is_on_demand(name) or os.path.lexists(transaction.socket_link(name))]  # fmt: skip


def stop(names: Sequence[str], drain: Draining, sockets: Optional[Sequence[str]] = None) -> None:
    """Stop these instances, those of `drain` when their running replies have ended, and wait until all have ended.
    `sockets` are stopped first; None: all that they have."""
    sockets = doors(names) if sockets is None else sockets
    with drain.begun():
        if sockets:
            systemctl("stop", *sockets, check=False)  # systemd may never have read one
        systemctl("stop", *map(unit_of, names))


def start_and_check(names: Sequence[str], *options: str, drain: Optional[Draining] = None) -> Optional[str]:
    """Restart the units and run the gate: None if all pass, else the failed check as text, after the name of the unit
    where there are several. `options` are the gate's."""
    sockets = doors(names)
    for name in names:
        enable(name)
        systemctl("reset-failed", unit_of(name), check=False)  # it fails where the unit has no failure to forget
    # Stop and wait first, so that the gate cannot ask an old server that is slow to end.
    stop(names, drain or Draining(), sockets)
    at_boot = [name for name in names if not common.is_on_demand(name)]
    # Returns when ExecStartPost got an answer from the servers, or when the start has failed; the gate tells which,
    # and why.
    if at_boot:
        systemctl("start", *map(unit_of, at_boot), check=False)
    for name in names:
        problem = (gate if name in at_boot else start_on_demand)(name, *options)
        if problem is not None:
            return problem if len(names) == 1 else f"{unit_of(name)}: {problem}"
        if name not in at_boot and len(names) > 1:  # the next one may need its memory
            stop([name], Draining())
    for name in names:
        open_door(name)
    return None


def start_on_demand(name: str, *options: str) -> Optional[str]:
    """Make room for the instance, start it, unless it runs, and run the gate; as `start_and_check`."""
    problem = room.make(name)
    if problem is None:
        open_door(name)
        systemctl("start", unit_of(name), check=False)
        problem = gate(name, *options)
    return problem


def gate(name: str, *options: str) -> Optional[str]:
    done = subprocess.run(
        [sys.executable, "-s", "-E", "-B", GATE, "check", common.plan_path(name), "--record", *options],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        checks = json.loads(done.stdout)["checks"]
    except (ValueError, TypeError, KeyError):
        return f"the gate itself failed with exit code {done.returncode}"
    for check in checks:
        print(f"gate {check['name']}: {'ok' if check['ok'] else 'FAILED'}", flush=True)
    for check in checks:
        if check["name"] == "pace" and check["ok"] and check["hint"]:
            print(f"note: {unit_of(name)}: {check['hint']}: {check['found']}", flush=True)
    bad = [check for check in checks if not check["ok"]]
    if not bad:
        return None
    return f"{bad[0]['name']}: expected {bad[0]['expected']}, found {bad[0]['found']} ({bad[0]['hint']})"


def serving_since(name: str) -> str:
    """systemd's id of the start of the server that runs; empty where none does, or where systemd does not answer."""
    try:
        shown = common.show(unit_of(name), "ActiveState", "InvocationID", seconds=30.0)
    except (OSError, subprocess.SubprocessError):
        return ""
    return shown.get("InvocationID", "") if shown.get("ActiveState") == "active" else ""
