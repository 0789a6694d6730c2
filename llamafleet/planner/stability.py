"""Keep the installed plan, or change it: what others hold on a host drifts, and a restart costs a reload.

A plan is a pure function of the machine. So its record carries the memory it was made for, and here the
plan is made twice: for that memory, which gives the installed plan again, and for what is there now.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from llamafleet.host.machine import Machine
from llamafleet.memory.ledger import LedgerRow
from llamafleet.memory.placement import HOST
from llamafleet.planner.result import Plan, Refusal
from llamafleet.settings.schema import Instance, Settings
from llamafleet.units import MIB

# How much of a reserve drift may eat before the plan is changed. The rest still holds what the reserve is for:
# pools that grow after the start.
DRIFT_SHARE = 0.25
# A plan that is predicted to be this much faster is worth a restart; predictions are no better than that.
FASTER_SHARE = 0.05
# Total memory that differs by less is the same hardware: a kernel or a driver takes some MiB more or less.
SAME_TOTAL_SHARE = 0.01

# Settings that do not touch a plan: a change of one of these is no reason to plan for other memory.
_NO_MATTER_OF_INSTANCE = {"name", "source", "port", "listen", "api_key_file", "sha256", "mirrors",
                          "tls_certificate_file", "tls_key_file"}  # fmt: skip
_NO_MATTER = {"models", "llama_cpp_repository", "llama_cpp_ref", "build_ui", "build_jobs", "build_cache",
              "keep_releases", "hub_endpoint", "hub_token_file", "cuda_toolkit"}  # fmt: skip


def inputs_key(machine: Machine, settings: Settings, instance: Instance, model: Mapping[str, Any]) -> str:
    """A hash of what a plan is made of, memory left out. `model` says which one: its files and their sizes."""
    made_of = {
        "instance": _without(asdict(instance), _NO_MATTER_OF_INSTANCE),
        "settings": _without(asdict(settings), _NO_MATTER),
        "model": model,
        "cpu": asdict(machine.cpu),
        "gpus": [[gpu.uuid, gpu.name, gpu.problem] for gpu in machine.gpus],
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True, default=list).encode()).hexdigest()[:16]


def _without(values: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in names}


@dataclass(frozen=True)
class Memory:
    """What a plan was made for: total bytes and, of a GPU, what others held; by UUID, as the driver gives it."""

    host_bytes: int
    swap_bytes: int
    gpu_total_bytes: Mapping[str, int]
    gpu_others_bytes: Mapping[str, int]

    @classmethod
    def of(cls, machine: Machine) -> Memory:
        """As the probe found it."""
        return cls(
            machine.memory.total_bytes,
            machine.memory.swap_total_bytes,
            {gpu.uuid: gpu.memory_total_bytes for gpu in machine.gpus},
            {gpu.uuid: gpu.memory_used_by_others_bytes for gpu in machine.gpus},
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Memory:
        """From plan.json, which we wrote."""
        return cls(**data)

    def to_json(self) -> dict[str, Any]:
        """For plan.json."""
        return asdict(self)

    def on(self, machine: Machine) -> Machine | None:
        """The machine with this memory; None where it has other hardware now."""
        now = Memory.of(machine)
        if now.gpu_total_bytes.keys() != self.gpu_total_bytes.keys():
            return None
        then = [self.host_bytes, *(self.gpu_total_bytes[uuid] for uuid in now.gpu_total_bytes)]
        totals = [now.host_bytes, *now.gpu_total_bytes.values()]
        if any(abs(a - b) > SAME_TOTAL_SHARE * b for a, b in zip(then, totals, strict=True)):
            return None
        gpus = tuple(
            replace(
                gpu, memory_total_bytes=self.gpu_total_bytes[gpu.uuid],
                memory_used_by_others_bytes=self.gpu_others_bytes[gpu.uuid],
            )
            for gpu in machine.gpus
        )  # fmt: skip
        memory = replace(machine.memory, total_bytes=self.host_bytes, swap_total_bytes=self.swap_bytes)
        return replace(machine, gpus=gpus, memory=memory)

    def drift(self, machine: Machine) -> dict[str, int]:
        """Bytes that a plan can have now beyond what it was made for, by the ledger's device names."""
        now = Memory.of(machine)
        drift = {
            f"GPU{gpu.index}": (gpu.memory_total_bytes - gpu.memory_used_by_others_bytes)
            - (self.gpu_total_bytes[gpu.uuid] - self.gpu_others_bytes[gpu.uuid])
            for gpu in machine.gpus
        }
        return {**drift, HOST: now.host_bytes - self.host_bytes}


@dataclass(frozen=True)
class Installed:
    """What is known of an installed plan whose inputs are those of the wanted one."""

    argv: tuple[str, ...]  # the planned part
    memory: Memory

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Installed:
        """From plan.json, where `is_of_inputs` says so."""
        return cls(tuple(record["plan"]["argv"]), Memory.from_json(record["inputs"]["memory"]))


