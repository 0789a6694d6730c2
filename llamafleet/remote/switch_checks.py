"""What is checked of a staged instance while the old server serves: what is known to fail stops nothing.

Contract: a module of switch.py. Each check raises `Failed` with the file, the address or the unit and what to do, and
changes nothing but the staged files, which `try_hardening` may loosen. Root, systemd, the standard library, Python 3.8;
common.py, switch_back.py and what the preflight needs lie beside it.

Decision 7: docs/decisions/0007-health-is-not-enough.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import subprocess
from typing import Any, Dict, List, Optional, Sequence, Tuple
from urllib.parse import urlsplit

import common
from addresses import cannot_bind
from common import unit_of
from instance_files import PLAN
from switch_back import Failed

# What a switch writes while no server runs: records, logs of jobs, links. Some ten thousand bytes; a file system with
# less than this has other troubles soon.
LEAST_FREE_BYTES, LEAST_FREE_FILES = 8 << 20, 64


def check(names: Sequence[str]) -> None:
    """All checks of these staged instances."""
    space()
    for name in names:
        print(f"checking the staged unit {unit_of(name)}", flush=True)
        verify(name)
        plan = common.read_json(f"{common.STAGED}/{name}/{PLAN}")
        address(name, plan)
        readable(name, [str(one.get("path")) for one in plan.get("files") or [] if isinstance(one, dict)])
        try_hardening(name)


def verify(name: str) -> None:
    """Have systemd-analyze check the staged unit, and those that start it on demand."""
    paths = [f"{common.STAGED}/{name}/{unit}" for unit in (unit_of(name), *common.demand_units(name))]
    # Errors in units that ours only mentions do not count; systemd 250 and later can leave them out.
    for options in (["--recursive-errors=no"], []):
        done = subprocess.run(
            ["systemd-analyze", "verify", *options, *filter(os.path.exists, paths)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        if "unrecognized option" not in done.stdout:
            break
    if done.returncode:
        raise Failed(f"systemd-analyze verify refuses the unit: {done.stdout.strip()}")


def try_hardening(name: str) -> None:
    """Loosen the staged unit as far as this host needs."""
    import preflight

    try:
        preflight.prepare(f"{common.STAGED}/{name}", name, common.plan_path(name))
    except preflight.Unfit as error:
        raise Failed(str(error)) from error


def space() -> None:
    """Where the switch, its way back and the next stages write, there is room for some files."""
    for path in (common.UNITS, common.ETC, common.OPT, common.VAR):
        with contextlib.suppress(OSError):
            found = os.statvfs(path)
            free = found.f_bavail * found.f_frsize
            if free < LEAST_FREE_BYTES:
                raise Failed(f"{path} has {free} bytes free, {LEAST_FREE_BYTES} are needed to switch and to go back: "
                             "make room on its file system")  # fmt: skip
            if found.f_files and found.f_favail < LEAST_FREE_FILES:
                raise Failed(f"{path}: its file system has {found.f_favail} inodes free, {LEAST_FREE_FILES} are "
                             "needed: remove files there")  # fmt: skip


def address(name: str, plan: Dict[str, Any]) -> None:
    """The host has the address that the staged server is to listen at."""
    gate = plan.get("gate")
    listen = urlsplit(str(gate.get("url"))).hostname if isinstance(gate, dict) else None
    why = cannot_bind(listen) if listen else None
    if why:
        raise Failed(f"{name}: listen: {listen}: {why}: give an address that the host has, or 0.0.0.0")


def argv_of(plan: Dict[str, Any]) -> List[str]:
    gate = plan.get("gate")
    argv = gate.get("argv") if isinstance(gate, dict) else None
    return [str(word) for word in argv] if isinstance(argv, list) else []


def readable(name: str, paths: Sequence[str]) -> None:
    """The services' user can open the model's files."""
    found = as_user(common.USER, paths)
    if found:
        path, why = found
        raise Failed(f"{name}: the user {common.USER} cannot read {path}: {why}; set its mode and those of the folders "
                     f"above it (chmod a+r {path}), or remove it and deploy again")  # fmt: skip


def as_user(user: str, paths: Sequence[str]) -> Optional[Tuple[str, str]]:
    """The first of these files that the user cannot open, and why; None where all can be opened. A child tries it."""
    ids = _ids(user)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(ids[1])
                os.setuid(ids[0])
            for path in paths:
                try:
                    os.close(os.open(path, os.O_RDONLY))
                except OSError as error:
                    os.write(writer, json.dumps([path, error.strerror]).encode())
                    break
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    return tuple(json.loads(told)) if told else None


def _ids(user: str) -> Tuple[int, int]:
    try:
        found = pwd.getpwnam(user)
    except KeyError:
        return os.getuid(), os.getgid()
    return found.pw_uid, found.pw_gid


def effective(name: str) -> None:
    """What systemd would start is what is installed: no drop-in changes the command or the user. After daemon-reload,
    while the old server still runs."""
    try:
        shown = common.show(unit_of(name), "ExecStart", "User", "DropInPaths", seconds=30.0)
    except (OSError, subprocess.SubprocessError):
        return
    drop_ins = shown.get("DropInPaths", "")
    found = re.search(r"argv\[\]=(.*?) ; ignore_errors=", shown.get("ExecStart", ""))
    if not drop_ins or not found:
        return
    wanted = " ".join(word.replace("$", "$$") for word in argv_of(common.read_json(common.plan_path(name))))
    changed = []
    if found[1] != wanted:
        changed.append(f"it would start {found[1]}")
    if shown.get("User") != common.USER:
        changed.append(f"it would run as {shown.get('User') or 'root'}")
    if changed:
        raise Failed(f"drop-ins change what {unit_of(name)} runs: {drop_ins}: {'; '.join(changed)}: remove them, and "
                     "say in the inventory what they are for")  # fmt: skip
