"""Where a model's bytes go: weights, KV cache, compute, staging and overhead, device by device.

All of them follow llama.cpp's own rules at b11434: weights in `weights`, caches in `kv`, compute buffers in `compute`,
which lays out the graph as llama.cpp does. What no log of llama.cpp counts is in the traits below.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from llamafleet.host.backends import TRAITS
from llamafleet.memory.compute import Rules
from llamafleet.memory.context import Context
from llamafleet.memory.placement import Placement
from llamafleet.memory.weights import X86_TYPES, Model, repacked_bytes

LOGIT_BYTES = 4


@dataclass(frozen=True)
class LedgerRow:
    """One device's bytes. Free is capacity less everything and less the reserve; negative: too much."""

    device: str
    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    staging_bytes: int
    overhead_bytes: int
    capacity_bytes: int
    free_bytes: int
    reserve_bytes: int

    def to_json(self) -> dict[str, Any]:
        """As the plan contract has it."""
        return asdict(self)

    @property
    def used_bytes(self) -> int:
        """Everything that this model takes on the device."""
        return self.weights_bytes + self.kv_bytes + self.compute_bytes + self.staging_bytes + self.overhead_bytes


@dataclass(frozen=True)
class Usage:
    """Bytes on one device, before any capacity is looked at."""

    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    staging_bytes: int
    overhead_bytes: int
    repacked_bytes: int = 0  # of the weights, those that the CPU keeps in a layout of its own

    @property
    def total_bytes(self) -> int:
        """All of them."""
        return self.weights_bytes + self.kv_bytes + self.compute_bytes + self.staging_bytes + self.overhead_bytes


@dataclass(frozen=True)
class Buffers:
    """Bytes to compute in, of each device in use and, last, of the host."""

    compute: tuple[int, ...]  # without op-offload
    staging: tuple[int, ...]  # what op-offload adds; less than nothing where it takes work away


def usage(
    model: Model,
    context: Context,
    placement: Placement,
    backend: str,
    host_extra_bytes: int = 0,
    repacked: Mapping[str, int] = X86_TYPES,
    known: Buffers | None = None,
) -> tuple[dict[int, Usage], Usage]:
    """What each device in use holds, and what the host holds.

    `host_extra_bytes`: the prompt cache and context checkpoints. `repacked`: what the host's CPU repacks
    (`weights.repacked_types`). `known`: the buffers; else they are laid out, which takes milliseconds.
    """
    traits = TRAITS[backend]
    devices = placement.devices
    packs = {} if traits.pinned_host and devices else repacked
    weights, packed = _weights(model, placement, packs)
    kept: dict[int | None, int] = defaultdict(int)
    for device, size in zip(placement.layer_devices, model.compute.kv_bytes(context), strict=False):
        kept[device] += size
    rooms = known or buffers(model, context, placement, backend)
    used = {
        device: Usage(weights[device], kept[device], rooms.compute[n], rooms.staging[n], traits.overhead_bytes)
        for n, device in enumerate(devices)
    }
    output = model.shape.vocabulary * context.outputs * LOGIT_BYTES  # its buffer, llama-context.cpp:2203
    extra = traits.host_overhead_bytes + host_extra_bytes + output
    return used, Usage(weights[None], kept[None], rooms.compute[-1], 0, extra, packed)


def _weights(model: Model, placement: Placement, packs: Mapping[str, int]) -> tuple[dict[int | None, int], int]:
    """Bytes by device, the host's under None; and how much of the host's is repacked."""
    weights: dict[int | None, int] = defaultdict(int)
    packed = 0
    parts = placement.moved
    for layer, device in enumerate(placement.layer_devices[:-1]):
        moved = model.moved_bytes(layer, parts.get(layer))
        weights[device] += model.layer_bytes[layer] - moved
        weights[None] += moved
        packed += repacked_bytes(
            model.layer_packs[layer] if device is None else model.moved_packs(layer, parts.get(layer)), packs
        )
    output = placement.layer_devices[-1]
    weights[output] += model.output_bytes
    if output is None:
        packed += repacked_bytes(model.output_packs, packs)
        if model.shares_tied(packs):
            weights[None] -= model.tied_bytes
    weights[None] += model.input_bytes
    for device in set(placement.layer_devices[:-1]):
        weights[device] += model.rotation_bytes
    return weights, packed


def buffers(
    model: Model, context: Context, placement: Placement, backend: str, *, apart: bool = True, roughly: bool = False
) -> Buffers:
    """Compute buffers without op-offload, and what that adds. `apart`: False counts both as compute, in half the time.

    The host's is what it is with op-offload, where there is any: it is less then. `roughly`: in less time still.
    """
    traits = TRAITS[backend]
    plain = Rules(attention_scratch=traits.attention_scratch)
    stages = traits.op_offload and bool(placement.devices) and placement.uses_host
    whole = model.compute.bytes(context, placement, replace(plain, op_offload=stages), roughly=roughly)
    if not (stages and apart):
        return Buffers(whole, (0,) * len(whole))
    less = (*model.compute.bytes(context, placement, plain)[:-1], whole[-1])
    return Buffers(less, tuple(all_ - without for all_, without in zip(whole, less, strict=True)))


@dataclass(frozen=True)
class Adjustment:
    """Bytes that the binary allocates beyond the ledger's, by the ledger's device name ("GPU0", "host");
    negative where it takes less."""

    extra_bytes: Mapping[str, int] = field(default_factory=dict)

    def applied(self, device: str, use: Usage) -> Usage:
        """The device's usage with the difference counted as compute, the part that is estimated."""
        return replace(use, compute_bytes=use.compute_bytes + self.extra_bytes.get(device, 0))

    def plus(self, more: Mapping[str, int]) -> Adjustment:
        """With further differences added."""
        devices = {**self.extra_bytes, **more}
        return Adjustment({one: self.extra_bytes.get(one, 0) + more.get(one, 0) for one in devices})


NO_ADJUSTMENT = Adjustment()
