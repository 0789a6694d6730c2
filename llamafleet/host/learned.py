"""What a host's own measurements say about its rates: the survey's probe of the memory, the gates of its instances, and
the trials of tunes.

A gate measures one model, and so does a tune. The plan says which speed was expected of it, and by which rates
(`Expected`). Measured and expected speed together give the rate that the host really has, whatever the model; of
several the median counts. A tune reads prompts as long as the workload's, as often as its spread asks for; where there
is one, the short requests of gates do not count.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    """What the processors read together; None where it was not measured, and `why`. `hardware` names what it is of;
    `core_steps_per_s`: how fast each computes, see `llamafleet/remote/probe_bandwidth.py`."""

    bytes_per_s: Rate | None
    hardware: Label
    why: Message = ""
    core_steps_per_s: Rate | None = None


@dataclass(frozen=True)
class Expected:
    """The speed at which what was measured was expected, in tokens/s, and the rates that this came from."""

    decode_tokens_per_s: Rate
    prompt_tokens_per_s: Rate
    computed_on: Name  # HOST, GPUS or BOTH
    host_bytes_per_s: Rate
    host_flops: Rate
    gpu_bytes_per_s: ByGpu = field(default_factory=dict)  # of the GPUs in use, by UUID
    gpu_flops: ByGpu = field(default_factory=dict)  # likewise; none of a gate, whose prompt is too short to tell it

    def to_json(self) -> dict[str, Any]:
        """For plan.json and tuned.json."""
        told = asdict(self)
        return told if self.gpu_flops else {key: value for key, value in told.items() if key != "gpu_flops"}


@dataclass(frozen=True)
class MeasuredSpeeds:
    """The speeds that gates of an instance measured, tokens/s: the median of the last ones, and the fastest prompt; or
    a tune, the medians of its trials."""

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
    probe_core_steps_per_s: Rate | None = None

    @classmethod
    def of(cls, measured: Measurements) -> ChosenRates:
        """Those of the measurements that are kept."""
        return cls(
            measured.host_bytes_per_s, measured.host_flops, measured.probe_bytes_per_s, dict(measured.gpu_bytes_per_s),
            measured.probe_core_steps_per_s,
        )  # fmt: skip

    def measurements(self) -> Measurements:
        """For the planner."""
        return Measurements(
            self.host_bytes_per_s, self.host_flops, self.probe_bytes_per_s, self.probe_core_steps_per_s,
            gpu_bytes_per_s=self.gpu_bytes_per_s,
        )  # fmt: skip


@dataclass(frozen=True)
class RecordedRates:
    """`inputs.rates` of plan.json: what the plan was chosen with, and the probe's figure, which is measured once."""

    chosen: ChosenRates = ChosenRates()
    probe: Bandwidth | None = None

    def to_json(self) -> dict[str, Any]:
        """For plan.json; as earlier releases wrote it where nothing is known of the steps."""
        told = asdict(self)
        for part, key in (("chosen", "probe_core_steps_per_s"), ("probe", "core_steps_per_s")):
            if told[part] and told[part][key] is None:
                del told[part][key]
        return told


def measurements(
    bandwidth: Bandwidth | None, gates: Sequence[MeasuredSpeeds], tuned: Sequence[MeasuredSpeeds] = ()
) -> Measurements:
    """The host's rates as far as they were measured. What GPUs and CPU computed together tells nothing, since nobody
    knows which of them was slower than expected."""
    by_host = [_computed_on(HOST, found) for found in (tuned, gates)]
    by_gpus = [_computed_on(GPUS, found) for found in (tuned, gates)]
    return Measurements(
        host_bytes_per_s=_first(
            [one.expected.host_bytes_per_s * _decode_ratio(one) for one in found] for found in by_host
        ),
        host_flops=_first(
            [one.expected.host_flops * _prompt_ratio(one) for one in found if one.prompt_tokens_per_s]
            for found in by_host
        ),
        probe_bytes_per_s=bandwidth.bytes_per_s if bandwidth else None,
        probe_core_steps_per_s=bandwidth.core_steps_per_s if bandwidth else None,
        gpu_bytes_per_s=_of_gpus(by_gpus, lambda one: one.expected.gpu_bytes_per_s, _decode_ratio),
        gpu_flops=_of_gpus(by_gpus, lambda one: one.expected.gpu_flops, _prompt_ratio),
    )


def _computed_on(where: str, found: Sequence[MeasuredSpeeds]) -> list[MeasuredSpeeds]:
    return [one for one in found if one.expected.computed_on == where]


def _of_gpus(
    by_gpus: Sequence[Sequence[MeasuredSpeeds]],
    rates: Callable[[MeasuredSpeeds], Mapping[str, float]],
    ratio: Callable[[MeasuredSpeeds], float],
) -> dict[str, float]:
    """A rate of each GPU by its UUID, as far as it was measured."""
    uuids = sorted({uuid for found in by_gpus for one in found for uuid in rates(one)})
    values = {
        uuid: _first([rates(one)[uuid] * ratio(one) for one in found if uuid in rates(one)] for found in by_gpus)
        for uuid in uuids
    }
    return {uuid: value for uuid, value in values.items() if value}


def _first(values: Iterable[Sequence[float]]) -> float | None:
    """The median of the first of these that has any."""
    return next((float(statistics.median(found)) for found in values if found), None)


def _decode_ratio(gate: MeasuredSpeeds) -> float:
    return gate.decode_tokens_per_s / gate.expected.decode_tokens_per_s


def _prompt_ratio(gate: MeasuredSpeeds) -> float:
    return (gate.prompt_tokens_per_s or 0.0) / gate.expected.prompt_tokens_per_s
