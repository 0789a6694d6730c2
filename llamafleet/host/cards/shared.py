"""GPUs that share their memory with the processor."""

from __future__ import annotations

from llamafleet.host.cards.row import GB, MIB, TERA, GpuModel, integrated, section, tegra

SHARED: tuple[GpuModel, ...] = (
    *section(
        "NVIDIA's data sheets of DGX Spark, GH200 and Jetson modules (https://developer.nvidia.com/embedded/jetson-modules);"
        " memory as Linux reports it",
        tegra("GB10", 122500, 273, 125, "12.1", "DGX Spark"),
        tegra("Jetson Nano", 3956, 25.6, 0.47, "5.3", "Nano 4GB", "Jetson Nano 4GB"),
        tegra("Jetson TX2", 7850, 59.7, 1.3, "6.2", "TX2"),
        tegra("Jetson Xavier NX", 7766, 59.7, 10.5, "7.2", "Xavier NX"),
        tegra("Jetson Xavier NX", 15816, 59.7, 10.5, "7.2", "Xavier NX"),
        tegra("Jetson AGX Xavier", 31918, 136.5, 11.0, "7.2", "AGX Xavier"),
        tegra("Jetson AGX Xavier", 63480, 136.5, 11.0, "7.2", "AGX Xavier"),
        tegra("Jetson Orin Nano", 7620, 102, 17.0, "8.7", "Orin Nano", "Jetson Orin Nano Super", "Orin Nano Super"),
        tegra("Jetson Orin Nano", 3812, 51, 8.5, "8.7", "Orin Nano", "Jetson Orin Nano Super", "Orin Nano Super"),
        tegra("Jetson Orin NX", 15656, 102, 30.0, "8.7", "Orin NX"),
        tegra("Jetson Orin NX", 7620, 102, 25.0, "8.7", "Orin NX"),
        tegra("Jetson AGX Orin", 62841, 204.8, 42.5, "8.7", "AGX Orin", "Orin"),
        tegra("Jetson AGX Orin", 30697, 204.8, 27.0, "8.7", "AGX Orin", "Orin"),
        tegra("Jetson AGX Thor", 125772, 273, 258.0, "11.0", "AGX Thor", "Jetson Thor", "Thor", "Jetson T5000"),
        tegra("Jetson T4000", 62886, 273, 150.0, "11.0"),
    ),
    *section(
        "NVIDIA's data sheets of GH200 and GB200: HBM of the GPU; the processor has memory of its own",
        GpuModel("GH200", "nvidia", 97871 * MIB, 4000 * GB, 989 * TERA, "9.0", None, 5, 16, arch="aarch64",
                 aliases=("GH200 480GB", "GH200 96GB")),
        GpuModel("GB200", "nvidia", 189471 * MIB, 8000 * GB, 2500 * TERA, "10.0", None, 6, 16, arch="aarch64"),
    ),
    *section(
        "https://www.amd.com/en/products/accelerators/instinct/mi300/mi300a.html: one HBM for processor and GPU",
        integrated("amd", "MI300A", 131072, 5300, 980.6, "gfx942"),
    ),
    *section(
        "https://www.amd.com/en/products/specifications/processors.html: processors' graphics and memory",
        integrated("amd", "Radeon 8060S", 128000, 256, 59.4, "gfx1151", "Strix Halo", "StrixHalo",
                   "Ryzen AI Max+ 395", "AI Max 395", "AI Max+ 395", "Ryzen AI Max 395"),
        integrated("amd", "Radeon 8050S", 128000, 256, 46.0, "gfx1151", "Ryzen AI Max 390", "Ryzen AI Max 385"),
        integrated("amd", "Radeon 8040S", 128000, 256, 23.0, "gfx1151", "Ryzen AI Max 380"),
        integrated("amd", "Radeon 890M", 256000, 120, 23.8, "gfx1150", "Strix Point", "Ryzen AI 9 HX 370"),
        integrated("amd", "Radeon 880M", 256000, 120, 17.8, "gfx1150"),
        integrated("amd", "Radeon 860M", 256000, 120, 12.2, "gfx1152", "Krackan Point"),
        integrated("amd", "Radeon 840M", 256000, 120, 6.1, "gfx1152"),
        integrated("amd", "Radeon 780M", 256000, 89.6, 16.6, "gfx1103"),
        integrated("amd", "Radeon 760M", 256000, 89.6, 10.6, "gfx1103"),
        integrated("amd", "Radeon 740M", 256000, 89.6, 5.7, "gfx1103"),
        integrated("amd", "Radeon 680M", 64000, 76.8, 6.8, "gfx1035"),
        integrated("amd", "Radeon 660M", 64000, 76.8, 3.6, "gfx1035"),
        integrated("amd", "Radeon 610M", 192000, 83.2, 1.1, "gfx1036"),
        integrated("amd", "Radeon Vega 8", 64000, 51.2, 4.1, "gfx90c", "Vega 8"),
        integrated("amd", "Radeon Vega 7", 64000, 51.2, 3.4, "gfx90c", "Vega 7"),
    ),
    *section(
        "https://www.intel.com/content/www/us/en/ark.html: processors' graphics and memory",
        integrated("intel", "Arc 140V", 32000, 136.5, 33.0, None, "140V", "Lunar Lake"),
        integrated("intel", "Arc 130V", 32000, 136.5, 26.0, None, "130V"),
        integrated("intel", "Arc 140T", 128000, 134.4, 38.0, None, "140T"),
        integrated("intel", "Arc 130T", 128000, 134.4, 31.0, None, "130T"),
        integrated("intel", "Iris Xe", 64000, 68.3, 4.4, None, "Iris Xe 96EU"),
        integrated("intel", "UHD Graphics 770", 192000, 89.6, 1.6, None, "UHD 770"),
    ),
)  # fmt: skip
