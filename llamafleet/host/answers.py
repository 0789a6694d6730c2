"""What our programs on a host answer: one JSON value on the last line of their output.

Each function here takes that line and gives a checked value; `installed.py` and `machine.py` have the schema of the
survey's. A host is not trusted: whatever else the line is, `AnswerError` says in one sentence which program answered
what. Keys that a schema does not know are ignored, so that a newer program can say more.

Decision 10: docs/decisions/0010-a-host-is-not-trusted.md.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, cast

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from typing_extensions import TypedDict

from llamafleet import validation
from llamafleet.host.installed import Holder, Installed, Many, Offer, Path, Sha256, Survey, Table, UserId
from llamafleet.host.left import Left
from llamafleet.host.machine import Bytes, Label, Machine, MachineError, Message
from llamafleet.host.recorded import Speed, readable
from llamafleet.remote.common import GATE_SCHEMA
from llamafleet.validation import Flag, Listed, Problem, Text, Whole, one_of, shown

# The survey of a host with many models has some 100 KB; the log of a job has 16 KiB.
MAX_CHARACTERS = 16 * 2**20
# Of lists and objects within each other. Ours have six; Python's own JSON writer ends at about 300.
MAX_DEPTH = 60

Line = Annotated[Text, Field(max_length=65536), BeforeValidator(readable)]
# Tokens, requests or seconds: a mean has a fraction.
Amount = Annotated[float, Field(strict=True, ge=0, le=1e12, allow_inf_nan=False, description="of the host's journal")]
Counted = Annotated[Whole, Field(ge=0, le=2**63)]
Lines = Annotated[Listed[Line], Field(max_length=1000)]


class AnswerError(MachineError):
    """What a program on the host answered is unusable; the text names the program."""

    def __init__(self, program: str, problems: Iterable[Problem]) -> None:
        super().__init__(list(problems))
        self.args = (f"{program} on the host: {self}",)


@dataclass(frozen=True)
class Job:
    """What `job.py` says of a job: its state, its exit code and how it ended once it has, and the end of its log."""

    state: Annotated[Text, one_of(("running", "ended", "absent"))]
    exit_code: Annotated[Whole, Field(ge=-255, le=255)] | None
    line: Line
    tail: Lines
    how: Message = ""  # llamafleet 0.1.0 does not say it


@dataclass(frozen=True)
class Memory:
    """What `verify.py` says that llama-server would allocate: bytes by llama.cpp's names of devices and kinds of host
    memory. `told` is None where it reported nothing; `why` is then the reason."""

    told: Table[Bytes] | None
    why: Message
    room: Flag  # False: the GPU had no free memory for this question beside the running server
    rejected: Message = ""  # the line by which llama-server refuses its arguments or its model


@dataclass(frozen=True)
class Verdict:
    """One check of the gate."""

    name: Label
    ok: Flag
    expected: Any = None
    found: Any = None
    hint: Any = None


@dataclass(frozen=True)
class Gate:
    """The record of an instance's last gate. Where the host's file is damaged, `problem` says what is wrong with it."""

    ok: Flag
    checks: Annotated[Listed[Verdict], Field(max_length=1000)] = ()
    time: Label = ""
    decode_tokens_per_s: Speed | None = None
    slower: Message = ""  # since another driver or kernel has booted
    schema: Annotated[Whole, Field(ge=1, le=GATE_SCHEMA)] = GATE_SCHEMA
    problem: str = ""
    record: Mapping[str, Any] = field(default_factory=dict)  # all of it, as the host has it


def _gate_or_problem(value: object) -> Gate | None:
    """The record, or what is wrong with it: a damaged file of one instance does not hide the others."""
    if value is None:
        return None
    record: dict[str, Any] = value if isinstance(value, dict) else {}
    try:
        return cast(
            Gate, _adapter(Gate).validate_python({**record, "record": record, "problem": ""} if record else value)
        )
    except ValidationError as error:
        problem = next(validation.problems(error, Gate, validation.JSON, "record"))
        return Gate(False, problem=str(problem), record=record)


@dataclass(frozen=True)
class Restarts:
    """The liveness check's restarts of an instance, those of systemd before them, and the last one with its reason."""

    restarts: Annotated[Whole, Field(ge=0, le=2**63)] = 0
    by_systemd: Annotated[Whole, Field(ge=0, le=2**63)] = 0
    time: Label = ""
    why: Message = ""


def _restarts(value: object) -> Restarts:
    """The record; a damaged one counts nothing, as for the check itself."""
    try:
        return cast(Restarts, _adapter(Restarts).validate_python(value))
    except ValidationError:
        return Restarts()


