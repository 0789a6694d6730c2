"""Who may open the device nodes of this host's GPUs, so that a server of an ordinary user can.

Contract: a module of probe.py and survey.py. `groups(NODES)` are the groups by which nodes that are not open to
everybody can be opened, by name, or by number where the host has no name for it, as in containers; `problems(NODES)`
are sentences about nodes that no group opens. Reads only. Python 3.8, the standard library; common.py and
probe_files.py beside it.
"""

from __future__ import annotations

import grp
import re
from os import stat
from typing import Dict, Iterator, List, Sequence, Tuple

from common import USER
from probe_files import at, read

NVIDIA = ("nvidia[0-9]*", "nvidiactl", "nvidia-uvm")
OTHERS = ("kfd", "dri/renderD*")
NOBODY = 65534  # whom a container shows as the owner of what it has no number for
READ_WRITE = 0o006  # of the mode, for everybody


def groups(nodes: Sequence[str]) -> List[str]:
    """Groups by which these nodes of /dev can be opened, where everybody cannot; NVIDIA's also by what its driver is to
    make them with, since they exist only after its first use."""
    found = [group for _, mode, group in owners(nodes) if mode & 0o060 == 0o060]
    if nodes == NVIDIA:
        # The services' user may have been put into it by hand: then the unit need not name it, and does not change.
        found = [group for group in (*found, *driver_group()) if not has_our_user(group)]
    return sorted({name_of(group) for group in found if group not in (0, NOBODY)})


def owners(nodes: Sequence[str]) -> Iterator[Tuple[str, int, int]]:
    """Path, mode and group of each of the nodes that are not open to everybody."""
    for pattern in nodes:
        for path in sorted(at("/dev").glob(pattern)):
            try:
                status = stat(path)
            except OSError:
                continue
            if not path.is_dir() and status.st_mode & READ_WRITE != READ_WRITE:
                yield f"/dev/{path.relative_to(at('/dev'))}", status.st_mode & 0o777, status.st_gid


def driver_group() -> List[int]:
    """The group that NVIDIA's driver gives its nodes, where they are not for everybody (NVreg_DeviceFileGID)."""
    told: Dict[str, str] = dict(re.findall(r"^(DeviceFile\w+): (\d+)$", read(at("/proc/driver/nvidia/params")), re.M))
    mode, group = int(told.get("DeviceFileMode", 0o666)), int(told.get("DeviceFileGID", 0))
    return [group] if mode & READ_WRITE != READ_WRITE and mode & 0o060 == 0o060 else []


def has_our_user(group: int) -> bool:
    try:
        return USER in grp.getgrgid(group).gr_mem
    except KeyError:
        return False


def name_of(group: int) -> str:
    try:
        return grp.getgrgid(group).gr_name
    except KeyError:
        return str(group)


def problems(nodes: Sequence[str]) -> List[str]:
    """Those of the nodes that a server cannot open, whatever groups it has, with the way out."""
    shut = [(path, mode, group) for path, mode, group in owners(nodes)
            if group in (0, NOBODY) or mode & 0o060 != 0o060]  # fmt: skip
    return [
        f"no permission: {path} has mode {mode:04o} and group {name_of(group)}, so only root may open it: give it a "
        'group with read and write (a udev rule such as GROUP="render", MODE="0660"; in a container the number of a '
        "group of its own, as gid= of LXC's dev0)"
        for path, mode, group in shut
    ]
