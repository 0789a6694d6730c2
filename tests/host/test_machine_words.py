"""Machine words as people write them: each is exactly the cards that it names, or refused with the nearest known ones.

"an unknown size is ignored" and "rtx3090x2 is one card" are public reports' kinds; the words here go beyond them.
"""

import pytest

from llamafleet.host import described
from tests import planning

MIB, GIB = 2**20, 2**30

# Words, and for each card its name in the catalogue and its MiB.
EXACT: dict[str, list[tuple[str, int]]] = {
    # GeForce 10 and 16
    "gt1030": [("GT 1030", 2048)],
    "gtx1050": [("GTX 1050", 2048)],
    "GTX 1050 3GB": [("GTX 1050", 3072)],
    "gtx1050ti": [("GTX 1050 Ti", 4096)],
    "gtx 1060 6gb": [("GTX 1060", 6144)],
    "gtx1060 3gb": [("GTX 1060", 3072)],
    "gtx1070": [("GTX 1070", 8192)],
    "gtx-1070-ti": [("GTX 1070 Ti", 8192)],
    "NVIDIA GeForce GTX 1080": [("GTX 1080", 8192)],
    "gtx1080ti 11gb": [("GTX 1080 Ti", 11264)],
    "titan xp": [("TITAN Xp", 12288)],
    "titan x (pascal)": [("TITAN X (Pascal)", 12288)],
    "titan v": [("TITAN V", 12288)],
    "gtx1630": [("GTX 1630", 4096)],
    "gtx1650": [("GTX 1650", 4096)],
    "gtx 1650 super": [("GTX 1650 SUPER", 4096)],
    "gtx1660": [("GTX 1660", 6144)],
    "gtx1660super": [("GTX 1660 SUPER", 6144)],
    "gtx1660ti": [("GTX 1660 Ti", 6144)],
    # GeForce 20 to 50
    "rtx2060": [("RTX 2060", 6144)],
    "rtx 2060 12gb": [("RTX 2060", 12288)],
    "rtx2060 super": [("RTX 2060 SUPER", 8192)],
    "rtx2070": [("RTX 2070", 8192)],
    "rtx2080ti": [("RTX 2080 Ti", 11264)],
    "titan rtx": [("TITAN RTX", 24576)],
    "rtx3050": [("RTX 3050", 8192)],
    "rtx3050 6gb": [("RTX 3050", 6144)],
    "rtx3060": [("RTX 3060", 12288)],
    "rtx3060 8gb": [("RTX 3060", 8192)],
    "rtx3060 12GiB": [("RTX 3060", 12288)],
    "rtx3060ti": [("RTX 3060 Ti", 8192)],
    "rtx3070": [("RTX 3070", 8192)],
    "rtx3080 10g": [("RTX 3080", 10240)],
    "rtx3080-12gb": [("RTX 3080", 12288)],
    "RTX 3080 Ti": [("RTX 3080 Ti", 12288)],
    "rtx_3090": [("RTX 3090", 24576)],
    "rtx3090 24gb": [("RTX 3090", 24576)],
    "GeForce RTX 3090 Ti": [("RTX 3090 Ti", 24564)],
    "rtx4060": [("RTX 4060", 8188)],
    "rtx4060ti 8gb": [("RTX 4060 Ti", 8188)],
    "rtx4060ti 16gb": [("RTX 4060 Ti", 16380)],
    "rtx4070 super": [("RTX 4070 SUPER", 12282)],
    "rtx4070tisuper": [("RTX 4070 Ti SUPER", 16376)],
    "rtx4080": [("RTX 4080", 16376)],
    "rtx4090": [("RTX 4090", 24564)],
    "rtx4090d": [("RTX 4090 D", 24564)],
    "rtx5050": [("RTX 5050", 8151)],
    "rtx5060ti 16gb": [("RTX 5060 Ti", 16311)],
    "rtx5060ti 8 gb": [("RTX 5060 Ti", 8151)],
    "rtx5070ti": [("RTX 5070 Ti", 16303)],
    "rtx5080": [("RTX 5080", 16303)],
    "rtx5090 32gb": [("RTX 5090", 32607)],
    # Laptops
    "rtx4090 laptop": [("RTX 4090 Laptop", 16376)],
    "rtx4090 mobile 16gb": [("RTX 4090 Laptop", 16376)],
    "NVIDIA GeForce RTX 4080 Laptop GPU": [("RTX 4080 Laptop", 12282)],
    "rtx4070 laptop": [("RTX 4070 Laptop", 8188)],
    "rtx4060 laptop": [("RTX 4060 Laptop", 8188)],
    "rtx4050": [("RTX 4050 Laptop", 6141)],
    "rtx3080ti laptop": [("RTX 3080 Ti Laptop", 16384)],
    "rtx3080 laptop 16gb": [("RTX 3080 Laptop", 16384)],
    "rtx3080 laptop 8gb": [("RTX 3080 Laptop", 8192)],
    "rtx3070 mobile": [("RTX 3070 Laptop", 8192)],
    "rtx3060 laptop": [("RTX 3060 Laptop", 6144)],
    "rtx3050ti laptop": [("RTX 3050 Ti Laptop", 4096)],
    "rtx3050 laptop 6gb": [("RTX 3050 Laptop", 6144)],
    "rtx2070 max-q": [("RTX 2070 Laptop", 8192)],
    "NVIDIA GeForce RTX 2060 with Max-Q Design": [("RTX 2060 Laptop", 6144)],
    "gtx1650 ti": [("GTX 1650 Ti", 4096)],
    "gtx 1660 ti mobile": [("GTX 1660 Ti Laptop", 6144)],
    "rtx5090 laptop": [("RTX 5090 Laptop", 24463)],
    "rtx5080 laptop": [("RTX 5080 Laptop", 16303)],
    "rtx5070ti laptop": [("RTX 5070 Ti Laptop", 12227)],
    "rtx5060 laptop": [("RTX 5060 Laptop", 8151)],
    "rtx a2000 laptop 8gb": [("RTX A2000 Laptop", 8192)],
    "rtx a5000 laptop": [("RTX A5000 Laptop", 16384)],
    "NVIDIA RTX 3500 Ada Generation Laptop GPU": [("RTX 3500 Ada Generation Laptop", 12282)],
    "rx6600m": [("RX 6600M", 8176)],
    "rx6800m": [("RX 6800M", 12272)],
    "rx7600m xt": [("RX 7600M XT", 8176)],
    "rx7900m": [("RX 7900M", 16368)],
    # Workstations
    "quadro p2000": [("Quadro P2000", 5120)],
    "p4000": [("Quadro P4000", 8192)],
    "quadro p6000 24gb": [("Quadro P6000", 24576)],
    "quadro rtx 4000": [("Quadro RTX 4000", 8192)],
    "quadro rtx 5000": [("Quadro RTX 5000", 16384)],
    "quadro rtx 6000": [("Quadro RTX 6000", 24576)],
    "rtx8000": [("Quadro RTX 8000", 49152)],
    "t400 4gb": [("T400 4GB", 4096)],
    "t1000 8gb": [("T1000 8GB", 8192)],
    "a2000 6gb": [("RTX A2000", 6138)],
    "rtx a2000 12gb": [("RTX A2000", 12282)],
    "a4000": [("RTX A4000", 16376)],
    "rtx-a4500": [("RTX A4500", 20470)],
    "a5000": [("RTX A5000", 24564)],
    "a5500": [("RTX A5500", 24564)],
    "NVIDIA RTX A6000": [("RTX A6000", 49140)],
    "rtx 2000 ada": [("RTX 2000 Ada", 16380)],
    "rtx4000ada": [("RTX 4000 Ada", 20475)],
    "rtx 4000 sff ada": [("RTX 4000 SFF Ada", 20475)],
    "NVIDIA RTX 6000 Ada Generation": [("RTX 6000 Ada", 49140)],
    "rtx pro 2000": [("RTX PRO 2000 Blackwell", 16311)],
    "rtx pro 4500 blackwell": [("RTX PRO 4500 Blackwell", 32623)],
    "rtx pro 6000": [("RTX PRO 6000 Blackwell", 97887)],
    "rtx pro 6000 max-q": [("RTX PRO 6000 Blackwell Max-Q", 97887)],
    "rtx pro 6000 96gb": [("RTX PRO 6000 Blackwell", 97887)],
    # Servers
    "tesla m40 24gb": [("Tesla M40 24GB", 22945)],
    "p4": [("P4", 7680)],
    "tesla p40": [("P40", 23040)],
    "p40 24gb": [("P40", 23040)],
    "p100": [("P100", 16384)],
    "p100 12gb": [("P100", 12288)],
    "tesla t4": [("T4", 15360)],
    "t4 16gb": [("T4", 15360)],
    "v100 16gb": [("V100", 16384)],
    "v100-sxm2-32gb": [("V100", 32768)],
    "Tesla V100-PCIE-16GB": [("V100", 16384)],
    "v100s": [("V100S", 32768)],
    "a2": [("A2", 15356)],
    "a10": [("A10", 23028)],
    "a10g": [("A10G", 23028)],
    "a16": [("A16", 15356)],
    "a30": [("A30", 24576)],
    "a40 48gb": [("A40", 46068)],
    "a100 40gb": [("A100-PCIE-40GB", 40960)],
    "a100-80gb": [("A100 80GB", 81920)],
    "NVIDIA A100-SXM4-40GB": [("A100-SXM4-40GB", 40960)],
    "a800 80gb": [("A800 80GB", 81920)],
    "l4": [("L4", 23034)],
    "l4 24gb": [("L4", 23034)],
    "l40": [("L40", 46068)],
    "l40s": [("L40S", 46068)],
    "h20": [("H20", 97871)],
    "h100": [("H100 80GB HBM3", 81559)],
    "h100 80gb": [("H100 80GB HBM3", 81559)],
    "h100 pcie": [("H100 PCIe", 81559)],
    "h100 nvl": [("H100 NVL", 95830)],
    "h200": [("H200", 143771)],
    "h200 141gb": [("H200", 143771)],
    "b200": [("B200", 183359)],
    # Radeon, Instinct
    "rx470 4gb": [("RX 470", 4080)],
    "rx480": [("RX 480", 8176)],
    "rx580 8gb": [("RX 580", 8176)],
    "rx580 4gb": [("RX 580", 4080)],
    "vega 56": [("RX Vega 56", 8176)],
    "vega64": [("RX Vega 64", 8176)],
    "radeon vii": [("Radeon VII", 16368)],
    "rx5500xt": [("RX 5500 XT", 8176)],
    "rx5700": [("RX 5700", 8176)],
    "rx5700xt": [("RX 5700 XT", 8176)],
    "rx6400": [("RX 6400", 4080)],
    "rx6500xt": [("RX 6500 XT", 4080)],
    "rx6600": [("RX 6600", 8176)],
    "rx6600xt": [("RX 6600 XT", 8176)],
    "rx6650 xt": [("RX 6650 XT", 8176)],
    "rx6700": [("RX 6700", 10224)],
    "AMD Radeon RX 6700 XT": [("RX 6700 XT", 12272)],
    "rx6750xt": [("RX 6750 XT", 12272)],
    "rx6800": [("RX 6800", 16368)],
    "rx6950xt": [("RX 6950 XT", 16368)],
    "rx7600": [("RX 7600", 8176)],
    "rx7600xt": [("RX 7600 XT", 16368)],
    "rx7700xt": [("RX 7700 XT", 12272)],
    "rx7700": [("RX 7700", 16368)],
    "rx7800xt 16gb": [("RX 7800 XT", 16368)],
    "rx7900xt": [("RX 7900 XT", 20464)],
    "rx7900xtx 24gb": [("RX 7900 XTX", 24560)],
    "rx9060xt 16gb": [("RX 9060 XT", 16368)],
    "rx9060xt 8gb": [("RX 9060 XT", 8176)],
    "rx9070gre": [("RX 9070 GRE", 12272)],
    "r9700": [("R9700", 32752)],
    "radeon pro w6800": [("W6800", 32752)],
    "w7800 48gb": [("W7800", 49136)],
    "mi25": [("MI25", 16368)],
    "mi50 16gb": [("MI50", 16368)],
    "mi50 32gb": [("MI50", 32752)],
    "instinct mi60": [("MI60", 32752)],
    "mi300x": [("MI300X", 196592)],
    "mi325x": [("MI325X", 262128)],
    # Arc
    "arc a310": [("Arc A310", 4080)],
    "a380": [("Arc A380", 6128)],
    "arc a770 16gb": [("Arc A770", 16368)],
    "a770 8gb": [("Arc A770", 8176)],
    "intel arc b580": [("Arc B580", 12272)],
    "b580 12gb": [("Arc B580", 12272)],
    "arc pro b60": [("Arc Pro B60", 24560)],
    "arc pro b70": [("Arc Pro B70", 32752)],
    # Several cards
    "2xrtx3090": [("RTX 3090", 24576)] * 2,
    "2x rtx3090": [("RTX 3090", 24576)] * 2,
    "2 x rtx 3090": [("RTX 3090", 24576)] * 2,
    "2*rtx3090": [("RTX 3090", 24576)] * 2,
    "2×rtx3090": [("RTX 3090", 24576)] * 2,  # noqa: RUF001, the multiplication sign is what is tested
    "2 rtx3090": [("RTX 3090", 24576)] * 2,
    "rtx3090x2": [("RTX 3090", 24576)] * 2,
    "rtx3090 x2": [("RTX 3090", 24576)] * 2,
    "rtx4090 x 2": [("RTX 4090", 24564)] * 2,
    "rtx4090*2": [("RTX 4090", 24564)] * 2,
    "rtx4060tix2": [("RTX 4060 Ti", 16380)] * 2,
    "rtx4060ti 8gb x2": [("RTX 4060 Ti", 8188)] * 2,
    "rtx4060ti 16gbx2": [("RTX 4060 Ti", 16380)] * 2,
    "rtx 3090 (x2)": [("RTX 3090", 24576)] * 2,
    "rx7900xtx x2": [("RX 7900 XTX", 24560)] * 2,
    "4xv100 16gb": [("V100", 16384)] * 4,
    "mi50x8 16gb": [("MI50", 16368)] * 8,
    "rtx4060ti x2 8gb": [("RTX 4060 Ti", 8188)] * 2,
    "rtx 4090 24GB x2": [("RTX 4090", 24564)] * 2,
    "gb200": [("GB200", 189471)],
    "rtx pro 5000 72gb": [("RTX PRO 5000 Blackwell", 73728)],
    "8xh100": [("H100 80GB HBM3", 81559)] * 8,
    "rtx3090+rtx3060": [("RTX 3090", 24576), ("RTX 3060", 12288)],
    "2xrtx3090 + rtx3060 8gb": [("RTX 3090", 24576), ("RTX 3090", 24576), ("RTX 3060", 8192)],
    "rtx3090x2+rtx4090": [("RTX 3090", 24576), ("RTX 3090", 24576), ("RTX 4090", 24564)],
    "rtx3090,rtx3060": [("RTX 3090", 24576), ("RTX 3060", 12288)],
    "gpu=rtx4090": [("RTX 4090", 24564)],
    "gpu=2xrtx4090": [("RTX 4090", 24564)] * 2,
    "gpu=rtx4090,gpu=rtx3060 8gb": [("RTX 4090", 24564), ("RTX 3060", 8192)],
    "gpu=rtx4090 + a6000": [("RTX 4090", 24564), ("RTX A6000", 49140)],
    # Another size
    "rtx4090,vram=48GB": [("RTX 4090", 49152)],
    "2xrtx2080ti,vram=22GB": [("RTX 2080 Ti", 22528)] * 2,
    "rtx3090,rtx3080,vram=20GB": [("RTX 3090", 24576), ("RTX 3080", 20480)],
    "rtx2080ti,vram=22GB,rtx4090,vram=48 GiB": [("RTX 2080 Ti", 22528), ("RTX 4090", 49152)],
    "gpu=rtx3060,vram=6144M": [("RTX 3060", 6144)],
}
# One memory with the processor, whose size is ram=.
SHARED: dict[str, tuple[str, int, str]] = {
    "gb10,cores=20": ("GB10", 122500, "aarch64"),
    "dgx spark,cores=20": ("GB10", 122500, "aarch64"),
    "gb10,ram=128GB,cores=20": ("GB10", 122500, "aarch64"),
    "jetson orin nano,cores=6": ("Jetson Orin Nano", 7620, "aarch64"),
    "orin nano 4gb,cores=6": ("Jetson Orin Nano", 3812, "aarch64"),
    "orin nano,ram=8GB,cores=6": ("Jetson Orin Nano", 7620, "aarch64"),
    "jetson orin nx 16gb,cores=8": ("Jetson Orin NX", 15656, "aarch64"),
    "orin nx,ram=8GB,cores=6": ("Jetson Orin NX", 7620, "aarch64"),
    "jetson agx orin 64gb,cores=12": ("Jetson AGX Orin", 62841, "aarch64"),
    "agx orin,ram=32GB,cores=8": ("Jetson AGX Orin", 30697, "aarch64"),
    "jetson agx xavier,cores=8,arm64": ("Jetson AGX Xavier", 31918, "aarch64"),
    "jetson nano,cores=4": ("Jetson Nano", 3956, "aarch64"),
    "jetson thor,cores=14": ("Jetson AGX Thor", 125772, "aarch64"),
    "strix halo,ram=64GB,cores=16": ("Radeon 8060S", 65536, "x86_64"),
    "ryzen ai max+ 395,ram=128GB,cores=16": ("Radeon 8060S", 128000, "x86_64"),
    "radeon 890m,ram=32GB,cores=12": ("Radeon 890M", 32768, "x86_64"),
    "780m,ram=32GB,cores=8": ("Radeon 780M", 32768, "x86_64"),
    "radeon 680m,ram=16GB,cores=8": ("Radeon 680M", 16384, "x86_64"),
    "vega 8,ram=16GB,cores=4": ("Radeon Vega 8", 16384, "x86_64"),
    "arc 140v,ram=32GB,cores=4+4": ("Arc 140V", 32000, "x86_64"),
    "iris xe,ram=16GB,cores=4": ("Iris Xe", 16384, "x86_64"),
}
REFUSED: dict[str, str] = {
    # A size that no such card is sold with: the sizes that are, and how another is given
    "rtx4090 48gb": "the catalogue has RTX 4090 with 24 GB; for another size give vram=48GB",
    "rtx3060 16gb": "the catalogue has RTX 3060 with 12 GB or 8 GB; for another size give vram=16GB",
    "mi50 24gb": "the catalogue has MI50 with 32 GB or 16 GB",
    "rtx2080ti 22gb": "the catalogue has RTX 2080 Ti with 11 GB",
    "gtx1080ti 12gb": "the catalogue has GTX 1080 Ti with 11 GB",
    "a100 64gb": "the catalogue has A100 80GB with 80 GB or 40 GB",
    "rtx5090 48gb": "the catalogue has RTX 5090 with 32 GB",
    "rtx3080 20gb": "the catalogue has RTX 3080 with 10 GB or 12 GB",
    # Names that are none, with the nearest
    "rtx4900": "the nearest are RTX 4090",
    "rtx 3095": "the nearest are RTX 30",
    "4090": "the nearest are RTX 4090",
    "2x3090": "the nearest are RTX 3090",
    "7900xtx": "'7900xtx': no such GPU is in the catalogue; the nearest are RX 7900 XTX",
    "dual rtx 3090": "the nearest are RTX 3090",
    "rtx 3090 fe": "the nearest are RTX 3090",
    "laptop rtx 4090": "RTX 4090 Laptop",
    "gtx970": "the nearest are",
    "k80": "the nearest are",
    "h100 94gb": "the catalogue has H100 80GB HBM3 with 80 GB",
    "rtx6000": "the nearest are",
    "rtx4090 super": "the nearest are RTX 40",
    "rtx4070 tii": "the nearest are RTX 4070 Ti",
    "rx7900": "the nearest are RX 7900",
    "rx6800xtx": "the nearest are RX 6800 XT",
    "gtx1090": "the nearest are GTX 10",
    "arc b590": "Arc B570, Arc B580",
    "mi300": "the nearest are MI300X",
    "h300": "the nearest are",
    "rtx3090 foo": "the nearest are RTX 3090",
    "xrtx3090": "the nearest are RTX 3090",
    "rtx3090+": "a card is missing beside the plus sign",
    "+rtx3090": "a card is missing beside the plus sign",
    "rtx3090+voodoo": "'voodoo': no such GPU is in the catalogue",
    "0xrtx3090": "0 cards",
    "rtx3090x0": "0 cards",
    "rtx3090x17": "llama.cpp uses 16 at most",
    "rx7900xtx2": "can be read in two ways: write 2xrx7900xt, or 2xrx7900xtx",
    "qqqq": "no such GPU is in the catalogue; should be like rtx4090",
    # Apple's
    "m3 max": "Metal, on macOS",
    "apple m2 ultra": "Metal, on macOS",
    "m4 pro 48gb": "Metal, on macOS",
    "mac studio": "Metal, on macOS",
    # Keys
    "vram=24GB,rtx4090": "there is no card before it",
    "rtx4090,vram=": "should be vram=48GB",
    "rtx4090,vram=lots": "should be vram=48GB",
    "rtx4090,ram=32GB": "ram is given twice, as 32GB too",
    "rtx4090,cores=4": "cores is given twice",
    "rtx4090,cpu": "has both a GPU and the word cpu",
    "gpu=": "should be gpu=rtx4090",
    "rtx4090,arch=riscv": "should be arch=arm64 or arch=x86_64",
    "rtx4090,arm64,x86_64": "two processor architectures are given",
    "gb10,x86_64": "GB10 has an aarch64 processor, not x86_64",
    "gb10,vram=64GB": "GB10 shares the RAM: give its size as ram=, not as vram=",
    "780m,680m": "Radeon 680M shares its memory with the CPU",
    "gb10,rtx4090": "GB10 shares its memory with the CPU",
}


