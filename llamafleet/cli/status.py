"""The state of a fleet: for each host and instance the planned and the actual values, as a table and as JSON."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llamafleet.host.answers import Gate, LiveInstance
from llamafleet.host.installed import Installed, InstalledInstance
from llamafleet.host.recorded import PlanRecord
from llamafleet.units import MIB

GIB = 1024 * MIB
ASLEEP = "asleep"  # active, with its model's memory free until the next request
COLUMNS = ("host", "instance", "state", "plan", "RAM", "GPU", "tok/s", "restarts", "last gate", "drift")
ON_DEMAND = "on demand, {}"  # of a server that runs while it is used
FINE = ("active", ASLEEP, *map(ON_DEMAND.format, ("stopped", "up", ASLEEP, "activating", "deactivating")))
# Of a host, the worst first.
STATES = CANNOT_BE_READ, NOT_SERVING, GATE_FAILED, HAS_A_PROBLEM, DIFFERS, AS_WANTED = (
    "cannot be read", "not serving", "failed its gate", "has a problem", "differs", "fine",
)  # fmt: skip
LARGEST_SPEED = 1e12  # tokens/s: more is a damaged record
NOT_KNOWN = LiveInstance(rss_bytes=None, cgroup_bytes=None, gpu_bytes={}, since="", gate=None)


@dataclass(frozen=True)
class InstanceStatus:
    """The state of one instance: actual values beside planned ones."""

    name: str
    state: str  # systemd's: active, failed, ...; or "asleep", "on demand, stopped", "not installed"
    plan: str  # the plan in short, see `plan_in_short`
    release: str
    rss_bytes: int | None
    cgroup_bytes: int | None
    gpu_bytes: Mapping[str, int | None] | str
    planned_gpu_bytes: Mapping[str, int]
    tokens_per_s: float | None  # measured by the last gate
    predicted_tokens_per_s: float | None
    restarts: int  # by systemd since the last start that was none of its own, and by the liveness check
    liveness_restarts: int  # of these, by the liveness check
    last_liveness_restart: str  # its time and reason
    since: str
    gate: Gate | None  # the record of the last gate
    verified: bool  # did llama-server report its memory before the plan was installed?
    drift: tuple[str, ...]
    tuned: Mapping[str, Any] = field(default_factory=dict)  # what measurements say of it, see service/measured.py
    source: str = ""  # of its model; empty where it is not installed, or the record does not say it

    @property
    def is_up(self) -> bool:
        """Does it answer requests, or will at the next one?"""
        return self.state in FINE

    @property
    def is_fine(self) -> bool:
        """Is it active, without drift, and did it pass its last gate?"""
        return self.is_up and not self.drift and (self.gate is None or self.gate.ok)

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        gate = self.gate and (dict(self.gate.record) or {"ok": False, "problem": self.gate.problem})
        return {**self.__dict__, "gate": gate, "drift": list(self.drift), "fine": self.is_fine}


@dataclass(frozen=True)
class HostStatus:
    """The state of one host: its instances, the other changes that a run would make, and a problem in reading it."""

    instances: tuple[InstanceStatus, ...] = ()
    drift: tuple[str, ...] = ()
    problem: str = ""
    free_bytes: Mapping[str, int] = field(default_factory=dict)  # of the disks of our folders, by path
    problems: tuple[str, ...] = ()  # what the probe found wrong with the host, each with the way out
    # Of a host that could not be read: the sources of the instances that the inventory names, by their names.
    expected: Mapping[str, str] = field(default_factory=dict)
    is_compared: bool = False  # with the inventory: else its drift is not known

    @property
    def state(self) -> str:
        """One of STATES."""
        if self.problem and not self.instances and not self.free_bytes:
            return CANNOT_BE_READ
        if not all(one.is_up for one in self.instances):
            return NOT_SERVING
        if not all(one.gate is None or one.gate.ok for one in self.instances):
            return GATE_FAILED
        return HAS_A_PROBLEM if self.problem else AS_WANTED if self.is_fine else DIFFERS

    @property
    def is_fine(self) -> bool:
        """Is there no problem, no drift, and is every instance fine?"""
        return not self.problem and not self.drift and all(instance.is_fine for instance in self.instances)

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        instances = {instance.name: instance.to_json() for instance in self.instances}
        return {"fine": self.is_fine, "state": self.state, "problem": self.problem, "drift": list(self.drift),
                "instances": instances,
                "free_bytes": dict(self.free_bytes), "problems": list(self.problems)}  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """The changes that a run with this inventory would make on a host."""

    # Reasons to install or restart each instance; no reasons: it is as planned.
    services: Mapping[str, Sequence[str]] = field(default_factory=dict)
    host: tuple[str, ...] = ()  # other changes, by name
    tuned: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by instance, what measurements say of it


def of_host(
    installed: Installed, live: Mapping[str, LiveInstance], wanted: Wanted | None, problem: str = ""
) -> HostStatus:
    """Combine the survey (`found`), the status program's output (`live`) and the comparison with the inventory.

    `wanted` is None if the host could not be compared with the inventory; `problem` then says why.
    """
    there = installed.instances
    names = [*there, *(name for name in (wanted.services if wanted else ()) if name not in there)]
    instances = tuple(_instance(name, there.get(name), live.get(name, NOT_KNOWN), wanted) for name in names)
    return HostStatus(instances, wanted.host if wanted else (), problem, is_compared=wanted is not None)


def _instance(
    name: str, installed: InstalledInstance | None, live: LiveInstance, wanted: Wanted | None
) -> InstanceStatus:
    record = (installed and installed.record) or PlanRecord({})
    drift: tuple[str, ...] = ()
    if wanted is not None:
        drift = tuple(wanted.services[name]) if name in wanted.services else ("the inventory does not name it",)
    return InstanceStatus(
        name=name,
        state=_state(installed, live),
        plan=plan_in_short(record),
        release=record.release,
        rss_bytes=live.rss_bytes,
        cgroup_bytes=live.cgroup_bytes,
        gpu_bytes=live.gpu_problem or live.gpu_bytes,
        planned_gpu_bytes={gpu.uuid: gpu.planned_bytes for gpu in record.gate.gpus} if record.gate else {},
        tokens_per_s=_measured(live.gate) if live.gate else None,
        predicted_tokens_per_s=record.plan.predicted.tokens_per_s if record.plan else None,
        restarts=(installed.restarts if installed else 0) + live.liveness.restarts + live.liveness.by_systemd,
        liveness_restarts=live.liveness.restarts,
        last_liveness_restart=f"{live.liveness.time}: {live.liveness.why}" if live.liveness.restarts else "",
        since=live.since,
        gate=live.gate,
        verified=bool(record.verified and record.verified.binary_bytes),
        drift=drift,
        tuned=wanted.tuned.get(name, {}) if wanted else {},
        source=record.source or "",
    )


def _measured(gate: Gate) -> float | None:
    """What the gate measured in tokens/s: written, or read by a server that writes nothing."""
    read = gate.record.get("read_tokens_per_s")
    if gate.decode_tokens_per_s is None and isinstance(read, int | float) and 0 < read < LARGEST_SPEED:
        return float(read)
    return gate.decode_tokens_per_s


def _state(installed: InstalledInstance | None, live: LiveInstance) -> str:
    if installed is None:
        return "not installed"
    state = ASLEEP if live.asleep and installed.active == "active" else installed.active or "unknown"
    if not installed.is_on_demand:
        return state
    return ON_DEMAND.format({"inactive": "stopped", "active": "up"}.get(state, state))


def plan_in_short(record: PlanRecord) -> str:
    """The plan of a plan.json, such as "131072 x 1 f16, 37 layers on 1 GPU, cuda"; empty if the record has none. Slots
    over one pool are "32768 x 8 of 131072"; what is no chat comes first, as in "embedding, 8192 x 1 f16, CPU, cpu"."""
    plan, gate = record.plan, record.gate
    if plan is None or gate is None:
        return ""
    value = dict(itertools.pairwise(plan.argv))
    gpus = len(gate.gpus)
    layers = f"{value.get('--n-gpu-layers', '?')} layers on {gpus} GPU{'s' if gpus > 1 else ''}" if gpus else "CPU"
    key = value.get("--cache-type-k", "?")
    kinds = key if value.get("--cache-type-v", key) == key else f"{key}/{value['--cache-type-v']}"
    pool = f" of {value.get('--ctx-size', '?')}" if "--kv-unified" in plan.argv else ""
    serves = "" if gate.serves == "chat" else f"{gate.serves}, "
    return f"{serves}{gate.context_tokens} x {gate.slots}{pool} {kinds}, {layers}, {record.backend}"


def rows_of(name: str, host: HostStatus) -> Iterator[tuple[str, ...]]:
    """The cells of COLUMNS for each instance."""
    for instance in host.instances:
        yield (
            name, instance.name, instance.state, instance.plan, ram_of(instance), _gpu(instance), _speed(instance),
            str(instance.restarts), gate_of(instance),
            "; ".join(instance.drift) or "none",
        )  # fmt: skip
    if not host.instances:
        yield (name, "-", "unknown" if host.problem else "no instances", *[""] * (len(COLUMNS) - 3))


def remarks(host: HostStatus) -> Iterator[str]:
    """What the columns have no place for, a sentence each."""
    if host.problem:
        yield host.problem
    yield from (problem for problem in host.problems if problem not in host.problem)
    for instance in host.instances:
        yield from (f"{instance.name}: {remark}" for remark in remarks_of(instance))
        yield from (f"{instance.name}: {note}" for note in instance.tuned.get("notes", ()))
    if host.free_bytes:
        yield space(host)
    if host.drift:
        yield f"a run would change: {'; '.join(host.drift)}"


def remarks_of(instance: InstanceStatus) -> Iterator[str]:
    """What an operator should know of an instance beside its line, but for its tune."""
    if instance.gate is not None and instance.gate.problem:
        yield f"the last gate is not known: {instance.gate.problem}"
    if instance.gate is not None and instance.gate.slower:
        yield instance.gate.slower
    if instance.liveness_restarts:
        yield (f"restarted {instance.liveness_restarts} times by the liveness check, "
               f"last {instance.last_liveness_restart}")  # fmt: skip


def space(host: HostStatus) -> str:
    """The free space, equal values once: two folders are mostly on one disk."""
    paths: dict[str, list[str]] = {}
    for path, free in host.free_bytes.items():
        paths.setdefault(f"{free / GIB:.1f}", []).append(path)
    return ", ".join(f"{free} GiB free at {' and '.join(names)}" for free, names in paths.items())


def ram_of(instance: InstanceStatus) -> str:
    size = instance.cgroup_bytes if instance.cgroup_bytes is not None else instance.rss_bytes
    return "" if size is None else f"{size / GIB:.1f} GiB"


def _gpu(instance: InstanceStatus) -> str:
    if isinstance(instance.gpu_bytes, str):
        return instance.gpu_bytes
    parts = []
    for uuid, planned in instance.planned_gpu_bytes.items():
        used = instance.gpu_bytes.get(uuid, 0)
        parts.append(f"{'?' if used is None else f'{used / GIB:.1f}'} of {planned / GIB:.1f}")
    return f"{' + '.join(parts)} GiB" if parts else ""


def _speed(instance: InstanceStatus) -> str:
    return "" if instance.tokens_per_s is None else f"{instance.tokens_per_s:.1f}"


def gate_of(instance: InstanceStatus) -> str:
    """The verdict of the last gate with its time; empty where there was none."""
    gate = instance.gate
    if gate is None or gate.problem:
        return "" if gate is None else "unusable record"
    if gate.ok:
        return f"good {gate.time}".rstrip()
    failed = next((check.name for check in gate.checks if not check.ok), "")
    return f"FAILED {failed} {gate.time}".replace("  ", " ").rstrip()
