"""Is an instance as it was asked for and planned? See `checks.py` for how a check is made."""

from __future__ import annotations

import hashlib
import ipaddress
import json
from collections.abc import Mapping
from typing import Any

from llamafleet.remote.common import API_KEYS, INSTANCES, RELEASES, UNITS, plan_path
from tests.hosts.checks import Problem, Problems, Served, say

# A process that systemd started again within the unit's own StartLimitIntervalSec is in a loop, seconds.
LOOP_SECONDS = 1800
# linux/seccomp.h, SECCOMP_MODE_FILTER, as /proc/PID/status shows it.
SECCOMP_FILTER = 2
GATE_CHECKS = ("health", "process", "gpu memory", "devices", "api key", "context", "completion", "speed")


def plan_file(one: Served) -> Problems:
    """plan.json is there, nobody edited it, and it was made for what the inventory asks."""
    path = plan_path(one.instance.name)
    file, plan = one.facts["plan_file"], one.facts["plan"]
    if plan is None or file is None:
        yield Problem(one.where, path, "the record of what was deployed", file and "no JSON object", "run the deploy")
        return
    if (file["owner"], file["mode"]) != ("root", "0644"):
        yield Problem(one.where, path, "root 0644", f"{file['owner']} {file['mode']}")
    if identity_of(plan) != plan.get("identity"):
        yield Problem(one.where, f"identity in {path}", identity_of(plan), plan.get("identity"), "it was edited")
    if one.facts["plan_sha256"] != one.facts["good"]["plan_sha256"]:
        yield Problem(
            one.where,
            path,
            f"what last passed the gate, sha256 {say(one.facts['good']['plan_sha256'])}",
            f"sha256 {one.facts['plan_sha256']}",
        )
    if plan["release"] != one.release:
        yield Problem(one.where, "release", f"the current one, {say(one.release)}", plan["release"])
    yield from _as_asked(one, plan)


def _as_asked(one: Served, plan: Mapping[str, Any]) -> Problems:
    asked, gate = one.instance, plan["gate"]
    pairs = [
        ("model", asked.source, plan["source"]),
        ("port", asked.port, int(gate["url"].rsplit(":", 1)[-1])),
        ("slots", asked.slots or gate["slots"], gate["slots"]),  # unset: the plan's choice
        ("an API key is asked", asked.api_key_file is not None, gate["api_keys"] is not None),
    ]
    for what, expected, found in pairs:
        if expected != found:
            yield Problem(one.where, f"{what} in plan.json", expected, found, "the inventory changed: deploy again")
    if asked.context_tokens is not None and gate["context_tokens"] < asked.context_tokens:
        yield Problem(
            one.where,
            "context in plan.json",
            f"at least {asked.context_tokens} tokens a slot",
            f"{gate['context_tokens']} tokens",
        )


def identity_of(plan: Mapping[str, Any]) -> str:
    """The hash that a plan must carry: of all but itself, how it was decided, and how the host tries and watches it."""
    left_out = ("identity", "plan", "preflight", "inputs", "verified", "trial", "batch_tokens")
    record = {key: value for key, value in plan.items() if key not in left_out}
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def models(one: Served) -> Problems:
    """Every file of the model is whole, and root's alone to change."""
    if not one.plan.get("files"):
        yield Problem(one.where, "files of the model in plan.json", "at least one", None)
    for file in one.plan.get("files", []):
        found = one.facts["models"].get(file["path"])
        if found is None:
            yield Problem(one.where, file["path"], f"a model of {file['size_bytes']} bytes", None)
            continue
        if file["size_bytes"] not in (None, found["size_bytes"]):
            yield Problem(one.where, file["path"], f"{file['size_bytes']} bytes", f"{found['size_bytes']} bytes")
        # Read now, or (quick) noted when it was verified. A source without a checksum has only the note.
        read, noted = found["sha256"] or found["noted_sha256"], file["sha256"] or found["noted_sha256"]
        if read is None or read != noted:
            yield Problem(
                one.where,
                file["path"],
                f"sha256 {noted or 'noted in .verified'}",
                read,
                "without a valid note: the file changed since it was verified" if not read else "",
            )
        if found["owner"] != "root" or int(found["mode"], 8) & 0o022:
            yield Problem(
                one.where,
                file["path"],
                "root's, and nobody else may write",
                f"{found['owner']} {found['mode']}",
            )


