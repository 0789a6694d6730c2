"""NVIDIA's GeForce and TITAN cards for desktops."""

from __future__ import annotations

from llamafleet.host.cards.row import GpuModel, nvidia, section

_PRODUCT_PAGES = "https://www.nvidia.com/en-us/geforce/graphics-cards/compare/"

# Name, MiB, GB/s, TFLOPS, compute capability, PCIe generation, lanes (16), other names.
# If a name has several sizes, the most common size comes first.
GEFORCE: tuple[GpuModel, ...] = (
    *section(
        "NVIDIA's product pages of the GeForce 10 series, and white paper NVIDIA GeForce GTX 1080; TITAN V's page",
        nvidia("GT 1030", 2048, 48, 1.1, "6.1", 3, 4),
        nvidia("GTX 1050", 2048, 112, 1.9, "6.1", 3),
        nvidia("GTX 1050", 3072, 84, 1.9, "6.1", 3),
        nvidia("GTX 1050 Ti", 4096, 112, 2.1, "6.1", 3),
        nvidia("GTX 1060", 6144, 192, 4.4, "6.1", 3),
        nvidia("GTX 1060", 3072, 192, 3.9, "6.1", 3),
        nvidia("GTX 1070", 8192, 256, 6.5, "6.1", 3),
        nvidia("GTX 1070 Ti", 8192, 256, 8.2, "6.1", 3),
        nvidia("GTX 1080", 8192, 320, 8.9, "6.1", 3),
        nvidia("GTX 1080 Ti", 11264, 484, 11.3, "6.1", 3),
        nvidia("TITAN X (Pascal)", 12288, 480, 11.0, "6.1", 3, 16, "TITAN X Pascal"),
        nvidia("TITAN Xp", 12288, 547, 12.1, "6.1", 3),
        nvidia("TITAN V", 12288, 653, 110, "7.0", 3),
    ),
    *section(  # no tensor cores; f16 at twice the rate of f32
        "NVIDIA's product pages of the GeForce 16 series",
        nvidia("GTX 1630", 4096, 96, 3.6, "7.5", 3),
        nvidia("GTX 1650", 4096, 128, 6.0, "7.5", 3),
        nvidia("GTX 1650 SUPER", 4096, 192, 8.8, "7.5", 3),
        nvidia("GTX 1660", 6144, 192, 10.0, "7.5", 3),
        nvidia("GTX 1660 SUPER", 6144, 336, 10.0, "7.5", 3),
        nvidia("GTX 1660 Ti", 6144, 288, 10.9, "7.5", 3),
    ),
    *section(
        f"{_PRODUCT_PAGES}; white paper NVIDIA Turing GPU Architecture (TU102, TU104, TU106)",
        nvidia("RTX 2060", 6144, 336, 25.8, "7.5", 3),
        nvidia("RTX 2060", 12288, 336, 28.7, "7.5", 3),
        nvidia("RTX 2060 SUPER", 8192, 448, 28.7, "7.5", 3),
        nvidia("RTX 2070", 8192, 448, 29.9, "7.5", 3),
        nvidia("RTX 2070 SUPER", 8192, 448, 36.3, "7.5", 3),
        nvidia("RTX 2080", 8192, 448, 40.3, "7.5", 3),
        nvidia("RTX 2080 SUPER", 8192, 496, 44.6, "7.5", 3),
        nvidia("RTX 2080 Ti", 11264, 616, 53.8, "7.5", 3),
        nvidia("TITAN RTX", 24576, 672, 65.2, "7.5", 3),
    ),
    *section(
        f"{_PRODUCT_PAGES}; white paper NVIDIA Ampere GA102 GPU Architecture",
        nvidia("RTX 3050", 8192, 224, 18.2, "8.6", 4, 8),
        nvidia("RTX 3050", 6144, 168, 13.5, "8.6", 4, 8),
        nvidia("RTX 3060", 12288, 360, 25.5, "8.6", 4),
        nvidia("RTX 3060", 8192, 240, 25.5, "8.6", 4),
        nvidia("RTX 3060 Ti", 8192, 448, 32.4, "8.6", 4),
        nvidia("RTX 3070", 8192, 448, 40.6, "8.6", 4),
        nvidia("RTX 3070 Ti", 8192, 608, 43.5, "8.6", 4),
        nvidia("RTX 3080", 10240, 760, 59.5, "8.6", 4),
        nvidia("RTX 3080", 12288, 912, 61.3, "8.6", 4),
        nvidia("RTX 3080 Ti", 12288, 912, 68.2, "8.6", 4),
        nvidia("RTX 3090", 24576, 936, 71.0, "8.6", 4),
        nvidia("RTX 3090 Ti", 24564, 1008, 80.0, "8.6", 4),
    ),
    *section(
        f"{_PRODUCT_PAGES}; white paper NVIDIA Ada GPU Architecture (AD102)",
        nvidia("RTX 4060", 8188, 272, 30.2, "8.9", 4, 8),
        nvidia("RTX 4060 Ti", 16380, 288, 44.1, "8.9", 4, 8),
        nvidia("RTX 4060 Ti", 8188, 288, 44.1, "8.9", 4, 8),
        nvidia("RTX 4070", 12282, 504, 58.3, "8.9", 4),
        nvidia("RTX 4070 SUPER", 12282, 504, 70.9, "8.9", 4),
        nvidia("RTX 4070 Ti", 12282, 504, 80.2, "8.9", 4),
        nvidia("RTX 4070 Ti SUPER", 16376, 672, 88.2, "8.9", 4),
        nvidia("RTX 4080", 16376, 717, 97.5, "8.9", 4),
        nvidia("RTX 4080 SUPER", 16376, 736, 104.4, "8.9", 4),
        nvidia("RTX 4090", 24564, 1008, 165.2, "8.9", 4),
        nvidia("RTX 4090 D", 24564, 1008, 147.1, "8.9", 4),
    ),
    *section(
        f"{_PRODUCT_PAGES}; white paper NVIDIA RTX Blackwell GPU Architecture (GB202)",
        nvidia("RTX 5050", 8151, 320, 26.3, "12.0", 5, 8),
        nvidia("RTX 5060", 8151, 448, 38.4, "12.0", 5, 8),
        nvidia("RTX 5060 Ti", 16311, 448, 47.4, "12.0", 5, 8),
        nvidia("RTX 5060 Ti", 8151, 448, 47.4, "12.0", 5, 8),
        nvidia("RTX 5070", 12227, 672, 61.7, "12.0", 5),
        nvidia("RTX 5070 Ti", 16303, 896, 87.9, "12.0", 5),
        nvidia("RTX 5080", 16303, 960, 112.6, "12.0", 5),
        nvidia("RTX 5090", 32607, 1792, 209.5, "12.0", 5),
        nvidia("RTX 5090 D", 32607, 1792, 209.5, "12.0", 5),
    ),
)
