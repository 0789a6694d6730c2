"""Run a package manager's commands with their output among our progress lines, and wait for its lock.

Contract: a module of install_packages.py and install_toolkit.py. `run` raises `Failed` with what the command said at
the end. Python 3.8, the standard library; packages.py beside it.
"""

from __future__ import annotations

import os
import subprocess
import time
from typing import List, Optional, Tuple, Type  # the contract is Python 3.8, whose own are not generic

import packages

# On its first boot a host installs updates, for ten minutes and more (cloud-init, unattended-upgrades).
LOCK_SECONDS, LOCK_POLL_SECONDS, LOCK_SAY_SECONDS = 1800.0, 2.0, 60.0
KEPT_LINES = 200


class Failed(Exception):
    """The installation cannot go on; the text is for the operator."""


def say(text: str) -> None:
    print(text, flush=True)


def run(command: List[str], failure: str, manager: Optional[Type[packages.Manager]] = None) -> None:
    """Run a command; `Failed` with its last lines where it fails. With a `manager`, wait while another process holds
    the manager's lock, and finish an installation that was cut off."""
    began, mended, said = time.monotonic(), False, 0.0
    while True:
        code, lines = output(command, manager)
        if not code:
            return
        text = "\n".join(lines)
        mend = manager.mend(text) if manager and not mended else None
        if mend:
            say(f"finishing an installation that was cut off: {' '.join(mend)}")
            mended = True
            run(mend, "what was cut off cannot be finished")
            continue
        is_locked = manager is not None and (manager.locked.search(text) or code in manager.locked_codes)
        if not is_locked or time.monotonic() - began > LOCK_SECONDS:
            waited = f", after waiting {LOCK_SECONDS:.0f} s for another process" if is_locked else ""
            # curl explains itself behind its first line, for a certificate in six lines.
            telling = [line for line in lines if line.startswith("curl: (")][:1] or [one for one in lines[-5:] if one]
            last = " | ".join(telling)
            raise Failed(f"{failure} (exit code {code}{waited}): {last}")
        if not said or time.monotonic() - said > LOCK_SAY_SECONDS:
            said = time.monotonic()
            say("another process holds the lock of the package manager: waiting for it")
        time.sleep(LOCK_POLL_SECONDS)


def output(command: List[str], manager: Optional[Type[packages.Manager]]) -> Tuple[int, List[str]]:
    """The exit code, and the last lines, which were printed as they came."""
    extra = manager.environment if manager else {}
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8", **extra}
    last: List[str] = []
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env=environment, text=True, errors="replace") as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            say(line.rstrip())
            last = [*last[-KEPT_LINES:], line.strip()]
    return process.returncode, last


def refresh(manager: Type[packages.Manager]) -> Optional[Failed]:
    """Read the lists of packages anew, where the manager does not do that by itself. Gives the failure: one repository
    of an owner's that is gone must not end what the others can do."""
    command = manager.refresh()
    if command:
        try:
            run(command, f"{command[0]} cannot read its lists of packages", manager)
        except Failed as failed:
            return failed
    return None
