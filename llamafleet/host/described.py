"""A machine in words, for a box that does not exist yet: "2xrtx3090,ram=128GB,cores=16".

A card's figures come from the catalogue, everything else from the words. What they leave out is unknown, as in a
machine file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from llamafleet.host.gpus import MIB, GpuModel, find, nearest
from llamafleet.host.machine import SCHEMA, Cpu, Driver, Gpu, Machine, Memory, Os

FORM = "should be like rtx4090,ram=64GB,cores=10 or 2xrtx3090,ram=128GB,cores=16 or cpu,ram=32GB,cores=8"
KEYS = {
    "ram": "ram=64GB",
    "cores": "cores=10, or cores=6+4 of a hybrid: performance and efficiency cores",
    "swap": "swap=8GB",
    "cpu": "cpu=i5-13400F, the processor's name",
    "memory-bandwidth": "memory-bandwidth=80GB/s, of the RAM, as measured",
    "pcie": "pcie=4x8, generation and lanes of every card",
}
GPU_LIMIT = 16  # GGML_CUDA_MAX_DEVICES, ggml/include/ggml-cuda.h
_CARDS = re.compile(r"(?:(?P<count>\d+) ?[x*] ?(?=[a-z]))?(?P<name>.+)")
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?) ?(?P<unit>[kmgt]?)(?:i?b)?(?:/s)?")
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


class DescriptionError(ValueError):
    """The words describe no machine; the message has the word and what it should be."""


@dataclass(frozen=True)
class Described:
    """A described machine, and its memory's speed where the words give it."""

    machine: Machine
    host_bytes_per_s: float | None = None


def read(description: str) -> Described:
    """The machine that the words describe. Raises `DescriptionError`."""
    words = [word.strip() for word in description.split(",")]
    given = dict(_given(word) for word in words if "=" in word)
    cards = [card for word in words if "=" not in word for card in _cards(word)]
    if not cards and "cpu" not in [word.lower() for word in words]:
        raise DescriptionError(f"{description!r}: names no GPU and does not begin with cpu; {FORM}")
    pools = [card.memory_bytes for card in cards if card.unified]
    if pools and len(cards) > 1:
        raise DescriptionError(f"{description!r}: {cards[0].name} shares its memory with the CPU and has no second GPU")
    if len(cards) > GPU_LIMIT:
        raise DescriptionError(f"{description!r}: {len(cards)} GPUs, llama.cpp uses {GPU_LIMIT} at most")
    for key in ("cores",) if pools else ("ram", "cores"):
        if key not in given:
            raise DescriptionError(f"{description!r}: {key} is missing, add {KEYS[key]}")
    ram = _bytes("ram", given["ram"]) if "ram" in given else pools[0]
    machine = Machine(
        schema=SCHEMA,
        hostname=description,
        os=Os(id="", version="", arch="x86_64", libc=""),
        cpu=_cpu(given),
        memory=Memory(ram, ram, _bytes("swap", given["swap"]) if "swap" in given else 0),
        gpus=tuple(_gpu(index, card, ram, given) for index, card in enumerate(cards)),
        driver=Driver(None, None),
        disks=(),
    )
    rate = given.get("memory-bandwidth")
    return Described(machine, float(_bytes("memory-bandwidth", rate, 1000)) if rate else None)


def _given(word: str) -> tuple[str, str]:
    key, _, value = (part.strip() for part in word.partition("="))
    if key.lower() not in KEYS:
        raise DescriptionError(f"{word!r}: unknown; known are {', '.join(KEYS)}")
    if not value:
        raise DescriptionError(f"{word!r}: should be {KEYS[key.lower()]}")
    return key.lower(), value


def _cards(word: str) -> Iterator[GpuModel]:
    if word.lower() in ("cpu", ""):
        return
    match = _CARDS.fullmatch(word.lower())
    assert match  # every text that is not empty has a name
    model = find(match["name"])
    if model is None:
        near = nearest(match["name"])
        hint = f"the nearest are {', '.join(near)}" if near else FORM
        raise DescriptionError(f"{word!r}: no such GPU is in the catalogue; {hint}; or give a machine file")
    yield from [model] * min(int(match["count"] or 1), GPU_LIMIT + 1)


def _gpu(index: int, model: GpuModel, ram: int, given: Mapping[str, str]) -> Gpu:
    gpu = Gpu(
        index=index,
        uuid="",
        name=model.name,
        compute_capability=model.compute_capability,
        memory_total_bytes=min(model.memory_bytes, ram) if model.unified else model.memory_bytes,
        memory_used_by_others_bytes=0,
        pci_bus_id=f"0000:{index + 1:02x}:00.0",
        pcie_generation=model.pcie_generation,
        pcie_width=model.pcie_width,
        unified_memory=model.unified,
        vendor=model.vendor,
        gfx=model.gfx,
    )
    if "pcie" not in given or model.unified:
        return gpu
    link = re.fullmatch(r"([1-6])x(1|2|4|8|16)", given["pcie"])
    if not link:
        raise DescriptionError(f"'pcie={given['pcie']}': should be {KEYS['pcie']}")
    return replace(gpu, pcie_generation=int(link[1]), pcie_width=int(link[2]))


def _cpu(given: Mapping[str, str]) -> Cpu:
    match = re.fullmatch(r"([1-9]\d{0,3})(?:\+(\d{1,3}))?", given["cores"])
    if not match:
        raise DescriptionError(f"'cores={given['cores']}': should be {KEYS['cores']}")
    fast, physical = int(match[1]), int(match[1]) + int(match[2] or 0)
    return Cpu(
        model=given.get("cpu", ""),
        sockets=1,
        physical_cores=physical,
        logical_cores=physical,
        performance_cores=fast,
        numa_nodes=1,
        flags=("avx2",),  # what every x86 processor of the last ten years has
    )


def _bytes(key: str, text: str, base: int = 1024) -> int:
    """A size; of memory, "GB" is 2**30 as on the label of a module."""
    match = _SIZE.fullmatch(text.lower())
    size = int(float(match["number"]) * base ** _POWERS[match["unit"]]) if match else 0
    if not MIB <= size <= base**5:
        raise DescriptionError(f"'{key}={text}': should be {KEYS[key]}")
    return size
