"""What a server of this host needs at a boot: units that come up before it, and NVIDIA's device nodes.

Contract: a module of survey.py, verify.py and hardening_trial.py. `enabled_units()` and `minors()` read and change
nothing; `make_nodes()` loads NVIDIA's driver and makes its device nodes, where the host has
nvidia-modprobe. Python 3.8, standard library; common.py beside it.
"""

from __future__ import annotations

import glob
import os
import re
import subprocess
from fnmatch import fnmatchcase
from typing import Dict, List, Set

from common import listing, read_file

ROOT = ""  # for tests: in front of /dev, /etc, /proc and /usr
MODPROBE = "/usr/bin/nvidia-modprobe"
CONTROL_MINOR = 255  # of /dev/nvidiactl

UNIT_FOLDERS = ("/etc/systemd/system", "/run/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")
# Targets of a boot, in whose .wants/ and .requires/ a unit is enabled.
TARGETS = ("sysinit.target", "basic.target", "multi-user.target", "graphical.target", "network.target",
           "network-online.target", "default.target")  # fmt: skip
# Units that make a GPU usable: modules that are compiled at a boot, and daemons of the driver's.
GPU_UNITS = ("nvidia-*.service", "akmods*.service", "dkms*.service")
# Units that bring an address which no network manager configures, so that network-online.target does not wait for it.
NETWORK_UNITS = ("tailscaled*.service", "zerotier-one.service", "wg-quick@*.service", "netbird*.service",
                 "nebula*.service", "openvpn*.service", "strongswan*.service", "ipsec.service", "tinc*.service",
                 "keepalived.service", "pacemaker.service", "frr.service")  # fmt: skip


def enabled_units() -> Dict[str, List[str]]:
    """The units that a boot of this host starts and that a server may have to wait for, by kind: "gpu", "network"."""
    names: Set[str] = set()
    for folder in UNIT_FOLDERS:
        for target in TARGETS:
            for end in (".wants", ".requires"):
                names.update(listing(f"{ROOT}{folder}/{target}{end}"))
    kinds = {"gpu": GPU_UNITS, "network": NETWORK_UNITS}
    return {kind: sorted(name for name in names if any(fnmatchcase(name, one) for one in patterns))
            for kind, patterns in kinds.items()}  # fmt: skip


def minors() -> Dict[str, int]:
    """The number of each NVIDIA GPU's device node, by bus id. The driver counts in its own order."""
    found = {}
    for path in glob.glob(f"{ROOT}/proc/driver/nvidia/gpus/*/information"):
        number = re.search(r"^Device Minor:\s*(\d+)\s*$", text(path), re.MULTILINE)
        if number:
            found[os.path.basename(os.path.dirname(path)).lower()] = int(number.group(1))
    return found


def make_nodes() -> None:
    """Make the device nodes of all NVIDIA GPUs, as the unit does before it starts."""
    if not os.path.exists(MODPROBE):
        return
    subprocess.run([MODPROBE, f"-c{CONTROL_MINOR}"])  # loads the driver, which then tells its GPUs
    subprocess.run([MODPROBE, *(f"-c{number}" for number in sorted({0, *minors().values()}))])
    # With -u the numbers are those of nvidia-uvm's nodes, and no GPU's is made.
    subprocess.run([MODPROBE, "-c0", "-u"])


def text(path: str) -> str:
    return (read_file(path) or b"").decode("utf-8", "replace")
