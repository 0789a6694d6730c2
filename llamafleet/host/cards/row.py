"""A row of the GPU catalogue, and a section of rows whose figures have one source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

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
    arch: str = "x86_64"  # of the processor that it is built together with, or beside usually
    sold_with: tuple[int, ...] = ()  # sizes in MiB of a unified memory that is soldered; empty: modules of any size
    source: str = ""  # where the figures are from


def section(source: str, *rows: GpuModel) -> Iterator[GpuModel]:
    """The rows, with the source of their figures."""
    return (replace(row, source=source) for row in rows)


def nvidia(
    name: str, mib: int, gb_per_s: float, tflops: float, capability: str, generation: int, width: int = 16,
    *aliases: str,
) -> GpuModel:  # fmt: skip
    """A card of NVIDIA's."""
    speeds = (gb_per_s * GB, tflops * TERA)
    return GpuModel(name, "nvidia", mib * MIB, *speeds, capability, None, generation, width, aliases=aliases)


def amd(
    name: str, mib: int, gb_per_s: float, tflops: float, gfx: str, generation: int, width: int = 16, *aliases: str
) -> GpuModel:
    """A card of AMD's."""
    return GpuModel(name, "amd", mib * MIB, gb_per_s * GB, tflops * TERA, None, gfx, generation, width, aliases=aliases)


def intel(
    name: str, mib: int, gb_per_s: float, tflops: float, width: int, *aliases: str, generation: int = 4
) -> GpuModel:
    """A card of Intel's."""
    speeds = (gb_per_s * GB, tflops * TERA)
    return GpuModel(name, "intel", mib * MIB, *speeds, None, None, generation, width, aliases=aliases)


def tegra(name: str, mib: int, gb_per_s: float, tflops: float, capability: str, *aliases: str) -> GpuModel:
    """A module with NVIDIA's GPU and an ARM processor, whose memory of this size is soldered."""
    return GpuModel(
        name, "nvidia", mib * MIB, gb_per_s * GB, tflops * TERA, capability, None, None, None, True, aliases,
        "aarch64", (mib,),
    )  # fmt: skip


def integrated(
    vendor: str, name: str, mib: int, gb_per_s: float, tflops: float, gfx: str | None, *aliases: str
) -> GpuModel:
    """A GPU inside an x86 processor: `mib` is the most memory that the processor takes."""
    return GpuModel(name, vendor, mib * MIB, gb_per_s * GB, tflops * TERA, None, gfx, None, None, True, aliases)
