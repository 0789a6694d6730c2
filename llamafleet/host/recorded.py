"""plan.json of an installed instance, as far as this side reads it; `llamafleet/service/record.py` writes it.

The file lies on a host, which is not trusted, and may be of another version. What cannot be used is worth nothing: the
instance is planned anew and the file replaced. A schema of a later version is kept, so that it can be refused by name.

Decision 10: docs/decisions/0010-a-host-is-not-trusted.md.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, model_validator

from llamafleet import validation
from llamafleet.host.learned import RecordedRates
from llamafleet.host.machine import Bytes, Count, Label, Message, Name
from llamafleet.remote.common import PLAN_SCHEMA
from llamafleet.validation import Listed, Text, Whole

SCHEMA = PLAN_SCHEMA


def readable(value: object) -> object:
    """Bytes that are no UTF-8 come from the host as lone surrogates; as "?" they can be shown and compared."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


Argument = Annotated[Text, Field(max_length=2**17, description="MAX_ARG_STRLEN of Linux"), BeforeValidator(readable)]
Arguments = Annotated[Listed[Argument], Field(max_length=100_000)]
Tokens = Annotated[Whole, Field(ge=0, le=2**40)]
Speed = Annotated[float, Field(strict=True, ge=0, le=1e9, allow_inf_nan=False, description="tokens a second")]
# Bytes by the name or UUID of a device; what llama-server needs beyond the plan may be negative.
ByDevice = Annotated[Mapping[Label, Bytes], Field(max_length=1024)]
Differences = Annotated[Mapping[Label, Annotated[Whole, Field(ge=-(2**64), le=2**64)]], Field(max_length=1024)]


@dataclass(frozen=True)
class RecordedGpu:
    """A GPU of the plan, with the bytes that the process must hold there."""

    uuid: Name
    planned_bytes: Bytes


@dataclass(frozen=True)
class RecordedGate:
    """What the gate compares the running server with."""

    context_tokens: Tokens  # of one slot
    slots: Count
    gpus: Annotated[Listed[RecordedGpu], Field(max_length=256)] = ()
    argv: Arguments = ()  # the whole command line of the service
    serves: Name = "chat"

    @property
    def port(self) -> int | None:
        """Where clients reach it; None where the record does not say."""
        value = self.argv[self.argv.index("--port") + 1] if "--port" in self.argv[:-1] else ""
        return int(value) if value.isascii() and value.isdigit() and len(value) < 6 else None


@dataclass(frozen=True)
class RecordedPrediction:
    """The speed that the plan was made for."""

    decode_tokens_per_s: Speed | None = None
    prefill_tokens_per_s: Speed | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """The speed of writing; of reading where nothing is written."""
        return self.decode_tokens_per_s or self.prefill_tokens_per_s


@dataclass(frozen=True)
class RecordedPlan:
    """The planned part of the command line."""

    argv: Arguments
    predicted: RecordedPrediction = RecordedPrediction()


@dataclass(frozen=True)
class InputMemory:
    """The memory that a plan was made for, see `llamafleet/planner/stability.py`."""

    host_bytes: Bytes
    swap_bytes: Bytes
    gpu_total_bytes: ByDevice
    gpu_others_bytes: ByDevice

    @model_validator(mode="after")
    def _others_fit_in(self) -> Self:
        if self.gpu_total_bytes.keys() != self.gpu_others_bytes.keys():
            validation.refuse([("gpu_others_bytes", "should have the keys of gpu_total_bytes")])
        if any(size > self.gpu_total_bytes[uuid] for uuid, size in self.gpu_others_bytes.items()):
            validation.refuse([("gpu_others_bytes", "should be at most gpu_total_bytes")])
        return self


@dataclass(frozen=True)
class RecordedInputs:
    """What the plan was made from: a hash of all other inputs, the memory, and the measured rates; None in records of
    llamafleet 0.1.0, which knew estimates only."""

    key: Name
    memory: InputMemory
    rates: RecordedRates | None = None


@dataclass(frozen=True)
class RecordedAnswer:
    """llama-server's answer about the plan, by the ledger's names of devices."""

    binary_bytes: ByDevice | None = None
    extra_bytes: Differences = field(default_factory=dict)
    why: Message = ""


@dataclass(frozen=True)
class PlanRecord:
    """plan.json of an installed instance. `raw` is all of it, as the host has it."""

    raw: Mapping[str, Any] = field(repr=False)
    schema: Annotated[Whole, Field(ge=SCHEMA, le=SCHEMA)] = SCHEMA
    release: Name = ""
    backend: Name = ""
    plan: RecordedPlan | None = None
    gate: RecordedGate | None = None
    inputs: RecordedInputs | None = None
    verified: RecordedAnswer | None = None

    @property
    def is_later(self) -> bool:
        """Did a later version of llamafleet write it? Then nothing but `schema` is known of it."""
        return self.schema > SCHEMA

    @property
    def source(self) -> str | None:
        """Where the model came from, as it was named; None where that is not a text."""
        value = self.raw.get("source")
        return value if isinstance(value, str) else None

    @classmethod
    def of(cls, value: object) -> PlanRecord | None:
        """From the JSON value of the file; None where it cannot be used."""
        if not isinstance(value, dict) or not value:
            return None
        if type(schema := value.get("schema")) is int and schema > SCHEMA:
            return cls(raw=value, schema=schema)
        try:
            record: PlanRecord = _adapter().validate_python({**value, "raw": value})
        except ValidationError:
            return None
        return record


@functools.cache
def _adapter() -> TypeAdapter[PlanRecord]:
    return TypeAdapter(PlanRecord)
