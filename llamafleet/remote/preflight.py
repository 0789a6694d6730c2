"""Try before the switch whether llama-server works with the unit's hardening on this host; drop what does not work.

Contract: `prepare(staged, name, installed)` takes the folder with the staged unit and plan.json of the instance
NAME and the path of the installed plan.json. It runs the release in a transient unit with the same directives, by the
commands in plan.json's `trial`: every planned device must be listed, and a tiny model must answer a completion. If that
fails, directives are dropped in the order of `SUSPECTS`, one by one and then together, and the tightest set that works
is kept: the staged unit then has the dropped ones as comments, and plan.json has them with the reason in its
`preflight`. Raises `Unfit` where llama-server does not work even without hardening, or only without a directive that
keeps instances apart; nothing that is installed is touched. `keep(staged, name, plan, unit)` loosens the staged unit
as the installed one is, whose plan.json and text are given, and tries nothing. Root, systemd, the standard library,
Python 3.8; common.py, ground.py, instance_files.py, hardening_trial.py and tiny_gguf.py lie beside it.

Decision 18: docs/decisions/0018-hardening-is-proven-on-the-host.md.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Callable, Dict, FrozenSet, List, NamedTuple, Optional, Sequence, Tuple

import ground
import hardening_trial
import instance_files
from common import APART, QUIET_LINES, read_json, unit_of, without_directives, write_json
from hardening_trial import Directive, Unfit

__all__ = ["Unfit", "prepare"]


class Part(NamedTuple):
    """Directives that are kept or dropped together; `names` are directives, or NAME=VALUE of one of many."""

    label: str
    names: Tuple[str, ...]


# In the order in which they are dropped. First placement, which costs speed and no safety: a container may have other
# CPUs, or forbid a memory policy. Then the directives that GPU drivers are most likely to break.
SUSPECTS = (
    Part("CPUAffinity", ("CPUAffinity",)),
    Part("NUMAPolicy", ("NUMAPolicy", "NUMAMask")),
    Part("MemoryDenyWriteExecute", ("MemoryDenyWriteExecute",)),
    Part("PrivateUsers", ("PrivateUsers",)),
    Part("SystemCallFilter=~@resources", ("SystemCallFilter=~@resources",)),
    Part("DeviceAllow", ("DevicePolicy", "DeviceAllow")),
    Part("ExecPaths", ("NoExecPaths", "ExecPaths")),
    Part("ProcSubset", ("ProcSubset",)),
    Part("RestrictAddressFamilies", ("RestrictAddressFamilies",)),
    Part("InaccessiblePaths", ("InaccessiblePaths",)),
    Part("SocketBindDeny", ("SocketBindDeny", "SocketBindAllow")),
    Part("IPAddressDeny", ("IPAddressDeny", "IPAddressAllow")),
    Part("PrivateDevices", ("PrivateDevices",)),
)
# Dropped only where the suspects together are not enough.
OTHERS = (
    Part("SystemCallFilter", ("SystemCallFilter=@system-service", "SystemCallFilter=~@privileged")),
    *(Part(name, (name,)) for name in (
        "SystemCallArchitectures", "RestrictNamespaces", "RestrictRealtime", "LockPersonality", "ProtectProc",
        "ProtectKernelTunables", "ProtectKernelModules", "ProtectKernelLogs", "ProtectControlGroups", "ProtectClock",
        "ProtectHostname", "PrivateIPC", "PrivateMounts", "KeyringMode",
    )),
)  # fmt: skip
# Of these, what `APART` in common.py names is dropped only where the host has no other instance, and addresses of
# clients that the operator allowed are not dropped at all.
# Everything else stays in any case, above all User, NoNewPrivileges, the empty capability sets, ProtectSystem,
# ProtectHome and PrivateTmp: a server that does not run with these is not run at all.

# Tries the hardening without the parts of these labels: why llama-server does not work, or None.
Works = Callable[[FrozenSet[str]], Optional[str]]


def prepare(staged: str, name: str, installed: str) -> None:
    """Find the directives that have to be dropped, and write the staged unit and plan.json accordingly."""
    unit_path, plan_path = f"{staged}/{unit_of(name)}", f"{staged}/plan.json"
    unit, plan = read(unit_path), json.loads(read(plan_path))
    trial = trial_of(plan)
    alone = is_alone(name, trial)
    found = known(installed, unit, alone)
    if found is None:
        print("preflight: trying the unit's hardening", flush=True)
        found = examine(name, unit, trial, alone)
    for one in found["dropped"]:
        print(f"note: hardening without {', '.join(one['directives'])}: {one['why']}", flush=True)
    loosen(unit_path, plan_path, found)


def keep(staged: str, name: str, plan: Dict[str, Any], unit: str) -> None:
    """Loosen the staged unit as the installed one is, and as its plan.json says."""
    found = findings(plan)
    if found is None:
        return
    unit_path, there = f"{staged}/{unit_of(name)}", {one.line for one in service_directives(unit)}
    dropped = [one for one in found["dropped"] if there.isdisjoint(one["directives"])]
    rendered = sha256(read(unit_path))
    loosen(unit_path, f"{staged}/plan.json", {**found, "dropped": dropped, "rendered_sha256": rendered})


def loosen(unit_path: str, plan_path: str, found: Dict[str, Any]) -> None:
    """Drop the directives that were found, and write down what was."""
    loosened = without_directives(read(unit_path), [line for one in found["dropped"] for line in one["directives"]])
    write(unit_path, loosened)
    write_json(plan_path, {**read_json(plan_path), "preflight": {**found, "unit_sha256": sha256(loosened)}})


def trial_of(plan: Dict[str, Any]) -> Dict[str, Any]:
    """The commands of the trial; raises Unfit where an earlier version made the record, which has none."""
    if "trial" not in plan:
        raise Unfit("the staged plan.json has no trial, so it was made by another version of llamafleet: deploy again")
    trial: Dict[str, Any] = plan["trial"]
    return trial


def known(installed: str, unit: str, alone: bool) -> Optional[Dict[str, Any]]:
    """What the installed instance's preflight found, if the unit, systemd, kernel and driver are still the same, and
    what was dropped because the instance was alone may still be."""
    found = findings(read_json(installed))
    if found is None or (needs_to_be_alone(found) and not alone):
        return None
    same = found.get("rendered_sha256") == sha256(unit) and found.get("ground") == ground.ground()
    return {key: found[key] for key in found if key != "unit_sha256"} if same else None


def findings(plan: Dict[str, Any]) -> Optional[Dict[str, Any]]:
    """The preflight's findings in a plan.json; None where there are none of the form that it writes."""
    found = plan.get("preflight")
    dropped = found.get("dropped") if isinstance(found, dict) else None
    whole = isinstance(dropped, list) and all(
        isinstance(one, dict) and isinstance(one.get("why"), str) and is_words(one.get("directives")) for one in dropped
    )
    return found if whole else None


