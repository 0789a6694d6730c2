"""Where a model's bytes go: weights, KV cache, compute, staging and overhead, device by device.

Weights and KV follow llama.cpp's own rules (llama-model.cpp:1559-1609 for who gets which layer).
Compute is an estimate that is meant to stay above what llama-server allocates; `compute.py` has it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .compute import compute_bytes
from .gguf import Header, Tensor
from .kv import Context, kv_bytes, number

MIB = 1024**2
HOST = "host"

# Types that the CPU backend repacks on x86 (ggml-cpu/repack.cpp): as a matrix they are a second copy
# of the embedding, which is read row by row and stays as it was.
REPACKED = frozenset({"Q4_0", "Q4_K", "Q2_K", "Q8_0", "IQ4_NL", "MXFP4"})

_LAYER = re.compile(r"blk\.(\d+)\.(.*)")
# What --n-cpu-moe matches (common/common.h, LLM_FFN_EXPS_REGEX), and a dense model's feed-forward part.
_EXPERTS = re.compile(r"ffn_(up|down|gate|gate_up)_(ch|)exps\..*")
_DENSE = re.compile(r"ffn_(up|down|gate)\.weight")


@dataclass(frozen=True)
class Traits:
    """What sets a llama.cpp backend apart, as far as memory goes."""

    device_prefix: str  # its devices' name in llama.cpp, before the number
    visible_variable: str | None  # environment variable that chooses and orders its devices
    op_offload: bool  # host weights are copied to the device for batches of 32 and more
    pinned_host: bool  # host weights sit in page-locked memory and are not repacked
    overhead_bytes: int  # device memory that no log counts: context, libraries
    host_overhead_bytes: int  # the process itself: code, vocabulary, driver's host part


# Overheads: 300 to 750 MiB are reported for CUDA contexts with cuBLAS; the host's part is the
# driver's and the runtime's, the vocabulary and HTTP threads.
TRAITS: Mapping[str, Traits] = {
    "cuda": Traits("CUDA", "CUDA_VISIBLE_DEVICES", True, True, 512 * MIB, 1024 * MIB),
    "hip": Traits("ROCm", "HIP_VISIBLE_DEVICES", True, True, 512 * MIB, 1024 * MIB),
    "vulkan": Traits("Vulkan", "GGML_VK_VISIBLE_DEVICES", True, True, 256 * MIB, 512 * MIB),
    "cpu": Traits("CPU", None, False, False, 0, 256 * MIB),
}


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

    def to_json(self) -> dict[str, Any]:
        """As the plan contract has it."""
        return asdict(self)

    @property
    def used_bytes(self) -> int:
        """Everything that this model takes on the device."""
        return self.weights_bytes + self.kv_bytes + self.compute_bytes + self.staging_bytes + self.overhead_bytes


@dataclass(frozen=True)
class Model:
    """A header's tensors, sorted by what moves together."""

    header: Header
    layer_bytes: tuple[int, ...]  # all of a layer's weights
    spill_bytes: tuple[int, ...]  # of them, those that may go to the host while attention stays
    largest_spill_bytes: int  # the largest single one, what op-offload stages
    input_bytes: int  # token embedding and the like: always on the host
    output_bytes: int  # output matrix and norm
    tied_bytes: int  # what `output_bytes` has of the embedding, because the model has no output matrix
    tied_is_shared: bool  # on the host it is held once, not twice
    is_moe: bool
    down_bytes: tuple[int, ...] = ()  # of the spillable ones, the down projections

    def part_bytes(self, layer: int, part: str) -> int:
        """Bytes of a layer's spillable tensors of a part: "down", or "up" for up and gate, which work together."""
        down = self.down_bytes[layer]
        return down if part == "down" else self.spill_bytes[layer] - down

    @property
    def layers(self) -> int:
        """Blocks, without the output layer."""
        return len(self.layer_bytes)

    @classmethod
    def of(cls, header: Header) -> Model:
        """Sort the tensors of a header."""
        layers = number(header, "block_count")
        whole, spill, down = [0] * layers, [0] * layers, [0] * layers
        outside: list[Tensor] = []
        largest = 0
        is_moe = any(_EXPERTS.fullmatch(_part(tensor.name)) for tensor in header.tensors)
        wanted = _EXPERTS if is_moe else _DENSE
        for tensor in header.tensors:
            layer = _layer(tensor.name)
            if layer is None or layer >= layers:
                outside.append(tensor)
                continue
            whole[layer] += tensor.bytes
            if wanted.fullmatch(_part(tensor.name)):
                spill[layer] += tensor.bytes
                down[layer] += tensor.bytes if "ffn_down" in tensor.name else 0
                largest = max(largest, tensor.bytes)
        inputs = sum(tensor.bytes for tensor in outside if not tensor.name.startswith("output"))
        outputs = sum(tensor.bytes for tensor in outside) - inputs
        by_name = {tensor.name: tensor for tensor in outside}
        tied = None if "output.weight" in by_name else by_name.get("token_embd.weight")
        tied_bytes = tied.bytes if tied else 0
        shared = tied is not None and tied.type not in REPACKED
        return cls(
            header,
            tuple(whole),
            tuple(spill),
            largest,
            inputs,
            outputs + tied_bytes,
            tied_bytes,
            shared,
            is_moe,
            tuple(down),
        )