@pytest.mark.parametrize("words", EXACT, ids=str)
def test_the_cards_are_exactly_those_that_are_named(words):
    gpus = described.read(f"{words},ram=64GB,cores=8").machine.gpus
    assert [(gpu.name, gpu.memory_total_bytes // MIB) for gpu in gpus] == EXACT[words]
    assert not any(gpu.unified_memory for gpu in gpus)


@pytest.mark.parametrize("words", SHARED, ids=str)
def test_a_memory_that_is_shared_has_the_size_of_the_ram(words):
    machine = described.read(words).machine
    name, mib, arch = SHARED[words]
    [gpu] = machine.gpus
    assert (gpu.name, gpu.memory_total_bytes // MIB, machine.os.arch) == (name, mib, arch)
    assert gpu.unified_memory and machine.memory.total_bytes == gpu.memory_total_bytes


@pytest.mark.parametrize("words", REFUSED, ids=str)
def test_other_words_are_refused_with_what_is_known(words):
    ending = ",cores=8" if words.startswith("rtx4090,cores") else ",ram=64GB,cores=8"
    with pytest.raises(described.DescriptionError) as caught:
        described.read(words + ending if not words.startswith("rtx4090,cores") else f"{words},ram=64GB{ending}")
    assert REFUSED[words] in str(caught.value)


def test_two_hundred_words_and_more_are_tried():
    assert len(EXACT) + len(SHARED) + len(REFUSED) >= 200


@pytest.mark.parametrize(
    ("words", "arch", "repacks_more"),
    [
        ("rtx4090,ram=64GB,cores=8", "x86_64", False),
        ("rtx4090,ram=64GB,cores=8,arm64", "aarch64", True),
        ("rtx4090,ram=64GB,cores=8,aarch64", "aarch64", True),
        ("cpu,arch=arm64,ram=64GB,cores=80", "aarch64", True),
        ("cpu,amd64,ram=64GB,cores=8", "x86_64", False),
        ("gh200,ram=480GB,cores=72", "aarch64", True),
        ("rtx4090,ram=64GB,cores=8,cpu=arm64", "x86_64", False),  # the processor's name, not its architecture
    ],
)
def test_processors_are_x86_unless_another_is_named_or_built_in(words, arch, repacks_more):
    machine = described.read(words).machine
    assert machine.os.arch == arch
    assert ("asimddp" in machine.cpu.flags) == repacks_more


def test_a_choice_that_the_words_leave_is_told():
    assert described.read("rtx3080,ram=64GB,cores=8").notes == (
        "RTX 3080: taken with 10 GB; it is also sold with 12 GB: add the size",
    )
    assert described.read("2xrtx3080 12gb,ram=64GB,cores=8").notes == ()
    assert described.read("rtx4090,vram=48GB,ram=64GB,cores=8").notes == ()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("780m,cores=8", "ram is missing"),
        ("gb10,ram=512GB,cores=20", "GB10 has 128 GB at most"),
        ("orin nano,ram=64GB,cores=6", "Jetson Orin Nano has 8 GB at most"),
    ],
)
def test_a_shared_memory_is_given_and_within_what_is_sold(words, message):
    with pytest.raises(described.DescriptionError, match=message):
        described.read(words)


@pytest.mark.parametrize("words", ["680m,rtx4090,vram=24GB", "rtx4090,uhd 770", "rtx4090+780m"])
def test_graphics_of_a_processor_beside_a_card_are_left_out(words):
    """ollama#10204: a Ryzen APU beside NVIDIA was refused as two vendors."""
    machine = described.read(f"{words},ram=64GB,cores=8").machine
    assert sorted(gpu.unified_memory for gpu in machine.gpus) == [False, True]
    [answer] = planning.plans(machine, [("Llama-3.1-8B",)], planning.settings({}))
    assert [gpu.name for gpu in answer.gpus] == ["RTX 4090"] and answer.backend == "cuda"
    assert "beside a card with memory of its own" in "\n".join(answer.why)


def test_a_card_that_is_left_out_and_reserves_of_each():
    """ollama#1813, #3095: some GPUs are kept for others."""
    machine = described.read("2xrtx3090+rtx3060,ram=64GB,cores=8").machine
    settings = planning.settings({}, gpus=[0, 2], gpu_reserve_mib={0: 20000, "default": 500})
    [answer] = planning.plans(machine, [("Llama-3.1-8B",)], settings)
    reserves = {row.device: row.reserve_bytes // MIB for row in answer.ledger}
    assert "GPU1" not in reserves and set(reserves) - {"host"} <= {"GPU0", "GPU2"}
    assert reserves.get("GPU2", 500) == 500 and reserves.get("GPU0", 20000) == 20000
    assert "GPU1 (RTX 3090) is not used: gpus does not name it" in "\n".join(answer.why)
