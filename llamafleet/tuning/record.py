"""tuned.json: what a tune measured for one instance on one host, what won, and for what host and workload that holds.

The file lies on a host, which is not trusted, or in the operator's repository, where somebody may have edited it. One
that cannot be used is worth nothing: the instance is planned as without a tune. One of a later version is refused by
its number. A record holds while its fingerprint is that of now; what differs is named.

Decision 16: docs/decisions/0016-records-are-versioned.md.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, get_type_hints

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from llamafleet.host.machine import Bytes, Count, Label, Machine, Message, Name
from llamafleet.planner.stability import SAME_TOTAL_SHARE, asked_for
from llamafleet.settings.schema import Instance, Settings
from llamafleet.settings.speculation import AUTO
from llamafleet.settings.workload import Workload
from llamafleet.units import GIB
from llamafleet.validation import Listed, Text, Whole

SCHEMA = 1
# What a tune may choose, with the value that leaves it open. A host could write anything into its record.
LEFT_OPEN: Mapping[str, Any] = {
    "ubatch_tokens": None, "batch_tokens": None, "threads": None, "threads_batch": None, "cpus": None, "numa": "auto",
    "load_mode": "none", "op_offload": True, "repack": None, "spilled_layers": None, "slots": None,
    "split_mode": "auto", "speculation": AUTO,
}  # fmt: skip
OF_SPECULATION = ("draft", "draft_max_tokens", "draft_min_tokens")  # open where the speculation is
# Settings that are compared as the workload, so that a change of them is named as such.
_OF_WORKLOAD = {"prompt_tokens", "reply_tokens", "live_tokens", "concurrency"}

Tokens = Annotated[Whole, Field(ge=0, le=2**40)]
# A gain is infinite where llama-server as it ships does not run; JSON has no number for that, so it is null there.
Ratio = Annotated[float, Field(ge=0, allow_inf_nan=False)] | None
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Speed = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False, description="tokens a second")] | None


def _chosen(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The values as the inventory's; what a tune does not choose is refused, and so is another draft."""
    known = get_type_hints(Instance, include_extras=True)
    if other := settings.keys() - {*LEFT_OPEN, *OF_SPECULATION, "kv_types"}:
        raise ValueError(f"a tune does not choose {', '.join(sorted(other))}")
    if settings.get("draft") is not None:
        raise ValueError("a tune leaves a draft out, and names none")
    return {key: TypeAdapter(known[key]).validate_python(value) for key, value in settings.items()}


class LaterRecordError(ValueError):
    """A later version of llamafleet wrote the record; the text names its schema."""


@dataclass(frozen=True)
class TunedGpu:
    """A GPU that was there. Another card of the same name and size is as fast, so its UUID is for people only."""

    name: Label
    memory_total_bytes: Bytes
    uuid: Name = ""


@dataclass(frozen=True)
class TunedWorkload:
    """The requests that were measured, tokens; `text` is the SHA-256 of the prompt text, None with random words."""

    prompt_tokens: Tokens
    reply_tokens: Tokens
    live_tokens: Tokens
    concurrency: Count
    text: Text | None = None


@dataclass(frozen=True)
class Fingerprint:
    """All that a measurement depends on. It is the same on two hosts that are made alike."""

    build: Name  # the build key
    model: Annotated[Mapping[Name, Name], Field(max_length=256)]  # a digest of the files, by part; "": the model itself
    gpus: Annotated[Listed[TunedGpu], Field(max_length=256)]
    driver: Name | None  # NVIDIA's
    ram_bytes: Bytes
    cpu: Label  # its model
    cores: Annotated[Listed[Count], Field(min_length=3, max_length=3)]  # physical, logical, performance: usable ones
    kernel: Name
    workload: TunedWorkload
    asked: Name  # a hash of the other settings that the operator gave

    @classmethod
    def of(
        cls, machine: Machine, settings: Settings, instance: Instance, *, build: str,
        model: Mapping[str, Sequence[tuple[str, int | None, str | None]]], work: Workload, text_sha256: str | None,
    ) -> Fingerprint:  # fmt: skip
        """Of a host and an instance as the operator wrote it. `model`: name, size and SHA-256 of each file, by part."""
        host, own = asked_for(settings, instance)
        asked = [host, {key: value for key, value in own.items() if key not in _OF_WORKLOAD}]
        cpu = machine.cpu
        return cls(
            build=build,
            model={part: _hash([list(file) for file in files]) for part, files in sorted(model.items())},
            gpus=tuple(TunedGpu(gpu.name, gpu.memory_total_bytes, gpu.uuid) for gpu in machine.gpus if gpu.usable),
            driver=machine.driver.nvidia,
            ram_bytes=machine.memory.total_bytes,
            cpu=cpu.model,
            cores=(cpu.physical_cores, cpu.logical_cores, cpu.performance_cores),
            kernel=machine.os.kernel,
            workload=TunedWorkload(
                work.prompt_tokens, work.reply_tokens, work.live_tokens, work.concurrency, text_sha256
            ),
            asked=_hash(asked),
        )  # fmt: skip

    @property
    def key(self) -> str:
        """16 hexadecimal digits, by which trials of the same measurement are known. Memory counts in whole GiB: kernels
        and drivers reserve some MiB more or less at each boot."""
        return _hash({**asdict(self), "gpus": _gpus(self), "ram_bytes": round(self.ram_bytes / GIB)})


@dataclass(frozen=True)
class Winner:
    """What won, with the seconds of the workload; `gain` is the seconds of llama-server as it ships by the winner's."""

    label: Message
    seconds: Seconds
    gain: Ratio
    low: Ratio
    high: Ratio
    prompt_tokens_per_s: Speed = None
    decode_tokens_per_s: Speed = None