def needs_to_be_alone(found: Dict[str, Any]) -> bool:
    """Whether a directive was dropped that keeps instances apart."""
    lines = [line for one in found["dropped"] for line in one["directives"]]
    return any(line.partition("=")[0] in APART for line in lines)


def is_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def is_alone(name: str, trial: Dict[str, Any]) -> bool:
    """Whether the host has no other instance, neither planned nor installed."""
    others = [unit for unit in instance_files.units() if unit != unit_of(name)]
    return trial.get("alone") is True and not others


def examine(name: str, unit: str, trial: Dict[str, Any], alone: bool) -> Dict[str, Any]:
    """The preflight's findings for a unit; raises Unfit."""
    directives = service_directives(unit)
    with hardening_trial.Trial(name, trial) as tried:

        def works(dropped: FrozenSet[str]) -> Optional[str]:
            gone = {line for label in dropped for line in lines_of(label, directives)}
            why = tried.run([one for one in directives if one.line not in gone])
            print(f"preflight: without {', '.join(sorted(dropped)) or 'nothing'}: {why or 'works'}", flush=True)
            return why

        suspects, others = (droppable(parts, directives) for parts in (SUSPECTS, OTHERS))
        dropped = tightest(suspects, others, works, frozenset() if alone else APART)
        checked = tried.checked
    return {
        "rendered_sha256": sha256(unit),
        "ground": ground.ground(),
        "checked": checked,
        "dropped": [{"directives": lines_of(label, directives), "why": why} for label, why in dropped.items()],
    }


