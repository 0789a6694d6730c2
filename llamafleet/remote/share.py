"""Serve verified files of this host to the other hosts of its site, while a run lasts.

Contract: `share.py serve SPEC.json SECRET`, where SPEC has

    {"run": the id of the run that holds the host's lock, "address", "port": of this host,
     "allowed": [addresses of the other hosts],
     "files": [{"path", "sha256", "size_bytes"}, ...]}      those that are to be served now

and SECRET is a file (0600) with {"nginx.conf", "certificate", "key"}, texts. It lists the pieces of each file, of which
it reads all bytes, and starts the server unless it runs for this run: nginx in `llamafleet-share.service`, with a user
of its own; with another `nginx.conf` it is started again. That names all files that this run will have here; one of
which no list was made is not asked for.
Prints progress; a file that is not what its name says is not served, with a line `note: `. Exit 0 the server answers;
1 it does not, and the last line begins with `error: `.

`share.py apart PORT ADDRESS...` prints {"apart": [those of the addresses that this host does not reach]}: where the
connection is refused it reaches the other one, whose server may start later.

`share.py watch RUN` ends when that run no longer holds the host's lock; it is the service on which the server depends,
so that this ends too. `share.py end` ends both. Root, systemd 247 or later, nginx; Python 3.8, the standard library;
common.py, lock.py and pieces.py beside it.

Decision 25: docs/decisions/0025-one-download-for-a-site.md.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Dict, List

import lock
import pieces
from common import ETC, RUN, read_json, replace_file, sha256, show, write_json
from pieces import CREDENTIALS, LISTS, SERVER, SERVER_RUN

NGINX = "/usr/sbin/nginx"
# Between two looks whether the run still holds the lock.
WATCH_SECONDS = 10.0
# Until nginx answers; it has no more to do than to read its configuration.
START_SECONDS = 15.0
LONGEST_SECONDS = 7 * 86400
# Until a host of the same site answers, or refuses; how many are tried at once.
REACH_SECONDS, MOST_TRIES = 3.0, 64
WATCHER = "llamafleet-share-watch.service"  # ends the server with its run
SECRETS = ("nginx.conf", "certificate", "key")


class Failed(Exception):
    """The files are not served; the text says why."""


def say(text: str) -> None:
    print(text, flush=True)


def serve(spec: Dict[str, Any], secrets: Dict[str, str]) -> None:
    """As the contract says. Raises Failed, OSError and SubprocessError."""
    if not os.path.exists(NGINX):
        raise Failed(f"{NGINX} is not there: install the package nginx")
    wanted = {"run": spec["run"], "configuration": sha256(secrets["nginx.conf"].encode())}
    before = read_json(f"{LISTS}/run.json")
    is_there = before == wanted and show(SERVER, "ActiveState").get("ActiveState") == "active"
    if not is_there:
        stop()
    if before.get("run") != spec["run"]:  # its lists do not show that the files are still as they were
        shutil.rmtree(LISTS, ignore_errors=True)
    os.makedirs(LISTS, mode=0o755, exist_ok=True)
    for file in spec["files"]:
        listed(file["path"], file["sha256"], file["size_bytes"])
    if not is_there:
        start(spec, secrets)
        write_json(f"{LISTS}/run.json", wanted)
    await_server(spec["address"], spec["port"])
    say(f"serving {len(spec['files'])} files at port {spec['port']}")


def listed(path: str, sha256: str, size_bytes: int) -> bool:
    """Whether the file is what it should be, and its pieces are listed now."""
    target = f"{LISTS}/{sha256}.pieces"
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


def start(spec: Dict[str, Any], secrets: Dict[str, str]) -> None:
    """The server, and what ends it with its run."""
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


def watcher(run: str) -> List[str]:
    """The command that starts what ends the server with its run."""
    program = [sys.executable, "-s", "-E", "-B", os.path.abspath(__file__), "watch", run]
    limits = ["Type=exec", f"RuntimeMaxSec={LONGEST_SECONDS}", "MemoryMax=128M", "TasksMax=8", "NoNewPrivileges=yes",
              "ProtectSystem=strict", "ProtectHome=yes", "PrivateTmp=yes", "PrivateDevices=yes", "PrivateNetwork=yes",
              "CapabilityBoundingSet=", "LimitCORE=0"]  # fmt: skip
    return ["systemd-run", "--quiet", "--collect", f"--unit={WATCHER}",
            *(f"--property={one}" for one in limits), *program]  # fmt: skip


def server(allowed: List[str], private: str) -> List[str]:
    """The command that starts nginx: no user of the host's, no other file of ours, no other peer than `allowed`."""
    limits = [
        "Type=exec", f"BindsTo={WATCHER}", f"After={WATCHER}", f"RuntimeMaxSec={LONGEST_SECONDS}",
        "DynamicUser=yes", f"RuntimeDirectory={os.path.basename(SERVER_RUN)}", "RuntimeDirectoryMode=0700",
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
    return ["systemd-run", "--quiet", "--collect", f"--unit={SERVER}", *(f"--property={one}" for one in limits),
            NGINX, "-c", f"{CREDENTIALS}/nginx.conf"]  # fmt: skip


def await_server(address: str, port: int) -> None:
    """Raises Failed where nothing listens there."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if listens(address, port):
            return
        if show(SERVER, "ActiveState").get("ActiveState") != "active":
            break
        time.sleep(0.2)
    raise Failed(f"nginx does not answer at port {port}: journalctl -u {SERVER} has the reason")


def listens(address: str, port: int) -> bool:
    """Whether a socket of this host listens there. The kernel's own list is read, since the server answers the other
    hosts alone."""
    packed = ipaddress.ip_address(address).packed
    words = (packed[at : at + 4] for at in range(0, len(packed), 4))
    place = "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words) + f":{port:04X}"
    for path in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError), open(path) as file:
            for line in file.readlines()[1:]:
                local, state = line.split()[1], line.split()[3]
                if state == "0A" and local == place:  # TCP_LISTEN
                    return True
    return False


def apart(port: int, addresses: List[str]) -> List[str]:
    """Those of the addresses from which nothing comes back."""
    with ThreadPoolExecutor(MOST_TRIES) as pool:
        tries = {address: pool.submit(is_reached, address, port) for address in addresses}
    return [address for address, is_there in tries.items() if not is_there.result()]


def is_reached(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), REACH_SECONDS).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return True


def stop() -> None:
    for unit in (SERVER, WATCHER):
        subprocess.run(["systemctl", "stop", unit], stderr=subprocess.DEVNULL)  # it may not be there
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{LISTS}/run.json")


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
        elif argv[0] == "apart":
            print(json.dumps({"apart": apart(int(argv[1]), argv[2:])}))
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
