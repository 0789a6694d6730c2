"""Keep the installed plan, or change it: the memory of other processes changes, and a restart costs a model load.

A plan is a pure function of the machine, so plan.json records the memory that the plan was made for. Here the plan is
made twice: for the recorded memory, which gives the installed plan again, and for the memory of now.

Decision 2: docs/decisions/0002-capacity-is-total-less-what-others-hold.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from llamafleet.host.machine import Machine
from llamafleet.host.recorded import PlanRecord
from llamafleet.memory.ledger import LedgerRow
from llamafleet.memory.placement import HOST
from llamafleet.planner.devices import reserve_mib
from llamafleet.planner.result import Plan, Refusal
from llamafleet.settings.schema import Instance, Settings
from llamafleet.units import MIB

# The share of a reserve that other processes may use before the plan is changed. The rest is left for memory pools
# that grow after the start.
DRIFT_SHARE = 0.25
SAME_INPUTS = "kept: the same inputs give the installed plan"
# A plan that is predicted to be this much faster is worth a restart; a smaller gain is within the prediction's error.
FASTER_SHARE = 0.05
# A total memory that differs by less is the same hardware: kernels and drivers reserve some MiB more or less.
SAME_TOTAL_SHARE = 0.01

# Settings that do not affect a plan: a plan is not made again for the memory of now because one of them changes.
_UNRELATED_INSTANCE_SETTINGS = {"name", "source", "port", "listen", "allowed_clients", "api_key_file", "sha256",
                          "mirrors", "allow_unverified", "tls_certificate_file", "tls_key_file",
                          "allowed_drop_ins", "sleep_idle_seconds", "idle_seconds", "rerank_example",
                          "tune_prompt_file", "accept_slower", "gateway"}  # fmt: skip
_UNRELATED_SETTINGS = {"models", "llama_cpp_repository", "llama_cpp_ref", "build_ui", "build_jobs", "build_cache",
              "keep_releases", "hub_endpoint", "hub_token_file", "cuda_toolkit", "drain_seconds",
              "drain_overdue", "switch_at_once", "site", "site_port",
              "allow_empty_models", "environment", "models_dir", "proxy", "no_proxy", "ca_file", "python",
              "tune", "tune_minutes", "tune_stops_service", "tune_window", "reached_at",
              "gateway_listen", "gateway_port", "gateway_api_key_file", "gateway_allow_unauthenticated",
              "gateway_allowed_clients", "gateway_tls_certificate_file", "gateway_tls_key_file",
              "gateway_session_headers", "gateway_queue_seconds", "gateway_queue_requests", "gateway_reply_seconds",
              "gateway_body_kib", "gateway_stats_port", "metrics_listen", "metrics_port", "metrics_allowed_clients",
              "monitoring_port", "monitoring_days", "alertmanagers"}  # fmt: skip


# Settings that later versions added: with these values they are no part of the hash, which so is that of before.
_ADDED_SETTINGS: Mapping[str, Any] = {"gpus": None}
_ADDED_INSTANCE_SETTINGS: Mapping[str, Any] = {
    "serves": "chat", "pooling": None, "rerank_example": None, "projector": None, "image_min_tokens": None,
    "image_max_tokens": None, "speculation": "none", "draft": None, "draft_max_tokens": None, "draft_min_tokens": None,
    "adapters": (), "chat_template_file": None, "grammar_file": None, "json_schema_file": None, "kv_unified": False,
    "pool_tokens": None, "gpus": None, "copies": 1, "split_mode": "layer", "start": "boot",
    "batch_tokens": None, "threads_batch": None, "cpus": None, "numa": "auto", "load_mode": "none", "op_offload": True,
    "spilled_layers": None, "profile": None, "repack": None,
}  # fmt: skip


def inputs_key(machine: Machine, settings: Settings, instance: Instance, model: Mapping[str, Any]) -> str:
    """A hash of all inputs of a plan except memory, 16 hex digits. `model` has the model's files and their sizes."""
    inputs = {
        "instance": _instance(instance),
        "settings": _settings(settings),
        "model": model,
        "cpu": asdict(machine.cpu),
        "gpus": [[gpu.uuid, gpu.name, gpu.problem] for gpu in machine.gpus],
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=list).encode()).hexdigest()[:16]


