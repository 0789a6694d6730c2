"""The versions that a unit's hardening depends on: it may work with one systemd, kernel and driver and not with others.

Contract: `ground()` returns {"systemd", "kernel", "driver"}, texts (driver: null without NVIDIA's). Changes
nothing. Python 3.8, standard library; common.py beside it.
"""

from __future__ import annotations

import os
from typing import Dict, Optional  # the contract is Python 3.8, whose own are typing's

from common import output_of


def ground() -> Dict[str, Optional[str]]:
    return {"systemd": systemd(), "kernel": os.uname().release, "driver": driver()}


def systemd() -> str:
    """Such as "257 (257.13-1~deb13u1)"; empty where it cannot be asked."""
    return output_of(["systemctl", "--version"]).partition("\n")[0].replace("systemd ", "", 1)


def driver() -> Optional[str]:
    try:
        with open("/sys/module/nvidia/version") as file:
            return file.read().strip()
    except OSError:
        return None
