"""The catalogue of GPUs: a card is found by each of the usual forms of its name."""

import pytest

from llamafleet.host import gpus as catalogue

MIB = 2**20


@pytest.mark.parametrize(
    ("written", "name", "mib"),
    [
        ("rtx4090", "RTX 4090", 24564),
        ("RTX 4090", "RTX 4090", 24564),
        ("NVIDIA GeForce RTX 4090", "RTX 4090", 24564),
        ("geforce-rtx-4090", "RTX 4090", 24564),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "RTX 4090 Laptop", 16376),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti SUPER", 16376),
        ("rtx4060ti 8gb", "RTX 4060 Ti", 8188),
        ("Tesla T4", "T4", 15360),
        ("Tesla V100-SXM2-16GB", "V100", 16384),
        ("NVIDIA A10", "A10", 23028),
        ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB", 81920),
        ("NVIDIA A100 80GB PCIe", "A100 80GB", 81920),
        ("a100-40gb", "A100-PCIE-40GB", 40960),
        ("NVIDIA H100 80GB HBM3", "H100 80GB HBM3", 81559),
        ("NVIDIA H100 PCIe", "H100 PCIe", 81559),
        ("NVIDIA L40S", "L40S", 46068),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada", 49140),
        ("a6000", "RTX A6000", 49140),
        ("AMD Radeon RX 7900 XTX", "RX 7900 XTX", 24560),
        ("Strix Halo", "Radeon 8060S", 128000),
        ("NVIDIA GB10", "GB10", 122500),
        ("NVIDIA T400 4GB", "T400 4GB", 4096),
        ("NVIDIA GeForce RTX 3080 Laptop GPU", "RTX 3080 Laptop", 8192),
        ("NVIDIA GeForce RTX 2070 with Max-Q Design", "RTX 2070", 8192),
        ("AMD Radeon RX 6600M", "RX 6600M", 8176),
        ("AMD Radeon RX 7700S", "RX 7700S", 8176),
        ("AMD Instinct MI300X", "MI300X", 196592),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000 Blackwell Server", 97887),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000 Blackwell", 97887),
        ("Orin (nvgpu)", "Jetson AGX Orin", 62841),
    ],
)
def test_names(written, name, mib):
    model = catalogue.find(written)
    assert model is not None
    assert (model.name, model.memory_bytes) == (name, mib * MIB)


@pytest.mark.parametrize(
    "written", ["", "NVIDIA T4000", "NVIDIA GeForce RTX 3095", "NVIDIA GeForce RTX 5030 Laptop GPU", "Voodoo 2", "4090"]
)
def test_an_unknown_card_is_not_taken_for_another(written):
    assert catalogue.find(written) is None


def test_sizes_of_one_name_are_distinguished_by_memory():
    assert catalogue.find("NVIDIA GeForce RTX 3080").memory_bytes == 10240 * MIB
    assert catalogue.find("NVIDIA GeForce RTX 3080", 12288 * MIB).bandwidth_bytes_per_s == 912e9


def test_the_nearest_names_are_offered():
    assert catalogue.nearest("rtx409")[0] == "RTX 4090"
    assert catalogue.nearest("4090")[0] == "RTX 4090"


@pytest.mark.parametrize("model", catalogue.GPUS, ids=lambda model: model.name)
def test_every_card_is_found_by_its_name_and_is_plausible(model):
    assert catalogue.find(model.name, model.memory_bytes) == model
    for alias in model.aliases:
        assert catalogue.find(alias, model.memory_bytes) is not None
    assert 2e9 < model.memory_bytes < 310e9
    assert 25e9 < model.bandwidth_bytes_per_s <= 8e12
    # The bounds fit all generations from Polaris (no tensor cores) to Blackwell; a figure in a wrong unit is outside.
    assert 10 < model.fp16_flops / model.bandwidth_bytes_per_s < 1000
    assert model.source
    assert (model.compute_capability is not None) == (model.vendor == "nvidia")
    assert (model.gfx is not None) == (model.vendor == "amd")
    assert (model.pcie_width is None) == model.unified
