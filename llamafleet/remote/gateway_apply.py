"""Put a new configuration of this host's gateway into service, without dropping a connection.

Contract: `gateway_apply.py show` prints {"version": HAProxy's or null, "digest": of the configuration in service or
null, "active", "enabled", "unit": the unit's SHA-256 or null, "servers": the record in servers.json or {}} and changes
nothing. `gateway_apply.py apply STAGED DIGEST` takes the staged files (a configuration with what it names, and the
unit `llamafleet-gateway.service`), checks them with `haproxy -c`, and reloads HAProxy or starts it. Prints progress,
with `note: ` before what the operator should know; the last line of a failure begins with `error: `. Exit 0 the
gateway runs with this configuration; 1 failed, and it runs with the one that it had. Killed at any point it can be run
again. Root, systemd, HAProxy 2.4 or later; the standard library, Python 3.8; common.py, gateway_admin.py and staged.py
beside it.

Decision 24: docs/decisions/0024-a-gateway-of-standard-parts.md.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from typing import Any, Dict, List, Mapping, Optional

import common
import gateway_admin
import staged
from common import listing, output_of, read_file, read_json, replace_file, replace_link
from gateway_admin import Failed

HAPROXY = "haproxy"
# The oldest that has all that the configuration names: `json_query`, `http-request wait-for-body` and `set-timeout`.
OLDEST = (2, 4)
# Until a new process answers with the new configuration: it reads it within a second.
START_SECONDS, POLL_SECONDS = 20.0, 0.2
# Until the checks of the servers' health have said something: one every 2 s.
CHECK_SECONDS = 5.0
NO_ANSWER = ("L4TOUT", "L4CON")  # HAProxy's words for a server that cannot be reached
REFUSED_KEY = ("401", "403")


def say(text: str) -> None:
    print(text, flush=True)


def unit_path() -> str:
    return f"{common.UNITS}/{common.GATEWAY_UNIT}"


def version() -> Optional[str]:
    """HAProxy's version; None where it is not installed."""
    found = re.search(r"[Vv]ersion (\d+\.\d+[\w.-]*)", output_of([HAPROXY, "-v"]))
    return found.group(1) if found else None


def show() -> Dict[str, Any]:
    """As the contract says."""
    unit = read_file(unit_path())
    return {
        "version": version(),
        "digest": staged.in_service(common.GATEWAY),
        "active": staged.is_so("is-active", common.GATEWAY_UNIT),
        "enabled": staged.is_so("is-enabled", common.GATEWAY_UNIT),
        "unit": common.sha256(unit) if unit is not None else None,
        "servers": read_json(f"{staged.link(common.GATEWAY)}/servers.json"),
    }


def apply(arrived: str, digest: str) -> None:
    """Raises `Failed`, OSError, and CalledProcessError of systemctl."""
    found = version()
    if found is None:
        raise Failed("HAProxy is not installed: no `haproxy` is on the PATH")
    if tuple(int(number) for number in re.findall(r"\d+", found)[:2]) < OLDEST:
        raise Failed(f"HAProxy is {found}, and {'.'.join(map(str, OLDEST))} or later is needed: let the gateway be a "
                     "host with a newer distribution")  # fmt: skip
    folder, old = staged.take(common.GATEWAY, arrived, digest), show()
    check(f"{folder}/haproxy.cfg")
    unit = read_file(f"{folder}/{common.GATEWAY_UNIT}") or b""
    new_unit = read_file(unit_path()) != unit
    if new_unit:
        replace_file(unit_path(), unit)
        common.systemctl("daemon-reload")
    replace_link(staged.link(common.GATEWAY), digest)
    try:
        reload_or_start(folder, digest)
    except (Failed, subprocess.CalledProcessError) as failed:
        put_back(old["digest"], digest, str(failed))
    if not staged.is_so("is-enabled", common.GATEWAY_UNIT):
        common.systemctl("enable", "--quiet", common.GATEWAY_UNIT)
    remove_others(digest)
    if new_unit and old["active"]:
        say(f"note: the unit of the gateway is new: it counts from its next start (systemctl restart "
            f"{common.GATEWAY_UNIT}, which ends the replies that run)")  # fmt: skip
    tell_of_servers()


def check(config: str) -> None:
    """Raises `Failed` with what HAProxy finds wrong, and removes the folder."""
    done = subprocess.run([HAPROXY, "-c", "-f", config], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True)  # fmt: skip
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if "[ALERT]" in line] or done.stdout.splitlines()
        said = " | ".join(lines[-5:])
        if os.path.basename(os.path.dirname(config)) != staged.in_service(common.GATEWAY):
            shutil.rmtree(os.path.dirname(config), ignore_errors=True)
        raise Failed(f"haproxy -c refuses the configuration, and the gateway stays as it is: {said}")


