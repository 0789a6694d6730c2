"""Serve verified files of this host to the other hosts of its site, while a run lasts.

Contract: `share.py serve SPEC.json SECRET`, where SPEC has

    {"run": the id of the run that holds the host's lock, "port": of this host,
     "allowed": [addresses of the other hosts],
     "files": [{"path", "sha256", "size_bytes"}, ...]}      those that are to be served now

and SECRET is a file (0600) with {"nginx.conf", "certificate", "key"}, texts. It lists the pieces of each file, of which
it reads all bytes, and starts the server unless it runs for this run: nginx in `llamafleet-share.service`, with a user
of its own. `nginx.conf` names all files that this run will have here; one of which no list was made is not asked for.
Prints progress; a file that is not what its name says is not served, with a line `note: `. Exit 0 the server answers;
1 it does not, and the last line begins with `error: `.

`share.py watch RUN` ends when that run no longer holds the host's lock; it is the service on which the server depends,
so that this ends too. `share.py end` ends both. Root, systemd 247 or later, nginx; Python 3.8, the standard library;
common.py, lock.py and pieces.py beside it.

Decision 25: docs/decisions/0025-one-download-for-a-site.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from typing import Any, Dict, List

import lock
import pieces
from common import (
    ETC,
    RUN,
    SHARE_CREDENTIALS,
    SHARE_RUN,
    SHARE_UNIT,
    SHARE_WATCH_UNIT,
    SHARED,
    read_json,
    replace_file,
    show,
    write_json,
)  # fmt: skip

NGINX = "/usr/sbin/nginx"
# Between two looks whether the run still holds the lock.
WATCH_SECONDS = 10.0
# Until nginx answers; it has no more to do than to read its configuration.
START_SECONDS = 15.0
LONGEST_SECONDS = 7 * 86400
SECRETS = ("nginx.conf", "certificate", "key")


class Failed(Exception):
    """The files are not served; the text says why."""


def say(text: str) -> None:
    print(text, flush=True)


def serve(spec: Dict[str, Any], secrets: Dict[str, str]) -> None:
    """As the contract says. Raises Failed, OSError and SubprocessError."""
    os.makedirs(SHARED, mode=0o755, exist_ok=True)
    for file in spec["files"]:
        listed(file["path"], file["sha256"], file["size_bytes"])
    if not is_serving(spec["run"]):
        start(spec, secrets)
    await_server(spec["port"])
    say(f"serving {len(spec['files'])} files at port {spec['port']}")


def listed(path: str, sha256: str, size_bytes: int) -> bool:
    """Whether the file is what it should be, and its pieces are listed now."""
    target = f"{SHARED}/{sha256}.pieces"
    if os.path.exists(target):
        return True
    say(f"listing the pieces of {path}")
    try:
        found, sums = pieces.of(path)
    except OSError as error:
        say(f"note: {path} is not served: {error.strerror}")
        return False
    if found != sha256:
        say(f"note: {path} is damaged, and not served: it has sha256 {found}, should have {sha256}. Remove "
            f"{path}.verified and deploy: the run reads it and downloads it again")  # fmt: skip
        return False
    replace_file(target, pieces.text(sha256, size_bytes, sums).encode())
    return True


def is_serving(run: str) -> bool:
    started = read_json(f"{SHARED}/run.json").get("run")
    return started == run and show(SHARE_UNIT, "ActiveState").get("ActiveState") == "active"


def start(spec: Dict[str, Any], secrets: Dict[str, str]) -> None:
    """The server, and what ends it with its run. What an earlier run left is ended first."""
    if not os.path.exists(NGINX):
        raise Failed(f"{NGINX} is not there: install the package nginx")
    stop()
    subprocess.run(watcher(spec["run"]), check=True)
    private = f"{RUN}/share-secrets"
    shutil.rmtree(private, ignore_errors=True)
    os.mkdir(private, 0o700)
    try:
        for name in SECRETS:
            replace_file(f"{private}/{name}", secrets[name].encode(), 0o600)
        subprocess.run(server(spec["allowed"], private), check=True)
    finally:
        shutil.rmtree(private)  # systemd has read them
    write_json(f"{SHARED}/run.json", {"run": spec["run"]})


def watcher(run: str) -> List[str]:
    """The command that starts what ends the server with its run."""
    program = [sys.executable, "-s", "-E", "-B", os.path.abspath(__file__), "watch", run]
    limits = ["Type=exec", f"RuntimeMaxSec={LONGEST_SECONDS}", "MemoryMax=128M", "TasksMax=8", "NoNewPrivileges=yes",
              "ProtectSystem=strict", "ProtectHome=yes", "PrivateTmp=yes", "PrivateDevices=yes", "PrivateNetwork=yes",
              "CapabilityBoundingSet=", "LimitCORE=0"]  # fmt: skip
    return ["systemd-run", "--quiet", "--collect", f"--unit={SHARE_WATCH_UNIT}",
            *(f"--property={one}" for one in limits), *program]  # fmt: skip


def server(allowed: List[str], private: str) -> List[str]:
    """The command that starts nginx: no user of the host's, no other file of ours, no other peer than `allowed`."""
    limits = [
        "Type=exec", f"BindsTo={SHARE_WATCH_UNIT}", f"After={SHARE_WATCH_UNIT}", f"RuntimeMaxSec={LONGEST_SECONDS}",
        "DynamicUser=yes", f"RuntimeDirectory={os.path.basename(SHARE_RUN)}", "RuntimeDirectoryMode=0700",
        *(f"LoadCredential={name}:{private}/{name}" for name in SECRETS),
        "IPAddressDeny=any", *(f"IPAddressAllow={address}" for address in allowed),
        f"InaccessiblePaths=-{ETC}", "NoNewPrivileges=yes", "CapabilityBoundingSet=",
        "RestrictAddressFamilies=AF_INET AF_INET6",
        "RestrictNamespaces=yes", "RestrictRealtime=yes", "RestrictSUIDSGID=yes", "LockPersonality=yes",
        "MemoryDenyWriteExecute=yes", "SystemCallArchitectures=native", "SystemCallFilter=@system-service",
        "SystemCallErrorNumber=EPERM", "ProtectSystem=strict", "ProtectHome=yes", "PrivateTmp=yes",
        "PrivateDevices=yes", "PrivateMounts=yes", "ProtectKernelTunables=yes", "ProtectKernelModules=yes",
        "ProtectKernelLogs=yes",
        "ProtectControlGroups=yes", "ProtectClock=yes", "ProtectHostname=yes", "ProtectProc=invisible",
        # A service of the host comes first at the CPU and the disk.
        "Nice=10", "CPUWeight=20", "IOWeight=20", "OOMScoreAdjust=500", "MemoryMax=512M", "TasksMax=64", "LimitCORE=0",
        "UMask=0077",
    ]  # fmt: skip
    return ["systemd-run", "--quiet", "--collect", f"--unit={SHARE_UNIT}", *(f"--property={one}" for one in limits),
            NGINX, "-c", f"{SHARE_CREDENTIALS}/nginx.conf"]  # fmt: skip