def unit(one: Served) -> Problems:
    """The unit file is the one that was made for this plan and passed the gate; no drop-in changes it."""
    path, found, state = f"{UNITS}/{one.instance.unit}", one.facts["unit"], one.facts["state"]
    if found is None:
        yield Problem(one.where, path, "the unit", None, "run the deploy")
        return
    if (found["owner"], found["gid"], found["mode"]) != ("root", 0, "0644"):
        yield Problem(
            one.where, path, "root, group 0, 0644", f"{found['owner']}, group {found['gid']}, {found['mode']}"
        )
    if found["identity"] is None or found["identity"] != one.plan.get("identity"):
        yield Problem(one.where, f"plan in {path}", say(one.plan.get("identity")), found["identity"])
    if found["sha256"] != one.facts["good"]["unit_sha256"]:
        yield Problem(
            one.where,
            path,
            f"what last passed the gate, sha256 {say(one.facts['good']['unit_sha256'])}",
            f"sha256 {found['sha256']}",
            "edited by hand? deploy again",
        )
    for name, expected in (("DropInPaths", ""), ("FragmentPath", path), ("NeedDaemonReload", "no")):
        if state.get(name) != expected:
            yield Problem(one.where, f"{name} of {one.instance.unit}", say(expected), state.get(name))


def running(one: Served) -> Problems:
    """The unit runs, will run after a reboot, and is not being started over and over."""
    state, process = one.facts["state"], one.facts["process"]
    for name, expected in (("ActiveState", "active"), ("SubState", "running"), ("UnitFileState", "enabled")):
        if state.get(name) != expected:
            yield Problem(
                one.where,
                f"{name} of {one.instance.unit}",
                expected,
                state.get(name),
                f"its log: journalctl -u {one.instance.unit}",
            )
    restarts, age = int(state.get("NRestarts") or 0), process["age_seconds"] if process else 0
    if restarts and age < LOOP_SECONDS:
        yield Problem(
            one.where,
            "restarts",
            f"none in the last {LOOP_SECONDS} s",
            f"{restarts}, the last {age} s ago",
            f"why: journalctl -u {one.instance.unit}",
        )


def process(one: Served) -> Problems:
    """What runs is the planned release's program, as its own user and not as root."""
    found = one.facts["process"]
    if found is None:
        yield Problem(one.where, "process", "a running llama-server", None)
        return
    release = one.plan.get("release")
    inside = f"{RELEASES}/{release}/"
    if release is None or not str(found["exe"]).startswith(inside):
        yield Problem(one.where, f"program of pid {found['pid']}", f"one in {inside}", found["exe"])
    if found["users"] != ["llamafleet"]:
        yield Problem(one.where, f"user of pid {found['pid']}", "llamafleet", ", ".join(found["users"]))


def sandbox(one: Served) -> Problems:
    """The kernel itself says that the process is locked in: no new privileges, a filter, no capability."""
    found = one.facts["process"]
    if found is None:
        yield Problem(one.where, "process", "a running llama-server", None)
        return
    expected = {
        "NoNewPrivs": 1,
        "Seccomp": SECCOMP_FILTER,
        "CapInh": 0,
        "CapPrm": 0,
        "CapEff": 0,
        "CapBnd": 0,
        "CapAmb": 0,
        "CoreLimit": "0 0",
    }
    for name, value in expected.items():
        if found.get(name) != value:
            there = hex(found[name]) if name.startswith("Cap") and name in found else found.get(name)
            file = "limits" if name == "CoreLimit" else "status"
            yield Problem(one.where, f"{name} in /proc/{found['pid']}/{file}", value, there)


