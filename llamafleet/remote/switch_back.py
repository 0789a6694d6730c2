"""Lead a switch back that fails or was cut off, or finish it where the gate had passed.

Contract: a module of switch.py, under the locks of the instances. Raises `Failed` with a sentence for the operator,
OSError and CalledProcessError. Root, systemd, the standard library, Python 3.8; common.py, instance_files.py,
transaction.py, starting.py and draining.py beside it.

Decision 9: docs/decisions/0009-nothing-half-done-has-its-final-name.md.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import common
import draining
import instance_files
import starting
import transaction
from common import systemctl, unit_of


class Failed(Exception):
    """The switch cannot go on; the text is for the operator."""


class Stopped(BaseException):
    """The job was told to stop."""


# What leads back at a boot.
RECOVER = """\
# Made by llamafleet: undoes a switch that was cut off; removed at its end.
[Unit]
Description=Undo a switch of llama-server {name} that was cut off
Before={units_of_group}
RequiresMountsFor={folder} {etc} {var}

[Service]
Type=oneshot
ExecStart={python} -s -E -B {folder}/switch.py recover {name}
TimeoutStartSec=90
MemoryMax=256M
TasksMax=64
LimitCORE=0
NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
SystemCallErrorNumber=EPERM
ProtectSystem=strict
ReadWritePaths={units} {etc} {var}
RuntimeDirectory=llamafleet
RuntimeDirectoryMode=0755
RuntimeDirectoryPreserve=yes
ProtectHome=yes
PrivateTmp=yes
PrivateDevices=yes
PrivateMounts=yes
PrivateIPC=yes
PrivateNetwork=yes
RestrictAddressFamilies=AF_UNIX
IPAddressDeny=any
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectClock=yes
ProtectHostname=yes
ProtectProc=invisible
KeyringMode=private
UMask=0077
"""


def recover_unit(names: Sequence[str]) -> str:
    """The text of the unit that leads back at a boot, before any of these instances starts; the first one leads."""
    return RECOVER.format(python=sys.executable, name=names[0], units_of_group=" ".join(map(unit_of, names)),
                          folder=starting.FOLDER, etc=common.ETC, var=common.VAR, units=common.UNITS)  # fmt: skip


def begin(old: Dict[str, Optional[instance_files.Files]], leaving: Sequence[str] = ()) -> None:
    """Note for these instances, the first one leading, that a switch is under way; `old` are the files to go back to,
    and of `leaving` none is replaced."""
    names = list(old)
    group = transaction.Group(names, os.urandom(8).hex(), leaving)
    for name in names:
        recover = recover_unit(names) if name == names[0] else None
        transaction.begin(name, old[name], starting.serving_since(name), recover, group)


@contextlib.contextmanager
def going_back(names: Sequence[str], prove: bool) -> Iterator[None]:
    """Whatever goes wrong in the block before the gate has passed, the old files come back. Raises Failed with the
    first cause and the result."""
    try:
        yield
    except (Exception, KeyboardInterrupt, Stopped) as error:
        if transaction.has_passed(names[0]):
            return  # decided: the new files are the good ones
        stopped = not isinstance(error, Exception)
        why = "the switch was stopped" if stopped else str(error)
        raise Failed(f"{why}; {go_back(names, prove and not stopped)}") from error


Notes = Dict[str, Dict[str, Any]]


def go_back(names: Sequence[str], prove: bool) -> str:
    """Restore the old files of a group and start them; a sentence with the result. `prove`: wait for them and run the
    gate.

    systemctl may fail here without an error: as much is done as can be.
    """
    began = time.monotonic()
    found = {name: transaction.under_way(name) for name in names}
    before: Notes = {name: note for name, note in found.items() if note is not None}
    if not before:
        _close(names)
        return "nothing was replaced"
    try:
        for name, note in before.items():
            transaction.put_back(name, note)
    except (OSError, transaction.Lost) as error:
        return f"and the previous one could not be put back: {error}. Run again, or restart the host"
    systemctl("daemon-reload", check=False)
    said = _start_old(before, prove)
    _close(names)
    return said + (f", {time.monotonic() - began:.0f} s later" if prove and _has_old(before) else "")


def _has_old(before: Notes) -> bool:
    return any(note["old"] is not None for note in before.values())


def _start_old(before: Notes, prove: bool) -> str:
    """Stop what is new, and start what was there before; a sentence with the result."""
    wait = () if prove else ("--no-block",)
    serve_on = [name for name, note in before.items()
                if note["invocation"] and starting.serving_since(name) == note["invocation"]]  # fmt: skip
    old = [name for name, note in before.items() if note["old"] is not None]
    for name in serve_on:
        draining.let_in(name)
    for name in before:
        if name not in old:
            for socket in starting.doors([name]):
                systemctl("disable", "--quiet", "--now", *wait, socket, check=False)
            systemctl("disable", "--quiet", "--now", *wait, unit_of(name), check=False)
    if not old:
        return f"there was no previous one, so it was stopped; its log: journalctl -u {unit_of(next(iter(before)))}"
    idle = [name for name in old if common.is_on_demand(name) and not before[name]["invocation"]]
    stopped = [name for name in old if name not in (*serve_on, *idle)]
    _let_start(idle, wait)
    problems = _start_again(stopped, prove)
    for name in old:
        starting.start_watching(name, *wait, check=False)  # also if it does not serve: a later check may restart it
    if len(idle) == len(before):
        return "what was there before was put back, and starts when it is asked for"
    return _told(stopped, problems, prove, several=len(before) > 1)


def _let_start(names: Sequence[str], wait: Sequence[str]) -> None:
    """Let instances start on demand that did not run before."""
    for name in names:
        systemctl("stop", *wait, unit_of(name), check=False)
        systemctl("reset-failed", unit_of(name), check=False)
        starting.enable(name)
        starting.open_door(name, *wait, check=False)


def _start_again(names: Sequence[str], prove: bool) -> List[Tuple[str, str]]:
    """Start the old files of these instances, and prove them; (name, problem) of those that do not serve."""
    if not names:
        return []
    if prove and len(names) > 1:  # all first: what is new holds the ports and the memory of what is old
        systemctl("stop", *map(unit_of, names), check=False)
    problems = []
    for name in names:
        if not prove and common.is_on_demand(name):
            _let_start([name], ["--no-block"])
            continue
        if not prove:
            systemctl("enable", "--quiet", unit_of(name), check=False)
            transaction.sync_enabled(name)
            systemctl("reset-failed", unit_of(name), check=False)
            systemctl("restart", "--no-block", unit_of(name), check=False)
            continue
        try:
            problem = starting.start_and_check([name], "--no-floor")
        except (OSError, subprocess.SubprocessError) as error:
            problem = str(error)
        if problem is not None:
            problems.append((name, problem))
    return problems


def _told(stopped: Sequence[str], problems: List[Tuple[str, str]], prove: bool, several: bool) -> str:
    what, was = ("the previous ones", "were") if several else ("the previous one", "was")
    if not stopped:
        return f"{what} {was} put back and {'serve' if several else 'serves'} on"
    if not prove:
        return f"{what} {was} put back and {'are' if several else 'is'} starting"
    if not problems:
        return f"{what} {was} put back and {'serve' if several else 'serves'}"
    if not several:
        return f"the previous one was put back but does not serve either: {problems[0][1]}"
    named = "; ".join(f"{unit_of(name)} does not serve either: {problem}" for name, problem in problems)
    return f"the previous ones were put back, but {named}"


def _close(names: Sequence[str]) -> None:
    """End the transaction of a group, its leading instance last: by it a boot finds the others."""
    for name in reversed(names):
        transaction.close(name)


def finish(names: Sequence[str], *options: str) -> None:
    """The gate has passed: keep the new files as the last good ones, and watch the servers."""
    transaction.pass_gate(names)
    for name in names:
        if transaction.has_passed(name) and not transaction.is_leaving(name):  # else it is closed already
            transaction.keep(name)
            starting.start_watching(name, *options)
    _close(names)


def recover(name: str) -> None:
    """End a switch that was cut off. Waits for no unit: at a boot they all wait for this."""
    names = transaction.group_of(name)
    if transaction.has_passed(name):
        finish(names, "--no-block")
    elif any(transaction.under_way(one) is not None for one in names):
        what = ", ".join(map(unit_of, names))
        print(f"the switch of {what} was cut off; {go_back(names, prove=False)}", flush=True)
        if any(transaction.under_way(one) is not None for one in names):
            raise Failed(f"{what} is neither the old one nor the new one")
    else:
        _close(names)


def settle(name: str) -> None:
    """End a switch that was cut off, before another one begins."""
    try:
        recover(name)
    except Failed as error:
        print(f"{error}; it is replaced as a whole", flush=True)
        _close(transaction.group_of(name))
