"""Who this run is, for the hosts' locks, and whether the run that holds a lock is dead.

Decision 17: docs/decisions/0017-long-work-runs-detached-under-a-lease.md.
"""

from __future__ import annotations

import getpass
import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any

import psutil

from llamafleet.host.installed import Holder


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def pid_namespace() -> str:
    """The namespace of this machine's process numbers: containers of one host name have one each. Empty where the
    system has none."""
    try:
        return str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        return ""


def started(pid: int) -> float | None:
    """When a process began, on a clock that nobody sets; None if there is no such process."""
    stat = _read(f"/proc/{pid}/stat")
    if stat:
        return float(stat.rpartition(")")[2].split()[19])  # field 22 of proc_pid_stat(5), in ticks since the boot
    if os.path.exists("/proc/self/stat"):
        return None
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return None


def who() -> str:
    """The user and the machine, for the reader of a message."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a user without a name, as containers have
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


_THIS_RUN: dict[str, Any] = {
    "run": str(uuid.uuid4()),
    "who": who(),
    # The same machine, boot and namespace of processes: then we can see whether the holder's process is still there.
    "machine": f"{socket.gethostname()} {_read('/proc/sys/kernel/random/boot_id')}",
    "pid_namespace": pid_namespace(),
    "pid": os.getpid(),
    "pid_began": started(os.getpid()),
    "pid_started": psutil.Process().create_time(),  # what llamafleet 0.1.0 compares
    "began": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
}


def this_run() -> dict[str, Any]:
    """What others that find a host's lock held are shown of this run."""
    return _THIS_RUN


def is_ours_or_dead(holder: Holder) -> bool:
    """Whether we may take the lock from this holder: it is this run, or a process that we see to have ended.

    Of the processes of another machine, boot or container we see nothing, and of a holder that does not name its
    namespace (llamafleet 0.1.0) we do not know where it is: these lose the lock by silence alone.
    """
    if holder.run == _THIS_RUN["run"]:
        return True
    if (holder.machine, holder.pid_namespace) != (_THIS_RUN["machine"], _THIS_RUN["pid_namespace"]):
        return False
    return started(holder.pid) != holder.pid_began