def _layer(name: str) -> int | None:
    match = _LAYER.fullmatch(name)
    return int(match[1]) if match else None


def _part(name: str) -> str:
    match = _LAYER.fullmatch(name)
    return match[2] if match else ""


@dataclass(frozen=True)
class Placement:
    """Who holds what: a device number for each layer and, last, the output; None is the host."""

    layer_devices: tuple[int | None, ...]
    spilled: frozenset[int] = frozenset()  # layers on a device whose experts (FFN) are on the host
    # Layers of whose experts (FFN) only a part is there, and which: "down", or "up" for up and gate.
    partly: tuple[tuple[int, str], ...] = ()

    @property
    def devices(self) -> tuple[int, ...]:
        """The devices in use, in order."""
        return tuple(sorted({device for device in self.layer_devices if device is not None}))

    @property
    def gpu_layers(self) -> int:
        """For --n-gpu-layers: layers on devices, the output counted as one."""
        return sum(device is not None for device in self.layer_devices)

    def split(self) -> tuple[int, ...]:
        """For --tensor-split: layers of each device in use, which llama.cpp then assigns exactly so."""
        return tuple(self.layer_devices.count(device) for device in self.devices)


@dataclass(frozen=True)
class Usage:
    """Bytes on one device, before any capacity is looked at."""

    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    staging_bytes: int
    overhead_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of them."""
        return self.weights_bytes + self.kv_bytes + self.compute_bytes + self.staging_bytes + self.overhead_bytes


def usage(
    model: Model, context: Context, placement: Placement, backend: str, host_extra_bytes: int = 0
) -> tuple[dict[int, Usage], Usage]:
    """What each device in use holds, and what the host holds. `host_extra_bytes`: the prompt cache."""
    traits = TRAITS[backend]
    partly = dict(placement.partly)
    cache = kv_bytes(model.header, context)
    pipelined = len(placement.devices) > 1 and None not in placement.layer_devices
    pipelined = pipelined and not placement.spilled and not placement.partly
    holders: Sequence[int | None] = placement.layer_devices
    weights: dict[int | None, int] = defaultdict(int)
    kept: dict[int | None, int] = defaultdict(int)
    for layer, device in enumerate(holders[:-1]):
        moved = model.spill_bytes[layer] if layer in placement.spilled and device is not None else 0
        moved += model.part_bytes(layer, partly[layer]) if layer in partly else 0
        weights[device] += model.layer_bytes[layer] - moved
        weights[None] += moved
        kept[device] += cache[layer]
    weights[holders[-1]] += model.output_bytes
    if holders[-1] is None and model.tied_is_shared:
        weights[None] -= model.tied_bytes
    weights[None] += model.input_bytes
    staging = _staging(model, placement) if traits.op_offload else 0
    devices = {
        device: Usage(
            weights[device],
            kept[device],
            compute_bytes(model.header, context, output=holders[-1] == device, pipelined=pipelined),
            staging,
            traits.overhead_bytes,
        )
        for device in placement.devices
    }
    host_compute = compute_bytes(model.header, context, output=holders[-1] is None, pipelined=pipelined)
    host = Usage(weights[None], kept[None], host_compute, 0, traits.host_overhead_bytes + host_extra_bytes)
    return devices, host


def _staging(model: Model, placement: Placement) -> int:
    """What op-offload adds: one whole host tensor at a time, the largest (ggml-backend.cpp, op_offload)."""
    if None in placement.layer_devices[:-1]:
        layers = [t.bytes for t in model.header.tensors if _layer(t.name) is not None]
        return max(layers, default=0)
    return model.largest_spill_bytes if placement.spilled or placement.partly else 0
