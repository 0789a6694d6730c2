"""Read a machine from a description in words, such as "2xrtx3090,ram=128GB,cores=16": it need not exist yet.

The properties of a card come from the catalogue (`gpus.py`), all others from the description. Properties that it does
not give are unknown, as in a machine file.
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
    "cores": "cores=10, or cores=6+4 for a hybrid processor: performance and efficiency cores",
    "swap": "swap=8GB",
    "cpu": "cpu=i5-13400F, the processor's name",
    "memory-bandwidth": "memory-bandwidth=80GB/s, the measured bandwidth of the RAM",
    "pcie": "pcie=4x8, PCIe generation and lanes of every card",
}
LONGEST = 500  # characters; one with all keys has about 150
GPU_LIMIT = 16  # ggml/include/ggml-cuda.h, GGML_CUDA_MAX_DEVICES
_CARDS = re.compile(r"(?:(?P<count>[0-9]+) ?[x*] ?(?=[a-z]))?(?P<name>.+)")
_SIZE = re.compile(r"(?P<number>[0-9]{1,15}(?:\.[0-9]{1,15})?) ?(?P<unit>[kmgt]?)(?:i?b)?(?:/s)?")
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


class DescriptionError(ValueError):
    """The description is invalid; the message has the invalid word and says what it should be."""


@dataclass(frozen=True)
class Described:
    """A described machine. Its `hostname` is the description."""

    machine: Machine
    host_bytes_per_s: float | None = None  # bandwidth of the RAM; None: not given


def read(description: str) -> Described:
    """The machine with this description. Raises `DescriptionError`."""
    if len(description) > LONGEST:
        raise DescriptionError(f"it has {len(description)} characters, {LONGEST} at most are read; {FORM}")
    words = [word.strip() for word in description.split(",")]
    values = dict(_pair(word) for word in words if "=" in word)
    cards = [card for word in words if "=" not in word for card in _cards(word)]
    if not cards and "cpu" not in [word.lower() for word in words]:
        raise DescriptionError(f"{description!r}: has neither a GPU nor the word cpu; {FORM}")
    unified = [card.memory_bytes for card in cards if card.unified]
    if unified and len(cards) > 1:
        raise DescriptionError(
            f"{description!r}: {cards[0].name} shares its memory with the CPU; no other GPU can be beside it"
        )
    if len(cards) > GPU_LIMIT:
        raise DescriptionError(f"{description!r}: {len(cards)} GPUs, llama.cpp uses {GPU_LIMIT} at most")
    for key in ("cores",) if unified else ("ram", "cores"):
        if key not in values:
            raise DescriptionError(f"{description!r}: {key} is missing, add {KEYS[key]}")
    ram = _bytes("ram", values["ram"]) if "ram" in values else unified[0]
    machine = Machine(
        schema=SCHEMA,
        hostname=description,
        os=Os(id="", version="", arch="x86_64", libc=""),
        cpu=_cpu(values),
        memory=Memory(ram, ram, _bytes("swap", values["swap"]) if "swap" in values else 0),
        gpus=tuple(_gpu(index, card, ram, values) for index, card in enumerate(cards)),
        driver=Driver(None, None),
        disks=(),
    )
    rate = values.get("memory-bandwidth")
    return Described(machine, float(_bytes("memory-bandwidth", rate, 1000)) if rate else None)


def _pair(word: str) -> tuple[str, str]:
    """Key and value of a word such as "ram=64GB"."""
    key, _, value = (part.strip() for part in word.partition("="))
    if key.lower() not in KEYS:
        raise DescriptionError(f"{word!r}: unknown key; known keys are {', '.join(KEYS)}")
    if not value:
        raise DescriptionError(f"{word!r}: should be {KEYS[key.lower()]}")
    return key.lower(), value


def _cards(word: str) -> Iterator[GpuModel]:
    """The cards of a word such as "2xrtx3090"; none for "cpu"."""
    if word.lower() in ("cpu", ""):
        return
    match = _CARDS.fullmatch(word.lower())
    assert match  # _CARDS matches every text that is not empty
    model = find(match["name"])
    if model is None:
        names = nearest(match["name"])
        hint = f"the nearest are {', '.join(names)}" if names else FORM
        raise DescriptionError(f"{word!r}: no such GPU is in the catalogue; {hint}; or give a machine file")
    yield from [model] * min(int(match["count"] or 1), GPU_LIMIT + 1)


def _gpu(index: int, model: GpuModel, ram: int, values: Mapping[str, str]) -> Gpu:
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
    if "pcie" not in values or model.unified:
        return gpu
    link = re.fullmatch(r"([1-6])x(1|2|4|8|16)", values["pcie"])
    if not link:
        raise DescriptionError(f"'pcie={values['pcie']}': should be {KEYS['pcie']}")
    return replace(gpu, pcie_generation=int(link[1]), pcie_width=int(link[2]))


def _cpu(values: Mapping[str, str]) -> Cpu:
    match = re.fullmatch(r"([1-9][0-9]{0,3})(?:\+([0-9]{1,3}))?", values["cores"])
    if not match:
        raise DescriptionError(f"'cores={values['cores']}': should be {KEYS['cores']}")
    performance, physical = int(match[1]), int(match[1]) + int(match[2] or 0)
    return Cpu(
        model=values.get("cpu", ""),
        sockets=1,
        physical_cores=physical,
        logical_cores=physical,
        performance_cores=performance,
        numa_nodes=1,
        flags=("avx2",),  # every x86 processor since about 2015 has it
    )


def _bytes(key: str, text: str, base: int = 1024) -> int:
    """A size in bytes, 1 MiB or more. "GB" of memory is 2**30 bytes, as on the label of a memory module."""
    match = _SIZE.fullmatch(text.lower())
    size = int(float(match["number"]) * base ** _POWERS[match["unit"]]) if match else 0
    if not MIB <= size <= base**5:
        raise DescriptionError(f"'{key}={text}': should be {KEYS[key]}")
    return size
