"""Is a host as it was asked for? Pure functions over settings and what `collect.py` found.

Each check yields a `Problem` for everything that is not as it should be, and nothing where all is well.
What is expected comes from the inventory's settings and, for what was decided for this very host, from
the plan.json that lies there; the latter is itself checked against the former.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llamafleet.settings import Instance, Settings

# A process that systemd started again within the unit's own StartLimitIntervalSec is in a loop, seconds.
LOOP_SECONDS = 1800
# linux/seccomp.h, SECCOMP_MODE_FILTER, as /proc/PID/status shows it.
SECCOMP_FILTER = 2
GATE_CHECKS = ("health", "process", "gpu memory", "api key", "context", "completion")


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it should be: where, what, and both values."""

    where: str
    what: str
    expected: Any
    found: Any
    hint: str = ""

    def __str__(self) -> str:
        hint = f" ({self.hint})" if self.hint else ""
        return f"{self.where}: {self.what}: expected {self.expected}, found {_say(self.found)}{hint}"


def _say(value: Any) -> str:
    return "nothing" if value is None or value in ("", [], {}) else str(value)


Problems = Iterator[Problem]


@dataclass(frozen=True)
class Box:
    """A host: its name, what was asked for it, and what was found there."""

    where: str
    settings: Settings
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Served:
    """One instance of a host; `where` is HOST/INSTANCE."""

    where: str
    instance: Instance
    facts: Mapping[str, Any]
    # Key of the host's current release; None where there is none.
    release: str | None

    @property
    def plan(self) -> Mapping[str, Any]:
        """plan.json as it lies on the host; empty where there is none, which `plan_file` reports."""
        return self.facts["plan"] or {}


def served(box: Box, instance: Instance) -> Served:
    """The part of a host's facts that is about one instance."""
    found = box.facts["release"]
    key = found["target"].rsplit("/", 1)[-1] if found else None
    return Served(f"{box.where}/{instance.name}", instance, box.facts["instances"][instance.name], key)


# --- a host ----------------------------------------------------------------------------------


def release(box: Box, resolve: Callable[[str, str], str | None]) -> Problems:
    """`current` leads to a whole release of the wanted version. `resolve` asks a repository what commit a
    ref names; it is called only where the ref's name alone does not settle it."""
    found = box.facts["release"]
    if found is None:
        yield Problem(box.where, "/opt/llamafleet/current", "a link to a release", None, "run the deploy")
        return
    if not re.fullmatch(r"releases/[0-9a-f]{16}", found["target"]):
        yield Problem(box.where, "/opt/llamafleet/current", "a link to releases/KEY", found["target"])
    record = found["record"]
    if record is None:
        yield Problem(box.where, f"{found['target']}/release.json", "the record of a whole build", None)
        return
    if found["target"] != f"releases/{record['key']}":
        yield Problem(box.where, "key in release.json", found["target"], record["key"])
    ref = box.settings.llama_cpp_ref
    if ref not in (record["ref"], record["commit"]):
        commit = resolve(box.settings.llama_cpp_repository, ref)
        if commit != record["commit"]:
            yield Problem(box.where, "llama.cpp", f"{ref} (commit {commit or 'unknown'})",
                          f"{record['ref']} (commit {record['commit']})")  # fmt: skip
    for name in sorted({*record["files"], *found["files"]}):
        expected, there = record["files"].get(name), found["files"].get(name)
        if expected != there:
            yield Problem(box.where, f"{found['target']}/bin/{name}", _say(expected and f"sha256 {expected}"),
                          there and f"sha256 {there}", "damaged, or built by hand")  # fmt: skip


def version(box: Box) -> Problems:
    """The installed program itself names the commit it was made from."""
    found = box.facts["release"]
    commit = ((found or {}).get("record") or {}).get("commit", box.settings.llama_cpp_ref)
    said = found and found["version"]
    if not said or f"({commit[:7]})" not in said:
        yield Problem(box.where, "llama-server --version", f"commit {commit[:7]}", said)


def folders(box: Box) -> Problems:
    """Only root changes what the services run and are told."""
    for path in ("/opt/llamafleet", "/etc/llamafleet", "/etc/llamafleet/instances"):
        found = box.facts["folders"][path]
        if found is None or (found["owner"], found["mode"]) != ("root", "0755"):
            yield Problem(box.where, path, "root 0755", found and f"{found['owner']} {found['mode']}")