@dataclass(frozen=True)
class Tuned:
    """One record. `settings` are put over those that the operator left open; `raw` is all of it, with every trial."""

    raw: Mapping[str, Any]
    instance: Name
    fingerprint: Fingerprint
    settings: Annotated[Mapping[Name, Any], Field(max_length=64), AfterValidator(_chosen)]
    winner: Winner
    ended: Seconds  # unix time
    schema: Annotated[Whole, Field(ge=SCHEMA, le=SCHEMA)] = SCHEMA

    @classmethod
    def of(cls, value: object) -> Tuned | None:
        """From the JSON value of the file; None where it cannot be used. Raises LaterRecordError."""
        if not isinstance(value, dict):
            return None
        if type(schema := value.get("schema")) is int and schema > SCHEMA:
            raise LaterRecordError(
                f"schema {schema} is of a later llamafleet, this one knows {SCHEMA}: upgrade it, or remove the record"
            )
        try:
            record: Tuned = _adapter().validate_python({**value, "raw": value})
        except ValidationError:
            return None
        return record

    def over(self, instance: Instance) -> Instance:
        """The instance with those of the record's settings that the operator left open."""
        chosen = {key: value for key, value in self.settings.items() if _is_open(instance, key, value)}
        return replace(instance, **chosen)


def _is_open(instance: Instance, key: str, value: Any) -> bool:
    if key == "kv_types":
        return set(value) <= set(instance.kv_types)
    if key in OF_SPECULATION:
        return instance.speculation == AUTO
    return bool(getattr(instance, key) == LEFT_OPEN[key])


@functools.cache
def _adapter() -> TypeAdapter[Tuned]:
    return TypeAdapter(Tuned)


def record_text(record: Mapping[str, Any]) -> str:
    """A record, or the operator's records of a host by instance, as they are written: in an order that stays."""
    return json.dumps(record, indent=1, sort_keys=True, allow_nan=False) + "\n"


def stale(record: Tuned, now: Fingerprint) -> tuple[str, ...]:
    """What differs from when the record was measured, a phrase each; nothing where it holds."""
    return tuple(_differences(record.fingerprint, now))


def is_of_hardware(then: Fingerprint, machine: Machine) -> bool:
    """Whether that was measured on a machine whose GPUs and processor are like these, under the same driver."""
    cpu = machine.cpu
    gpus = tuple(TunedGpu(gpu.name, gpu.memory_total_bytes) for gpu in machine.gpus if gpu.usable)
    return (
        _gpus(then) == _gpus(replace(then, gpus=gpus))
        and (then.driver, then.cpu) == (machine.driver.nvidia, cpu.model)
        and tuple(then.cores) == (cpu.physical_cores, cpu.logical_cores, cpu.performance_cores)
    )


def _differences(then: Fingerprint, now: Fingerprint) -> Iterator[str]:
    if then.build != now.build:
        yield f"another build of llama.cpp: {then.build} before, {now.build} now"
    for part in sorted(then.model.keys() | now.model.keys()):
        if then.model.get(part) != now.model.get(part):
            both = part in then.model and part in now.model
            yield f"{'other files' if both else 'added or removed'}: {part or 'model'}"
    if _gpus(then) != _gpus(now):
        yield f"another GPU: {_gpu_words(then)} before, {_gpu_words(now)} now"
    if then.driver != now.driver:
        yield f"another driver: {then.driver or 'none'} before, {now.driver or 'none'} now"
    if abs(then.ram_bytes - now.ram_bytes) > SAME_TOTAL_SHARE * max(then.ram_bytes, now.ram_bytes):
        yield f"another amount of RAM: {then.ram_bytes / GIB:.1f} GiB before, {now.ram_bytes / GIB:.1f} GiB now"
    if then.cpu != now.cpu:
        yield f"another processor: {then.cpu} before, {now.cpu} now"
    if then.cores != now.cores:
        yield f"other usable cores: {_core_words(then.cores)} before, {_core_words(now.cores)} now"
    if then.kernel != now.kernel:
        yield f"another kernel: {then.kernel or 'unknown'} before, {now.kernel or 'unknown'} now"
    yield from _of_workload(then.workload, now.workload)
    if then.asked != now.asked:
        yield "other settings of the model or the host in the inventory"


def _of_workload(then: TunedWorkload, now: TunedWorkload) -> Iterator[str]:
    for key in ("prompt_tokens", "reply_tokens", "live_tokens", "concurrency"):
        before, after = getattr(then, key), getattr(now, key)
        if before != after:
            yield f"another workload: {key} {before} before, {after} now"
    if then.text != now.text:
        yield "another workload: the text of its prompts"


def _gpus(of: Fingerprint) -> list[tuple[str, int]]:
    """Name and whole GiB: drivers reserve some MiB more or less."""
    return [(gpu.name, round(gpu.memory_total_bytes / GIB)) for gpu in of.gpus]


def _gpu_words(of: Fingerprint) -> str:
    return ", ".join(f"{name} ({size} GiB)" for name, size in _gpus(of)) or "none"


def _core_words(cores: Sequence[int]) -> str:
    return f"{cores[0]} ({cores[1]} with hyper-threading, {cores[2]} of them fast)"


def fitting(own: Tuned | None, others: Mapping[str, Tuned], now: Fingerprint) -> tuple[str, Tuned] | None:
    """The record to plan with, and who measured it, "" for this instance: its own if that holds, else the newest that
    holds of `others`, by who measured them; of the same age, the first."""
    if own and not stale(own, now):
        return "", own
    good = {who: one for who, one in others.items() if not stale(one, now)}
    newest = max(good, key=lambda who: good[who].ended, default=None)
    return None if newest is None else (newest, good[newest])


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=list).encode()).hexdigest()[:16]
