"""Take servers out of this host's gateway for a while, put them back, and show how they are.

Contract: a server is named HOST/INSTANCE, as the inventory names the host and as its unit is named.

    gateway_admin.py show                                        all servers
    gateway_admin.py drain [--seconds N] [--even-last] NAME...   no new requests to these servers for N seconds at most
    gateway_admin.py undrain NAME...                             they get requests again
    gateway_admin.py save                                        write the servers' state for the next start or reload

The last line on stdout is a JSON object, for `show` of all servers, for `drain` and `undrain` of those named:
{NAME: {"model", "up": bool, "drained": bool, "drained_seconds": how long still, or null, "in_flight", "queued",
"check": what the last check of its health said}}. What is in flight in a process from before a reload is not counted:
the server's own /slots knows all. `save` prints nothing.

A drained server gets no new request, also of sessions that it had; its running replies end in peace. The drain is
lent: a timer of systemd ends it after N seconds (900), `drain` again lengthens it, a reload or restart of the gateway
keeps it, and a boot ends it. So nothing is drained for ever, whatever becomes of who asked.

Exit 0 done, also where it was so already; 1 failed; 3 nothing was changed, because no other server of a model would be
up (`--even-last` does it); 4 the gateway has no server of that name. Of 1, 3 and 4 the last line on stderr says why,
and begins with `error: `. Root, systemd, the standard library, Python 3.8; common.py lies beside it.

Decision 24: docs/decisions/0024-a-gateway-of-standard-parts.md.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import fcntl
import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from typing import Any, Collection, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence

import common
from common import make_folder, read_json, replace_file, write_json

SECONDS = 900
ANSWER_SECONDS = 10.0
UP = ("UP", "no check")  # how HAProxy's states of servers that get requests begin


class Failed(Exception):
    """Nothing more can be done; the text is for the operator."""

    code = 1


class Last(Failed):
    """No other server of a model would be up."""

    code = 3


class Unknown(Failed):
    """The gateway has no server of that name."""

    code = 4


class Place(NamedTuple):
    """Where HAProxy has a server: a model's backend and a name in it."""

    backend: str
    server: str


def places() -> Dict[str, Dict[str, Any]]:
    """The servers of the installed configuration by their names, as `llamafleet/fleet/haproxy.py` records them."""
    found = read_json(f"{common.GATEWAY}/current/servers.json").get("servers")
    return found if isinstance(found, dict) else {}


def place(entry: Mapping[str, Any]) -> Place:
    return Place(entry["backend"], entry["server"])


def named(names: Sequence[str]) -> Dict[str, Place]:
    """Where these servers are. Raises `Unknown`."""
    known = places()
    for name in names:
        if name not in known:
            raise Unknown(f"the gateway has no server {name}: it has {', '.join(sorted(known)) or 'none'}")
    return {name: place(known[name]) for name in names}


def ask(command: str) -> str:
    """What HAProxy answers to a command of its runtime API. Raises `Failed` where it does not."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(ANSWER_SECONDS)
            connection.connect(common.GATEWAY_SOCKET)
            connection.sendall(command.encode() + b"\n")
            parts: List[bytes] = []
            while True:
                part = connection.recv(65536)
                if not part:
                    return b"".join(parts).decode("utf-8", "replace")
                parts.append(part)
    except OSError as error:
        raise Failed(f"the gateway does not answer at {common.GATEWAY_SOCKET} ({error.strerror or error}): "
                     f"systemctl status {common.GATEWAY_UNIT}") from error  # fmt: skip


def told(command: str) -> None:
    """Tell HAProxy what succeeds in silence. Raises `Failed` with what it says otherwise."""
    answer = ask(command).strip()
    if answer:
        raise Failed(f"the gateway refuses {command!r}: {answer}")


def stats() -> Dict[Place, Dict[str, str]]:
    """HAProxy's statistics of each server. Raises `Failed`."""
    rows = csv.DictReader(ask("show stat").lstrip("# ").splitlines())
    return {Place(row["pxname"], row["svname"]): row for row in rows if row.get("type") == "2"}


def shown(names: Optional[Collection[str]] = None) -> Dict[str, Dict[str, Any]]:
    """What the contract says of these servers, or of all. Raises `Failed`."""
    lent, rows = drains(), stats()
    found = {}
    for name, entry in places().items():
        row = rows.get(place(entry), {})
        if names is None or name in names:
            found[name] = {
                "model": entry.get("model"),
                "up": is_up(row),
                "drained": row.get("status", "").startswith("MAINT"),
                "drained_seconds": max(0, round(lent[name] - now())) if name in lent else None,
                "in_flight": int(row.get("scur") or 0),
                "queued": int(row.get("qcur") or 0),
                "check": " ".join(filter(None, (row.get("check_status"), row.get("check_code"), row.get("last_chk")))),
            }
    return found


def is_up(row: Mapping[str, str]) -> bool:
    return row.get("status", "").startswith(UP)


# --- drains ----------------------------------------------------------------------------------------


