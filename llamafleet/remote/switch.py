"""Switch one instance to its new files, and restore the old ones if the new ones do not serve.

Contract: `switch.py install NAME` takes the staged files of /var/lib/llamafleet/staged/NAME (the unit, plan.json, the
secrets that it has, the units of its liveness check where there is one), installs them together, starts, runs the gate
and, where anything fails, puts the old ones back and proves that they serve again. `switch.py refresh NAME` installs
the staged files, and sets the unit's state in systemd right, while the server runs on; `switch.py watch NAME` installs
the staged liveness check alone. Each removes the drop-ins of the instance's units, but for those that plan.json allows.
`switch.py recover NAME [--wait]` ends a switch that was cut off: it finishes it if the gate had passed, else it
puts the old files back and starts them, and does not wait for them; while a switch is at work it does nothing, or, with
--wait, waits for its end.
`switch.py remove NAME` stops and removes an instance. Log lines on stdout; the last one of a failure begins with
`error: `. Exit 0 done, 1 failed. Killed at any point it can be run again, and `recover` runs before the instance starts
at the next boot. Root, the standard library; common.py, transaction.py, instance_files.py and what the gate and the
preflight need lie beside it.

Decision 7: docs/decisions/0007-health-is-not-enough.md.
Decision 9: docs/decisions/0009-nothing-half-done-has-its-final-name.md.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import Iterator, List, Optional, Sequence  # the contract is Python 3.8, whose own are typing's

import common
import instance_files
import transaction
from common import journal, liveness_units, systemctl, unit_of
from instance_files import PLAN, Files

FOLDER = os.path.dirname(os.path.realpath(__file__))  # of the helpers of this version, not `current`
GATE, VERIFY = f"{FOLDER}/gate.py", f"{FOLDER}/verify.py"

# What leads back at a boot.
RECOVER = """\
# Made by llamafleet: undoes a switch that was cut off; removed at its end.
[Unit]
Description=Undo a switch of llama-server {name} that was cut off
Before={unit}
RequiresMountsFor={folder} {etc} {var}

[Service]
Type=oneshot
ExecStart=/usr/bin/python3 -s -E -B {folder}/switch.py recover {name}
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


class Failed(Exception):
    """The switch cannot go on; the text is for the operator."""


class Stopped(BaseException):
    """The job was told to stop."""


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
        systemctl("enable", "--quiet", "--now", *options, timer_of(name), check=check)
        transaction.sync_enabled(name)