@dataclass(frozen=True)
class LiveInstance:
    """What `status.py` says of an instance: what it uses, and its last gate."""

    rss_bytes: Bytes | None
    cgroup_bytes: Bytes | None
    gpu_bytes: Table[Bytes | None]  # by UUID; None where NVML does not tell
    since: Label
    gate: Annotated[Gate | None, BeforeValidator(_gate_or_problem)]
    gpu_problem: Message = ""  # why there are no `gpu_bytes`
    liveness: Annotated[Restarts, BeforeValidator(_restarts)] = Restarts()
    asleep: Flag = False

    @model_validator(mode="before")
    @classmethod
    def _text_is_a_problem(cls, value: Any) -> Any:
        """The program has a text in place of the sizes where NVML fails."""
        if isinstance(value, dict) and isinstance(value.get("gpu_bytes"), str):
            return {**value, "gpu_bytes": {}, "gpu_problem": value["gpu_bytes"]}
        return value


@dataclass(frozen=True)
class Figures:
    """Mean and quantiles of what several requests had."""

    mean: Amount
    p10: Amount
    p50: Amount
    p90: Amount
    p99: Amount
    max: Amount


@dataclass(frozen=True)
class Counters:
    """Tokens that a server has counted since its start: read, taken from its cache, written. Six digits of each."""

    prompt_tokens: Amount
    cached_tokens: Amount
    reply_tokens: Amount


@dataclass(frozen=True)
class Observed:
    """What `workload.py` says of an instance: what its server was asked for between two unix times."""

    since: Amount | None
    until: Amount | None
    requests: Counted
    cut_short: Counted
    checks: Counted
    prompt_tokens: Figures | None
    reply_tokens: Figures | None
    live_tokens: Figures | None
    concurrency: Figures | None
    counters: Counters | None = None


@dataclass(frozen=True)
class Removable:
    """What `uninstall.py find` found."""

    euid: UserId
    lock: Holder | None
    units: Many[Path]
    paths: Many[Path]
    models: Many[Path]
    user: Flag


@dataclass(frozen=True)
class GatewayServer:
    """What `gateway_admin.py` says of a server of the gateway: whether it gets requests, and for how many seconds it
    does not, where that was lent."""

    up: Flag
    drained: Flag
    drained_seconds: Annotated[Whole, Field(ge=0, le=2**31 - 1)] | None
    check: Message = ""  # what the last check of its health said


@dataclass(frozen=True)
class Built:
    """What `build.py digest` says of a release: the SHA-256 of its release.json."""

    digest: Sha256


@dataclass(frozen=True)
class Packed:
    """What `build.py pack` says of a release: the SHA-256 of its release.json; sum and size of its archive."""

    digest: Sha256
    sha256: Sha256
    size_bytes: Annotated[Whole, Field(ge=1, le=2**62)]


@dataclass(frozen=True)
class Apart:
    """What `share.py apart` says: the addresses that a host does not reach."""

    apart: Annotated[Listed[Label], Field(max_length=100_000)]


@dataclass(frozen=True)
class Gateway:
    """What `gateway_apply.py show` says of a host's gateway: HAProxy's version, the digest of the configuration in
    service, the SHA-256 of the unit, and the record of its servers, each None or empty where there is none."""

    version: Label | None
    digest: Label | None
    active: Flag
    enabled: Flag
    unit: Sha256 | None
    servers: Mapping[str, Any]


@dataclass(frozen=True)
class MonitoringUnit:
    """An installed unit of a host's monitoring."""

    sha256: Sha256
    active: Flag
    enabled: Flag


@dataclass(frozen=True)
class Monitoring:
    """What `monitoring_apply.py show` says of a host's monitoring: where the programs lie, and the digest of the
    configuration in service, each None where there is none; and the units."""

    prometheus: Path | None
    exporter: Path | None
    digest: Label | None
    units: Mapping[str, MonitoringUnit]


class Trial(TypedDict):
    """One measurement of a tune, as `tune.py` writes it, with more that is kept as it is: the candidate's number, the
    workload's seconds, None where it failed, and how long it took with loading."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]  # figures for the record
    id: Annotated[Whole, Field(ge=0, le=2**31)]
    candidate: Annotated[Whole, Field(ge=0, le=2**31)]
    label: Label
    stage: Annotated[Whole, Field(ge=1, le=3)]
    error: Message | None
    seconds: Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)] | None
    took_seconds: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
    prompt_tokens_per_s: Speed | None
    decode_tokens_per_s: Speed | None


# A tune of a day has some ten thousand.
Trials = Annotated[Listed[Trial], Field(max_length=100_000)]


def survey(line: str) -> Survey:
    """What `survey.py` prints. Raises `AnswerError`, and `MachineError` with the path of an unusable value."""
    found = json_value(line, "survey.py")
    if not isinstance(found, dict) or not {"machine", "found"} <= found.keys():
        raise AnswerError("survey.py", [Problem("answer", f"should have machine and found, is {shown(found)}")])
    return Survey(Machine.from_json(found["machine"]), Installed.from_json(found["found"]))


def holder(line: str) -> Holder:
    """The run that holds the host's lock, as `lock.py` prints it where that is another one."""
    return cast(Holder, _read(line, "lock.py", Holder))


