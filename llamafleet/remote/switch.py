"""Switch one instance to its new unit, and restore the old one if the new one does not serve.

Contract: `switch.py install NAME` takes the staged files of /var/lib/llamafleet/staged/NAME (the unit,
plan.json, the secrets that it has, the units of its liveness check where there is one), keeps the
installed ones aside, installs, starts, runs the gate and, where it fails, puts the old ones back and proves
that they serve again. `switch.py watch NAME` installs the staged liveness check alone; the server runs
on. `switch.py remove NAME` stops and removes an instance. Log lines on stdout; the last one of a failure begins
with `error: `. Exit 0 done, 1 failed. Killed at any point it can simply be run again: what is kept
aside is the last set of files that passed the gate. Root, the standard library; common.py and what the gate and
the preflight need lie beside it.

Decision 7: docs/decisions/0007-health-is-not-enough.md.
Decision 9: docs/decisions/0009-nothing-half-done-has-its-final-name.md.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time

from common import (
    GATES,
    GOOD,
    INSTANCES,
    RUN,
    SECRETS,
    STAGED,
    UNITS,
    journal,
    liveness_units,
    systemctl,
    unit_of,
)  # fmt: skip

GATE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "gate.py")
VERIFY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "verify.py")


class Failed(Exception):
    """The switch cannot go on; the text is for the operator."""


def timer_of(name: str) -> str:
    return liveness_units(name)[1]


def installed(name: str) -> dict[str, tuple[str, int]]:
    """Where the files of an instance are installed, with their modes."""
    return {
        **{unit: (f"{UNITS}/{unit}", 0o644) for unit in (unit_of(name), *liveness_units(name))},
        "plan.json": (f"{INSTANCES}/{name}/plan.json", 0o644),
        **{secret: (f"{INSTANCES}/{name}/{secret}", 0o600) for secret in SECRETS},
    }


def put(name: str, source: str, only: list[str] | None = None) -> None:
    """Install all files of a folder, or `only` these. Each is replaced as a whole; a missing one is removed."""
    os.makedirs(f"{INSTANCES}/{name}", mode=0o755, exist_ok=True)
    unwatch(name)
    for file, (target, mode) in installed(name).items():
        if only is not None and file not in only:
            continue
        if os.path.exists(f"{source}/{file}"):
            shutil.copyfile(f"{source}/{file}", target + ".new")
            os.chmod(target + ".new", mode)
            os.replace(target + ".new", target)
        elif os.path.exists(target):
            os.unlink(target)
    systemctl("daemon-reload")


def unwatch(name: str) -> None:
    """Stop the liveness check, if there is one, so that it restarts nothing during the switch."""
    if os.path.exists(f"{UNITS}/{timer_of(name)}"):
        systemctl("disable", "--quiet", "--now", timer_of(name))


def start_watching(name: str) -> None:
    if os.path.exists(f"{UNITS}/{timer_of(name)}"):
        systemctl("enable", "--quiet", "--now", timer_of(name))


def keep(name: str) -> None:
    """Copy the installed files, which have passed the gate, to the last good ones."""
    shutil.rmtree(f"{GOOD}/{name}.new", ignore_errors=True)
    os.makedirs(f"{GOOD}/{name}.new", mode=0o700)
    for file, (target, _) in installed(name).items():
        if os.path.exists(target):
            shutil.copy2(target, f"{GOOD}/{name}.new/{file}")
    shutil.rmtree(f"{GOOD}/{name}", ignore_errors=True)
    os.rename(f"{GOOD}/{name}.new", f"{GOOD}/{name}")


def verify(name: str) -> None:
    """Have systemd-analyze check the staged unit; raises Failed if it finds an error."""
    # Errors in units that ours only mentions do not count; systemd 250 and later can leave them out.
    for options in (["--recursive-errors=no"], []):
        done = subprocess.run(
            ["systemd-analyze", "verify", *options, f"{STAGED}/{name}/{unit_of(name)}"],
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
        preflight.prepare(f"{STAGED}/{name}", name, f"{INSTANCES}/{name}/plan.json")
    except preflight.Unfit as error:
        raise Failed(str(error)) from error


def ask(name: str) -> None:
    """Stop the old server and ask the new one what it would allocate, if the GPU had no room for both.

    Raises Failed, after the old server was restored, if it would allocate more than the plan gives.
    """
    question = f"{STAGED}/{name}/question.json"
    if not os.path.exists(question):
        return
    print(f"asking llama-server, with {unit_of(name)} stopped", flush=True)
    systemctl("stop", unit_of(name))
    done = subprocess.run(
        [sys.executable, "-s", "-E", "-B", VERIFY, "settle", question, f"{STAGED}/{name}/plan.json"]
    )  # fmt: skip
    if done.returncode:
        raise Failed(f"the plan of {unit_of(name)} does not fit; {go_back(name)}")


def start_and_check(name: str, *options: str) -> str | None:
    """Restart the unit and run the gate: None if it passes, else the failed check as text. `options` are the gate's."""
    systemctl("enable", "--quiet", unit_of(name))
    systemctl("reset-failed", unit_of(name), check=False)  # it fails where the unit has no failure to forget
    # Stop and wait first, so that the gate cannot ask an old server that is slow to end.
    systemctl("stop", unit_of(name))
    # Returns when ExecStartPost got an answer from the server, or when the start has failed; the gate tells which,
    # and why.
    subprocess.run(["systemctl", "start", unit_of(name)])
    done = subprocess.run(
        [sys.executable, "-s", "-E", "-B", GATE, "check", f"{INSTANCES}/{name}/plan.json", "--record", *options],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        checks = json.loads(done.stdout)["checks"]
    except ValueError:
        return f"the gate itself failed with exit code {done.returncode}"
    for check in checks:
        print(f"gate {check['name']}: {'ok' if check['ok'] else 'FAILED'}", flush=True)
    bad = [check for check in checks if not check["ok"]]
    if not bad:
        return None
    return f"{bad[0]['name']}: expected {bad[0]['expected']}, found {bad[0]['found']} ({bad[0]['hint']})"


def install(name: str) -> None:
    try:
        print(f"checking the staged unit {unit_of(name)}", flush=True)
        verify(name)
        try_hardening(name)
        ask(name)
        put(name, f"{STAGED}/{name}")
    finally:
        shutil.rmtree(f"{STAGED}/{name}", ignore_errors=True)  # it may hold keys
    print(f"starting {unit_of(name)}", flush=True)
    problem = start_and_check(name)
    if problem is None:
        keep(name)
        start_watching(name)
        return
    print(journal("--lines=15", "--unit", unit_of(name)).rstrip(), flush=True)
    raise Failed(f"{unit_of(name)} did not pass the gate: {problem}; {go_back(name)}")


def watch(name: str) -> None:
    """Install the staged liveness check, also among the last good files."""
    try:
        put(name, f"{STAGED}/{name}", only=liveness_units(name))
    finally:
        shutil.rmtree(f"{STAGED}/{name}", ignore_errors=True)
    for unit in liveness_units(name) if os.path.isdir(f"{GOOD}/{name}") else []:
        if os.path.exists(f"{UNITS}/{unit}"):
            shutil.copy2(f"{UNITS}/{unit}", f"{GOOD}/{name}/{unit}")
        elif os.path.exists(f"{GOOD}/{name}/{unit}"):
            os.unlink(f"{GOOD}/{name}/{unit}")
    start_watching(name)


def go_back(name: str) -> str:
    """Restore the last good files and start them; a sentence with the result."""
    began = time.monotonic()
    if not os.path.isdir(f"{GOOD}/{name}"):
        systemctl("disable", "--quiet", "--now", unit_of(name))
        return f"there was no previous one, so it was stopped; its log: journalctl -u {unit_of(name)}"
    put(name, f"{GOOD}/{name}")
    problem = start_and_check(name, "--no-floor")
    start_watching(name)  # also if it does not serve: a later check may restart it
    if problem is None:
        return f"the previous one was put back and serves, {time.monotonic() - began:.0f} s after the failed gate"
    return f"the previous one was put back but does not serve either: {problem}"


def remove(name: str) -> None:
    unwatch(name)
    systemctl("disable", "--quiet", "--now", unit_of(name))
    for file in [*(f"{UNITS}/{unit}" for unit in liveness_units(name)), f"{GATES}/{name}.json",
                 f"{GATES}/{name}.liveness.json", f"{RUN}/liveness-{name}.json"]:  # fmt: skip
        if os.path.exists(file):
            os.unlink(file)
    for folder in (f"{INSTANCES}/{name}", f"{GOOD}/{name}", f"{STAGED}/{name}"):
        shutil.rmtree(folder, ignore_errors=True)
    os.unlink(f"{UNITS}/{unit_of(name)}")  # last: while it is there, the next run sees what is left to do
    systemctl("daemon-reload")


def main(argv: list[str]) -> int:
    verb, name = argv
    os.makedirs(RUN, exist_ok=True)
    try:
        with open(f"{RUN}/switch-{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a job of a run that was killed may still be at work
            {"install": install, "watch": watch, "remove": remove}[verb](name)
    except (Failed, OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
