"""The ledger: bytes of weights, KV cache, compute buffers, staging and overhead on each device.

The sizes follow llama.cpp's rules at b11434: weights in `weights`, caches in `kv_cache`, compute buffers in `compute`,
which builds llama.cpp's graph. Memory that llama.cpp's log does not count is in `host/backends`, TRAITS.
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
from llamafleet.model.shape import Shape

FLOAT_BYTES = 4  # of a logit, and of an element of an embedding


@dataclass(frozen=True)
class LedgerRow:
    """One device's bytes. `free_bytes` is capacity less used bytes less reserve; negative: the model does not fit."""

    device: str
    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    staging_bytes: int
    overhead_bytes: int
    capacity_bytes: int
    free_bytes: int
    reserve_bytes: int
    beside_bytes: int = 0  # of what is loaded beside the model: projector, draft, adapters (`memory/beside.py`)

    def to_json(self) -> dict[str, Any]:
        """The row in the JSON of a plan (docs/planning.md)."""
        row = asdict(self)
        return row if self.beside_bytes else {key: value for key, value in row.items() if key != "beside_bytes"}

    @property
    def used_bytes(self) -> int:
        """Bytes of the device that this model takes."""
        own = self.weights_bytes + self.kv_bytes + self.compute_bytes + self.staging_bytes + self.overhead_bytes
        return own + self.beside_bytes


@dataclass(frozen=True)
class Usage:
    """Bytes that a model takes on one device."""

    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    staging_bytes: int
    overhead_bytes: int
    repacked_bytes: int = 0  # bytes of the weights that the CPU backend repacks

    @property
    def total_bytes(self) -> int:
        """Sum of weights, cache, compute, staging and overhead."""
        return self.weights_bytes + self.kv_bytes + self.compute_bytes + self.staging_bytes + self.overhead_bytes


@dataclass(frozen=True)
class Buffers:
    """Bytes of the compute buffers, for each device in use and, last, for the host."""

    compute: tuple[int, ...]  # without op-offload
    staging: tuple[int, ...]  # added by op-offload; negative where op-offload needs less


def usage(
    model: Model,
    context: Context,
    placement: Placement,
    backend: str,
    host_extra_bytes: int = 0,
    repacked: Mapping[str, int] = X86_TYPES,
    compute_buffers: Buffers | None = None,
    *,
    is_unified: bool = False,
) -> tuple[dict[int, Usage], Usage]:
    """Bytes on each device in use, by device number, and bytes on the host.

    `host_extra_bytes`: the prompt cache and context checkpoints. `repacked`: types that the host's CPU repacks
    (`weights.repacked_types`). `compute_buffers`: their sizes, if known; computing them takes milliseconds.
    `is_unified`: with an integrated GPU llama.cpp maps no tensors.
    """
    traits = TRAITS[backend]
    devices = placement.devices
    types = repacked if context.repack and may_repack(placement, backend) else {}
    weights, repacked_weights = _weights(model, placement, types)
    weights[None] += model.mapped_bytes if is_unified else 0
    cache: dict[int | None, int] = defaultdict(int)
    for device, size in zip(placement.layer_devices, model.compute.kv_bytes(context), strict=False):
        cache[device] += size
    sizes = compute_buffers or buffers(model, context, placement, backend)
    # Made known to llama.cpp after it has laid out its buffers, and after it has reported them.
    kept = context.kept * model.shape.embedding * context.batch_tokens * FLOAT_BYTES
    used = {
        device: Usage(weights[device], cache[device], sizes.compute[n], sizes.staging[n], traits.overhead_bytes + kept)
        for n, device in enumerate(devices)
    }
    overhead = (
        traits.host_overhead_bytes + host_extra_bytes + output_bytes(model.shape, context) + (0 if devices else kept)
    )
    return used, Usage(weights[None], cache[None], sizes.compute[-1], 0, overhead, repacked_weights)


def repacks(model: Model, placement: Placement, backend: str, repacked: Mapping[str, int]) -> bool:
    """Does the CPU repack any of the model's weights, if it may? `repacked`: as of `usage`."""
    return may_repack(placement, backend) and _weights(model, placement, repacked)[1] > 0


def may_repack(placement: Placement, backend: str) -> bool:
    """Can the CPU have weights in its own order? Not in pinned host memory."""
    return not (TRAITS[backend].pinned_host and placement.devices)


def output_bytes(shape: Shape, context: Context) -> int:
    """RAM for the results of a batch (src/llama-context.cpp, output_reserve).

    llama.cpp makes room for the logits of every output, also of a model that computes none.
    """
    each = shape.vocabulary + (shape.embedding_out if context.pooling else 0)
    return each * context.outputs * FLOAT_BYTES


def _weights(model: Model, placement: Placement, types: Mapping[str, int]) -> tuple[dict[int | None, int], int]:
    """Weight bytes by device number (None: the host), and the bytes of them that the host repacks.

    `types`: weight types that the host repacks.
    """
    weights: dict[int | None, int] = defaultdict(int)
    repacked = 0
    parts = placement.moved
    for layer, device in enumerate(placement.layer_devices[:-1]):
        moved = model.moved_bytes(layer, parts.get(layer))
        weights[device] += model.layer_bytes[layer] - moved
        weights[None] += moved
        repacked += repacked_bytes(
            model.layer_repackable[layer] if device is None else model.moved_repackable(layer, parts.get(layer)), types
        )
    output = placement.layer_devices[-1]
    weights[output] += model.output_bytes
    if output is None:
        repacked += repacked_bytes(model.output_repackable, types)
        if model.shares_tied(types):
            weights[None] -= model.tied_bytes
    weights[None] += model.input_bytes
    for device in set(placement.layer_devices[:-1]):
        weights[device] += model.rope_factor_bytes
    return weights, repacked


def buffers(
    model: Model,
    context: Context,
    placement: Placement,
    backend: str,
    *,
    separate_staging: bool = True,
    roughly: bool = False,
) -> Buffers:
    """Bytes of the compute buffers without op-offload, and the bytes that op-offload adds on each device.

    The host's buffer is the one with op-offload, where the backend has it: it is smaller then. `separate_staging`:
    False counts staging as compute, in half the time. `roughly`: approximate, in less time.
    """
    traits = TRAITS[backend]
    plain = Rules(attention_scratch=traits.attention_scratch)
    stages = traits.op_offload and context.op_offload and bool(placement.devices) and placement.uses_host
    whole = model.compute.bytes(context, placement, replace(plain, op_offload=stages), roughly=roughly)
    if not (stages and separate_staging):
        return Buffers(whole, (0,) * len(whole))
    compute = (*model.compute.bytes(context, placement, plain)[:-1], whole[-1])
    return Buffers(compute, tuple(total - size for total, size in zip(whole, compute, strict=True)))


@dataclass(frozen=True)
class Correction:
    """Bytes that llama-server allocates beyond the ledger's figure, by device name of the ledger ("GPU0", "host").

    Negative where llama-server allocates less.
    """

    extra_bytes: Mapping[str, int] = field(default_factory=dict)

    def applied(self, device: str, use: Usage) -> Usage:
        """The device's usage with the difference added to its compute bytes."""
        return replace(use, compute_bytes=use.compute_bytes + self.extra_bytes.get(device, 0))

    def plus(self, more: Mapping[str, int]) -> Correction:
        """This correction with further differences added, in bytes by device name."""
        devices = {**self.extra_bytes, **more}
        return Correction({name: self.extra_bytes.get(name, 0) + more.get(name, 0) for name in devices})


NO_CORRECTION = Correction()
