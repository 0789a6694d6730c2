"""What is left for people to do on this host: a reboot, a port that the firewall closes, a disk that is nearly full.

Contract: `left.py ASKED`, a JSON object {"ports": [numbers of TCP ports that other machines are to reach], "paths":
[paths]}; prints one JSON object {"reboot": text, empty where none is due, "closed": {port: why other machines do not
reach it}, "spaces": {...}, "model_bytes": {...}}, the last two as disks.py has them. survey.py asks `left` for the
same. It asks firewalld, ufw or nft where they are installed, each for 20 s at most, and changes nothing. Root; Python
3.8, standard library; common.py and disks.py beside it.
"""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any, Dict, Iterator, List, Optional, Sequence, Set, Tuple

import disks
from common import output_of, read_file

SECONDS = 20.0
# Files by which package managers say that a reboot is due, and the names of the packages that want it.
REBOOT = (("/run/reboot-required", "/run/reboot-required.pkgs"), ("/var/run/reboot-required", ""),
          ("/run/reboot-needed", ""))  # fmt: skip
KERNELS = "/lib/modules"
NEEDS_RESTARTING = "/usr/bin/needs-restarting"  # of dnf-utils


def left(asked: Dict[str, Any]) -> Dict[str, Any]:
    ports = [int(port) for port in asked.get("ports", [])]
    return {"reboot": reboot(), "closed": closed(ports) if ports else {},
            "spaces": disks.spaces(asked.get("paths", [])), "model_bytes": disks.model_bytes()}  # fmt: skip


# --- reboot ---------------------------------------------------------------------------------------


def reboot() -> str:
    """Why a reboot is due; empty where none is known to be."""
    for path, packages in REBOOT:
        if os.path.exists(path):
            names = sorted(set(text_of(packages).split())) if packages else []
            return f"{', '.join(names[:5])} want a reboot ({path})" if names else f"packages want a reboot ({path})"
    kernels = os.listdir(KERNELS) if os.path.isdir(KERNELS) else []
    running = os.uname().release
    if kernels and running not in kernels and not is_container():
        return f"the kernel that runs, {running}, is no longer installed, so none of its modules can be loaded"
    if os.path.exists(NEEDS_RESTARTING):
        said = output_of([NEEDS_RESTARTING, "-r"], SECONDS)
        if "Reboot is required" in said:
            return "packages want a reboot (needs-restarting -r)"
    return ""


def is_container() -> bool:
    """Its kernel is that of the host around it."""
    return output_of(["systemd-detect-virt", "--container"], SECONDS).strip() not in ("", "none")


def text_of(path: str) -> str:
    return (read_file(path) or b"").decode("utf-8", "replace")


# --- firewall -------------------------------------------------------------------------------------


def closed(ports: Sequence[int]) -> Dict[str, str]:
    """By port why other machines do not reach it; a port is left out where they do, or where that is not known."""
    for ask in (firewalld, ufw, nft):
        found = ask(ports)
        if found is not None:
            return {str(port): why for port, why in found.items()}
    return {}


def firewalld(ports: Sequence[int]) -> Optional[Dict[int, str]]:
    """None where it does not run."""
    if output_of(["firewall-cmd", "--state"], SECONDS).strip() != "running":
        return None
    active = re.findall(r"^(\S+)", output_of(["firewall-cmd", "--get-active-zones"], SECONDS), re.MULTILINE)
    zones = active or output_of(["firewall-cmd", "--get-default-zone"], SECONDS).split()
    open_ports: Set[Tuple[int, int]] = set()
    for zone in zones:
        listed = dict(re.findall(r"^\s+([a-z-]+): ?(.*)$", output_of(["firewall-cmd", f"--zone={zone}", "--list-all"],
                                                                      SECONDS), re.MULTILINE))  # fmt: skip
        if listed.get("target") == "ACCEPT":
            return {}
        open_ports.update(ranges(listed.get("ports", "")))
        for service in listed.get("services", "").split():
            open_ports.update(ranges(output_of(["firewall-cmd", f"--info-service={service}"], SECONDS)))
        rich = output_of(["firewall-cmd", f"--zone={zone}", "--list-rich-rules"], SECONDS).splitlines()
        accepted = "\n".join(rule for rule in rich if rule.rstrip().endswith("accept"))
        open_ports.update(ranges(re.sub(r'port="([\d-]+)" protocol="tcp"', r"\1/tcp", accepted)))
    zone = zones[0] if zones else "public"
    return {
        port: f"firewalld closes port {port} (zone {', '.join(zones)}): firewall-cmd --permanent --zone={zone} "
        f"--add-port={port}/tcp && firewall-cmd --reload"
        for port in ports if not any(first <= port <= last for first, last in open_ports)
    }  # fmt: skip


