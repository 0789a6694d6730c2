"""Machines that are described in words."""

import pytest

from llamafleet.host import described
from llamafleet.host.machine import Machine

GIB, MIB = 2**30, 2**20


def test_a_box_with_one_card():
    host = described.read("rtx4090,ram=64GB,cores=10")
    [gpu] = host.machine.gpus
    assert (gpu.name, gpu.vendor, gpu.memory_total_bytes) == ("RTX 4090", "nvidia", 24564 * MIB)
    assert (gpu.compute_capability, gpu.pcie_generation, gpu.pcie_width) == ("8.9", 4, 16)
    assert host.machine.memory.total_bytes == host.machine.memory.available_bytes == 64 * GIB
    assert (host.machine.cpu.physical_cores, host.machine.cpu.performance_cores) == (10, 10)
    assert host.host_bytes_per_s is None


def test_everything_that_can_be_described():
    words = "2xRTX 3090, RTX 3060, ram=128 GiB, swap=8GB, cores=6+4, cpu=i5-13400F, pcie=3x8, memory-bandwidth=60.5GB/s"
    host = described.read(words)
    machine = host.machine
    assert [gpu.name for gpu in machine.gpus] == ["RTX 3090", "RTX 3090", "RTX 3060"]
    assert {(gpu.pcie_generation, gpu.pcie_width) for gpu in machine.gpus} == {(3, 8)}
    assert len({gpu.pci_bus_id for gpu in machine.gpus}) == 3
    assert (machine.memory.total_bytes, machine.memory.swap_total_bytes) == (128 * GIB, 8 * GIB)
    assert (machine.cpu.model, machine.cpu.performance_cores, machine.cpu.physical_cores) == ("i5-13400F", 6, 10)
    assert host.host_bytes_per_s == 60.5e9
    assert Machine.from_json(machine.to_json()) == machine


@pytest.mark.parametrize("words", ["cpu,ram=32GB,cores=8", "CPU, ram=32gb, cores=8"])
def test_a_box_without_a_card(words):
    host = described.read(words)
    assert host.machine.gpus == ()
    assert host.machine.memory.total_bytes == 32 * GIB


def test_one_memory_for_both():
    whole = described.read("gb10,cores=20").machine
    assert whole.gpus[0].unified_memory
    assert whole.memory.total_bytes == whole.gpus[0].memory_total_bytes == 122500 * MIB
    half = described.read("strix halo,ram=64GB,cores=16").machine
    assert half.memory.total_bytes == half.gpus[0].memory_total_bytes == 64 * GIB


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("rtx4900,ram=64GB,cores=8", "'rtx4900': no such GPU is in the catalogue; the nearest are RTX 4090"),
        ("qqqq,ram=64GB,cores=8", "no such GPU is in the catalogue; should be like rtx4090"),
        ("ram=64GB,cores=8", "has neither a GPU nor the word cpu"),
        ("", "has neither a GPU"),
        ("rtx4090,cores=8", "ram is missing, add ram=64GB"),
        ("rtx4090,ram=64GB", "cores is missing, add cores=10"),
        ("rtx4090,ram=64,cores=8", "'ram=64': should be ram=64GB"),
        ("rtx4090,ram=lots,cores=8", "'ram=lots': should be"),
        ("rtx4090,ram=9999999999TB,cores=8", "should be ram=64GB"),
        ("rtx4090,ram=,cores=8", "'ram=': should be"),
        ("rtx4090,ram=64GB,cores=0", "'cores=0': should be cores=10"),
        ("rtx4090,ram=64GB,cores=8,pcie=4", "'pcie=4': should be pcie=4x8"),
        ("rtx4090,ram=64GB,cores=8,memory-bandwidth=fast", "should be memory-bandwidth=80GB/s"),
        ("rtx4090,ram=64GB,kores=8", "'kores=8': unknown key; known keys are ram, cores"),
        ("17xrtx4090,ram=64GB,cores=8", "llama.cpp uses 16 at most"),
        ("9999999999xrtx4090,ram=64GB,cores=8", "llama.cpp uses 16 at most"),
        ("2xgb10,cores=8", "shares its memory with the CPU; no other GPU can be beside it"),
    ],
)
def test_an_invalid_description_is_refused(words, message):
    with pytest.raises(described.DescriptionError) as caught:
        described.read(words)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "digits", ["9" * 400, "9" * 17, "\u00b2", "\u0663", "-1", "1e99", "nan", "inf", "0"], ids=lambda text: text[:5]
)
@pytest.mark.parametrize("form", ["rtx3090,ram={}GB,cores=2", "rtx3090,ram=64GB,cores={}", "{}xrtx3090,ram=64GB,cores=2",
                                  "rtx3090 {}gb,ram=64GB,cores={}", "cpu,ram=64GB,cores=2,memory-bandwidth={}GB/s",
                                  "rtx3090,ram=64GB,cores=2,pcie={}x16"])  # fmt: skip
def test_numbers_of_any_form_are_refused_or_read(form, digits):
    try:
        machine = described.read(form.replace("{}", digits)).machine
    except described.DescriptionError as error:
        assert len(str(error)) < 1200
    else:
        assert len(machine.gpus) <= 16 and machine.memory.total_bytes < 2**60
