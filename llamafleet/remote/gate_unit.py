"""Run the gate's checks in a transient unit that may do little, as a user of its own.

Part of gate.py and under its contract. The checks read what a server answers, so they run without root's rights: as a
user who exists for that time alone, with the instance's keys as credentials, the journal to read, the addresses and the
devices of the server, and nothing to write to. What they found comes back as JSON; gate.py, which is root, writes the
record. docs/hardening.md has the exposure of the unit.
"""

from __future__ import annotations

import grp
import ipaddress
import os
import subprocess
import sys
import urllib.parse
from typing import Any, Dict, List

import confined
from common import API_KEYS, TLS_CERTIFICATE, UNITS, instance_of, json_object, transient_unit

GATE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "gate.py")
# The argument by which gate.py knows that it runs in the unit.
CONFINED = "--confined"
# What the checks may take beside loading: completions of a busy server, each with its own deadline.
CHECK_SECONDS = 3600
MOST_MEMORY = "512M"  # NVML, and the answers of the server
# Lines of the server's unit that let it open its devices.
OF_DEVICES = ("DevicePolicy=", "DeviceAllow=", "SupplementaryGroups=")
# For a host on which systemd cannot start the unit: root's files, but no capability and no way to one.
WITHOUT_CAPABILITIES = ("setpriv", "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all")


class GateFailed(Exception):
    """The checks themselves ended with an error; the text is what they printed."""


def examine(argv: List[str], spec: Dict[str, Any]) -> Dict[str, Any]:
    """What `gate.examine` returns, from a process in the unit. Raises GateFailed."""
    command = [sys.executable, "-s", "-E", "-B", GATE, *argv, CONFINED]
    unit = transient_unit("start-check" if argv[0] == "start" else "gate", instance_of(spec["unit"]))
    try:
        done = confined.run(unit, command, directives(spec), spec["health_seconds"] + CHECK_SECONDS)
    except confined.NotStarted as error:
        print(f"the gate runs without its hardening, but without capabilities: {error}", file=sys.stderr)
        plain = subprocess.run([*WITHOUT_CAPABILITIES, *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        done = confined.Result(plain.returncode, plain.stdout[: confined.MOST_OUTPUT], "")
    found = json_object(done.stdout)
    if done.code == 0 and found and is_sound(found):
        return found
    raise GateFailed(done.stderr.strip()[-2000:] or f"the gate's checks ended with exit status {done.code}")


def is_sound(found: Dict[str, Any]) -> bool:
    """Whether this is what `gate.examine` returns: it comes from a process that read a server's answers."""
    verdict, record = found.get("found"), found.get("record")
    if not isinstance(verdict, dict):
        return False
    return (isinstance(verdict.get("ok"), bool) and isinstance(verdict.get("checks"), list)
            and all(isinstance(one, dict) and {"name", "ok", "expected", "found", "hint"} <= one.keys()
                    for one in verdict["checks"])
            and (record is None or isinstance(record, dict)) and isinstance(found.get("devices"), dict))  # fmt: skip


def directives(spec: Dict[str, Any]) -> List[str]:
    """The directives of the unit for a plan's `gate` object."""
    return confined.properties(
        confined.user(), f"PartOf={spec['unit']}", f"MemoryMax={MOST_MEMORY}", "MemorySwapMax=0",
        *credentials(spec), *network(spec["url"]), *devices(spec), *journal(), *processes(),
    )  # fmt: skip


def credentials(spec: Dict[str, Any]) -> List[str]:
    paths = {API_KEYS: spec.get("api_keys"), TLS_CERTIFICATE: spec.get("tls_certificate")}
    return [f"LoadCredential={name}:{path}" for name, path in paths.items() if path]


def with_credentials(spec: Dict[str, Any]) -> Dict[str, Any]:
    """The plan's `gate` object with the paths at which the unit has its keys and its certificate."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if not folder:
        return spec
    names = {"api_keys": API_KEYS, "tls_certificate": TLS_CERTIFICATE}
    return {**spec, **{key: f"{folder}/{name}" for key, name in names.items() if spec.get(key)}}


def network(url: str) -> List[str]:
    """The server's address alone, and the sockets by which systemd and the journal are asked."""
    host = str(urllib.parse.urlsplit(url).hostname).partition("%")[0]
    address = ipaddress.ip_address(host)
    return ["RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6", "IPAddressDeny=any",
            f"IPAddressAllow={'localhost' if address.is_loopback else address}"]  # fmt: skip


def devices(spec: Dict[str, Any]) -> List[str]:
    """Those of the server's unit, which the preflight has proven here: NVML needs them. None where it has no GPU."""
    if not spec["gpus"]:
        return ["PrivateDevices=yes", "MemoryDenyWriteExecute=yes"]
    try:
        with open(f"{UNITS}/{spec['unit']}") as file:
            return [line.strip() for line in file if line.startswith(OF_DEVICES)]
    except OSError:
        return []


def journal() -> List[str]:
    """The group that may read the journal, where the host has it."""
    try:
        return [f"SupplementaryGroups={grp.getgrnam('systemd-journal').gr_name}"]
    except KeyError:
        return []


def processes(mounts: str = "/proc/self/mounts") -> List[str]:
    """What it takes to read the server's command line where the host hides processes from other users: the group that
    sees them, or, where there is none, the capability."""
    with open(mounts) as file:
        options = [line.split()[3].split(",") for line in file if line.split()[1:3] == ["/proc", "proc"]]
    values = dict(one.partition("=")[::2] for one in (options[-1] if options else []))
    if values.get("hidepid", "0") in ("0", "off"):
        return []
    if values.get("gid", "0") != "0":
        return [f"SupplementaryGroups={values['gid']}"]
    return ["CapabilityBoundingSet=CAP_SYS_PTRACE", "AmbientCapabilities=CAP_SYS_PTRACE"]