def ranges(text: str) -> Iterator[Tuple[int, int]]:
    """The TCP ports that a text names, as 8080/tcp or 8000-8100/tcp; ufw writes a colon."""
    for first, last in re.findall(r"\b(\d+)(?:[-:](\d+))?/tcp", text):
        yield int(first), int(last or first)


def ufw(ports: Sequence[int]) -> Optional[Dict[int, str]]:
    """None where it does not run."""
    said = output_of(["ufw", "status", "verbose"], SECONDS)
    if "Status: active" not in said:
        return None
    if re.search(r"^Default: allow \(incoming\)", said, re.MULTILINE):
        return {}
    rules = re.findall(r"^(\S.*?)\s{2,}(?:ALLOW|LIMIT)(?: IN)?\s", said, re.MULTILINE)
    allowed = {one for rule in rules for one in ranges(rule)}
    allowed |= {
        (int(number), int(number)) for rule in rules for number in re.findall(r"(?:^| )(\d+)(?: \(v6\))?$", rule)
    }
    if any(rule.startswith("Anywhere") for rule in rules):  # some machines may reach all ports
        return {}
    return {port: f"ufw closes port {port}: ufw allow {port}/tcp"
            for port in ports if not any(first <= port <= last for first, last in allowed)}  # fmt: skip


def nft(ports: Sequence[int]) -> Optional[Dict[int, str]]:
    """Of rules that no such program made; also of iptables, which writes the same tables."""
    try:
        parts = json.loads(output_of(["nft", "-j", "list", "ruleset"], SECONDS) or "{}").get("nftables", [])
    except (ValueError, AttributeError):
        return None
    chains = [one["chain"] for one in parts if isinstance(one, dict) and "chain" in one]
    dropping = [one for one in chains if one.get("hook") == "input" and one.get("policy") == "drop"]
    if not dropping:
        return None
    rules = [one["rule"] for one in parts if isinstance(one, dict) and "rule" in one]
    # A rule that accepts without a port, such as all of a network's packets, or that jumps elsewhere: not known.
    text = json.dumps(rules)
    plain = [rule for rule in rules if any(rule.get("chain") == one["name"] and rule.get("table") == one["table"]
                                           for one in dropping)]  # fmt: skip
    if any(is_wide(rule) for rule in plain):
        return {}
    first = dropping[0]
    return {
        port: f"nftables closes port {port}: nft add rule {first['family']} {first['table']} {first['name']} tcp dport "
        f"{port} accept, and write it into /etc/nftables.conf"
        for port in ports if not names_port(text, port)
    }  # fmt: skip


def is_wide(rule: Dict[str, Any]) -> bool:
    """Whether a rule lets packets pass whatever their port is, other than those of the host itself and of connections
    that are open already."""
    expressions: List[Any] = rule.get("expr", [])
    text = json.dumps(expressions)
    passes = any(isinstance(one, dict) and ({"accept", "jump", "goto", "vmap"} & one.keys()) for one in expressions)
    return passes and not re.search(r'"dport"|"state"|"lo"|icmp|"l4proto"', text)


def names_port(text: str, port: int) -> bool:
    """Whether a rule names the port, alone, in a set or in a range."""
    if re.search(rf"(?<!\d){port}(?!\d)", text):
        return True
    found = re.findall(r'"range": \[(\d+), (\d+)\]', text)
    return any(int(first) <= port <= int(last) for first, last in found)


if __name__ == "__main__":
    print(json.dumps(left(json.loads(sys.argv[1]))))
