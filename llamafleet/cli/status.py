"""How a fleet is: what was planned beside what is, for each host and instance, as a table and as JSON."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llamafleet.host.installed import Installed, InstalledInstance
from llamafleet.units import MIB

GIB = 1024 * MIB
COLUMNS = ("host", "instance", "state", "plan", "RAM", "GPU", "tok/s", "restarts", "last gate", "drift")


@dataclass(frozen=True)
class InstanceStatus:
    """One instance as it is."""

    name: str
    state: str  # systemd's: active, failed, ...; or "not installed"
    plan: str  # in short
    release: str
    rss_bytes: int | None
    cgroup_bytes: int | None
    gpu_bytes: Mapping[str, int | None] | str
    planned_gpu_bytes: Mapping[str, int]
    tokens_per_s: float | None  # as the last gate measured
    predicted_tokens_per_s: float | None
    restarts: int
    since: str
    gate: Mapping[str, Any] | None  # its last verdict
    verified: bool  # was llama-server asked before it was installed?
    drift: tuple[str, ...]

    @property
    def is_fine(self) -> bool:
        """Does it run as it should?"""
        return self.state == "active" and not self.drift and not (self.gate and not self.gate.get("ok"))

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        return {**self.__dict__, "drift": list(self.drift), "fine": self.is_fine}


@dataclass(frozen=True)
class HostStatus:
    """One host: its instances, what a run would do beside them, or why it could not be told."""

    instances: tuple[InstanceStatus, ...] = ()
    drift: tuple[str, ...] = ()
    problem: str = ""

    @property
    def is_fine(self) -> bool:
        """Is everything on it as it should be?"""
        return not self.problem and not self.drift and all(one.is_fine for one in self.instances)

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        instances = {one.name: one.to_json() for one in self.instances}
        return {"fine": self.is_fine, "problem": self.problem, "drift": list(self.drift), "instances": instances}


@dataclass(frozen=True)
class Wanted:
    """What the inventory asks of a host against what is installed there."""

    # By instance: why it would be installed or restarted; empty reasons: it is as planned.
    services: Mapping[str, Sequence[str]] = field(default_factory=dict)
    host: tuple[str, ...] = ()


def of_host(
    installed: Installed, live: Mapping[str, Mapping[str, Any]], wanted: Wanted | None, problem: str = ""
) -> HostStatus:
    """Put together what a survey, the status program and the comparison with the inventory say.

    `wanted` is None where the inventory cannot be held against the host; `problem` then says why.
    """
    there = installed.instances
    names = [*there, *(name for name in (wanted.services if wanted else ()) if name not in there)]
    instances = tuple(_instance(name, there.get(name), live.get(name, {}), wanted) for name in names)
    return HostStatus(instances, wanted.host if wanted else (), problem)


def _instance(
    name: str, installed: InstalledInstance | None, live: Mapping[str, Any], wanted: Wanted | None
) -> InstanceStatus:
    record: Mapping[str, Any] = installed.record if installed and isinstance(installed.record, Mapping) else {}
    gate = live.get("gate")
    drift: tuple[str, ...] = ()
    if wanted is not None:
        drift = tuple(wanted.services[name]) if name in wanted.services else ("the inventory does not name it",)
    return InstanceStatus(
        name=name,
        state=(installed.active or "unknown") if installed else "not installed",
        plan=plan_in_short(record),
        release=str(record.get("release", "")),
        rss_bytes=live.get("rss_bytes"),
        cgroup_bytes=live.get("cgroup_bytes"),
        gpu_bytes=live.get("gpu_bytes", {}),
        planned_gpu_bytes={gpu["uuid"]: gpu["planned_bytes"] for gpu in record.get("gate", {}).get("gpus", [])},
        tokens_per_s=gate.get("decode_tokens_per_s") if gate else None,
        predicted_tokens_per_s=record.get("plan", {}).get("predicted", {}).get("decode_tokens_per_s"),
        restarts=installed.restarts if installed else 0,
        since=live.get("since", ""),
        gate=gate,
        verified=bool((record.get("verified") or {}).get("binary_bytes")),
        drift=drift,
    )


def plan_in_short(record: Mapping[str, Any]) -> str:
    """Such as "131072 x 1 f16, 37 layers on 1 GPU, cuda"; empty without a record that can be read."""
    try:
        argv, gate = record["plan"]["argv"], record["gate"]
        value = dict(itertools.pairwise(argv))
        gpus = len(gate["gpus"])
        where = f"{value['--n-gpu-layers']} layers on {gpus} GPU{'s' if gpus > 1 else ''}" if gpus else "CPU"
        return f"{gate['context_tokens']} x {gate['slots']} {value['--cache-type-k']}, {where}, {record['backend']}"
    except (KeyError, TypeError):
        return ""


def table(hosts: Mapping[str, HostStatus]) -> str:
    """A line for each instance; below it what is wrong with hosts."""
    rows = [COLUMNS, *(row for name, host in hosts.items() for row in _rows(name, host))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *(f"{name}: {said}" for name, host in hosts.items() for said in _said(host))])


def _rows(name: str, host: HostStatus) -> Iterator[tuple[str, ...]]:
    for one in host.instances:
        yield (
            name, one.name, one.state, one.plan, _ram(one), _gpu(one), _speed(one), str(one.restarts), _gate(one),
            "; ".join(one.drift) or "none",
        )  # fmt: skip
    if not host.instances:
        yield (name, "-", "unknown" if host.problem else "no instances", *[""] * (len(COLUMNS) - 3))


def _said(host: HostStatus) -> Iterator[str]:
    if host.problem:
        yield host.problem
    if host.drift:
        yield f"a run would change: {', '.join(host.drift)}"


def _ram(one: InstanceStatus) -> str:
    size = one.cgroup_bytes if one.cgroup_bytes is not None else one.rss_bytes
    return "" if size is None else f"{size / GIB:.1f} GiB"


def _gpu(one: InstanceStatus) -> str:
    if isinstance(one.gpu_bytes, str):
        return one.gpu_bytes
    parts = []
    for uuid, planned in one.planned_gpu_bytes.items():
        held = one.gpu_bytes.get(uuid, 0)
        parts.append(f"{'?' if held is None else f'{held / GIB:.1f}'} of {planned / GIB:.1f}")
    return f"{' + '.join(parts)} GiB" if parts else ""


def _speed(one: InstanceStatus) -> str:
    return "" if one.tokens_per_s is None else f"{one.tokens_per_s:.1f}"


def _gate(one: InstanceStatus) -> str:
    if not one.gate:
        return ""
    if one.gate.get("ok"):
        return f"good {one.gate.get('time', '')}".rstrip()
    failed = next((check["name"] for check in one.gate.get("checks", []) if not check["ok"]), "")
    return f"FAILED {failed} {one.gate.get('time', '')}".replace("  ", " ").rstrip()