def asked_for(settings: Settings, instance: Instance) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings that a plan depends on, of the host and of the instance."""
    return _settings(settings), _instance(instance)


def _instance(instance: Instance) -> dict[str, Any]:
    return _without(asdict(instance), {*_UNRELATED_INSTANCE_SETTINGS, *_unset(instance, _ADDED_INSTANCE_SETTINGS)})


def _settings(settings: Settings) -> dict[str, Any]:
    return _without(asdict(settings), {*_UNRELATED_SETTINGS, *_unset(settings, _ADDED_SETTINGS)})


def _unset(settings: Settings | Instance, added: Mapping[str, Any]) -> set[str]:
    return {key for key, value in added.items() if getattr(settings, key) == value}


def _without(values: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in names}


@dataclass(frozen=True)
class RecordedMemory:
    """The memory that a plan was made for: total bytes, and for each GPU the bytes of other processes, by UUID."""

    host_bytes: int
    swap_bytes: int
    gpu_total_bytes: Mapping[str, int]
    gpu_others_bytes: Mapping[str, int]

    @classmethod
    def of(cls, machine: Machine) -> RecordedMemory:
        """The memory of a probed machine."""
        return cls(
            machine.memory.total_bytes,
            machine.memory.swap_total_bytes,
            {gpu.uuid: gpu.memory_total_bytes for gpu in machine.gpus},
            {gpu.uuid: gpu.memory_used_by_others_bytes for gpu in machine.gpus},
        )

    def to_json(self) -> dict[str, Any]:
        """For plan.json."""
        return asdict(self)

    def on(self, machine: Machine) -> Machine | None:
        """The machine with this memory; None if the machine has other hardware now."""
        now = RecordedMemory.of(machine)
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
        """Bytes that are available to a plan now beyond the recorded memory, by the ledger's device names; negative if
        there are less."""
        now = RecordedMemory.of(machine)
        drift = {
            f"GPU{gpu.index}": (gpu.memory_total_bytes - gpu.memory_used_by_others_bytes)
            - (self.gpu_total_bytes[gpu.uuid] - self.gpu_others_bytes[gpu.uuid])
            for gpu in machine.gpus
        }
        return {**drift, HOST: now.host_bytes - self.host_bytes}


@dataclass(frozen=True)
class InstalledPlan:
    """An installed plan that was made from the same inputs as the wanted plan: its flags and its recorded memory."""

    argv: tuple[str, ...]  # the planned part of the command line
    memory: RecordedMemory

    @classmethod
    def of(cls, record: PlanRecord | None, key: str) -> InstalledPlan | None:
        """From plan.json, if it is of a plan with this `inputs_key`; None for another version's or an edited file."""
        if record is None or record.plan is None or record.inputs is None or record.inputs.key != key:
            return None
        memory = record.inputs.memory
        return cls(
            record.plan.argv,
            RecordedMemory(memory.host_bytes, memory.swap_bytes, memory.gpu_total_bytes, memory.gpu_others_bytes),
        )


@dataclass(frozen=True)
class Choice:
    """The plans to install, the memory that they were made for, and the reason, a sentence for the operator."""

    results: tuple[Plan | Refusal, ...]
    memory: RecordedMemory
    why: str = ""


Planner = Callable[[Machine], Sequence[Plan | Refusal]]


def keep_or_replan(
    machine: Machine, settings: Settings, planner: Planner, installed: Mapping[str, InstalledPlan]
) -> Choice:
    """The installed plans if they still fit and nothing much better is possible, else the plans for the memory of now.

    `planner` plans all instances of the host together. `installed` has, by instance name, the installed plans whose
    inputs have not changed.
    """
    present = Choice(tuple(planner(machine)), RecordedMemory.of(machine))
    if not installed:
        return present
    if _is_installed(present.results, installed):
        return replace(present, why=SAME_INPUTS)
    problems = []
    memories: list[RecordedMemory] = []
    for plan in installed.values():
        if plan.memory in memories:
            continue
        memories.append(plan.memory)
        kept = _keep(machine, settings, planner, plan.memory, present, installed)
        if isinstance(kept, Choice):
            return kept
        problems.append(kept)
    return replace(present, why=f"changed: {problems[0]}")