def reload_or_start(folder: str, digest: str) -> None:
    """Let HAProxy run with the configuration. Raises `Failed` and CalledProcessError."""
    if staged.is_so("is-active", common.GATEWAY_UNIT):
        gateway_admin.save(ports(folder))
        common.systemctl("kill", "--kill-who=main", "--signal=USR2", common.GATEWAY_UNIT)
    else:
        try:
            common.systemctl("restart", common.GATEWAY_UNIT)
        except subprocess.CalledProcessError as error:
            raise Failed(f"HAProxy does not start: {journal()}") from error
    end = time.monotonic() + START_SECONDS
    while running() != digest:
        if time.monotonic() > end:
            raise Failed(f"HAProxy does not run with the new configuration after {START_SECONDS:.0f} s: {journal()}")
        time.sleep(POLL_SECONDS)


def ports(folder: str) -> Dict[gateway_admin.Place, int]:
    entries = read_json(f"{folder}/servers.json").get("servers") or {}
    return {gateway_admin.place(entry): entry["port"] for entry in entries.values()}


def running() -> Optional[str]:
    """The digest of the configuration that takes new connections; None where HAProxy does not answer."""
    try:
        found = re.search(r"^[Dd]escription: (\w+)", gateway_admin.ask("show info"), re.M)
    except Failed:
        return None
    return found.group(1) if found else None


def journal() -> str:
    lines = output_of(["journalctl", "--quiet", "--no-pager", "--output=cat", "--lines=30", "-u", common.GATEWAY_UNIT])
    told = [line for line in lines.splitlines() if "[ALERT]" in line]
    return " | ".join(told[-3:]) or f"see journalctl -u {common.GATEWAY_UNIT}"


def put_back(old: Optional[str], digest: str, why: str) -> None:
    """The configuration from before is in service again. Raises `Failed` with why the new one is not."""
    if old is None or not os.path.isdir(f"{common.GATEWAY}/{old}"):
        common.systemctl("stop", common.GATEWAY_UNIT, check=False)
        os.unlink(staged.link(common.GATEWAY))
        shutil.rmtree(f"{common.GATEWAY}/{digest}", ignore_errors=True)
        raise Failed(f"{why}; the gateway is stopped, it had no configuration before")
    replace_link(staged.link(common.GATEWAY), old)
    try:
        reload_or_start(f"{common.GATEWAY}/{old}", old)
    except (Failed, subprocess.CalledProcessError) as failed:
        raise Failed(f"{why}; and the configuration from before does not run either: {failed}") from failed
    if old != digest:
        shutil.rmtree(f"{common.GATEWAY}/{digest}", ignore_errors=True)
    raise Failed(f"{why}; the gateway runs with the configuration that it had")


def remove_others(digest: str) -> None:
    """Older configurations: a process that still ends its replies has read its own long ago."""
    for name in listing(common.GATEWAY):
        path = f"{common.GATEWAY}/{name}"
        if name not in (digest, "current") and os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)


def tell_of_servers() -> None:
    """Note the servers that get no requests, with what is known of the reason."""
    asked = {name for name, entry in gateway_admin.places().items() if not entry.get("on_demand")}
    end = time.monotonic() + CHECK_SECONDS
    while time.monotonic() < end and not all(
        is_settled(one) for name, one in gateway_admin.shown().items() if name in asked
    ):
        time.sleep(POLL_SECONDS)
    for name, one in sorted(gateway_admin.shown().items()):
        if one["drained"]:
            say(f"note: {name} is drained, for {one['drained_seconds'] or 0} s still")
        elif not one["up"]:
            say(f"note: {name} gets no requests: {one['check'] or 'it does not answer'}{why(one['check'])}")


def is_settled(one: Mapping[str, Any]) -> bool:
    """Whether it is known why the server gets requests, or none."""
    return bool(one["drained"] or one["check"].startswith("L7OK"))


def why(check_said: str) -> str:
    """What to look at, by what HAProxy's check said."""
    words = check_said.split()
    if words[:1] and words[0] in NO_ANSWER:
        return "; does the server run, do its listen and allowed_clients let this gateway in, and the firewall?"
    if any(word in REFUSED_KEY for word in words):
        return "; does its api_key_file have the key that the gateway sends?"
    return "; it may be loading its model" if "503" in words else ""


def main(argv: List[str]) -> int:
    if argv[0] == "show":
        print(json.dumps(show()))
        return 0
    os.umask(0o022)
    try:
        with gateway_admin.alone():
            apply(argv[1], argv[2])
    except (Failed, OSError, subprocess.CalledProcessError) as error:
        say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
