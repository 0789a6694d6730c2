"""The speed of a placement, as a roofline: bytes moved and arithmetic done, each over what the machine reaches.

It ranks placements, and says how sure it is. Measurements of the host replace it where there are any.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate

from llamafleet.host.speeds import CACHE_MISS_TOKENS, GpuRates, Rates
from llamafleet.memory.context import Context
from llamafleet.memory.graph.allocation import OFFLOAD_TOKENS
from llamafleet.memory.placement import Segment
from llamafleet.memory.weights import LAYER, Model
from llamafleet.model.shape import DENSE, EXPERTS
from llamafleet.settings.workload import Workload

# Seconds on top of the bytes, for each layer on a GPU and token written: launching and waiting for small kernels.
# 8B Q4_0 on an RTX 3090 takes 6.45 ms a token, 5.84 of them for its bytes (llama.cpp pull/15802).
LAYER_SECONDS = 20e-6
EXPERTS_SECONDS = 70e-6  # routing and gathering more: gpt-oss-20b at about 225 tokens/s on an RTX 4090 (runaihome.com)
HOP_SECONDS = 50e-6  # from a GPU to the CPU and back: a copy each way and two waits
# GPUs read the cache in smaller pieces: Qwen3.5-27B on an RTX PRO 6000 from 2048 to 65536 tokens adds 3.2 ms for
# 4.2 GB, 0.73 of its bandwidth (llama.cpp pull/26622); as a share of what weights reach.
CACHE_SHARE = 0.85
# A quantised cache is unpacked while it is read; published figures have it slower than f16 on most GPUs, never faster.
QUANTISED_CACHE_COST = 1.25
# While a prompt is read, each expert gets few tokens: half speed at this many, and gathering costs a third.
EXPERT_HALF_SPEED_TOKENS, EXPERT_FLOPS_SHARE = 8, 0.65
UBATCH_HALF_SPEED_TOKENS = 64  # small batches fill a GPU badly: 7444 tokens/s at 128, 10359 at 512 (pull/7676)
ATTENTION_FLOPS_SHARE = 0.4  # of what matrices reach
# Of all experts, those that a large batch uses and op-offload copies: gpt-oss-120b with 26 layers' experts in RAM
# reads 380 to 2091 tokens/s at ubatches of 512 to 8192 on an RTX 3090, which is 39 GB/s over a 31.5 GB/s link.
EXPERTS_COPIED = 0.65


@dataclass(frozen=True)
class Prediction:
    """Tokens per second of one request alone, from the lowest to the highest that would not surprise."""

    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    decode_low_tokens_per_s: float = 0.0
    decode_high_tokens_per_s: float = 0.0
    prefill_low_tokens_per_s: float = 0.0
    prefill_high_tokens_per_s: float = 0.0
    all_slots_tokens_per_s: float = 0.0  # written by all slots together
    workload_seconds: float = 0.0  # for as many requests of the workload as come at once
    measured: bool = False

    @classmethod
    def of_trial(cls, decode: float, prefill: float) -> Prediction:
        """What was measured on the host with the very same flags."""
        return cls(decode, prefill, decode, decode, prefill, prefill, measured=True)

    def to_json(self) -> dict[str, float | bool]:
        """As the plan contract has it, and how sure it is."""
        return asdict(self)


@dataclass(frozen=True)
class Seconds:
    """Time by what it is spent on."""

    gpu: float
    host: float
    waiting: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.gpu + self.host + self.waiting


class Roofline:
    """A model's work on a machine's rates; sums over the layers from the front, so that a range is one difference."""

    def __init__(self, model: Model, work: Workload, rates: Rates, *, op_offload: bool) -> None:
        shape, layers = model.shape, model.layers
        self.model, self.work, self.rates, self.op_offload = model, work, rates, op_offload
        self.layers = layers
        self.experts = max(1, shape.experts.count) if model.is_moe else 1
        self.used = min(max(1, max(shape.experts.used, default=1)), self.experts)
        self.fixed = _sums(whole - spill for whole, spill in zip(model.layer_bytes, model.spill_bytes, strict=True))
        self.spill = _sums(model.spill_bytes)
        self.spilling = _sums(spill > 0 for spill in model.spill_bytes)
        fixed_ops, spill_ops = _operations(model)
        self.fixed_ops, self.spill_ops = _sums(fixed_ops), _sums(spill_ops)
        self.cache = _sums(model.compute.kv_bytes(Context(work.live_tokens, 1, "f16", 1)))
        heads = max(shape.heads, default=1)
        shared = [heads / max(1, kv) for kv in shape.kv_heads]
        # Multiply-adds of attention for one token: every element of K and V, once for each head that shares it.
        self.macs = _macs(model, work.live_tokens, shared)
        self.read_macs = _macs(model, work.read_depth_tokens, shared)
        missed = work.live_tokens / (work.live_tokens + CACHE_MISS_TOKENS)
        self.seconds_a_mac = 1 / rates.host_attention_macs + missed / rates.host_cache_macs

    def share(self, tokens: float) -> float:
        """The share of all experts that so many tokens use, if they choose independently; 1 for dense models."""
        return 1.0 - float((1.0 - self.used / self.experts) ** tokens)

    def decode(self, order: Sequence[int], segments: Sequence[Segment], sequences: int, kv_type: str) -> Seconds:
        """For one token of each of so many sequences. `order`: the GPUs in use, llama.cpp's device 0 first."""
        rates, share, active = self.rates, self.share(sequences), self.used / self.experts
        gpus = [rates.gpus[number] for number in order]
        slow_cache = 1.0 if kv_type in ("f16", "bf16", "f32") else QUANTISED_CACHE_COST
        gpu = host = waiting = 0.0
        for one in segments:
            fixed = _range(self.fixed, one.lo, one.hi)
            moved, moved_ops = self.moved(one)
            inside = _range(self.spill, one.lo, one.hi) - moved
            if one.device is None:
                ops = _range(self.fixed_ops, one.lo, one.hi) + active * _range(self.spill_ops, one.lo, one.hi)
                host += max((fixed + share * inside) / rates.host_bytes_per_s, sequences * ops / rates.host_flops)
                host += sequences * _range(self.macs, one.lo, one.hi) * slow_cache * self.seconds_a_mac
                continue
            speed = gpus[one.device].bytes_per_s
            cache = _range(self.cache, one.lo, one.hi) * sequences * slow_cache / CACHE_SHARE
            gpu += (fixed + share * inside + cache) / speed
            host += max(share * moved / rates.host_bytes_per_s, sequences * active * moved_ops / rates.host_flops)
            away = _range(self.spilling, one.keep, one.hi)
            experts = _range(self.spilling, one.lo, one.hi) if self.model.is_moe else 0
            waiting += (one.hi - one.lo) * LAYER_SECONDS + experts * EXPERTS_SECONDS + away * HOP_SECONDS
        waiting += (len(segments) - 1) * HOP_SECONDS
        last = segments[-1].device
        output = self.model.output_bytes / (rates.host_bytes_per_s if last is None else gpus[last].bytes_per_s)
        return Seconds(gpu + (output if last is not None else 0), host + (output if last is None else 0), waiting)

    def moved(self, one: Segment) -> tuple[float, float]:
        """Bytes of a device's layers that are on the host, and the operations that they mean for a token."""
        moved, ops = _range(self.spill, one.keep, one.hi), _range(self.spill_ops, one.keep, one.hi)
        if one.part:
            whole = self.model.spill_bytes[one.keep]
            back = whole - self.model.part_bytes(one.keep, one.part)
            moved, ops = moved - back, ops - _range(self.spill_ops, one.keep, one.keep + 1) * back / max(1, whole)
        return moved, ops

    def prefill(self, order: Sequence[int], segments: Sequence[Segment], ubatch: int) -> Seconds:
        """For the workload's prompt, in ubatches of so many tokens."""
        gpus = [self.rates.gpus[number] for number in order]
        tokens, size = self.work.prompt_tokens, min(ubatch, self.work.prompt_tokens)
        runs = -(-tokens // size)
        first = next((one.device for one in segments if one.device is not None), None)
        offload = self.op_offload and first is not None and size >= OFFLOAD_TOKENS
        parts = [self._read(gpus, one, tokens, runs, size, first if offload else None) for one in segments]
        gpu, host, waiting = (sum(part) for part in zip(*parts, strict=True))
        if len(segments) > 1 and all(one.device is not None and one.keep == one.hi for one in segments):
            # A pipeline: while the second GPU works on one ubatch, the first has the next.
            slowest = max(part[0] for part in parts)
            gpu = gpu / runs + slowest * (runs - 1) / runs
        return Seconds(gpu, host, waiting)

    def _read(
        self, gpus: Sequence[GpuRates], one: Segment, tokens: int, runs: int, size: int, staged_on: int | None
    ) -> tuple[float, float, float]:
        rates, active = self.rates, self.used / self.experts
        filled = size / (size + UBATCH_HALF_SPEED_TOKENS)
        each = size * active
        crowded = EXPERT_FLOPS_SHARE * each / (each + EXPERT_HALF_SPEED_TOKENS) if self.experts > 1 else filled
        ops, spill_ops = _range(self.fixed_ops, one.lo, one.hi), _range(self.spill_ops, one.lo, one.hi) * active
        macs = _range(self.read_macs, one.lo, one.hi)
        moved, _ = self.moved(one)
        if one.device is None:
            moved += _range(self.fixed, one.lo, one.hi)
        where = staged_on if one.device is None else one.device
        host = waiting = 0.0
        if one.device is None:
            host = tokens * macs / rates.host_read_attention_macs
        if where is None or (moved and staged_on is None):
            here = (ops if one.device is None else 0.0) + spill_ops
            return 0.0, host + tokens * here / rates.host_flops, 0.0
        if moved and staged_on is not None:
            copied = min(self.share(size), EXPERTS_COPIED) if self.experts > 1 else 1.0
            waiting = runs * copied * moved / gpus[staged_on].link_bytes_per_s
        flops = gpus[where].flops
        gpu = tokens * (ops / filled + spill_ops / crowded) / flops
        if one.device is not None:
            gpu += tokens * 2 * macs / (flops * ATTENTION_FLOPS_SHARE)
        held = _range(self.fixed, one.lo, one.hi) + _range(self.spill, one.lo, one.hi)
        gpu = max(gpu, runs * (held * self.share(size) / gpus[where].bytes_per_s))
        return gpu, host, waiting + runs * (one.hi - one.lo) * LAYER_SECONDS

    def workload(self, order: Sequence[int], segments: Sequence[Segment], context: Context) -> float:
        """Seconds until all requests that come at once are answered."""
        busy = min(context.slots, self.work.concurrency)
        waves = -(-self.work.concurrency // busy)
        reading = self.prefill(order, segments, context.ubatch_tokens).total
        writing = self.decode(order, segments, busy, context.kv_type).total
        return waves * (busy * reading + self.work.reply_tokens * writing)

    def predict(self, order: Sequence[int], segments: Sequence[Segment], context: Context) -> Prediction:
        """What one request alone sees, and all slots together."""
        one, read = (
            self.decode(order, segments, 1, context.kv_type),
            self.prefill(order, segments, context.ubatch_tokens),
        )
        unsure, read_unsure = self._unsure(one), self._unsure(read)
        decode, prefill = 1 / one.total, self.work.prompt_tokens / read.total
        return Prediction(
            round(decode, 2),
            round(prefill, 1),
            round(decode / (1 + unsure), 2),
            round(decode * (1 + unsure), 2),
            round(prefill / (1 + read_unsure), 1),
            round(prefill * (1 + read_unsure), 1),
            round(context.slots / self.decode(order, segments, context.slots, context.kv_type).total, 2),
            round(self.workload(order, segments, context), 2),
        )

    def _unsure(self, spent: Seconds) -> float:
        """A factor less one, weighted by where the time goes: data sheets are surer than guesses."""
        gpu = 0.25 if all(gpu.known for gpu in self.rates.gpus) else 0.6
        host = 0.4 if self.rates.host_known else 0.7
        return (spent.gpu * gpu + spent.host * host + spent.waiting * 0.5) / spent.total


def _operations(model: Model) -> tuple[list[float], list[float]]:
    """Multiply and add for each weight of a layer: what stays, and what may be spilled."""
    spilled = EXPERTS if model.is_moe else DENSE
    fixed, spill = [0.0] * model.layers, [0.0] * model.layers
    for tensor in model.header.tensors:
        match = LAYER.fullmatch(tensor.name)
        if match and int(match[1]) < model.layers:
            (spill if spilled.fullmatch(match[2]) else fixed)[int(match[1])] += 2.0 * tensor.elements
    return fixed, spill


def _macs(model: Model, tokens: int, shared: Sequence[float]) -> list[float]:
    cache = model.compute.kv_bytes(Context(max(1, tokens), 1, "f16", 1))
    return _sums(size / 2 * heads for size, heads in zip(cache, shared, strict=True))


def _sums(values: Iterable[float]) -> list[float]:
    return list(accumulate(values, initial=0.0))


def _range(sums: Sequence[float], lo: int, hi: int) -> float:
    return sums[hi] - sums[lo]