def now() -> float:
    """Seconds since the boot, on a clock that nobody sets: what is lent lies in /run, which ends with the boot."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def drains() -> Dict[str, float]:
    """The servers that are drained, with the end of each drain, by `now`."""
    found = read_json(f"{common.GATEWAY_RUN}/drains.json")
    return {name: float(end) for name, end in found.items() if isinstance(end, (int, float))}


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """One change at a time."""
    make_folder(common.GATEWAY_RUN)
    with open(f"{common.GATEWAY_RUN}/lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def drain(names: Sequence[str], seconds: int, even_last: bool) -> None:
    """Raises `Failed`, and then nothing was changed."""
    wanted = named(names)
    if not even_last:
        check_others(wanted)
    drained = drains()
    try:
        for name in wanted:  # first what ends the drain
            schedule(name, seconds)
        write_json(f"{common.GATEWAY_RUN}/drains.json", {**drained, **{name: now() + seconds for name in wanted}})
        for one in wanted.values():
            told(f"set server {one.backend}/{one.server} state maint")
        save()
    except Failed:
        with contextlib.suppress(Failed):
            undrain([name for name in wanted if name not in drained])
        raise


def check_others(wanted: Mapping[str, Place]) -> None:
    """Raises `Last` where a model would have no server that is up."""
    rows, leaving = stats(), set(wanted.values())
    for name, one in wanted.items():
        others = [other for other, row in rows.items() if other.backend == one.backend and other not in leaving
                  and is_up(row)]  # fmt: skip
        if is_up(rows.get(one, {})) and not others:
            raise Last(f"{name} is the last server of {one.backend.partition(':')[2]} that is up: put another one in "
                       "first, or pass --even-last")  # fmt: skip


def undrain(names: Sequence[str]) -> None:
    """Raises `Failed`; where the gateway does not run, what it reads at its next start is set right all the same."""
    known = places()
    write_json(f"{common.GATEWAY_RUN}/drains.json", {name: end for name, end in drains().items() if name not in names})
    back = [place(known[name]) for name in names if name in known]
    forget(back)
    for name in names:
        subprocess.run(["systemctl", "stop", f"{timer(name)}.timer"], stderr=subprocess.DEVNULL)
    for one in back:
        told(f"set server {one.backend}/{one.server} state ready")
    save()


def expire(name: str) -> None:
    """End a drain whose time is over. Raises `Failed`."""
    if drains().get(name, 0.0) <= now() + 1:
        undrain([name])


def timer(name: str) -> str:
    """The name of the unit that ends a drain."""
    return f"llamafleet-gateway-undrain-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def schedule(name: str, seconds: int) -> None:
    """Let systemd end the drain. Raises `Failed`."""
    subprocess.run(["systemctl", "stop", f"{timer(name)}.timer"], stderr=subprocess.DEVNULL)
    command = ["systemd-run", "--quiet", "--collect", f"--unit={timer(name)}", f"--on-active={seconds}",
               "--timer-property=AccuracySec=1s", "--property=Restart=on-failure", "--property=RestartSec=10",
               sys.executable, "-s", "-E", "-B", os.path.abspath(__file__), "expire", name]  # fmt: skip
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise Failed(f"no timer can be set that would end the drain of {name}: {done.stderr.strip()}")


# --- the state that a reload takes over ---------------------------------------------------------------


def save(ports: Optional[Mapping[Place, int]] = None) -> None:
    """Write the state of all servers for HAProxy's next process. `ports`: those of the configuration to come, because
    HAProxy would take an old port over from the state. Raises `Failed`."""
    make_folder(common.GATEWAY_RUN)
    replace_file(common.GATEWAY_STATE, state_text(ask("show servers state"), ports or {}).encode())


def state_text(state: str, ports: Mapping[Place, int]) -> str:
    """The state with these ports, and without empty lines."""
    head = next((line.split()[1:] for line in state.splitlines() if line.startswith("# be_id")), [])
    lines = []
    for line in filter(None, state.splitlines()):
        words = line.split(" ")
        if len(words) > 1 and words[0] != "#":
            row = dict(zip(head, words))  # noqa: B905 -- `strict` is Python 3.10's
            port = ports.get(Place(row.get("be_name", ""), row.get("srv_name", "")))
            if port is not None:
                words[head.index("srv_port")] = str(port)
        lines.append(" ".join(words))
    return "\n".join(lines) + "\n"


def forget(gone: Sequence[Place]) -> None:
    """Take servers out of the written state, so that a start begins with them as the configuration says."""
    try:
        with open(common.GATEWAY_STATE, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except OSError:  # nothing was saved yet
        return
    kept = [line for line in lines if not any(line.split(" ")[1:4:2] == [*one] for one in gone)]
    replace_file(common.GATEWAY_STATE, ("\n".join(kept) + "\n").encode())


# --- the command ------------------------------------------------------------------------------------


def main(argv: List[str]) -> int:
    parser = argparse.ArgumentParser(description="Drain and show the servers of this host's gateway.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("show", "save"):
        verbs.add_parser(verb)
    for verb in ("drain", "undrain", "expire"):
        verbs.add_parser(verb).add_argument("names", nargs="+", metavar="HOST/INSTANCE")
    verbs.choices["drain"].add_argument("--seconds", type=int, default=SECONDS)
    verbs.choices["drain"].add_argument("--even-last", action="store_true")
    asked = parser.parse_args(argv)
    try:
        with alone():
            answer = act(asked)
    except (Failed, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code if isinstance(error, Failed) else 1
    if answer is not None:
        print(json.dumps(answer))
    return 0


def act(asked: argparse.Namespace) -> Optional[Dict[str, Dict[str, Any]]]:
    """Do what was asked: what is to be printed. Raises `Failed`, OSError."""
    if asked.verb == "show":
        return shown()
    if asked.verb == "save":
        save()
        return None
    if asked.verb == "expire":
        expire(asked.names[0])
        return None
    if asked.verb == "drain":
        drain(asked.names, asked.seconds, asked.even_last)
    else:
        named(asked.names)
        undrain(asked.names)
    return shown(asked.names)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