def is_of_inputs(record: Any, key: str) -> bool:
    """Is the plan.json of a plan with this `inputs_key`? One that somebody edited, or of another version, is not."""
    try:
        Installed.of(record)
        return bool(record["inputs"]["key"] == key and isinstance(record["verified"], dict | None))
    except (KeyError, TypeError):
        return False


@dataclass(frozen=True)
class Choice:
    """The plans to go on with, the memory they were made for, and why, a sentence for the operator."""

    answers: tuple[Plan | Refusal, ...]
    memory: Memory
    why: str = ""


Planner = Callable[[Machine], Sequence[Plan | Refusal]]


def choose(machine: Machine, settings: Settings, planner: Planner, installed: Mapping[str, Installed]) -> Choice:
    """The installed plans where they still hold, else the best for what is there now.

    `planner` plans all instances of the host together, `installed` holds, by instance name, those
    that are installed and whose inputs have not changed.
    """
    present = Choice(tuple(planner(machine)), Memory.of(machine))
    if not installed:
        return present
    if _is_installed(present.answers, installed):
        return replace(present, why="kept: the same inputs give the installed plan")
    problems = []
    tried: list[Memory] = []
    for memory in (one.memory for one in installed.values()):
        if memory in tried:
            continue
        tried.append(memory)
        found = _kept(machine, settings, planner, memory, present, installed)
        if isinstance(found, Choice):
            return found
        problems.append(found)
    return replace(present, why=f"changed: {problems[0]}")


def _is_installed(answers: Sequence[Plan | Refusal], installed: Mapping[str, Installed]) -> bool:
    plans = {one.instance: one.argv for one in answers if isinstance(one, Plan)}
    return all(plans.get(name) == one.argv for name, one in installed.items())


def _kept(
    machine: Machine, settings: Settings, planner: Planner, memory: Memory, present: Choice,
    installed: Mapping[str, Installed],
) -> Choice | str:  # fmt: skip
    """The plans for the memory of then, or why they cannot be kept."""
    then = memory.on(machine)
    if then is None:
        return "the host has other memory than when it was planned"
    answers = tuple(planner(then))
    if not _is_installed(answers, installed):
        return "llamafleet plans otherwise than when it was installed"
    drift = memory.drift(machine)
    plans = []
    for answer in answers:
        if isinstance(answer, Refusal):
            return f"{answer.instance}: {answer.reason}"
        rows = tuple(_moved(row, drift[row.device]) for row in answer.ledger)
        plans.append(replace(answer, ledger=rows))
    if problem := next(_too_little(plans, drift, settings), ""):
        return problem
    much_more = any(size > _threshold(device, settings) for device, size in drift.items())
    if much_more and (problem := next(_better(plans, present.answers, settings), "")):
        return problem
    return Choice(tuple(plans), memory, f"kept: the installed plan still fits ({_told(drift)})")


def _moved(row: LedgerRow, drift: int) -> LedgerRow:
    return replace(row, capacity_bytes=row.capacity_bytes + drift, free_bytes=row.free_bytes + drift)


def _threshold(device: str, settings: Settings) -> int:
    """Drift of a device's memory up to this many bytes never changes a plan."""
    reserve = settings.ram_reserve_mib if device == HOST else settings.gpu_reserve_mib
    return int(DRIFT_SHARE * reserve * MIB)


def _too_little(plans: Sequence[Plan], drift: Mapping[str, int], settings: Settings) -> Iterator[str]:
    """The devices on which others now hold too much for a plan."""
    for plan in plans:
        for row in plan.ledger:
            if row.free_bytes < -_threshold(row.device, settings):
                yield (
                    f"{row.device} has {-drift[row.device] // MIB} MiB less than when {plan.instance} was planned:"
                    f" more than its free memory and {DRIFT_SHARE:.0%} of the reserve"
                )


def _better(plans: Sequence[Plan], present: Sequence[Plan | Refusal], settings: Settings) -> Iterator[str]:
    """Why what is possible now is worth a restart."""
    for old, new, instance in zip(plans, present, settings.models, strict=True):
        if isinstance(new, Refusal):
            continue
        if instance.kv_types.index(new.kv_type) < instance.kv_types.index(old.kv_type):
            yield f"{new.instance}: a KV cache of {new.kv_type} fits now, it was {old.kv_type}"
        before, after = old.predicted.workload_seconds, new.predicted.workload_seconds
        if before > after * (1 + FASTER_SHARE):
            yield f"{new.instance}: its workload would take {after:.1f} s, predicted, instead of {before:.1f} s"


def _told(drift: Mapping[str, int]) -> str:
    moved = [f"{device} {size / MIB:+.0f} MiB" for device, size in drift.items() if size]
    return ", ".join(moved) or "the same memory"
