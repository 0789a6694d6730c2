"""Checks of one instance against the inventory's settings and plan.json. `checks.py` says how a check works."""

from __future__ import annotations

import hashlib
import ipaddress
import json
from collections.abc import Mapping
from typing import Any

from llamafleet.remote.common import API_KEYS, INSTANCES, RELEASES, UNITS, plan_path
from llamafleet.service.record import without_query
from llamafleet.settings.prompt_files import SETTINGS
from llamafleet.settings.schema import DEMAND
from llamafleet.settings.speculation import AUTO
from tests.hosts import facts
from tests.hosts.checks import AGAIN, Problem, Problems, Served, say

# Seconds: a process that systemd restarted within them may be in a loop.
LOOP_SECONDS = 1800
# A result of the gate after which it asks a server that sleeps nothing more: llamafleet/remote/gate_sleep.py.
ASLEEP = "asleep"
# linux/seccomp.h, SECCOMP_MODE_FILTER, as /proc/PID/status shows it.
SECCOMP_FILTER = 2
GATE_CHECKS = (
    "health", "process", "gpu memory", "devices", "api key", "context", "prompt files", "completion", "adapters",
    "speculation", "picture", "embedding", "scores", "speed",
)  # fmt: skip
# Why a check does not apply.
NOT_PLANNED = {
    "gpu memory": "the plan uses no GPU", "devices": "the plan uses no GPU",
    "api key": "the settings ask for no API key", "prompt files": "the settings name none",
    "adapters": "the settings name none", "speculation": "the settings ask for none",
    **dict.fromkeys(("completion", "picture", "embedding", "scores"), "the model serves something else"),
}  # fmt: skip


def plan_file(served: Served) -> Problems:
    """plan.json exists, was not edited, is the one that passed the gate, and fits the inventory."""
    path = plan_path(served.instance.name)
    file, plan = served.facts["plan_file"], served.facts["plan"]
    if plan is None or file is None:
        yield Problem(
            served.where, path, "the record of what was deployed", file and "no JSON object", "run the deploy"
        )
        return
    if problems := facts.plan_problems(plan):
        for problem in problems:
            yield Problem(served.where, path, "a readable record", problem, "deploy again")
        return
    if (file["owner"], file["mode"]) != ("root", "0644"):
        yield Problem(served.where, path, "root 0644", f"{file['owner']} {file['mode']}")
    identity = plan.get("public_identity", plan.get("identity"))
    if identity_of(plan) != identity:
        yield Problem(served.where, f"identity in {path}", identity_of(plan), identity, AGAIN)
    if served.facts["plan_sha256"] != served.facts["good"]["plan_sha256"]:
        yield Problem(
            served.where,
            path,
            f"the file that last passed the gate, sha256 {say(served.facts['good']['plan_sha256'])}",
            f"sha256 {served.facts['plan_sha256']}",
            AGAIN,
        )
    if plan["release"] != served.release:
        yield Problem(served.where, "release", f"the host's current release, {say(served.release)}", plan["release"])
    yield from _as_asked(served, plan)


def _as_asked(served: Served, plan: Mapping[str, Any]) -> Problems:
    requested, gate = served.instance, plan["gate"]
    scales = [one.get("scale") if isinstance(one, dict) else one for one in gate.get("adapters") or ()]
    files = [name for name, setting in SETTINGS.items() if getattr(requested, setting)]
    guessed = (gate.get("speculation") or {"kind": "none"})["kind"]
    pairs = [
        ("model", without_query(requested.source), without_query(plan["source"])),
        ("port", requested.port, int(gate["url"].rsplit(":", 1)[-1])),
        ("slots", requested.slots or gate["slots"], gate["slots"]),  # unset: the plan's choice
        ("an API key is required", requested.api_key_file is not None, gate["api_keys"] is not None),
        ("speculation", guessed if requested.speculation == AUTO else requested.speculation, guessed),
        ("a projector", requested.projector is not None, bool(gate.get("modalities"))),
        ("scales of adapters", [one.scale for one in requested.adapters], scales),
        ("prompt files", sorted(files), sorted(gate.get("prompt_files") or ())),
    ]
    for what, expected, actual in pairs:
        if expected != actual:
            yield Problem(served.where, f"{what} in plan.json", expected, actual, "the inventory changed: deploy again")
    if requested.context_tokens is not None and gate["context_tokens"] < requested.context_tokens:
        yield Problem(
            served.where,
            "context in plan.json",
            f"at least {requested.context_tokens} tokens a slot",
            f"{gate['context_tokens']} tokens",
        )


