"""What `collect.py` answers, and the records of a host in it, checked before a check reads them: a host is not trusted.

`read` checks the answer; `plan_problems`, `release_problems` and `gate_problems` check what our own files on the host
and the gate say, so that a damaged one fails the checks of that host by a line.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from llamafleet import validation
from llamafleet.host import answers
from llamafleet.host.installed import Place
from llamafleet.host.machine import matching
from llamafleet.validation import JSON, Flag, Listed, Problem, Text, Whole

# Of a file: null where it is missing or cannot be read.
Sum = Text | None
Json = dict[str, Any]


class Stat(TypedDict):
    """A file of the host."""

    owner: Text
    uid: Whole
    gid: Whole
    mode: Annotated[Text, matching("be an octal mode", "[0-7]{1,5}")]
    size_bytes: Whole
    mtime_ns: Whole
    ctime_ns: Whole


class Helpers(TypedDict):
    """The current helpers: their key, and the files that are not what was installed."""

    key: Text | None
    damaged: Listed[Text]


class UnitFile(Stat):
    """The unit file of an instance."""

    sha256: Sum
    identity: Text | None


class Keys(Stat):
    """The file with the API keys; never the keys."""

    count: Whole


class Model(Stat):
    """A file of the model."""

    sha256: Sum
    noted_sha256: Any  # as FILE.verified says


class Release(TypedDict):
    """The release that the link `current` leads to."""

    target: Text
    record: Json | None
    files: dict[str, Sum]
    version: Text


class MainProcess(TypedDict):
    """The main process of an instance."""

    pid: Whole
    exe: Text | None
    users: Listed[Text]
    deleted: Listed[Text]
    inherited: Listed[Text]
    age_seconds: Annotated[float, Field(strict=True, allow_inf_nan=False)] | None


class Process(MainProcess, total=False):
    """Its hardening, as far as /proc tells."""

    NoNewPrivs: Whole
    Seccomp: Whole
    CapInh: Whole
    CapPrm: Whole
    CapEff: Whole
    CapBnd: Whole
    CapAmb: Whole
    CoreLimit: Text | None


class Good(TypedDict):
    """What last passed the gate."""

    unit_sha256: Sum
    plan_sha256: Sum
    secrets_as_kept: Flag


class Liveness(TypedDict):
    """The liveness check of an instance."""

    active: Text | None
    enabled: Text | None
    drop_ins: Listed[Text]
    units: Listed[Text]
    as_kept: Flag


class InstanceFacts(TypedDict):
    """The facts of an instance."""

    plan: Json | None
    kept_plan: Json | None
    plan_sha256: Sum
    plan_file: Stat | None
    good: Good
    drop_ins: Listed[Text]
    unit: UnitFile | None
    state: dict[str, Text]
    process: Process | None
    listening: Listed[Annotated[Listed[Any], Field(min_length=2, max_length=2)]]  # address and port
    keys: Keys | None
    models: dict[str, Model | None]
    liveness: Liveness
    gate: Any
    allowed_origin: Text | None


class Facts(TypedDict):
    """The facts of a host."""

    euid: Whole
    release: Release | None
    paths: dict[str, Place | None]
    helpers: Helpers
    staged: Listed[Text]
    run: Listed[Text]
    units: Listed[Text]
    instances: dict[str, InstanceFacts]


class PlanGpu(TypedDict):
    """A GPU of the plan."""

    uuid: Text


class PlanGate(TypedDict):
    """What the gate compares the server with."""

    url: Annotated[Text, matching("be an address with a port", r"https?://.+:\d{1,5}")]
    api_keys: Text | None
    context_tokens: Whole
    slots: Whole
    backend: Text
    gpus: Listed[PlanGpu]


class PlanFile(TypedDict):
    """A file of the plan's model."""

    path: Text
    size_bytes: Whole | None
    sha256: Sum


class PlanJson(TypedDict):
    """plan.json, as far as it is checked."""

    schema: Annotated[Whole, Field(ge=1, le=1)]
    source: Text
    release: Text
    identity: Text
    files: Listed[PlanFile]
    gate: PlanGate


class ReleaseJson(TypedDict):
    """release.json, as far as it is checked."""

    key: Text
    ref: Text
    commit: Text
    files: dict[str, Text]


class GateCheck(TypedDict):
    """One check of the gate."""

    name: Text
    ok: Flag
    expected: Any
    found: Any
    hint: Any


class GateJson(TypedDict):
    """The result of gate.py."""

    checks: Listed[GateCheck]


class FactsError(Exception):
    """The host's answer is unusable; the text says where."""


def read(text: str, instances: Sequence[str]) -> Mapping[str, Any]:
    """The facts on the last line of what the collector printed. Raises `FactsError`."""
    try:
        value = answers.json_value(text.strip().rpartition("\n")[2], "collect.py")
    except answers.AnswerError as error:
        raise FactsError(str(error)) from None
    for problem in _problems(Facts, value, "answer"):
        raise FactsError(f"collect.py on the host: {problem}")
    if missing := [name for name in instances if name not in value["instances"]]:
        raise FactsError(f"collect.py on the host: answer.instances: {missing[0]} is missing")
    facts: Mapping[str, Any] = value
    return facts


def plan_problems(plan: object) -> list[Problem]:
    """What is wrong with the form of plan.json."""
    return _problems(PlanJson, plan, "")


def release_problems(record: object) -> list[Problem]:
    """What is wrong with the form of release.json."""
    return _problems(ReleaseJson, record, "")


def gate_problems(answer: object) -> list[Problem]:
    """What is wrong with the form of the gate's result."""
    return _problems(GateJson, answer, "")


def _problems(schema: Any, value: object, root: str) -> list[Problem]:
    try:
        _adapter(schema).validate_python(value)
    except ValidationError as error:
        return list(validation.problems(error, schema, JSON, root))
    return []


@functools.cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)
