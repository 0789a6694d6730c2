"""What a unit's sandbox stands on: what worked on one systemd, kernel and driver may not on another.

Contract: `ground()` returns {"systemd", "kernel", "driver"}, texts (driver: null without NVIDIA's). Changes
nothing. Python 3.8, standard library.
"""

from __future__ import annotations

import os
import subprocess
from typing import Dict, Optional  # the contract is Python 3.8, whose own are typing's


def ground() -> Dict[str, Optional[str]]:
    return {"systemd": systemd(), "kernel": os.uname().release, "driver": driver()}


def systemd() -> str:
    """Such as "257 (257.13-1~deb13u1)"; empty where it cannot be asked."""
    try:
        done = subprocess.run(["systemctl", "--version"], stdout=subprocess.PIPE, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.partition("\n")[0].replace("systemd ", "", 1)


def driver() -> Optional[str]:
    try:
        with open("/sys/module/nvidia/version") as file:
            return file.read().strip()
    except OSError:
        return None
