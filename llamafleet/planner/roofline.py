"""The predicted speed of a placement, by a roofline model: bytes read and operations, divided by the machine's rates.

The prediction ranks placements and has a range for its uncertainty. Measurements on the host replace it.

Decision 6: docs/decisions/0006-the-workload-is-the-objective.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate

from llamafleet.host.speeds import CACHE_MISS_TOKENS, ESTIMATED, MEASURED, PROBED, SOURCES, GpuRates, Rates
from llamafleet.memory.context import Context, is_quantised
from llamafleet.memory.graph.allocation import OFFLOAD_TOKENS
from llamafleet.memory.placement import Segment
from llamafleet.memory.weights import Model
from llamafleet.model.architecture import Cache
from llamafleet.settings.workload import Workload

# Seconds to launch and wait for small kernels, for each layer on a GPU and each token written, besides reading weights.
# 8B Q4_0 on an RTX 3090 takes 6.45 ms a token, 5.84 ms of it to read the weights (llama.cpp pull/15802).
LAYER_SECONDS = 20e-6
# Further seconds of a layer with experts, to route and gather: gpt-oss-20b writes about 225 tokens/s on an RTX 4090
# (runaihome.com).
EXPERTS_SECONDS = 70e-6
HOP_SECONDS = 50e-6  # from a GPU to the CPU and back: two copies and two waits
# The KV cache is read more slowly than weights; this is its bandwidth as a share of that of weights. Qwen3.5-27B on an
# RTX PRO 6000 needs 3.2 ms more at 65536 tokens than at 2048, for 4.2 GB: 0.73 of the bandwidth (llama.cpp pull/26622).
CACHE_SHARE = 0.85
# A quantised cache is dequantised while it is read: on most published GPUs slower than f16, on none faster.
QUANTISED_CACHE_COST = 1.25
# In prefill each expert gets few tokens: half speed at this many tokens, and gathering costs a third.
EXPERT_HALF_SPEED_TOKENS, EXPERT_FLOPS_SHARE = 8, 0.65
UBATCH_HALF_SPEED_TOKENS = 64  # small batches fill a GPU badly: 7444 tokens/s at 128, 10359 at 512 (pull/7676)
ATTENTION_FLOPS_SHARE = 0.4  # attention's operations per second as a share of those of weight matrices
# The share of experts that a large batch uses and op-offload copies: gpt-oss-120b with 26 layers' experts in RAM reads
# 380 to 2091 tokens/s at ubatches of 512 to 8192 on an RTX 3090; all experts would be 39 GB/s over a 31.5 GB/s link.
EXPERTS_COPIED = 0.65
MEASURED_ERROR, PROBED_ERROR = 0.15, 0.3  # relative errors of a prediction from measured rates, and from the probe's


@dataclass(frozen=True)
class Prediction:
    """Predicted tokens per second of one request alone, each with the low and high end of its range."""

    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    decode_low_tokens_per_s: float = 0.0
    decode_high_tokens_per_s: float = 0.0
    prefill_low_tokens_per_s: float = 0.0
    prefill_high_tokens_per_s: float = 0.0
    all_slots_tokens_per_s: float = 0.0  # written by all slots together
    workload_seconds: float = 0.0  # until all concurrent requests of the workload are answered
    measured: bool = False
    # Where the rates come from that most depends on: "estimated", "probe" or "measured on this host".
    decode_source: str = ESTIMATED
    prefill_source: str = ESTIMATED
    # Bytes of the plan that are in swap: where there are any, no speed is predicted, and all of them are 0.
    swap_bytes: int = 0

    @classmethod
    def of_trial(cls, decode: float, prefill: float) -> Prediction:
        """The speeds of a trial on the host with exactly the plan's flags; the range is the measured value."""
        return cls(
            decode, prefill, decode, decode, prefill, prefill, measured=True,
            decode_source=MEASURED, prefill_source=MEASURED,
        )  # fmt: skip

    @property
    def tokens_per_s(self) -> float:
        """The speed of writing; of reading where nothing is written."""
        return self.decode_tokens_per_s or self.prefill_tokens_per_s

    def to_json(self) -> dict[str, float | bool | str]:
        """For the plan contract: all fields."""
        return asdict(self)