def leftovers(box: Box) -> Problems:
    """A finished deploy leaves no token on the host and nothing half prepared."""
    tokens = [name for name in box.facts["run"] if "token" in name]
    if tokens:
        yield Problem(box.where, "/run/llamafleet", "no Hub token", tokens, "a fetch was broken off: remove it")
    if box.facts["staged"]:
        yield Problem(box.where, "/var/lib/llamafleet/staged", "an empty folder", box.facts["staged"],
                      "a switch was broken off: deploy again")  # fmt: skip
    staged = box.facts["folders"]["/var/lib/llamafleet/staged"]
    if staged and (staged["owner"], staged["mode"]) != ("root", "0700"):
        yield Problem(box.where, "/var/lib/llamafleet/staged", "root 0700", f"{staged['owner']} {staged['mode']}",
                      "API keys pass through it")  # fmt: skip


def undeclared(box: Box) -> Problems:
    """What the inventory does not name does not run."""
    declared = {instance.unit for instance in box.settings.models}
    extra = sorted(set(box.facts["units"]) - declared)
    if extra:
        yield Problem(box.where, "units llama-server-*.service", f"only {', '.join(sorted(declared)) or 'none'}",
                      ", ".join(extra), "deploy again, or name them in models")  # fmt: skip


# --- an instance -----------------------------------------------------------------------------


def plan_file(one: Served) -> Problems:
    """plan.json is there, nobody edited it, and it was made for what the inventory asks."""
    path = f"/etc/llamafleet/instances/{one.instance.name}/plan.json"
    file, plan = one.facts["plan_file"], one.facts["plan"]
    if plan is None or file is None:
        yield Problem(one.where, path, "the record of what was deployed", file and "no JSON object", "run the deploy")
        return
    if (file["owner"], file["mode"]) != ("root", "0644"):
        yield Problem(one.where, path, "root 0644", f"{file['owner']} {file['mode']}")
    if identity_of(plan) != plan.get("identity"):
        yield Problem(one.where, f"identity in {path}", identity_of(plan), plan.get("identity"), "it was edited")
    if one.facts["plan_sha256"] != one.facts["good"]["plan_sha256"]:
        yield Problem(one.where, path, f"what last passed the gate, sha256 {_say(one.facts['good']['plan_sha256'])}",
                      f"sha256 {one.facts['plan_sha256']}")  # fmt: skip
    if plan["release"] != one.release:
        yield Problem(one.where, "release", f"the current one, {_say(one.release)}", plan["release"])
    yield from _as_asked(one, plan)


def _as_asked(one: Served, plan: Mapping[str, Any]) -> Problems:
    asked, gate = one.instance, plan["gate"]
    pairs = [
        ("model", asked.source, plan["source"]),
        ("port", asked.port, int(gate["url"].rsplit(":", 1)[-1])),
        ("slots", asked.slots, gate["slots"]),
        ("an API key is asked", asked.api_key_file is not None, gate["api_keys"] is not None),
    ]
    for what, expected, found in pairs:
        if expected != found:
            yield Problem(one.where, f"{what} in plan.json", expected, found, "the inventory changed: deploy again")
    if asked.context_tokens is not None and gate["context_tokens"] < asked.context_tokens:
        yield Problem(one.where, "context in plan.json", f"at least {asked.context_tokens} tokens a slot",
                      f"{gate['context_tokens']} tokens")  # fmt: skip


def identity_of(plan: Mapping[str, Any]) -> str:
    """The hash that a plan must carry: of all but itself and the account of how it was decided."""
    record = {key: value for key, value in plan.items() if key not in ("identity", "plan")}
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
            yield Problem(one.where, file["path"], f"sha256 {noted or 'noted in .verified'}", read,
                          "without a valid note: the file changed since it was verified" if not read else "")  # fmt: skip
        if found["owner"] != "root" or int(found["mode"], 8) & 0o022:
            yield Problem(one.where, file["path"], "root's, and nobody else may write",
                          f"{found['owner']} {found['mode']}")  # fmt: skip


