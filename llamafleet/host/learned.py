"""What a host's own measurements say about its rates: the survey's probe of the memory, and the gates of its instances.

A gate measures one model. Its plan says which speed was expected of it, and by which rates (`Expected`). Measured and
expected speed together give the rate that the host really has, whatever the model; of several gates the median counts.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from pydantic import Field

from llamafleet.host.machine import Label, Message, Name
from llamafleet.host.speeds import Measurements

# Of bytes, operations and tokens a second; a rate of 0 says nothing and would be divided by.
Rate = Annotated[float, Field(strict=True, gt=0, le=1e18, allow_inf_nan=False)]
ByGpu = Annotated[Mapping[Name, Rate], Field(max_length=256)]
HOST, GPUS, BOTH = "host", "gpus", "both"


@dataclass(frozen=True)
class Bandwidth:
    """What the processors read together; None where it was not measured, and `why`. `hardware` names what it is of."""

    bytes_per_s: Rate | None
    hardware: Label
    why: Message = ""


@dataclass(frozen=True)
class Expected:
    """The speed at which a gate's own short request was expected, in tokens/s, and the rates that this came from."""

    decode_tokens_per_s: Rate
    prompt_tokens_per_s: Rate
    computed_on: Name  # HOST, GPUS or BOTH
    host_bytes_per_s: Rate
    host_flops: Rate
    gpu_bytes_per_s: ByGpu = field(default_factory=dict)  # of the GPUs in use, by UUID

    def to_json(self) -> dict[str, Any]:
        """For plan.json."""
        return asdict(self)


@dataclass(frozen=True)
class GateSpeeds:
    """The speeds that gates of an instance measured, tokens/s: the median of the last ones, and the fastest prompt."""

    instance: Label
    decode_tokens_per_s: Rate
    prompt_tokens_per_s: Rate | None
    expected: Expected


@dataclass(frozen=True)
class GatedSpeed:
    """The speeds that gates of an instance measured, tokens/s: the median of the last ones, None of a server that
    writes nothing; and the last prompt's, or the median of the inputs of such a server."""

    decode_tokens_per_s: Rate | None
    prompt_tokens_per_s: Rate | None = None


@dataclass(frozen=True)
class ChosenRates:
    """The measurements that a plan was chosen with, as plan.json has them under `inputs`."""

    host_bytes_per_s: Rate | None = None
    host_flops: Rate | None = None
    probe_bytes_per_s: Rate | None = None
    gpu_bytes_per_s: ByGpu = field(default_factory=dict)

    @classmethod
    def of(cls, measured: Measurements) -> ChosenRates:
        """Those of the measurements that are kept."""
        return cls(
            measured.host_bytes_per_s, measured.host_flops, measured.probe_bytes_per_s, dict(measured.gpu_bytes_per_s)
        )

    def measurements(self) -> Measurements:
        """For the planner."""
        return Measurements(
            self.host_bytes_per_s, self.host_flops, self.probe_bytes_per_s, gpu_bytes_per_s=self.gpu_bytes_per_s
        )


@dataclass(frozen=True)
class RecordedRates:
    """`inputs.rates` of plan.json: what the plan was chosen with, and the probe's figure, which is measured once."""

    chosen: ChosenRates = ChosenRates()
    probe: Bandwidth | None = None

    def to_json(self) -> dict[str, Any]:
        """For plan.json."""
        return asdict(self)


def measurements(bandwidth: Bandwidth | None, gates: Sequence[GateSpeeds]) -> Measurements:
    """The host's rates as far as they were measured. A gate whose model was computed by GPUs and CPU together says
    nothing, since it does not tell which of them was slower than expected."""
    on_host = [gate for gate in gates if gate.expected.computed_on == HOST]
    reading = [gate for gate in on_host if gate.prompt_tokens_per_s]
    uuids = {uuid for gate in gates if gate.expected.computed_on == GPUS for uuid in gate.expected.gpu_bytes_per_s}
    return Measurements(
        host_bytes_per_s=_median([gate.expected.host_bytes_per_s * _decode_ratio(gate) for gate in on_host]),
        host_flops=_median([gate.expected.host_flops * _prompt_ratio(gate) for gate in reading]),
        probe_bytes_per_s=bandwidth.bytes_per_s if bandwidth else None,
        gpu_bytes_per_s={uuid: rate for uuid in sorted(uuids) if (rate := _gpu_rate(uuid, gates))},
    )


def _gpu_rate(uuid: str, gates: Sequence[GateSpeeds]) -> float | None:
    return _median(
        [
            gate.expected.gpu_bytes_per_s[uuid] * _decode_ratio(gate)
            for gate in gates
            if gate.expected.computed_on == GPUS and uuid in gate.expected.gpu_bytes_per_s
        ]
    )


def _decode_ratio(gate: GateSpeeds) -> float:
    return gate.decode_tokens_per_s / gate.expected.decode_tokens_per_s


def _prompt_ratio(gate: GateSpeeds) -> float:
    return (gate.prompt_tokens_per_s or 0.0) / gate.expected.prompt_tokens_per_s


def _median(values: Sequence[float]) -> float | None:
    return float(statistics.median(values)) if values else None