@dataclass(frozen=True)
class Seconds:
    """Seconds by where they are spent: GPUs, CPU, and waiting for copies and kernel launches."""

    gpu: float
    host: float
    waiting: float

    @property
    def total(self) -> float:
        """The sum of the three parts."""
        return self.gpu + self.host + self.waiting


class Roofline:
    """A model's work divided by a machine's rates.

    Lists such as `spill` are sums over the layers from the front, so that a range of layers is one difference.
    """

    def __init__(self, model: Model, work: Workload, rates: Rates, *, op_offload: bool) -> None:
        shape, layers = model.shape, model.layers
        self.model, self.work, self.rates, self.op_offload = model, work, rates, op_offload
        self.layers = layers
        self.experts = max(1, shape.experts.count) if model.is_moe else 1
        self.used = min(max(1, max(shape.experts.used, default=1)), self.experts)
        self.fixed = _sums(whole - spill for whole, spill in zip(model.layer_bytes, model.spill_bytes, strict=True))
        self.spill = _sums(model.spill_bytes)
        self.spilling = _sums(spill > 0 for spill in model.spill_bytes)
        fixed_ops, spill_ops = model.operations
        self.fixed_ops, self.spill_ops = _sums(fixed_ops), _sums(spill_ops)
        self.cache = _sums(model.compute.kv_bytes(Context(work.live_tokens, 1, "f16", 1)))
        # Without a cache, a token attends to those behind it too.
        depth = work.prompt_tokens if shape.architecture.attends_to_batch else work.read_depth_tokens
        heads = max(shape.heads, default=1)
        shared = [heads / max(1, kv) for kv in shape.kv_heads]
        # Multiply-adds of attention for one token: every element of K and V, once for each head that shares it.
        self.macs = _macs(model, work.live_tokens, shared)
        self.read_macs = _macs(model, depth, shared)
        missed = work.live_tokens / (work.live_tokens + CACHE_MISS_TOKENS)
        self.seconds_a_mac = 1 / rates.host_attention_macs + missed / rates.host_cache_macs

    def share(self, tokens: float) -> float:
        """The share of all experts that `tokens` tokens use if they choose independently; 1 for dense models."""
        return 1.0 - float((1.0 - self.used / self.experts) ** tokens)

    def decode(self, order: Sequence[int], segments: Sequence[Segment], sequences: int, kv_type: str) -> Seconds:
        """Time of one token of each of `sequences` sequences. `order`: the GPUs in use, llama.cpp's device 0 first."""
        rates, share, active = self.rates, self.share(sequences), self.used / self.experts
        gpus = [rates.gpus[number] for number in order]
        slow_cache = QUANTISED_CACHE_COST if is_quantised(kv_type) else 1.0
        gpu = host = waiting = 0.0
        for segment in segments:
            fixed = _range(self.fixed, segment.lo, segment.hi)
            offloaded, offloaded_ops = self.on_host(segment)
            inside = _range(self.spill, segment.lo, segment.hi) - offloaded
            if segment.device is None:
                spill_ops = _range(self.spill_ops, segment.lo, segment.hi)
                ops = _range(self.fixed_ops, segment.lo, segment.hi) + active * spill_ops
                host += max((fixed + share * inside) / rates.host_bytes_per_s, sequences * ops / rates.host_flops)
                host += sequences * _range(self.macs, segment.lo, segment.hi) * slow_cache * self.seconds_a_mac
                continue
            speed = gpus[segment.device].bytes_per_s
            cache = _range(self.cache, segment.lo, segment.hi) * sequences * slow_cache / CACHE_SHARE
            gpu += (fixed + share * inside + cache) / speed
            host += max(
                share * offloaded / rates.host_bytes_per_s, sequences * active * offloaded_ops / rates.host_flops
            )
            hops = _range(self.spilling, segment.keep, segment.hi)
            experts = _range(self.spilling, segment.lo, segment.hi) if self.model.is_moe else 0
            waiting += (segment.hi - segment.lo) * LAYER_SECONDS + experts * EXPERTS_SECONDS + hops * HOP_SECONDS
        waiting += (len(segments) - 1) * HOP_SECONDS
        last = segments[-1].device
        output = self.model.output_bytes / (rates.host_bytes_per_s if last is None else gpus[last].bytes_per_s)
        return Seconds(gpu + (output if last is not None else 0), host + (output if last is None else 0), waiting)

    def on_host(self, segment: Segment) -> tuple[float, float]:
        """Bytes of a device's layers (experts or FFN) that are on the host, and their operations for a token."""
        offloaded, ops = _range(self.spill, segment.keep, segment.hi), _range(self.spill_ops, segment.keep, segment.hi)
        if segment.part:
            whole = self.model.spill_bytes[segment.keep]
            on_gpu = whole - self.model.part_bytes(segment.keep, segment.part)
            offloaded -= on_gpu
            ops -= _range(self.spill_ops, segment.keep, segment.keep + 1) * on_gpu / max(1, whole)
        return offloaded, ops

    def prefill(self, order: Sequence[int], segments: Sequence[Segment], ubatch: int) -> Seconds:
        """Time to read the workload's prompt in ubatches of `ubatch` tokens."""
        gpus = [self.rates.gpus[number] for number in order]
        tokens, size = self.work.prompt_tokens, min(ubatch, self.work.prompt_tokens)
        runs = -(-tokens // size)  # ubatches of one prompt
        first = next((segment.device for segment in segments if segment.device is not None), None)
        offload = self.op_offload and first is not None and size >= OFFLOAD_TOKENS
        parts = [self._read(gpus, segment, tokens, runs, size, first if offload else None) for segment in segments]
        gpu, host, waiting = (sum(part) for part in zip(*parts, strict=True))
        if len(segments) > 1 and all(segment.device is not None and segment.keep == segment.hi for segment in segments):
            # A pipeline: while the second GPU computes an ubatch, the first GPU computes the next ubatch.
            slowest = max(part[0] for part in parts)
            gpu = gpu / runs + slowest * (runs - 1) / runs
        return Seconds(gpu, host, waiting)

    def _read(
        self, gpus: Sequence[GpuRates], segment: Segment, tokens: int, runs: int, size: int, staged_on: int | None
    ) -> tuple[float, float, float]:
        rates, active = self.rates, self.used / self.experts
        filled = size / (size + UBATCH_HALF_SPEED_TOKENS)
        expert_tokens = size * active
        expert_filled = EXPERT_FLOPS_SHARE * expert_tokens / (expert_tokens + EXPERT_HALF_SPEED_TOKENS)
        spill_filled = expert_filled if self.experts > 1 else filled
        ops = _range(self.fixed_ops, segment.lo, segment.hi)
        spill_ops = _range(self.spill_ops, segment.lo, segment.hi) * active
        macs = _range(self.read_macs, segment.lo, segment.hi)
        offloaded, _ = self.on_host(segment)
        if segment.device is None:
            offloaded += _range(self.fixed, segment.lo, segment.hi)
        computed_on = staged_on if segment.device is None else segment.device
        host = waiting = 0.0
        if segment.device is None:
            host = tokens * macs / rates.host_read_attention_macs
        if computed_on is None or (offloaded and staged_on is None):
            host_ops = (ops if segment.device is None else 0.0) + spill_ops
            return 0.0, host + tokens * host_ops / rates.host_flops, 0.0
        if offloaded and staged_on is not None:
            copied = min(self.share(size), EXPERTS_COPIED) if self.experts > 1 else 1.0
            waiting = runs * copied * offloaded / gpus[staged_on].link_bytes_per_s
        flops = gpus[computed_on].flops
        gpu = tokens * (ops / filled + spill_ops / spill_filled) / flops
        if segment.device is not None:
            gpu += tokens * 2 * macs / (flops * ATTENTION_FLOPS_SHARE)
        weights = _range(self.fixed, segment.lo, segment.hi) + _range(self.spill, segment.lo, segment.hi)
        gpu = max(gpu, runs * (weights * self.share(size) / gpus[computed_on].bytes_per_s))
        return gpu, host, waiting + runs * (segment.hi - segment.lo) * LAYER_SECONDS

    def workload(self, order: Sequence[int], segments: Sequence[Segment], context: Context) -> float:
        """Seconds until all concurrent requests of the workload are answered."""
        busy = min(context.slots, self.work.concurrency)
        waves = -(-self.work.concurrency // busy)  # rounds of `busy` requests
        reading = self.prefill(order, segments, context.ubatch_tokens).total
        writing = self.decode(order, segments, busy, context.kv_type).total
        return waves * (busy * reading + self.work.reply_tokens * writing)

    def predict(self, order: Sequence[int], segments: Sequence[Segment], context: Context) -> Prediction:
        """The speed of one request alone, and of all slots together; none of writing where nothing is written."""
        writing = self.decode(order, segments, 1, context.kv_type)
        reading = self.prefill(order, segments, context.ubatch_tokens)
        gpus, rates = [self.rates.gpus[number] for number in order], self.rates
        write_source = _weakest(writing, rates.host_source, [gpu.source for gpu in gpus])
        read_source = _weakest(reading, rates.host_flops_source, [gpu.flops_source for gpu in gpus])
        write_error, read_error = self._uncertainty(writing, write_source), self._uncertainty(reading, read_source)
        decode, prefill = 1 / writing.total, self.work.prompt_tokens / reading.total
        together = context.slots / self.decode(order, segments, context.slots, context.kv_type).total
        if not self.work.reply_tokens:
            decode = together = 0.0
        return Prediction(
            round(decode, 2),
            round(prefill, 1),
            round(decode / (1 + write_error), 2),
            round(decode * (1 + write_error), 2),
            round(prefill / (1 + read_error), 1),
            round(prefill * (1 + read_error), 1),
            round(together, 2),
            round(self.workload(order, segments, context), 2),
            decode_source=write_source,
            prefill_source=read_source,
        )

    def _uncertainty(self, spent: Seconds, source: str) -> float:
        """The relative uncertainty (0.25: a factor of 1.25 both ways), weighted by where the time is spent; it is
        smaller for hardware whose rates are known from data sheets, and smallest where they were measured."""
        if source == MEASURED:
            return MEASURED_ERROR
        gpu = 0.25 if all(gpu.known for gpu in self.rates.gpus) else 0.6
        host = PROBED_ERROR if self.rates.host_source == PROBED else 0.4 if self.rates.host_known else 0.7
        return (spent.gpu * gpu + spent.host * host + spent.waiting * 0.5) / spent.total


def _weakest(spent: Seconds, host: str, gpus: Sequence[str]) -> str:
    """The least certain source of the rates of those parts that take a tenth of the time or more."""
    sources = [host] if spent.host >= 0.1 * spent.total else []
    sources += gpus if spent.gpu >= 0.1 * spent.total else []
    return min(sources, key=SOURCES.index, default=ESTIMATED)


def _macs(model: Model, tokens: int, shared: Sequence[float]) -> list[float]:
    shape = model.shape
    if shape.cache is Cache.NONE:
        rows = [sum(shape.head_sizes(window > 0)) * heads * min(tokens, window or tokens)
                for window, heads in zip(shape.windows, shape.kv_heads, strict=True)]  # fmt: skip
    else:
        cache = model.compute.kv_bytes(Context(max(1, tokens), 1, "f16", 1))
        rows = [size // 2 for size in cache]
    return _sums(elements * heads for elements, heads in zip(rows, shared, strict=True))


def _sums(values: Iterable[float]) -> list[float]:
    return list(accumulate(values, initial=0.0))


def _range(sums: Sequence[float], lo: int, hi: int) -> float:
    return sums[hi] - sums[lo]
