"""What a server of this host needs at a boot: units that come up before it, device nodes, and their groups.

Contract: a module of survey.py, verify.py and hardening_trial.py. `enabled_units()`, `node_groups()` and `minors()`
read and change nothing; `make_nodes()` loads NVIDIA's driver and makes its device nodes, where the host has
nvidia-modprobe. Python 3.8, standard library; common.py beside it.
"""

from __future__ import annotations

import glob
import grp
import os
import re
import stat
import subprocess
from fnmatch import fnmatchcase
from typing import Dict, List, Set

from common import USER, listing, read_file

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
# Device nodes that a server opens, by who makes them. Jetson has NVIDIA's at the names of the third line.
NODES = {
    "nvidia": ("nvidia[0-9]*", "nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-caps/nvidia-cap[0-9]*",
               "nvmap", "nvhost-*", "nvgpu/*/*"),
    "dri": ("dri/card[0-9]*", "dri/renderD[0-9]*", "kfd"),
}  # fmt: skip


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


def node_groups() -> Dict[str, List[str]]:
    """By kind of device node the groups that may open nodes which others may not: names, or numbers without a name.
    Groups that the services' user is a member of are left out."""
    found = {kind: set() for kind in NODES}  # type: Dict[str, Set[int]]
    for kind, patterns in NODES.items():
        for path in (path for pattern in patterns for path in glob.glob(f"{ROOT}/dev/{pattern}")):
            try:
                node = os.stat(path)
            except OSError:
                continue
            if is_node(node.st_mode) and needs_group(node.st_mode):
                found[kind].add(node.st_gid)
    # What the driver gives to nodes that it has not made yet.
    params = dict(re.findall(r"^(\w+): (\d+)$", text(f"{ROOT}/proc/driver/nvidia/params"), re.MULTILINE))
    if "DeviceFileMode" in params and needs_group(int(params["DeviceFileMode"])):
        found["nvidia"].add(int(params.get("DeviceFileGID", "0")))
    return {kind: sorted(group_name(one) for one in groups if one and not is_member(one))
            for kind, groups in found.items()}  # fmt: skip


def is_node(mode: int) -> bool:
    return stat.S_ISCHR(mode)


def needs_group(mode: int) -> bool:
    """Whether members of the node's group may read and write it, and others may not."""
    return mode & 0o060 == 0o060 and mode & 0o006 != 0o006


def group_name(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def is_member(number: int) -> bool:
    try:
        return USER in grp.getgrgid(number).gr_mem
    except KeyError:
        return False


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
