"""What a job on this host may use and write: the directives of its transient unit.

Contract: a module, no program. `for_job(name)` gives them for systemd-run's --property; the kind of a job is the first
word of its name: "build", "checkout", "fetch", "packages", "share", "toolkit", "tune", and "switch", "refresh" and
"watch" (of instances). An unknown kind has the limits of a switch. All are known to systemd 247. Python 3.8, standard
library; common.py and pieces.py lie beside it.

A service that runs beside a job comes first: work gives way to it at the CPU and the disk, ends before it when memory
runs out, and has no more memory than was free when it began. Services keep their models in files that are mapped into
memory, which the kernel counts as free; here they are not.

docs/hardening.md has the reasons and the exposure.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any, Dict, List, Optional, Sequence

from common import BUILD, ETC, JOBS, MODELS, RELEASES, RUN, SOURCE, UNITS, VAR, read_json
from pieces import BUILDS

GIB = 1 << 30
# Seconds that a job may take, by its kind. A checkout of one commit is some 30 MB, packages are some 100 MB, a CUDA
# toolkit 8 GB; a download ends itself after seven days; a liveness check is installed in a moment; a tune has a day;
# what other hosts are given is read once, 800 GB from a slow disk.
LONGEST = {"build": 12 * 3600, "checkout": 3600, "fetch": 170 * 3600, "packages": 3600, "toolkit": 4 * 3600,
           "share": 4 * 3600, "switch": 24 * 3600, "refresh": 600, "watch": 600, "tune": 26 * 3600}  # fmt: skip
# A compiler needs as much at the least, or nothing can be built on a full host.
LEAST_BYTES = GIB
# Left free for the system.
SPARE_BYTES = 512 << 20

# Work that can wait: below every service of the host.
BEHIND = ("Nice=10", "CPUWeight=20", "IOWeight=20", "OOMScoreAdjust=500")
ALWAYS = ("PrivateTmp=yes", "LimitCORE=0", "UMask=0022", "TimeoutStopSec=30")
# Of jobs that run other people's programs or read from the network. They are root's, since what they write is.
CONFINED = (
    "NoNewPrivileges=yes", "PrivateDevices=yes", "PrivateMounts=yes", "ProtectSystem=strict", "ProtectHostname=yes",
    "ProtectClock=yes",
    "ProtectKernelTunables=yes", "ProtectKernelModules=yes", "ProtectKernelLogs=yes", "ProtectControlGroups=yes",
    "RestrictNamespaces=yes", "RestrictRealtime=yes", "RestrictSUIDSGID=yes", "LockPersonality=yes",
    "SystemCallArchitectures=native", "KeyringMode=private",
)  # fmt: skip
# To write files of any owner, and to give files to the services' user; a build also runs a program as nobody.
FILES = "CapabilityBoundingSet=CAP_CHOWN CAP_DAC_OVERRIDE CAP_FOWNER"
FILES_AND_USERS = FILES + " CAP_SETUID CAP_SETGID CAP_SETPCAP"
# Of a client on the network. How names are resolved asks which addresses the host has (AF_NETLINK).
CLIENT = (FILES, "SystemCallFilter=@system-service", "SystemCallErrorNumber=EPERM", "ProtectProc=invisible",
          "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK")  # fmt: skip
# A compiler cache of the host may lie there.
CACHES = "/var/cache"


def limits(
    kind: str, build_cache: Optional[str] = None, reads_files: bool = False, stores: Sequence[str] = ()
) -> List[str]:  # fmt: skip
    """The directives of a job of this kind; `build_cache` is the folder that a build shares with other hosts. With
    `reads_files` a download takes a file of this host, wherever it lies. `stores` are folders for models on other
    disks."""
    if kind == "build":
        paths = [BUILD, SOURCE, RELEASES, CACHES, *([build_cache] if build_cache else [])]
        return [*ALWAYS, *BEHIND, *CONFINED, *writable(paths), *bounds(kind, 8192, free_bytes()),
                # A CUDA toolkit may lie in somebody's home.
                "ProtectHome=read-only", FILES_AND_USERS,
                "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6"]  # fmt: skip
    if kind == "checkout":  # by ssh too, whose keys are root's
        return [*ALWAYS, *BEHIND, *CONFINED, *CLIENT, *writable([SOURCE]), *bounds(kind, 256, 4 * GIB),
                "ProtectHome=read-only"]  # fmt: skip
    if kind == "fetch":
        return of_download(reads_files, stores)
    if kind == "share":  # it reads models and asks systemd to start a server; that has limits of its own (share.py)
        return [*ALWAYS, *BEHIND, *CONFINED, *writable([]), *bounds(kind, 256, 2 * GIB), "ProtectHome=read-only",
                "RestrictAddressFamilies=AF_UNIX"]  # fmt: skip
    if kind in ("packages", "toolkit"):  # packages write anywhere, and run scripts of their own
        return [*ALWAYS, *BEHIND, *bounds(kind, 4096, free_bytes())]
    # It asks systemd, and makes device nodes of a GPU: a sandbox as tight would have to be opened for both.
    return [*ALWAYS, "NoNewPrivileges=yes", "ProtectSystem=strict", "ProtectHome=yes", "RestrictRealtime=yes",
            "LockPersonality=yes", "SystemCallArchitectures=native",
            *writable([UNITS, ETC, VAR, *([CACHES] if kind in ("remove", "undo") else [])]),
            *bounds(kind, 1024, 4 * GIB)]  # fmt: skip


def of_download(reads_files: bool, stores: Sequence[str]) -> List[str]:
    """The directives of a job that fetches a model."""
    common = [*ALWAYS, *BEHIND, *CLIENT, *bounds("fetch", 256, 2 * GIB)]
    if reads_files:
        # Its folders are no mounts of their own, or no file outside could get a second name in them (link(2), EXDEV).
        confined = [one for one in CONFINED if not one.startswith("ProtectSystem=")]
        return [*common, *confined, "ProtectSystem=full", "ProtectHome=read-only"]
    return [*common, *CONFINED, *writable([MODELS, BUILDS, *stores]), "ProtectHome=yes"]


def writable(paths: Sequence[str]) -> List[str]:
    """Beside these and the folders for logs, ends and locks of jobs all is read-only; a missing folder is no error."""
    quoted = (path.replace("\\", "\\\\").replace('"', '\\"') for path in (*paths, JOBS, RUN))
    return ["ReadWritePaths=" + " ".join(f'"-{path}"' for path in quoted)]


def bounds(kind: str, tasks: int, memory_bytes: int) -> List[str]:
    """An end, and the most processes and memory."""
    return [f"RuntimeMaxSec={LONGEST.get(kind, LONGEST['switch'])}", f"TasksMax={tasks}", f"MemoryMax={memory_bytes}"]


def free_bytes(meminfo: str = "/proc/meminfo") -> int:
    """Memory that no process uses, nor a file that is mapped; LEAST_BYTES at least."""
    sizes = {}
    with open(meminfo) as file:
        for line in file:
            name, _, value = line.partition(":")
            sizes[name] = int(value.split()[0]) * 1024
    return max(LEAST_BYTES, sizes["MemAvailable"] - sizes["Mapped"] - SPARE_BYTES)


def for_job(name: str) -> List[str]:
    """The directives of the job of that name, whose specification, if it has one, lies in the folder of jobs. Makes the
    folders that it may write to, which it could not."""
    kind = name.partition("-")[0]
    spec = read_json(f"{JOBS}/{name}.json") if kind in ("build", "fetch") else {}
    cache = spec.get("build_cache")
    stores = stores_of(spec) if kind == "fetch" else []
    folders = {"build": (BUILD, SOURCE, RELEASES), "checkout": (SOURCE,)}.get(kind, ())
    for path in (BUILDS,) if spec.get("directory") == BUILDS else folders:
        os.makedirs(path, mode=0o755, exist_ok=True)
    if cache:
        with contextlib.suppress(OSError):  # the job says what is wrong with it
            os.makedirs(cache, mode=0o755, exist_ok=True)
    return limits(kind, cache, '"file:///' in json.dumps(spec.get("files")), stores)


def stores_of(spec: Dict[str, Any]) -> List[str]:
    """The folders outside ours that a download writes to: the one that the settings name for models, and the one to
    which the model's own folder leads. The first is made where it is missing."""
    store, directory = spec.get("store"), str(spec.get("directory"))
    found = []
    if isinstance(store, str):
        found.append(os.path.dirname(store))
        with contextlib.suppress(OSError):  # the job says what is wrong with it
            os.makedirs(found[0], mode=0o755, exist_ok=True)
    if os.path.islink(directory):
        found.append(os.path.realpath(directory))
    return found
