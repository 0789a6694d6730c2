"""The catalogue of GPUs: memory, memory bandwidth, f16 arithmetic and PCIe link of each model, one row for each.

Bandwidth and arithmetic are the manufacturers' figures: NVIDIA's product pages, data sheets and architecture white
papers (Turing TU102, Ampere GA102, Ada AD102, Blackwell GB202, A100, H100); AMD's product pages and CDNA data sheets;
Intel's product pages. Arithmetic is dense f16 with f32 accumulation on tensor cores, which on GeForce is half of the
figure with f16 accumulation; for cards without tensor cores it is the shaders' rate that llama.cpp uses. The memory of
NVIDIA's cards is what NVML reports, with ECC as shipped; that of other cards is nominal, less 16 MiB for the firmware.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

MIB, GB, TERA = 1024**2, 1e9, 1e12


@dataclass(frozen=True)
class GpuModel:
    """A GPU model. `unified`: it shares the CPU's memory, and `memory_bytes` is the largest such memory."""

    name: str  # the driver's name for it: the longest part that all boards have in common
    vendor: str  # "nvidia", "amd" or "intel", as in a machine file
    memory_bytes: int
    bandwidth_bytes_per_s: float
    fp16_flops: float
    compute_capability: str | None  # NVIDIA's
    gfx: str | None  # AMD's LLVM target
    pcie_generation: int | None
    pcie_width: int | None
    unified: bool = False
    aliases: tuple[str, ...] = ()  # other usual names


def find(name: str, memory_bytes: int | None = None) -> GpuModel | None:
    """The model with the longest name that is part of `name`: "rtx4090", "RTX 4090", "NVIDIA GeForce RTX 4090".

    If several sizes have that name, it is the one nearest to `memory_bytes`, or to a size in `name` ("V100 16GB"), else
    the first row. None if no row's name is part of `name`.
    """
    words = _words(name)
    matches = [(len("".join(known)), model) for known, model in _KNOWN if _within(known, words)]
    if _MOBILE & set(words):  # the chip of a laptop's card differs from the desktop card's of that name
        matches = [(length, model) for length, model in matches if _MOBILE & set(_words(model.name))]
    longest = max((length for length, _ in matches), default=0)
    best = [model for length, model in matches if length == longest]
    size = re.search(r"\b([0-9]{1,6}) ?gb?\b", name.lower())
    if memory_bytes is None and size:
        memory_bytes = int(size[1]) * 1024 * MIB
    if memory_bytes is None:
        return best[0] if best else None
    return min(best, key=lambda model: abs(model.memory_bytes - memory_bytes), default=None)


def nearest(name: str) -> tuple[str, ...]:
    """Up to three names of the catalogue that are similar to `name`, for messages."""
    letters = "".join(_words(name))
    names = {"".join(known): model.name for known, model in _KNOWN}
    similar = difflib.get_close_matches(letters, names, n=6, cutoff=0.5)
    return tuple(dict.fromkeys(names[key] for key in similar))[:3]


def _words(name: str) -> tuple[str, ...]:
    """Groups of letters and of digits: "rtx4090" has those of "RTX 4090", and "T4" is not a part of "T400"."""
    return tuple(re.findall(r"[a-z]+|\d+", name.lower()))


def _within(part: tuple[str, ...], whole: tuple[str, ...]) -> bool:
    return any(whole[start : start + len(part)] == part for start in range(len(whole) - len(part) + 1))


_MOBILE = frozenset({"laptop", "mobile"})


def _nvidia(
    name: str, mib: int, gb_per_s: float, tflops: float, capability: str, generation: int, width: int = 16,
    *aliases: str,
) -> GpuModel:  # fmt: skip
    speeds = (gb_per_s * GB, tflops * TERA)
    return GpuModel(name, "nvidia", mib * MIB, *speeds, capability, None, generation, width, aliases=aliases)


def _amd(
    name: str, mib: int, gb_per_s: float, tflops: float, gfx: str, generation: int, width: int = 16, *aliases: str
) -> GpuModel:
    return GpuModel(name, "amd", mib * MIB, gb_per_s * GB, tflops * TERA, None, gfx, generation, width, aliases=aliases)


def _intel(name: str, mib: int, gb_per_s: float, tflops: float, width: int, *aliases: str) -> GpuModel:
    return GpuModel(name, "intel", mib * MIB, gb_per_s * GB, tflops * TERA, None, None, 4, width, aliases=aliases)


