"""Intel's Arc cards and Data Center GPUs."""

from __future__ import annotations

from llamafleet.host.cards.row import GpuModel, intel, section

# Name, MiB (nominal, less 16), GB/s, TFLOPS of XMX, lanes, other names.
ARC: tuple[GpuModel, ...] = (
    *section(
        "https://www.intel.com/content/www/us/en/ark.html: Arc A",
        intel("Arc A310", 4080, 124, 23.4, 8, "A310"),
        intel("Arc A380", 6128, 186, 31.9, 8, "A380"),
        intel("Arc A580", 8176, 512, 79.6, 16, "A580"),
        intel("Arc A750", 8176, 512, 110.0, 16, "A750"),
        intel("Arc A770", 16368, 560, 131.0, 16, "A770"),
        intel("Arc A770", 8176, 512, 131.0, 16, "A770"),
        intel("Arc A350M", 4080, 112, 15.0, 8, "A350M"),
        intel("Arc A370M", 4080, 112, 24.8, 8, "A370M"),
        intel("Arc A550M", 8176, 224, 29.5, 8, "A550M"),
        intel("Arc A730M", 12272, 336, 62.0, 16, "A730M"),
        intel("Arc A770M", 16368, 512, 105.0, 16, "A770M"),
        intel("Arc Pro A40", 6128, 192, 26.0, 8, "Pro A40"),
        intel("Arc Pro A50", 6128, 192, 32.0, 8, "Pro A50"),
        intel("Arc Pro A60", 12272, 384, 65.0, 16, "Pro A60"),
    ),
    *section(
        "https://www.intel.com/content/www/us/en/ark.html: Arc B and Arc Pro B",
        intel("Arc B570", 10224, 380, 101.5, 8, "B570"),
        intel("Arc B580", 12272, 456, 116.5, 8, "B580"),
        intel("Arc Pro B50", 16368, 224, 85.0, 8, "Pro B50", "B50", generation=5),
        intel("Arc Pro B60", 24560, 456, 98.5, 8, "Pro B60", "B60", generation=5),
        intel("Arc Pro B65", 32752, 608, 98.5, 16, "Pro B65", "B65", generation=5),
        intel("Arc Pro B70", 32752, 608, 183.5, 16, "Pro B70", "B70", generation=5),
    ),
    *section(
        "https://www.intel.com/content/www/us/en/ark.html: Data Center GPU Flex and Max",
        intel("Data Center GPU Flex 140", 6128, 186, 30.0, 8, "Flex 140"),
        intel("Data Center GPU Flex 170", 16368, 576, 131.0, 16, "Flex 170"),
        intel("Data Center GPU Max 1100", 49136, 1229, 352.0, 16, "Max 1100", "GPU Max 1100", generation=5),
        intel("Data Center GPU Max 1550", 131056, 3277, 832.0, 16, "Max 1550", "GPU Max 1550", generation=5),
    ),
)
