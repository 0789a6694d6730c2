"""Bandwidth and arithmetic of a machine's GPUs and processor: estimated from data sheets, or measured.

The `..._SHARE` constants are the part of a data sheet's figure that llama.cpp reaches, for every model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llamafleet.host.gpus import find
from llamafleet.host.machine import Cpu, Gpu

GB, TERA = 1e9, 1e12
# Where a rate comes from, the least certain first.
ESTIMATED, PROBED, MEASURED = SOURCES = ("estimated", "probe", "measured on this host")

# Share of a GPU's memory bandwidth while a token is written: 8B Q4_0 (4.65 GB) at 155 tokens/s on an RTX 3090
# (github.com/ggml-org/llama.cpp/pull/15802) is 0.77 of 936 GB/s with launches, 0.85 without.
GPU_BANDWIDTH_SHARE = 0.85
# Share of its dense f16 arithmetic while a prompt is read: 8B Q6_K at 3500 tokens/s on an RTX 3090 is 0.79 of
# 71 TFLOPS (pull/7860), 8B Q4_0 at 10359 tokens/s on an RTX 4090 1.0 of 165 (pull/7676).
GPU_FLOPS_SHARE = 0.8
# ROCm and Vulkan on AMD reach less: gpt-oss-20b at 94 tokens/s on an RX 7900 XT (discussion 15396), a single report.
AMD_BANDWIDTH_SHARE = 0.55
# Quantised matrices are multiplied by integer kernels that are not optimised for data-centre cards: no higher rate was
# reported for them.
GPU_FLOPS_LIMIT = 250 * TERA
# Share of a PCIe link's bandwidth for weights that are copied from pinned memory.
LINK_SHARE = 0.8
LINK_BYTES_PER_LANE = {1: 0.25 * GB, 2: 0.5 * GB, 3: 0.985 * GB, 4: 1.969 * GB, 5: 3.938 * GB, 6: 7.56 * GB}  # PCI-SIG
# Share of a processor's memory bandwidth while a token is written: experts of gpt-oss-120b cost 1.3 ms a layer on an
# i5-13400F (42 of 76.8 GB/s), of gpt-oss-20b on a Ryzen 9 5900X 31 of 51.2 (llama.cpp discussion 15396).
HOST_BANDWIDTH_SHARE = 0.55
CORE_BYTES_PER_S = 9 * GB  # quantised weights that a core multiplies (AVX2): few cores cannot use all memory channels
# With the survey's probe, weights are read as fast as it reads, unless the cores multiply slower. On two cores with AMX
# it reads 23.5e9: Gemma 3 270M writes 76 to 95 tokens/s, Qwen2.5-Coder 0.5B 44 to 64, 1.5B 23 to 39: 17 to
# 38e9 (b11434). Test hosts' builds have no AMX: there the same cores reach 9.5e9.
PROBED_CORE_BYTES_PER_S = {"amx_int8": 12 * GB}
# Arithmetic of one core while a prompt is read: 8 GFLOP a token at 10 tokens/s, AVX2; AVX-512 about half more.
CORE_FLOPS = {"amx_tile": 300e9, "avx512f": 120e9, "avx2": 80e9, "asimd": 60e9}
CORE_FLOPS_ELSE = 30e9
# With the survey's probe of the cores (`Steps` in llamafleet/remote/probe_bandwidth.py) the rates of a core follow its
# cycles: two cores of an EPYC (Zen 3, AVX2) make 0.40e9 steps a second each, write Qwen2.5-Coder 1.5B, 0.5B and Gemma
# 3 270M at 8.4 to 10.5, 18 to 23 and 31 to 37 tokens/s, 8.2 to 10e9 bytes of weights a second, and read 1.5B at 34 to
# 39 tokens/s, 91 to 104e9 operations (b11434): so many bytes a step, and steps a second of a core for which CORE_FLOPS
# holds.
CORE_BYTES_PER_STEP = 11.5
CORE_STEPS_PER_S = 0.68e9
# Multiply-adds of attention by one core, for one token and for many at once (measured:
# bench/results/cpu_attention.csv, b11434).
CORE_ATTENTION_MACS, CORE_READ_ATTENTION_MACS = 6e9, 15e9
# A long KV cache is read from memory again for every query head that shares it, in short pieces. That reaches this
# share of the bandwidth for weights, and half of it at CACHE_MISS_TOKENS. Qwen3-32B and Llama-3.3-70B with 24 layers
# on six cores: 13, 9 and 7.5e9 a second at 8039, 16202 and 29528 tokens (github.com/unslothai/unsloth/pull/9872).
CACHE_BANDWIDTH_SHARE, CACHE_ELEMENT_BYTES = 0.4, 2
CACHE_MISS_TOKENS = 8000

# GB/s of a socket's memory at its rated speed with all channels filled (product pages: Intel ARK, AMD).
HOST_BANDWIDTHS: tuple[tuple[str, float], ...] = (
    (r"EPYC.* 9\d\d5", 576.0),
    (r"EPYC.* 9\d\d4", 460.8),
    (r"EPYC.* 8\d\d4", 230.4),
    (r"EPYC.* 7\w\w[23]", 204.8),
    (r"EPYC.* 7\w\w1", 170.6),
    (r"Threadripper PRO 9\d", 409.6),
    (r"Threadripper PRO 7\d", 332.8),
    (r"Threadripper PRO", 204.8),
    (r"Threadripper 9\d", 204.8),
    (r"Threadripper 7\d", 166.4),
    (r"Threadripper", 102.4),
    (r"Ryzen AI Max", 256.0),
    (r"Ryzen.* [89]\d\d\d", 89.6),
    (r"Ryzen.* 7\d\d\d", 83.2),
    (r"Ryzen.* [345]\d\d\d", 51.2),
    (r"Xeon.* 69\d\dP", 614.4),
    (r"Xeon.* 67\d\dP", 409.6),
    (r"Xeon.*( w[79]-3[45]|Platinum 8[45]|Gold [56][45])", 307.2),
    (r"Xeon.* w\d-2[45]", 153.6),
    (r"Xeon.*(Platinum 83|Gold [56]3|Silver 43)", 204.8),
    (r"Xeon.*(Platinum 8[12]|Gold [56][12]|Silver 4[12])", 128.0),
    (r"Xeon.* E5-.* v[34]", 76.8),
    (r"Xeon", 100.0),
    (r"i9-(109|99|79)\d\dX", 93.9),
    (r"Core.* Ultra", 96.0),
    (r"i[3579]-14\d\d\d|i[79]-13\d\d\d|i5-136", 89.6),
    (r"i[3579]-1[23]\d\d\d", 76.8),
    (r"i[3579]-1[01]\d\d\d", 48.0),
    (r"i[3579]-\d{4}\D?", 41.6),
    (r"Neoverse-V2|Grace", 400.0),
    (r"Neoverse|Altra", 204.8),
)
HOST_BANDWIDTH_ELSE = 64.0  # two channels, between DDR4-3200 and DDR5-4800


@dataclass(frozen=True)
class Kernels:
    """How llama.cpp multiplies with many tokens on a processor. A prompt of `half_speed_tokens` is read at half the
    speed of a long one; `costs`: time for weights of a type, as a multiple of the time for K-quants."""

    half_speed_tokens: int = 0
    costs: Mapping[str, float] = field(default_factory=dict)

    def filled(self, tokens: int) -> float:
        """The speed at which a prompt of so many tokens is read, as a share of that of a long one."""
        return tokens / (tokens + self.half_speed_tokens)


# Gemma 3 270M, Qwen2.5-Coder 0.5B and 1.5B read 20 tokens at 0.72, 0.74 and 0.66 of their speed with 128 on two cores
# with AVX-512. Q5_0, in which most layers of the 0.5B are, takes 33 ps there for a weight and token, and Q4_K and Q6_K
# 11: 1.5B reads 68 tokens/s, 0.5B 90, Gemma, of both kinds, 454. With AVX2 alone K-quants gain less, and few tokens
# suffice: an EPYC (Zen 3) reads 34 to 39, 82 to 93 and 260 to 296 tokens/s (b11434).
KERNELS_AVX512 = Kernels(8, {"Q5_0": 3.0, "Q5_1": 3.0})
KERNELS = Kernels(4, {"Q5_0": 1.75, "Q5_1": 1.75})


@dataclass(frozen=True)
class GpuRates:
    """Estimated rates of a GPU. `known`: it is in the catalogue or was measured; False: typical values."""

    bytes_per_s: float
    flops: float
    link_bytes_per_s: float
    known: bool
    source: str = ESTIMATED  # of `bytes_per_s`; that of `flops` is `flops_source`
    flops_source: str = ESTIMATED


@dataclass(frozen=True)
class Rates:
    """Rates of a machine; `gpus` in the order of the argument of `rates`. "macs" are multiply-adds per second."""

    gpus: tuple[GpuRates, ...]
    host_bytes_per_s: float
    host_flops: float
    host_attention_macs: float  # for a single token
    host_cache_macs: float  # limit by the memory's bandwidth, if the processor's caches do not help
    host_read_attention_macs: float  # for many tokens at once
    host_known: bool  # the processor is in HOST_BANDWIDTHS, or its memory was measured
    # What the host's bandwidth and arithmetic come from: ESTIMATED, PROBED or MEASURED.
    host_source: str = ESTIMATED
    host_flops_source: str = ESTIMATED
    host_kernels: Kernels = Kernels()


@dataclass(frozen=True)
class Measurements:
    """Measurements of a host, by GPU UUID. Each replaces its estimate; values that are missing stay estimated.

    `trials`: measured (decode, prefill) speed of a single request in tokens/s, by the planned argv.
    """

    host_bytes_per_s: float | None = None
    host_flops: float | None = None
    # What the processors read together, as the survey measured it: a limit, which not every model reaches.
    probe_bytes_per_s: float | None = None
    probe_core_steps_per_s: float | None = None  # of each processor, see llamafleet/remote/probe_bandwidth.py
    gpu_bytes_per_s: Mapping[str, float] = field(default_factory=dict)
    gpu_flops: Mapping[str, float] = field(default_factory=dict)
    link_bytes_per_s: Mapping[str, float] = field(default_factory=dict)
    trials: Mapping[tuple[str, ...], tuple[float, float]] = field(default_factory=dict)


NOT_MEASURED = Measurements()


def rates(cpu: Cpu, gpus: Sequence[Gpu], threads: int, measured: Measurements = NOT_MEASURED) -> Rates:
    """The machine's rates with `threads` threads on the processor."""
    bandwidth, known = host_bandwidth(cpu)
    estimate = min(bandwidth * HOST_BANDWIDTH_SHARE, threads * CORE_BYTES_PER_S)
    # What cores with AMX reach was measured without steps.
    steps = None if "amx_tile" in cpu.flags else measured.probe_core_steps_per_s
    pace = min(1.0, steps / CORE_STEPS_PER_S) if steps else 1.0
    flops = next((rate for flag, rate in CORE_FLOPS.items() if flag in cpu.flags), CORE_FLOPS_ELSE)
    by_probe = _by_probe(cpu, threads, measured.probe_bytes_per_s, steps) if measured.probe_bytes_per_s else None
    host = measured.host_bytes_per_s or by_probe or estimate
    # A core that multiplies weights slower, by what was measured of it, is as much slower at attention.
    slower = host / estimate if measured.host_flops else pace
    reads_slower = measured.host_flops / (threads * flops) if measured.host_flops else pace
    return Rates(
        gpus=tuple(_gpu(gpu, measured) for gpu in gpus),
        host_bytes_per_s=host,
        host_flops=measured.host_flops or threads * flops * pace,
        host_attention_macs=threads * CORE_ATTENTION_MACS * min(1.0, slower),
        host_cache_macs=host * CACHE_BANDWIDTH_SHARE / CACHE_ELEMENT_BYTES,
        host_read_attention_macs=threads * CORE_READ_ATTENTION_MACS * min(1.0, reads_slower),
        host_known=known or measured.host_bytes_per_s is not None or by_probe is not None,
        host_source=MEASURED if measured.host_bytes_per_s else PROBED if by_probe else ESTIMATED,
        host_flops_source=MEASURED if measured.host_flops else PROBED if steps else ESTIMATED,
        host_kernels=KERNELS_AVX512 if "avx512f" in cpu.flags else KERNELS,
    )