# Name, MiB, GB/s, TFLOPS, compute capability or LLVM target, PCIe generation, lanes (16), other names.
# If a name has several sizes, the most common size comes first.
GPUS: tuple[GpuModel, ...] = (
    # GeForce 10 and 20
    _nvidia("GTX 1080 Ti", 11264, 484, 11.3, "6.1", 3),
    _nvidia("RTX 2060", 6144, 336, 25.8, "7.5", 3),
    _nvidia("RTX 2070", 8192, 448, 29.9, "7.5", 3),
    _nvidia("RTX 2070 SUPER", 8192, 448, 36.3, "7.5", 3),
    _nvidia("RTX 2080", 8192, 448, 40.3, "7.5", 3),
    _nvidia("RTX 2080 SUPER", 8192, 496, 44.6, "7.5", 3),
    _nvidia("RTX 2080 Ti", 11264, 616, 53.8, "7.5", 3),
    # GeForce 30
    _nvidia("RTX 3050", 8192, 224, 18.2, "8.6", 4, 8),
    _nvidia("RTX 3060", 12288, 360, 25.5, "8.6", 4),
    _nvidia("RTX 3060 Ti", 8192, 448, 32.4, "8.6", 4),
    _nvidia("RTX 3070", 8192, 448, 40.6, "8.6", 4),
    _nvidia("RTX 3070 Ti", 8192, 608, 43.5, "8.6", 4),
    _nvidia("RTX 3080", 10240, 760, 59.5, "8.6", 4),
    _nvidia("RTX 3080", 12288, 912, 61.3, "8.6", 4),
    _nvidia("RTX 3080 Ti", 12288, 912, 68.2, "8.6", 4),
    _nvidia("RTX 3090", 24576, 936, 71.0, "8.6", 4),
    _nvidia("RTX 3090 Ti", 24564, 1008, 80.0, "8.6", 4),
    # GeForce 40
    _nvidia("RTX 4060", 8188, 272, 30.2, "8.9", 4, 8),
    _nvidia("RTX 4060 Ti", 16380, 288, 44.1, "8.9", 4, 8),
    _nvidia("RTX 4060 Ti", 8188, 288, 44.1, "8.9", 4, 8),
    _nvidia("RTX 4070", 12282, 504, 58.3, "8.9", 4),
    _nvidia("RTX 4070 SUPER", 12282, 504, 70.9, "8.9", 4),
    _nvidia("RTX 4070 Ti", 12282, 504, 80.2, "8.9", 4),
    _nvidia("RTX 4070 Ti SUPER", 16376, 672, 88.2, "8.9", 4),
    _nvidia("RTX 4080", 16376, 717, 97.5, "8.9", 4),
    _nvidia("RTX 4080 SUPER", 16376, 736, 104.4, "8.9", 4),
    _nvidia("RTX 4090", 24564, 1008, 165.2, "8.9", 4),
    _nvidia("RTX 4090 Laptop", 16376, 576, 65.0, "8.9", 4, 8),
    # GeForce 50
    _nvidia("RTX 5060", 8151, 448, 38.4, "12.0", 5, 8),
    _nvidia("RTX 5060 Ti", 16311, 448, 47.4, "12.0", 5, 8),
    _nvidia("RTX 5060 Ti", 8151, 448, 47.4, "12.0", 5, 8),
    _nvidia("RTX 5070", 12227, 672, 61.7, "12.0", 5),
    _nvidia("RTX 5070 Ti", 16303, 896, 87.9, "12.0", 5),
    _nvidia("RTX 5080", 16303, 960, 112.6, "12.0", 5),
    _nvidia("RTX 5090", 32607, 1792, 209.5, "12.0", 5),
    _nvidia("RTX 5090 Laptop", 24463, 896, 82.0, "12.0", 5, 8),
    # Workstations: Turing, Ampere, Ada, Blackwell
    _nvidia("TITAN RTX", 24576, 672, 65.2, "7.5", 3),
    _nvidia("Quadro RTX 8000", 49152, 672, 130.5, "7.5", 3),
    _nvidia("RTX A2000", 12282, 288, 31.9, "8.6", 4, 16, "A2000"),
    _nvidia("RTX A4000", 16376, 448, 76.7, "8.6", 4, 16, "A4000"),
    _nvidia("RTX A4500", 20470, 640, 94.6, "8.6", 4, 16, "A4500"),
    _nvidia("RTX A5000", 24564, 768, 111.1, "8.6", 4, 16, "A5000"),
    _nvidia("RTX A6000", 49140, 768, 154.8, "8.6", 4, 16, "A6000"),
    _nvidia("RTX 2000 Ada", 16380, 224, 48.0, "8.9", 4, 8),
    _nvidia("RTX 4000 Ada", 20475, 360, 106.9, "8.9", 4),
    _nvidia("RTX 4000 SFF Ada", 20475, 280, 76.7, "8.9", 4),
    _nvidia("RTX 4500 Ada", 24570, 432, 158.5, "8.9", 4),
    _nvidia("RTX 5000 Ada", 32760, 576, 261.1, "8.9", 4),
    _nvidia("RTX 6000 Ada", 49140, 960, 364.2, "8.9", 4),
    _nvidia("RTX PRO 4000 Blackwell", 24467, 672, 147.0, "12.0", 5, 16, "RTX PRO 4000"),
    _nvidia("RTX PRO 4500 Blackwell", 32623, 896, 210.0, "12.0", 5, 16, "RTX PRO 4500"),
    _nvidia("RTX PRO 5000 Blackwell", 48935, 1344, 258.0, "12.0", 5, 16, "RTX PRO 5000"),
    _nvidia("RTX PRO 6000 Blackwell", 97887, 1792, 500.0, "12.0", 5, 16, "RTX PRO 6000"),
    # Servers
    _nvidia("P40", 23040, 346, 11.8, "6.1", 3),
    _nvidia("P100", 16384, 732, 18.7, "6.0", 3),
    _nvidia("T4", 15360, 320, 65.0, "7.5", 3),
    _nvidia("V100", 32768, 900, 112.0, "7.0", 3),
    _nvidia("V100", 16384, 900, 112.0, "7.0", 3),
    _nvidia("A2", 15356, 200, 18.0, "8.6", 4, 8),
    _nvidia("A10", 23028, 600, 125.0, "8.6", 4),
    _nvidia("A10G", 23028, 600, 70.0, "8.6", 4),
    _nvidia("A30", 24576, 933, 165.0, "8.0", 4),
    _nvidia("A40", 46068, 696, 149.7, "8.6", 4),
    _nvidia("A100 80GB", 81920, 1935, 312.0, "8.0", 4, 16, "A100", "A100 80G"),
    _nvidia("A100-SXM4-80GB", 81920, 2039, 312.0, "8.0", 4, 16, "A100 SXM"),
    _nvidia("A100-PCIE-40GB", 40960, 1555, 312.0, "8.0", 4, 16, "A100 40GB", "A100 40G", "A100"),
    _nvidia("A100-SXM4-40GB", 40960, 1555, 312.0, "8.0", 4),
    _nvidia("L4", 23034, 300, 121.0, "8.9", 4),
    _nvidia("L40", 46068, 864, 181.1, "8.9", 4),
    _nvidia("L40S", 46068, 864, 362.1, "8.9", 4),
    _nvidia("H100 PCIe", 81559, 2000, 756.0, "9.0", 5),
    _nvidia("H100 80GB HBM3", 81559, 3350, 989.0, "9.0", 5, 16, "H100", "H100 SXM"),
    _nvidia("H100 NVL", 95830, 3900, 835.0, "9.0", 5),
    _nvidia("GH200", 97871, 4000, 989.0, "9.0", 5),
    _nvidia("H200", 143771, 4800, 989.0, "9.0", 5),
    _nvidia("B200", 183359, 8000, 2250.0, "10.0", 5),
    # Radeon
    _amd("RX 6800 XT", 16368, 512, 41.5, "gfx1030", 4),
    _amd("RX 6900 XT", 16368, 512, 46.1, "gfx1030", 4),
    _amd("RX 7600 XT", 16368, 288, 45.1, "gfx1102", 4, 8),
    _amd("RX 7800 XT", 16368, 624, 74.7, "gfx1101", 4),
    _amd("RX 7900 GRE", 16368, 576, 92.0, "gfx1100", 4),
    _amd("RX 7900 XT", 20464, 800, 103.0, "gfx1100", 4),
    _amd("RX 7900 XTX", 24560, 960, 122.8, "gfx1100", 4),
    _amd("RX 9060 XT", 16368, 320, 103.0, "gfx1200", 5),
    _amd("RX 9070", 16368, 640, 145.0, "gfx1201", 5),
    _amd("RX 9070 XT", 16368, 640, 195.0, "gfx1201", 5),
    _amd("R9700", 32752, 640, 191.0, "gfx1201", 5),
    _amd("W7800", 32752, 576, 90.5, "gfx1100", 4),
    _amd("W7900", 49136, 864, 122.6, "gfx1100", 4),
    # Instinct; an MI250 is two devices, and the row is for each of them
    _amd("MI50", 32752, 1024, 26.5, "gfx906", 4),
    _amd("MI100", 32752, 1229, 184.6, "gfx908", 4),
    _amd("MI210", 65520, 1638, 181.0, "gfx90a", 4),
    _amd("MI250", 65520, 1638, 181.0, "gfx90a", 4),
    _amd("MI250X", 65520, 1638, 191.5, "gfx90a", 4),
    _amd("MI300X", 196592, 5300, 1307.4, "gfx942", 5),
    # Arc
    _intel("Arc A750", 8176, 512, 110.0, 16, "A750"),
    _intel("Arc A770", 16368, 560, 131.0, 16, "A770"),
    _intel("Arc B570", 10224, 380, 101.5, 8, "B570"),
    _intel("Arc B580", 12272, 456, 116.5, 8, "B580"),
    # One memory for CPU and GPU
    GpuModel("GB10", "nvidia", 122500 * MIB, 273 * GB, 125 * TERA, "12.1", None, None, None, True, ("DGX Spark",)),
    GpuModel(
        "Radeon 8060S",
        "amd",
        128000 * MIB,
        256 * GB,
        59.4 * TERA,
        None,
        "gfx1151",
        None,
        None,
        True,
        ("Strix Halo", "StrixHalo", "Ryzen AI Max+ 395", "AI Max 395"),
    ),
)

_KNOWN = tuple((_words(name), model) for model in GPUS for name in (model.name, *model.aliases))