def identity_of(plan: Mapping[str, Any]) -> str:
    """The hash that plan.json must have as its `identity`: of all keys that make a difference to the running service."""
    left_out = (
        *(
            "identity",
            "public_identity",
            "plan",
            "preflight",
            "inputs",
            "verified",
            "trial",
            "batch_tokens",
            "allowed_drop_ins",
            "demand",
        ),
    )
    record = {key: value for key, value in plan.items() if key not in left_out}
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def models(served: Served) -> Problems:
    """Every file of the model has the right size and checksum, and only root can change it."""
    if not served.plan.get("files"):
        yield Problem(served.where, "files of the model in plan.json", "at least one", None)
    for file in served.plan.get("files", []):
        actual = served.facts["models"].get(file["path"])
        if actual is None:
            yield Problem(served.where, file["path"], f"a model of {file['size_bytes']} bytes", None)
            continue
        if file["size_bytes"] not in (None, actual["size_bytes"]):
            yield Problem(served.where, file["path"], f"{file['size_bytes']} bytes", f"{actual['size_bytes']} bytes")
        # The checksum is computed now, or with --quick it is the one in FILE.verified. For a source without a checksum
        # only FILE.verified has one.
        read, noted = actual["sha256"] or actual["noted_sha256"], file["sha256"] or actual["noted_sha256"]
        if read is None or read != noted:
            yield Problem(
                served.where,
                file["path"],
                f"sha256 {noted or 'as in FILE.verified'}",
                read,
                "FILE.verified is missing or older than the file: deploy again, and it is read"
                if not read
                else f"damaged: remove {file['path']}.verified and deploy again, and it is downloaded",
            )
        elif actual["noted_sha256"] is None:
            why = "missing, damaged, or older than the file"
            yield Problem(served.where, f"{file['path']}.verified", "the note of its checksum", why, AGAIN)
        if actual["owner"] != "root" or int(actual["mode"], 8) & 0o022:
            yield Problem(
                served.where,
                file["path"],
                "owner root, writable by root only",
                f"{actual['owner']} {actual['mode']}",
            )


def unit(served: Served) -> Problems:
    """The unit file was made for this plan and is the one that passed the gate; no drop-in changes it."""
    path, actual, state = f"{UNITS}/{served.instance.unit}", served.facts["unit"], served.facts["state"]
    if actual is None:
        yield Problem(served.where, path, "the unit", None, "run the deploy")
        return
    if (actual["owner"], actual["gid"], actual["mode"]) != ("root", 0, "0644"):
        yield Problem(
            served.where, path, "root, group 0, 0644", f"{actual['owner']}, group {actual['gid']}, {actual['mode']}"
        )
    if actual["identity"] is None or actual["identity"] != served.plan.get("identity"):
        yield Problem(served.where, f"plan in {path}", say(served.plan.get("identity")), actual["identity"])
    if actual["sha256"] != served.facts["good"]["unit_sha256"]:
        yield Problem(
            served.where,
            path,
            f"the file that last passed the gate, sha256 {say(served.facts['good']['unit_sha256'])}",
            f"sha256 {actual['sha256']}",
            "edited by hand? deploy again",
        )
    for name, expected in (("FragmentPath", path), ("NeedDaemonReload", "no")):
        if state.get(name) != expected:
            yield Problem(served.where, f"{name} of {served.instance.unit}", say(expected), state.get(name), AGAIN)
    found = {*state.get("DropInPaths", "").split(), *served.facts["drop_ins"]}
    allowed = served.instance.allowed_drop_ins
    if drop_ins := [one for one in sorted(found) if "/service.d/" not in one and one.rpartition("/")[2] not in allowed]:
        hint = "deploy again, and they are removed, or name them in allowed_drop_ins"
        yield Problem(served.where, f"DropInPaths of {served.instance.unit}", "nothing", ", ".join(drop_ins), hint)
    if not served.facts["good"]["secrets_as_kept"]:
        folder = f"{INSTANCES}/{served.instance.name}"
        yield Problem(
            served.where, f"keys, certificate and prompt files in {folder}", "as they passed the gate", "others", AGAIN
        )


def running(served: Served) -> Problems:
    """The unit runs, is enabled for the next boot, and was not restarted lately."""
    state, process = served.facts["state"], served.facts["process"]
    if served.instance.start == DEMAND:
        yield from _on_demand(served)
        wanted = [("ActiveState", "active"), ("SubState", "running")] if not served.is_stopped else []
    else:
        wanted = [("ActiveState", "active"), ("SubState", "running"), ("UnitFileState", "enabled")]
    for name, expected in wanted:
        if state.get(name) != expected:
            yield Problem(
                served.where,
                f"{name} of {served.instance.unit}",
                expected,
                state.get(name),
                f"its log: journalctl -u {served.instance.unit}",
            )
    restarts, age = state.get("NRestarts") or "0", (process["age_seconds"] if process else 0) or 0
    if restarts != "0" and age < LOOP_SECONDS:
        yield Problem(
            served.where,
            "restarts",
            f"none in the last {LOOP_SECONDS} s",
            f"{restarts}, the last {age} s ago",
            f"why: journalctl -u {served.instance.unit}",
        )