def verify(name: str) -> None:
    """Have systemd-analyze check the staged unit; raises Failed if it finds an error."""
    # Errors in units that ours only mentions do not count; systemd 250 and later can leave them out.
    for options in (["--recursive-errors=no"], []):
        done = subprocess.run(
            ["systemd-analyze", "verify", *options, f"{common.STAGED}/{name}/{unit_of(name)}"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        if "unrecognized option" not in done.stdout:
            break
    if done.returncode:
        raise Failed(f"systemd-analyze verify refuses the unit: {done.stdout.strip()}")


def try_hardening(name: str) -> None:
    """Loosen the staged unit as far as this host needs. Raises Failed where llama-server does not work at all."""
    import preflight

    try:
        preflight.prepare(f"{common.STAGED}/{name}", name, common.plan_path(name))
    except preflight.Unfit as error:
        raise Failed(str(error)) from error


def ask(name: str) -> None:
    """Stop the old server and ask the new one what it would allocate, if the GPU had no room for both.

    Raises Failed if it would allocate more than the plan gives.
    """
    question = f"{common.STAGED}/{name}/question.json"
    if not os.path.exists(question):
        return
    print(f"asking llama-server, with {unit_of(name)} stopped", flush=True)
    systemctl("stop", unit_of(name))
    done = subprocess.run(
        [sys.executable, "-s", "-E", "-B", VERIFY, "settle", question, f"{common.STAGED}/{name}/{PLAN}"]
    )  # fmt: skip
    if done.returncode:
        raise Failed(f"the plan of {unit_of(name)} does not fit")


def start_and_check(name: str, *options: str) -> Optional[str]:
    """Restart the unit and run the gate: None if it passes, else the failed check as text. `options` are the gate's."""
    systemctl("enable", "--quiet", unit_of(name))
    transaction.sync_enabled(name)
    systemctl("reset-failed", unit_of(name), check=False)  # it fails where the unit has no failure to forget
    # Stop and wait first, so that the gate cannot ask an old server that is slow to end.
    systemctl("stop", unit_of(name))
    # Returns when ExecStartPost got an answer from the server, or when the start has failed; the gate tells which,
    # and why.
    systemctl("start", unit_of(name), check=False)
    return gate(name, *options)


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
    bad = [check for check in checks if not check["ok"]]
    if not bad:
        return None
    return f"{bad[0]['name']}: expected {bad[0]['expected']}, found {bad[0]['found']} ({bad[0]['hint']})"


def install(name: str) -> None:
    try:
        settle(name)
        print(f"checking the staged unit {unit_of(name)}", flush=True)
        verify(name)
        try_hardening(name)
        with going_back(name, prove=True):
            begin(name, instance_files.previous(name))
            ask(name)
            new = staged_files(name)
            transaction.write(name, new, good=new)
            unwatch(name)
            transaction.replace(name, new)
            remove_drop_ins(name, new)
            systemctl("daemon-reload")
            print(f"starting {unit_of(name)}", flush=True)
            problem = start_and_check(name)
            if problem is not None:
                print(journal("--lines=15", "--unit", unit_of(name)).rstrip(), flush=True)
                raise Failed(f"{unit_of(name)} did not pass the gate: {problem}")
            transaction.pass_gate(name)
        finish(name)
    finally:
        shutil.rmtree(f"{common.STAGED}/{name}", ignore_errors=True)  # it may hold keys


def staged_files(name: str) -> Files:
    return instance_files.in_folder(name, f"{common.STAGED}/{name}")


def guard(name: str) -> None:
    """Have a process outside this job wait for its end and, if that was no orderly one, lead back."""
    unit = common.transient_unit("guard", f"{name}-{os.getpid()}")
    subprocess.run(
        ["systemd-run", "--quiet", "--collect", f"--unit={unit}", "--property=Type=exec", "--property=MemoryMax=256M",
         sys.executable, "-s", "-E", "-B", f"{FOLDER}/switch.py", "recover", name, "--wait"],
        check=True,
    )  # fmt: skip


def begin(name: str, old: Optional[Files]) -> None:
    guard(name)
    unit = RECOVER.format(name=name, unit=unit_of(name), folder=FOLDER, etc=common.ETC, var=common.VAR,
                          units=common.UNITS)  # fmt: skip
    transaction.begin(name, old, serving_since(name), unit)


def serving_since(name: str) -> str:
    """systemd's id of the start of the server that runs; empty where none does, or where systemd does not answer."""
    try:
        shown = common.show(unit_of(name), "ActiveState", "InvocationID", seconds=30.0)
    except (OSError, subprocess.SubprocessError):
        return ""
    return shown.get("InvocationID", "") if shown.get("ActiveState") == "active" else ""


@contextlib.contextmanager
def going_back(name: str, prove: bool) -> Iterator[None]:
    """Whatever goes wrong in the block before the gate has passed, the old files come back. Raises Failed with the
    first cause and the result."""
    try:
        yield
    except (Exception, KeyboardInterrupt, Stopped) as error:
        if transaction.has_passed(name):
            return  # decided: the new files are the good ones
        stopped = not isinstance(error, Exception)
        why = "the switch was stopped" if stopped else str(error)
        raise Failed(f"{why}; {go_back(name, prove and not stopped)}") from error


def go_back(name: str, prove: bool) -> str:
    """Restore the old files and start them; a sentence with the result. `prove`: wait for them and run the gate.

    systemctl may fail here without an error: as much is done as can be.
    """
    began = time.monotonic()
    before = transaction.under_way(name)
    if before is None:
        transaction.close(name)
        return "nothing was replaced"
    try:
        transaction.put_back(name, before)
    except (OSError, transaction.Lost) as error:
        return f"and the previous one could not be put back: {error}. Run again, or restart the host"
    wait = () if prove else ("--no-block",)
    systemctl("daemon-reload", check=False)
    if before["old"] is None:
        systemctl("disable", "--quiet", "--now", *wait, unit_of(name), check=False)
        transaction.close(name)
        return f"there was no previous one, so it was stopped; its log: journalctl -u {unit_of(name)}"
    said = start_again(name, before["invocation"], prove)
    start_watching(name, *wait, check=False)  # also if it does not serve: a later check may restart it
    transaction.close(name)
    return said + (f", {time.monotonic() - began:.0f} s later" if prove else "")


def start_again(name: str, invocation: str, prove: bool) -> str:
    """Start the old files, unless their server was not stopped; a sentence with the result."""
    if invocation and serving_since(name) == invocation:
        return "the previous one was put back and serves on"
    if not prove:
        systemctl("enable", "--quiet", unit_of(name), check=False)
        transaction.sync_enabled(name)
        systemctl("reset-failed", unit_of(name), check=False)
        systemctl("restart", "--no-block", unit_of(name), check=False)
        return "the previous one was put back and is starting"
    try:
        problem = start_and_check(name, "--no-floor")
    except (OSError, subprocess.SubprocessError) as error:
        problem = str(error)
    if problem is not None:
        return f"the previous one was put back but does not serve either: {problem}"
    return "the previous one was put back and serves"


def finish(name: str, *options: str) -> None:
    """The gate has passed: keep the new files as the last good ones, and watch the server."""
    transaction.keep(name)
    start_watching(name, *options)
    transaction.close(name)


def recover(name: str) -> None:
    """End a switch that was cut off. Waits for no unit: at a boot they all wait for this."""
    if transaction.has_passed(name):
        finish(name, "--no-block")
    elif transaction.under_way(name) is not None:
        print(f"the switch of {unit_of(name)} was cut off; {go_back(name, prove=False)}", flush=True)
        if transaction.under_way(name) is not None:
            raise Failed(f"{unit_of(name)} is neither the old one nor the new one")
    else:
        transaction.close(name)


def settle(name: str) -> None:
    """End a switch that was cut off, before another one begins."""
    try:
        recover(name)
    except Failed as error:
        print(f"{error}; it is replaced as a whole", flush=True)
        transaction.close(name)


def replace_quietly(name: str, only: Sequence[str]) -> None:
    """Replace `only` these files by the staged ones while the server runs on, also among the last good files. Where
    there are no good files that fit, the running server has to pass the gate first."""
    try:
        settle(name)
        old = instance_files.installed(name)
        if unit_of(name) in only:
            keep_hardening(name, old)
        staged = staged_files(name)
        new, good = replaced(old, staged, only), instance_files.last_good(name)
        # The last good files stay those of one set.
        is_good = good is not None and has_same_core(name, good, new)
        with going_back(name, prove=False):
            begin(name, old)
            if unit_of(name) in only and instance_files.damage(name, new) is None:
                transaction.write(name, new, new if is_good or good is None else None)
            else:
                transaction.write(name, new, replaced(good, staged, only) if good and is_good else None)
            if timer_of(name) in only:
                unwatch(name)
            transaction.replace(name, new)
            remove_drop_ins(name, new)
            systemctl("daemon-reload")
            if unit_of(name) in only:
                systemctl("enable", "--quiet", unit_of(name))
                transaction.sync_enabled(name)
                if good is None and (problem := gate(name)):
                    raise Failed(f"{unit_of(name)} runs, but does not pass the gate: {problem}")
            transaction.pass_gate(name)
        finish(name)
    finally:
        shutil.rmtree(f"{common.STAGED}/{name}", ignore_errors=True)


def has_same_core(name: str, one: Files, other: Files) -> bool:
    """Whether two sets of files have a unit that differs at most in what a running server does not depend on."""
    cores = [common.core_of_unit(files.get(unit_of(name), b"").decode("utf-8", "replace")) for files in (one, other)]
    return bool(cores[0]) and cores[0] == cores[1]


def remove_drop_ins(name: str, files: Files) -> None:
    """Remove the drop-ins of the instance's units, but for those of its server that plan.json allows."""
    allowed = (instance_files.plan(files) or {}).get("allowed_drop_ins") or []
    for unit in (unit_of(name), *liveness_units(name)):
        for path in common.drop_ins(unit):
            if unit != unit_of(name) or os.path.basename(path) not in allowed:
                transaction.remove(path)
                print(f"removed the drop-in {path}", flush=True)


def replaced(files: Files, by: Files, only: Sequence[str]) -> Files:
    """These files with `only` those replaced; of them, those that `by` lacks are left out."""
    kept = {file: data for file, data in files.items() if file not in only}
    return {**kept, **{file: by[file] for file in only if file in by}}


def keep_hardening(name: str, old: Files) -> None:
    """Loosen the staged unit as the installed one is: they differ in nothing that the preflight tries."""
    import preflight

    unit = old.get(unit_of(name), b"").decode("utf-8", "replace")
    preflight.keep(f"{common.STAGED}/{name}", name, instance_files.record(name), unit)


def refresh(name: str) -> None:
    staged = staged_files(name)
    # A secret that the unit loads and that was not sent stays as it is.
    stay = [one for one in instance_files.credentials(name, staged.get(unit_of(name), b"")) if one not in staged]
    replace_quietly(name, [file for file in instance_files.places(name) if file not in stay])


def watch(name: str) -> None:
    replace_quietly(name, liveness_units(name))


def remove(name: str) -> None:
    unwatch(name)
    unit = f"{common.UNITS}/{unit_of(name)}"
    systemctl("disable", "--quiet", "--now", unit_of(name), check=os.path.isfile(unit) and not is_empty(unit))
    transaction.forget(name)
    transaction.remove_files([
        *(f"{common.UNITS}/{unit}" for unit in liveness_units(name)), common.gate_record(name),
        common.liveness_record(name), f"{common.RUN}/liveness-{name}.json",
    ])  # fmt: skip
    for folder in (f"{common.INSTANCES}/{name}", f"{common.STAGED}/{name}", f"{common.CACHES}/llama-server-{name}"):
        transaction.remove_folder(folder)
    transaction.remove_files([unit])  # last: while it is there, the next run sees what is left to do
    common.sync(common.UNITS)
    systemctl("daemon-reload")


VERBS = {"install": install, "refresh": refresh, "watch": watch, "remove": remove, "recover": recover}


def stop(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once: what follows leads back
    raise Stopped


def main(argv: List[str]) -> int:
    verb, name, *options = argv
    signal.signal(signal.SIGTERM, stop)
    os.makedirs(common.RUN, exist_ok=True)
    try:
        with open(f"{common.RUN}/switch-{name}.lock", "w") as lock:
            try:
                # A job of a run that was killed may still be at work. Whoever holds the lock ends its own switch.
                fcntl.flock(lock, fcntl.LOCK_EX | (fcntl.LOCK_NB if verb == "recover" and not options else 0))
            except BlockingIOError:
                return 0
            VERBS[verb](name)
    except (Failed, OSError, subprocess.SubprocessError, Stopped) as error:
        print(f"error: {error or 'the switch was stopped'}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
