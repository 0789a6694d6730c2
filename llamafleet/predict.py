"""A rough guess of the speed, from bytes that a token must read and published bandwidths.

It orders plans and shows whether a box is worth trying; only measuring on the host tells the truth.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from .gguf import Header
from .kv import Context, kv_bytes, number
from .ledger import Model, Placement
from .machine import Gpu

GB = 1e9
# GB/s by the makers' data sheets; a name is looked up by its longest matching entry.
BANDWIDTHS = {
    "RTX 3060": 360,
    "RTX 3070": 448,
    "RTX 3080": 760,
    "RTX 3090": 936,
    "RTX 4060": 272,
    "RTX 4070": 504,
    "RTX 4080": 717,
    "RTX 4090": 1008,
    "RTX 5070": 672,
    "RTX 5080": 960,
    "RTX 5090": 1792,
    "A100": 1935,
    "H100": 3350,
    "H200": 4800,
    "L4": 300,
    "L40": 864,
    "A10": 600,
    "T4": 320,
    "V100": 900,
    "GB10": 273,
    "RTX A6000": 768,
    "RTX 6000 Ada": 960,
    "RX 7900 XTX": 960,
    "MI300X": 5300,
}  # fmt: skip -- one line an entry would hide the table
DEFAULT_GPU = 400 * GB
GPU_EFFICIENCY = 0.6
HOST_BANDWIDTH = 36 * GB  # effective, two channels of DDR5; gpt-oss-120b with 28 layers on an i5-13400F: 22 tok/s
PREFILL_FLOPS = 20e12  # effective on a consumer GPU; the CPU's is two orders less
HOST_FLOPS = 0.3e12
STAGING_BANDWIDTH = 12 * GB  # PCIe 4.0 x16, pageable to pinned in practice


@dataclass(frozen=True)
class Prediction:
    """Tokens per second for one request."""

    decode_tokens_per_s: float
    prefill_tokens_per_s: float

    def to_json(self) -> dict[str, float]:
        """As the plan contract has it."""
        return asdict(self)


def bandwidth(gpu: Gpu) -> float:
    """Bytes per second of the GPU's memory, by its name."""
    hits = [name for name in BANDWIDTHS if name in gpu.name]
    return BANDWIDTHS[max(hits, key=len)] * GB if hits else DEFAULT_GPU


def predict(model: Model, context: Context, placement: Placement, gpus: tuple[Gpu, ...]) -> Prediction:
    """Decode is bound by reading the active weights and a quarter-full cache; prefill by arithmetic."""
    share = _active_share(model.header) if model.is_moe else 1.0
    cache = kv_bytes(model.header, context)
    decode = on_host = on_gpu = 0.0
    for layer, device in enumerate(placement.layer_devices):
        last = layer == model.layers
        moving = 0 if last else model.spill_bytes[layer]
        fixed = model.output_bytes if last else model.layer_bytes[layer] - moving + cache[layer] / 4
        moving_bytes = moving * share
        speed = HOST_BANDWIDTH if device is None else bandwidth(gpus[device]) * GPU_EFFICIENCY
        expert_speed = HOST_BANDWIDTH if layer in placement.spilled else speed
        decode += fixed / speed + moving_bytes / expert_speed
        on_host += (fixed if device is None else 0) + (moving_bytes if expert_speed == HOST_BANDWIDTH else 0)
        on_gpu += (fixed if device is not None else 0) + (moving_bytes if expert_speed != HOST_BANDWIDTH else 0)
    staged = sum(model.spill_bytes[layer] for layer in placement.spilled)
    batch = context.ubatch_tokens
    host_seconds = staged / STAGING_BANDWIDTH if gpus else 4 * batch * on_host / HOST_FLOPS
    seconds = 4 * batch * on_gpu / PREFILL_FLOPS + host_seconds
    return Prediction(round(1 / decode, 1), round(batch / seconds, 1))


def _active_share(header: Header) -> float:
    return number(header, "expert_used_count", 1) / max(1, number(header, "expert_count", 1))