def _on_demand(served: Served) -> Problems:
    """The socket that starts the server listens, also after the next boot, and its units are unchanged."""
    actual, units = served.facts["demand"], f"units llamafleet-demand-{served.instance.name}.*"
    if served.facts["state"].get("UnitFileState") == "enabled":
        yield Problem(served.where, f"UnitFileState of {served.instance.unit}", "static", "enabled", AGAIN)
    if actual["drop_ins"]:
        yield Problem(served.where, units, "no drop-ins", ", ".join(actual["drop_ins"]), AGAIN)
    if len(actual["units"]) != 2:
        yield Problem(served.where, units, "socket and service", actual["units"], "deploy again")
    elif not actual["as_kept"]:
        yield Problem(served.where, units, "the units that last passed the gate", "other texts", AGAIN)
    elif (actual["active"], actual["enabled"]) != ("active", "enabled"):
        found = f"one that is {actual['active']} and {actual['enabled']}"
        yield Problem(
            served.where, units, "a socket that is active and enabled", found, "stopped by hand? deploy again"
        )


def process(served: Served) -> Problems:
    """The main process runs llama-server of the planned release, as the user llamafleet."""
    if served.is_stopped:
        return
    actual = served.facts["process"]
    if actual is None:
        yield Problem(served.where, "process", "a running llama-server", None)
        return
    release = served.plan.get("release")
    inside = f"{RELEASES}/{release}/"
    if release is None or not str(actual["exe"]).startswith(inside):
        yield Problem(served.where, f"program of pid {actual['pid']}", f"one in {inside}", actual["exe"])
    if actual["deleted"]:
        what = f"files that pid {actual['pid']} runs from although they are gone"
        yield Problem(served.where, what, "nothing", ", ".join(actual["deleted"]), "deploy again, and it restarts")
    if actual["inherited"]:
        what = f"presets and variables of the host that pid {actual['pid']} has taken over"
        yield Problem(served.where, what, "nothing", ", ".join(actual["inherited"]), "deploy again, and it restarts")
    if actual["users"] != ["llamafleet"]:
        yield Problem(served.where, f"user of pid {actual['pid']}", "llamafleet", ", ".join(actual["users"]))


def hardening(served: Served) -> Problems:
    """The kernel shows the hardening in /proc: no new privileges, a system call filter, no capability, no core file."""
    if served.is_stopped:
        return
    actual = served.facts["process"]
    if actual is None:
        yield Problem(served.where, "process", "a running llama-server", None)
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
        if actual.get(name) != value:
            shown = hex(actual[name]) if name.startswith("Cap") and name in actual else actual.get(name)
            file = "limits" if name == "CoreLimit" else "status"
            yield Problem(served.where, f"{name} in /proc/{actual['pid']}/{file}", value, shown)


def origins(served: Served) -> Problems:
    """Web pages of other sites may not read the server's answers, unless `dangerous_flags` names their origins."""
    requested = [flag for flag in served.instance.dangerous_flags if flag.startswith("--cors-origins ")]
    if served.facts["allowed_origin"] != "none" and not requested and not served.is_stopped:
        yield Problem(served.where, "origin whose pages may read answers", "none", served.facts["allowed_origin"])


def listening(served: Served) -> Problems:
    """The server listens on the address and port of the settings, and on no other."""
    expected, actual = [served.instance.listen, served.instance.port], served.facts["listening"]
    if len(actual) != 1 or not _same_address(expected, actual[0]):
        yield Problem(
            served.where,
            "listens on",
            "{}:{}".format(*expected),
            ", ".join("{}:{}".format(*address) for address in actual),
        )


def _same_address(expected: list[Any], actual: list[Any]) -> bool:
    """Whether both are one address and port. Of a host name other than localhost only the port is compared."""
    try:
        same = ipaddress.ip_address(expected[0]) == ipaddress.ip_address(actual[0])
    except ValueError:
        same = expected[0] != "localhost" or ipaddress.ip_address(actual[0]).is_loopback
    return same and expected[1] == actual[1]