def job(line: str) -> Job:
    """The state of a job, as `job.py` prints it."""
    return cast(Job, _read(line, "job.py", Job))


def memory(line: str) -> Memory:
    """llama-server's memory, as `verify.py ask` prints it."""
    return cast(Memory, _read(line, "verify.py", Memory))


def sizes(line: str) -> Mapping[str, int]:
    """The bytes by device of a line `told: ...` in the log of a switch."""
    return cast("Mapping[str, int]", _read(line.removeprefix("told: "), "verify.py", Table[Bytes]))


def status(line: str) -> Mapping[str, LiveInstance]:
    """By instance, what `status.py` prints."""
    return cast("Mapping[str, LiveInstance]", _read(line, "status.py", Table[LiveInstance]))


def observed(line: str) -> Mapping[str, Observed]:
    """By instance, what `workload.py` prints."""
    return cast("Mapping[str, Observed]", _read(line, "workload.py", Table[Observed]))


def removable(line: str) -> Removable:
    """What `uninstall.py find` prints."""
    return cast(Removable, _read(line, "uninstall.py", Removable))


def offers(line: str) -> Mapping[str, Offer]:
    """By need, what `packages.py offers` prints."""
    return cast("Mapping[str, Offer]", _read(line, "packages.py", Table[Offer]))


def built(line: str) -> Built:
    """The digest of a release, as `build.py digest` prints it."""
    return cast(Built, _read(line, "build.py", Built))


def packed(line: str) -> Packed:
    """The archive of a release, as `build.py pack` prints it."""
    return cast(Packed, _read(line, "build.py", Packed))


def apart(line: str) -> tuple[str, ...]:
    """The addresses that a host does not reach, as `share.py apart` prints them."""
    return cast(Apart, _read(line, "share.py", Apart)).apart


def gateway_servers(line: str) -> Mapping[str, GatewayServer]:
    """The servers of a gateway by their names HOST/INSTANCE, as `gateway_admin.py` prints them."""
    return cast("Mapping[str, GatewayServer]", _read(line, "gateway_admin.py", Table[GatewayServer]))


def left(line: str) -> Left:
    """What is left for people to do, as `left.py` prints it."""
    return cast(Left, _read(line, "left.py", Left))


def gateway(line: str) -> Gateway:
    """The state that `gateway_apply.py show` prints."""
    return cast(Gateway, _read(line, "gateway_apply.py", Gateway))


def monitoring(line: str) -> Monitoring:
    """The state that `monitoring_apply.py show` prints."""
    return cast(Monitoring, _read(line, "monitoring_apply.py", Monitoring))


def trials(line: str) -> tuple[Trial, ...]:
    """The trials of a tune, as `tune.py read` prints them."""
    return cast("tuple[Trial, ...]", _read(line, "tune.py", Trials))


def gate(line: str) -> Gate:
    """The verdict that `gate.py check` prints."""
    return cast(Gate, _read(line, "gate.py", Gate))


def _read(line: str, program: str, schema: Any) -> Any:
    value = json_value(line, program)
    try:
        return _adapter(schema).validate_python(value)
    except ValidationError as error:
        raise AnswerError(program, validation.problems(error, schema, validation.JSON, "answer")) from None


@functools.cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def json_value(line: str, program: str) -> Any:
    """The JSON value of a line; raises `AnswerError` where it is none, or one that no program of ours prints."""

    def refused(what: str) -> AnswerError:
        return AnswerError(program, [Problem("answer", f"{what}: {shown(line[:200])}")])

    if len(line) > MAX_CHARACTERS:
        raise refused(f"should have at most {MAX_CHARACTERS} characters, has {len(line)}")
    try:
        value = json.loads(line, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
    except RecursionError:
        raise refused("is nested too deeply") from None
    except ValueError as error:
        raise refused(f"is no JSON ({error})") from None
    if not _is_flat(value):
        raise refused(f"is nested more than {MAX_DEPTH} times")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it has a key twice")
    return found


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _float(digits: str) -> float:
    if (number := float(digits)) in (float("inf"), -float("inf")):
        raise ValueError("a number is too large")
    return number


def _is_flat(value: object) -> bool:
    """Whether lists and objects are nested at most `MAX_DEPTH` times."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = list(itertools.chain.from_iterable(_items(one) for one in level))
        if not level:
            return True
    return False


def _items(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