def _is_installed(results: Sequence[Plan | Refusal], installed: Mapping[str, InstalledPlan]) -> bool:
    argvs = {result.instance: result.argv for result in results if isinstance(result, Plan)}
    return all(argvs.get(name) == plan.argv for name, plan in installed.items())


def _keep(
    machine: Machine, settings: Settings, planner: Planner, memory: RecordedMemory, present: Choice,
    installed: Mapping[str, InstalledPlan],
) -> Choice | str:  # fmt: skip
    """The plans for the recorded memory, or the reason why they cannot be kept."""
    planned_for = memory.on(machine)
    if planned_for is None:
        return "the host has other hardware, or another amount of memory, than when the plan was made"
    results = tuple(planner(planned_for))
    if not _is_installed(results, installed):
        return "this version of llamafleet makes another plan from the same inputs"
    drift, thresholds = memory.drift(machine), _thresholds(machine, settings)
    plans = []
    for result in results:
        if isinstance(result, Refusal):
            return f"{result.instance}: {result.reason}"
        rows = tuple(_with_drift(row, drift.get(row.device, 0)) for row in result.ledger)
        plans.append(replace(result, ledger=rows))
    if problem := next(_too_little_memory(plans, drift, thresholds), ""):
        return problem
    much_more = any(size > thresholds[device] for device, size in drift.items())
    if much_more and (reason := next(_better(plans, present.results, settings), "")):
        return reason
    return Choice(tuple(plans), memory, f"kept: the installed plan still fits ({_drift_text(drift)})")


def _with_drift(row: LedgerRow, drift: int) -> LedgerRow:
    return replace(row, capacity_bytes=row.capacity_bytes + drift, free_bytes=row.free_bytes + drift)


def _thresholds(machine: Machine, settings: Settings) -> dict[str, int]:
    """Bytes by which a device's memory may change without a change of the plan, by the ledger's device names."""
    reserves = {f"GPU{gpu.index}": reserve_mib(gpu, settings) for gpu in machine.gpus}
    return {name: int(DRIFT_SHARE * mib * MIB) for name, mib in {**reserves, HOST: settings.ram_reserve_mib}.items()}


def _too_little_memory(plans: Sequence[Plan], drift: Mapping[str, int], thresholds: Mapping[str, int]) -> Iterator[str]:
    """A sentence for each device on which a plan no longer fits. What Vulkan alone lists does not drift: the memory of
    other processes is unknown there."""
    for plan in plans:
        for row in plan.ledger:
            if row.device in drift and row.free_bytes < -thresholds[row.device]:
                yield (
                    f"{row.device} has {-drift[row.device] // MIB} MiB less than when {plan.instance} was planned,"
                    f" which is more than its free memory and {DRIFT_SHARE:.0%} of the reserve"
                )


def _better(plans: Sequence[Plan], present: Sequence[Plan | Refusal], settings: Settings) -> Iterator[str]:
    """A sentence for each reason why the plan for the memory of now is worth a restart."""
    for old, new, instance in zip(plans, present, settings.models, strict=True):
        if isinstance(new, Refusal):
            continue
        if instance.kv_types.index(new.kv_type) < instance.kv_types.index(old.kv_type):
            yield f"{new.instance}: a KV cache of type {new.kv_type} fits now, it was {old.kv_type}"
        before, after = old.chosen_for.workload_seconds, new.chosen_for.workload_seconds
        if before > after * (1 + FASTER_SHARE):
            yield f"{new.instance}: its workload would take {after:.1f} s, predicted, instead of {before:.1f} s"


def _drift_text(drift: Mapping[str, int]) -> str:
    changes = [f"{device} {size / MIB:+.0f} MiB" for device, size in drift.items() if size]
    return ", ".join(changes) or "the same memory"