def origins(one: Served) -> Problems:
    """Web pages of other sites may not read its answers, unless some were asked for by name."""
    asked = [flag for flag in one.instance.dangerous_flags if flag.startswith("--cors-origins ")]
    if one.facts["allowed_origin"] != "none" and not asked:
        yield Problem(one.where, "origin that may use it", "none", one.facts["allowed_origin"])


def listening(one: Served) -> Problems:
    """It listens where it was told to, and nowhere else."""
    expected, found = [one.instance.listen, one.instance.port], one.facts["listening"]
    if len(found) != 1 or not _same_address(expected, found[0]):
        yield Problem(
            one.where,
            "listens on",
            "{}:{}".format(*expected),
            ", ".join("{}:{}".format(*there) for there in found),
        )


def _same_address(expected: list[Any], found: list[Any]) -> bool:
    """A host name is not resolved here: of it the port alone is compared."""
    try:
        same = ipaddress.ip_address(expected[0]) == ipaddress.ip_address(found[0])
    except ValueError:
        same = expected[0] != "localhost" or ipaddress.ip_address(found[0]).is_loopback
    return same and expected[1] == found[1]


def keys(one: Served) -> Problems:
    """Keys are there where asked for, not empty, and for root's eyes only."""
    path, found = f"{INSTANCES}/{one.instance.name}/{API_KEYS}", one.facts["keys"]
    if one.instance.api_key_file is None:
        if found is not None:
            yield Problem(one.where, path, "no file: no key is asked for", f"a file with {found['count']} keys")
        return
    if found is None:
        yield Problem(one.where, path, "API keys", None)
        return
    if (found["owner"], found["mode"]) != ("root", "0600"):
        yield Problem(one.where, path, "root 0600", f"{found['owner']} {found['mode']}")
    if found["count"] == 0:
        yield Problem(
            one.where,
            path,
            "at least one key",
            "an empty file",
            "llama-server asks for no key where its file is empty",
        )


def planned_gate_checks(one: Served) -> tuple[str, ...]:
    """The gate's checks that apply to this plan, in the gate's order."""
    gate = one.plan.get("gate", {})
    gpus = gate.get("gpus")
    nvidia = gpus and gate.get("backend") == "cuda"
    without = {"gpu memory": not nvidia, "devices": not gpus, "api key": one.instance.api_key_file is None}
    return tuple(name for name in GATE_CHECKS if not without.get(name))


def gate(one: Served, name: str) -> Problems:
    """One check of the host's own gate.py, which asks the running server itself."""
    answer = one.facts["gate"]
    if "error" in answer:
        yield Problem(one.where, f"gate: {name}", "its verdict", answer["error"])
        return
    verdicts = {check["name"]: check for check in answer["checks"]}
    verdict = verdicts.get(name)
    if verdict is None:
        bad = [check["name"] for check in answer["checks"] if not check["ok"]]
        yield Problem(one.where, f"gate: {name}", "its verdict", None, f"it stopped before, at {say(', '.join(bad))}")
    elif not verdict["ok"]:
        yield Problem(one.where, f"gate: {name}", verdict["expected"], verdict["found"], verdict["hint"])


def liveness(one: Served) -> Problems:
    """A timer asks the server now and then for a token, unless the settings want none."""
    found, wanted = one.facts["liveness"], one.watched
    units = f"units llama-server-{one.instance.name}-liveness.*"
    if bool(found["units"]) is not wanted:
        yield Problem(one.where, units, "both" if wanted else "none", found["units"], "deploy again")
    elif not found["as_kept"]:
        yield Problem(one.where, units, "those that llamafleet made", "others", "edited by hand? deploy again")
    elif wanted and found["active"] != "active":
        yield Problem(one.where, units, "an active timer", found["active"], "stopped by hand? deploy again")


INSTANCE_CHECKS = (plan_file, models, unit, running, process, sandbox, origins, listening, keys, liveness)