def keys(served: Served) -> Problems:
    """API keys exist if the settings ask for them, the file has at least one, and only root can read it."""
    path, actual = f"{INSTANCES}/{served.instance.name}/{API_KEYS}", served.facts["keys"]
    if served.instance.api_key_file is None:
        if actual is not None:
            yield Problem(
                served.where, path, "no file, because api_key_file is not set", f"a file with {actual['count']} keys"
            )
        return
    if actual is None:
        yield Problem(served.where, path, "API keys", None)
        return
    if (actual["owner"], actual["mode"]) != ("root", "0600"):
        yield Problem(served.where, path, "root 0600", f"{actual['owner']} {actual['mode']}")
    if actual["count"] == 0:
        yield Problem(
            served.where,
            path,
            "at least one key",
            "an empty file",
            "llama-server requires no key if its key file is empty",
        )


def planned_gate_checks(served: Served) -> tuple[str, ...]:
    """The names of the gate's checks that apply to this plan, in the gate's order."""
    gate = served.plan.get("gate", {})
    gpus = gate.get("gpus")
    # The gate asks NVML for GPUs with a UUID alone, which a Jetson's may lack.
    nvidia = gpus and gate.get("backend") == "cuda" and any(gpu.get("uuid", True) for gpu in gpus)
    serves = gate.get("serves", "chat")
    without = {
        "gpu memory": not nvidia, "devices": not gpus, "api key": served.instance.api_key_file is None,
        "completion": serves != "chat", "picture": not gate.get("modalities"),
        "prompt files": not gate.get("prompt_files"), "adapters": not gate.get("adapters"), "embedding": serves != "embedding",
        "scores": serves != "reranking", "speculation": not gate.get("speculation"),
    }  # fmt: skip
    return tuple(name for name in GATE_CHECKS if not without.get(name))


def reported_at(served: Served, name: str) -> str | None:
    """The check that reports why the gate did not come to this one: the one at which it stopped, or the first one where
    it has no result at all. None where this one has a result, or is that check."""
    answer, planned = served.facts["gate"], planned_gate_checks(served)
    if (isinstance(answer, dict) and "error" in answer) or facts.gate_problems(answer):
        return planned[0] if name != planned[0] else None
    verdicts = {check["name"]: check["ok"] for check in answer["checks"]}
    if ASLEEP in verdicts and name not in verdicts:
        return ASLEEP
    failed = [one for one in planned if verdicts.get(one) is False]
    return failed[0] if failed and name not in verdicts else None


def gate(served: Served, name: str) -> Problems:
    """The result of one check of gate.py, which was run on the host against the running server."""
    answer = served.facts["gate"]
    if served.instance.api_key_file is not None and served.facts["keys"] is None:
        yield Problem(served.where, f"gate: {name}", "a result", "no API keys to ask with", "deploy again")
        return
    if isinstance(answer, dict) and "error" in answer:
        yield Problem(served.where, f"gate: {name}", "a result", answer["error"])
        return
    if problems := facts.gate_problems(answer):
        yield Problem(served.where, f"gate: {name}", "a result", problems[0], "deploy again")
        return
    verdicts = {check["name"]: check for check in answer["checks"]}
    verdict = verdicts.get(name)
    if verdict is None:
        bad = [check["name"] for check in answer["checks"] if not check["ok"]]
        yield Problem(served.where, f"gate: {name}", "a result", None, f"the gate stopped at {say(', '.join(bad))}")
    elif not verdict["ok"]:
        yield Problem(served.where, f"gate: {name}", verdict["expected"], verdict["found"], verdict["hint"])


def liveness(served: Served) -> Problems:
    """The timer of the liveness check is active and unchanged, or there is none if `liveness_seconds` is 0."""
    actual, wanted = served.facts["liveness"], served.watched
    units = f"units llama-server-{served.instance.name}-liveness.*"
    if actual["drop_ins"]:
        yield Problem(served.where, units, "no drop-ins", ", ".join(actual["drop_ins"]), AGAIN)
    if bool(actual["units"]) is not wanted:
        yield Problem(served.where, units, "service and timer" if wanted else "none", actual["units"], "deploy again")
    elif not actual["as_kept"]:
        yield Problem(
            served.where, units, "the units that last passed the gate", "other texts", "edited by hand? deploy again"
        )
    elif wanted and actual["active"] != "active" and not served.is_stopped:
        yield Problem(served.where, units, "an active timer", actual["active"], "stopped by hand? deploy again")
    elif wanted and actual["enabled"] != "enabled":
        yield Problem(served.where, units, "an enabled timer", actual["enabled"], "disabled by hand? deploy again")


INSTANCE_CHECKS = (plan_file, models, unit, running, process, hardening, origins, listening, keys, liveness)