def tightest(
    suspects: Sequence[str], others: Sequence[str], works: Works, apart: FrozenSet[str] = frozenset()
) -> Dict[str, str]:
    """The labels that have to be dropped, each with the failure that keeping it causes; none of `apart` is. Raises
    Unfit."""
    if works(frozenset()) is None:
        return {}
    everything = frozenset((*suspects, *others)) - apart
    bare = works(everything)
    if bare is not None:
        raise unfit(bare, everything, apart.intersection((*suspects, *others)), works)
    # Once more, so that a passing disturbance does not loosen the unit.
    why = works(frozenset())
    if why is None:
        return {}
    suspects = [label for label in suspects if label not in apart]
    for label in suspects:
        if works(frozenset([label])) is None:
            return {label: why}
    order = [*suspects, *others]
    together = works(frozenset(suspects)) is None
    return put_back(frozenset(suspects) if together else everything, order, works)


def unfit(bare: str, everything: FrozenSet[str], apart: FrozenSet[str], works: Works) -> Unfit:
    """Why llama-server does not work with nothing but the directives that keep instances apart."""
    if apart and works(everything | apart) is None:
        needed = put_back(everything | apart, sorted(apart), works)
        names = ", ".join(label for label in needed if label in apart)
        return Unfit(
            f"llama-server does not work on this host with {names}, which keeps instances of one host from reading "
            f"each other's keys: {bare}. Serve a single model on this host, or mend its driver"
        )
    return Unfit(f"llama-server does not work on this host, even without hardening: {bare}")


def put_back(dropped: FrozenSet[str], order: Sequence[str], works: Works) -> Dict[str, str]:
    """Put back every part that can be, the least suspect first. Returns the others, each with what fails with it."""
    reasons = {}
    for label in [one for one in reversed(order) if one in dropped]:
        why = works(dropped - {label})
        if why is None:
            dropped = dropped - {label}
        else:
            reasons[label] = why
    return {label: reasons[label] for label in order if label in reasons}


def droppable(parts: Sequence[Part], directives: Sequence[Directive]) -> List[str]:
    """The labels of the parts that the unit has. The clients that the operator allowed are not dropped: without them
    everybody would reach the server."""
    clients = any(one.name == "IPAddressAllow" and one.value != "localhost" for one in directives)
    return [part.label for part in parts
            if lines_of(part.label, directives) and not (clients and "IPAddressAllow" in part.names)]  # fmt: skip


def lines_of(label: str, directives: Sequence[Directive]) -> List[str]:
    """The unit's lines that belong to a part. What keeps the host's presets away is never dropped: it hides a folder
    that no driver needs."""
    (names,) = [part.names for part in (*SUSPECTS, *OTHERS) if part.label == label]
    return [one.line for one in directives
            if (one.name in names or one.line in names) and one.line not in QUIET_LINES]  # fmt: skip


def service_directives(unit: str) -> List[Directive]:
    """The directives of the [Service] section in their order, continued lines joined, comments left out."""
    section, found = "", []
    for line in unit.replace("\\\n", " ").splitlines():
        if line.startswith("["):
            section = line
        elif section == "[Service]" and "=" in line and not line.startswith(("#", ";")):
            found.append(Directive(*line.split("=", 1)))
    return found


def read(path: str) -> str:
    with open(path) as file:
        return file.read()


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