def unit(one: Served) -> Problems:
    """The unit file is the one that was made for this plan and passed the gate; no drop-in changes it."""
    path, found, state = f"/etc/systemd/system/{one.instance.unit}", one.facts["unit"], one.facts["state"]
    if found is None:
        yield Problem(one.where, path, "the unit", None, "run the deploy")
        return
    if (found["owner"], found["gid"], found["mode"]) != ("root", 0, "0644"):
        yield Problem(one.where, path, "root, group 0, 0644", f"{found['owner']}, group {found['gid']}, {found['mode']}")
    if found["identity"] is None or found["identity"] != one.plan.get("identity"):
        yield Problem(one.where, f"plan in {path}", _say(one.plan.get("identity")), found["identity"])
    if found["sha256"] != one.facts["good"]["unit_sha256"]:
        yield Problem(one.where, path, f"what last passed the gate, sha256 {_say(one.facts['good']['unit_sha256'])}",
                      f"sha256 {found['sha256']}", "edited by hand? deploy again")  # fmt: skip
    for name, expected in (("DropInPaths", ""), ("FragmentPath", path), ("NeedDaemonReload", "no")):
        if state.get(name) != expected:
            yield Problem(one.where, f"{name} of {one.instance.unit}", _say(expected), state.get(name))


def running(one: Served) -> Problems:
    """The unit runs, will run after a reboot, and is not being started over and over."""
    state, process = one.facts["state"], one.facts["process"]
    for name, expected in (("ActiveState", "active"), ("SubState", "running"), ("UnitFileState", "enabled")):
        if state.get(name) != expected:
            yield Problem(one.where, f"{name} of {one.instance.unit}", expected, state.get(name),
                          f"its log: journalctl -u {one.instance.unit}")  # fmt: skip
    restarts, age = int(state.get("NRestarts") or 0), process["age_seconds"] if process else 0
    if restarts and age < LOOP_SECONDS:
        yield Problem(one.where, "restarts", f"none in the last {LOOP_SECONDS} s",
                      f"{restarts}, the last {age} s ago", f"why: journalctl -u {one.instance.unit}")  # fmt: skip


def process(one: Served) -> Problems:
    """What runs is the planned release's program, as its own user and not as root."""
    found = one.facts["process"]
    if found is None:
        yield Problem(one.where, "process", "a running llama-server", None)
        return
    release = one.plan.get("release")
    inside = f"/opt/llamafleet/releases/{release}/"
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
    expected = {"NoNewPrivs": 1, "Seccomp": SECCOMP_FILTER, "CapInh": 0, "CapPrm": 0, "CapEff": 0, "CapBnd": 0,
                "CapAmb": 0}  # fmt: skip
    for name, value in expected.items():
        if found.get(name) != value:
            there = hex(found[name]) if name.startswith("Cap") and name in found else found.get(name)
            yield Problem(one.where, f"{name} in /proc/{found['pid']}/status", value, there)


def listening(one: Served) -> Problems:
    """It listens where it was told to, and nowhere else."""
    expected, found = [one.instance.listen, one.instance.port], one.facts["listening"]
    if len(found) != 1 or not _same_address(expected, found[0]):
        yield Problem(one.where, "listens on", "{}:{}".format(*expected),
                      ", ".join("{}:{}".format(*there) for there in found))  # fmt: skip


def _same_address(expected: list[Any], found: list[Any]) -> bool:
    """A host name is not resolved here: of it the port alone is compared."""
    try:
        same = ipaddress.ip_address(expected[0]) == ipaddress.ip_address(found[0])
    except ValueError:
        same = expected[0] != "localhost" or ipaddress.ip_address(found[0]).is_loopback
    return same and expected[1] == found[1]


def keys(one: Served) -> Problems:
    """Keys are there where asked for, not empty, and for root's eyes only."""
    path, found = f"/etc/llamafleet/instances/{one.instance.name}/api-keys", one.facts["keys"]
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
        yield Problem(one.where, path, "at least one key", "an empty file",
                      "llama-server asks for no key where its file is empty")  # fmt: skip


def planned_gate_checks(one: Served) -> tuple[str, ...]:
    """The gate's checks that apply to this plan, in the gate's order."""
    gate = one.plan.get("gate", {})
    without = {"gpu memory": not gate.get("gpus"), "api key": one.instance.api_key_file is None}
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
        yield Problem(one.where, f"gate: {name}", "its verdict", None, f"it stopped before, at {_say(', '.join(bad))}")
    elif not verdict["ok"]:
        yield Problem(one.where, f"gate: {name}", verdict["expected"], verdict["found"], verdict["hint"])


HOST_CHECKS = (version, folders, leftovers, undeclared)
INSTANCE_CHECKS = (plan_file, models, unit, running, process, sandbox, listening, keys)