def await_server(port: int) -> None:
    """Raises Failed where nothing listens at the port of any address of this host."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if listens(port):
            return
        if show(SHARE_UNIT, "ActiveState").get("ActiveState") != "active":
            break
        time.sleep(0.2)
    raise Failed(f"nginx does not answer at port {port}: journalctl -u {SHARE_UNIT} has the reason")


def listens(port: int) -> bool:
    """Whether a socket of this host listens at the port, by any address."""
    for path in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError), open(path) as file:
            for line in file.readlines()[1:]:
                local, state = line.split()[1], line.split()[3]
                if state == "0A" and int(local.rpartition(":")[2], 16) == port:  # TCP_LISTEN
                    return True
    return False


def stop() -> None:
    for unit in (SHARE_UNIT, SHARE_WATCH_UNIT):
        subprocess.run(["systemctl", "stop", unit], stderr=subprocess.DEVNULL)  # it may not be there
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{SHARED}/run.json")


def watch(run: str) -> None:
    """Returns when the run no longer holds the host's lock."""
    while True:
        holder = lock.read()
        if holder is None or holder["run"] != run:
            return
        time.sleep(WATCH_SECONDS)


def main(argv: List[str]) -> int:
    try:
        if argv[0] == "serve":
            with open(argv[1]) as file, open(argv[2]) as secret:
                serve(json.load(file), json.load(secret))
        elif argv[0] == "watch":
            watch(argv[1])
        else:
            stop()
    except (Failed, OSError, subprocess.SubprocessError) as error:
        say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