def host_bandwidth(cpu: Cpu) -> tuple[float, bool]:
    """Bytes per second of one socket's memory by its data sheet, and whether the processor is in HOST_BANDWIDTHS.

    Other sockets are not added, because threads that read the memory of another socket are slower.
    """
    for pattern, rate in HOST_BANDWIDTHS:
        if re.search(pattern, cpu.model):
            return rate * GB, True
    return HOST_BANDWIDTH_ELSE * GB, False


def _by_probe(cpu: Cpu, threads: int, probe_bytes_per_s: float, steps: float | None) -> float:
    """Bytes of weights a second: what the memory gives, of one socket, or what the cores multiply, if that is less."""
    core = next((rate for flag, rate in PROBED_CORE_BYTES_PER_S.items() if flag in cpu.flags), CORE_BYTES_PER_S)
    if steps:
        core = min(core, steps * CORE_BYTES_PER_STEP)
    return min(probe_bytes_per_s / max(1, cpu.sockets), threads * core)


def _gpu(gpu: Gpu, measured: Measurements) -> GpuRates:
    model = find(gpu.name, gpu.memory_total_bytes)
    memory, flops = (model.bandwidth_bytes_per_s, model.fp16_flops) if model else (400 * GB, 40 * TERA)
    share = AMD_BANDWIDTH_SHARE if gpu.vendor == "amd" else GPU_BANDWIDTH_SHARE
    generation = gpu.pcie_generation or (model.pcie_generation if model else None) or 3
    width = gpu.pcie_width or (model.pcie_width if model else None) or 16
    link = LINK_BYTES_PER_LANE.get(generation, LINK_BYTES_PER_LANE[3]) * width * LINK_SHARE
    return GpuRates(
        bytes_per_s=measured.gpu_bytes_per_s.get(gpu.uuid, memory * share),
        flops=measured.gpu_flops.get(gpu.uuid, min(flops * GPU_FLOPS_SHARE, GPU_FLOPS_LIMIT)),
        link_bytes_per_s=measured.link_bytes_per_s.get(gpu.uuid, link),
        known=model is not None or gpu.uuid in measured.gpu_bytes_per_s,
        source=MEASURED if gpu.uuid in measured.gpu_bytes_per_s else ESTIMATED,
        flops_source=MEASURED if gpu.uuid in measured.gpu_flops else ESTIMATED,
    )
