"""Read a machine from a description in words, such as "2xrtx3090,ram=128GB,cores=16": it need not exist yet.

The properties of a card come from the catalogue (`gpus.py`), all others from the description. Properties that it does
not give are unknown, as in a machine file.

    description = word {"," word}
    word        = KEY "=" VALUE | cards | "cpu" | architecture     cards: see `card_words`
    vram=SIZE   the memory of each card of the cards before it
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from llamafleet.host.card_words import FORM, GPU_LIMIT, Card, DescriptionError, label, read_cards
from llamafleet.host.cards.row import MIB, GpuModel
from llamafleet.host.gpus import named, of_size
from llamafleet.host.machine import SCHEMA, Cpu, Driver, Gpu, Machine, Memory, Os

__all__ = ["Described", "DescriptionError", "read"]

KEYS = {
    "ram": "ram=64GB",
    "cores": "cores=10, or cores=6+4 for a hybrid processor: performance and efficiency cores",
    "gpu": "gpu=rtx4090, or 2xrtx4090, or rtx4090+rtx3060",
    "vram": "vram=48GB, the memory of each card before it",
    "swap": "swap=8GB",
    "cpu": "cpu=i5-13400F, the processor's name",
    "arch": "arch=arm64 or arch=x86_64",
    "memory-bandwidth": "memory-bandwidth=80GB/s, the measured bandwidth of the RAM",
    "pcie": "pcie=4x8, PCIe generation and lanes of every card",
}
REPEATED = ("gpu", "vram")  # keys that may be given for each of several cards
ARCHITECTURES = {"arm64": "aarch64", "aarch64": "aarch64", "x86_64": "x86_64", "x86-64": "x86_64", "amd64": "x86_64",
                 "x64": "x86_64", "x86": "x86_64"}  # fmt: skip
# Every x86 processor since about 2015 has AVX2, every ARM one since about 2018 dot products.
FLAGS = {"x86_64": ("avx2",), "aarch64": ("asimd", "asimdhp", "asimddp")}
LONGEST = 500  # characters; one with all keys has about 150
_SIZE = re.compile(r"(?P<number>[0-9]{1,15}(?:\.[0-9]{1,15})?) ?(?P<unit>[kmgt]?)(?:i?b)?(?:/s)?")
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


@dataclass(frozen=True)
class Described:
    """A described machine. Its `hostname` is the description."""

    machine: Machine
    host_bytes_per_s: float | None = None  # bandwidth of the RAM; None: not given
    notes: tuple[str, ...] = ()  # what was assumed where the words leave a choice


@dataclass(frozen=True)
class _Words:
    """The words of a description, by what they are."""

    values: Mapping[str, str]
    cards: tuple[Card, ...]
    arch: str | None
    cpu_only: bool


def read(description: str) -> Described:
    """The machine with this description. Raises `DescriptionError`."""
    if len(description) > LONGEST:
        raise DescriptionError(f"it has {len(description)} characters, {LONGEST} at most are read; {FORM}")
    words = _words(description)
    values, cards = words.values, words.cards
    if wrong := _disagreement(words):
        raise DescriptionError(f"{description!r}: {wrong}")
    alone = len(cards) == 1
    models = [_of_ram(card, values.get("ram")) if alone and card.model.unified else card.model for card in cards]
    ram = _bytes("ram", values["ram"]) if "ram" in values else models[0].memory_bytes
    if alone and models[0].unified:
        ram = min(ram, models[0].memory_bytes)
    arch = _architecture(words.arch, models)
    machine = Machine(
        schema=SCHEMA,
        hostname=description,
        os=Os(id="", version="", arch=arch, libc=""),
        cpu=_cpu(values, arch),
        memory=Memory(ram, ram, _bytes("swap", values["swap"]) if "swap" in values else 0),
        gpus=tuple(_gpu(index, model, ram, values) for index, model in enumerate(models)),
        driver=Driver(None, None),
        disks=(),
    )
    rate = values.get("memory-bandwidth")
    notes = tuple(dict.fromkeys(card.note for card in cards if card.note and not card.model.unified))
    return Described(machine, float(_bytes("memory-bandwidth", rate, 1000)) if rate else None, notes)


def _disagreement(words: _Words) -> str:
    """What is missing, or cannot be in one machine; empty if nothing is."""
    cards = words.cards
    if not cards and not words.cpu_only:
        return f"has neither a GPU nor the word cpu; {FORM}"
    if cards and words.cpu_only:
        return "has both a GPU and the word cpu: leave one out"
    if len(cards) > GPU_LIMIT:
        return f"{len(cards)} GPUs, llama.cpp uses {GPU_LIMIT} at most"
    unified = [card.model for card in cards if card.model.unified]
    # A card can be beside a processor's own graphics alone.
    alone = [model for model in unified if model.sold_with] or unified[1:]
    if alone and len(cards) > 1:
        return f"{alone[0].name} shares its memory with the CPU; no other GPU can be beside it"
    needed = ("cores",) if unified and unified[0].sold_with else ("ram", "cores")
    missing = next((key for key in needed if key not in words.values), None)
    return f"{missing} is missing, add {KEYS[missing]}" if missing else ""


def _words(description: str) -> _Words:
    """The words, sorted by what they are. Raises `DescriptionError` for one that is none, or is there twice."""
    values: dict[str, str] = {}
    cards: list[list[Card]] = []
    arch, cpu_only = None, False
    for word in (word.strip() for word in description.split(",")):
        key, value = _pair(word) if "=" in word else ("", word)
        if key in values and key not in REPEATED:
            raise DescriptionError(f"{word!r}: {key} is given twice, as {values[key]} too: leave one out")
        if key == "vram":
            if not cards:
                raise DescriptionError(f"{word!r}: there is no card before it: write the card first, then its vram")
            cards[-1] = [card.with_memory(_bytes(key, value)) for card in cards[-1]]
        elif key == "gpu" or (not key and value.lower() not in ("cpu", "", *ARCHITECTURES)):
            cards.append(list(read_cards(value)))
        elif key == "arch" or (not key and value.lower() in ARCHITECTURES):
            if value.lower() not in ARCHITECTURES:
                raise DescriptionError(f"{word!r}: should be {KEYS['arch']}")
            if arch not in (None, ARCHITECTURES[value.lower()]):
                raise DescriptionError(f"{word!r}: two processor architectures are given: leave one out")
            arch = ARCHITECTURES[value.lower()]
        elif not key:
            cpu_only = cpu_only or value.lower() == "cpu"
        if key:
            values[key] = value
    return _Words(values, tuple(card for group in cards for card in group), arch, cpu_only)


def _pair(word: str) -> tuple[str, str]:
    """Key and value of a word such as "ram=64GB"."""
    key, _, value = (part.strip() for part in word.partition("="))
    key = key.lower()
    if key not in KEYS:
        raise DescriptionError(f"{word!r}: unknown key; known keys are {', '.join(KEYS)}")
    if not value:
        raise DescriptionError(f"{word!r}: should be {KEYS[key]}")
    return key, value


def _of_ram(card: Card, ram: str | None) -> GpuModel:
    """The model with the processor's memory: with the size in its name, with the RAM's, or the most common one."""
    models, size = named(card.word)
    if ram is None or size is not None:
        model = card.model
    else:
        gb = _bytes("ram", ram) / 1024 / MIB
        model = of_size(models, round(gb)) or max(models, key=lambda each: each.memory_bytes)
    if ram is not None and label(model) * 1024 * MIB < _bytes("ram", ram):
        raise DescriptionError(f"'ram={ram}': {model.name} has {label(model)} GB at most")
    return model


def _architecture(given: str | None, models: Sequence[GpuModel]) -> str:
    """The processor's: as given, or that of a GPU that is sold with one only."""
    built_in = {model.arch for model in models if model.unified or model.arch == "aarch64"}
    if given and built_in and given not in built_in:
        raise DescriptionError(f"{models[0].name} has an {built_in.pop()} processor, not {given}")
    return given or next(iter(built_in), "x86_64")


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


def _cpu(values: Mapping[str, str], arch: str) -> Cpu:
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
        flags=FLAGS[arch],
    )


def _bytes(key: str, text: str, base: int = 1024) -> int:
    """A size in bytes, 1 MiB or more. "GB" of memory is 2**30 bytes, as on the label of a memory module."""
    match = _SIZE.fullmatch(text.lower())
    size = int(float(match["number"]) * base ** _POWERS[match["unit"]]) if match else 0
    if not MIB <= size <= base**5:
        raise DescriptionError(f"'{key}={text}': should be {KEYS[key]}")
    return size
