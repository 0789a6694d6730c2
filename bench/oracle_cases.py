"""Cases for the oracle: llama-server's own memory breakdown compared with the ledger's."""

from __future__ import annotations

import random
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from llamafleet.memory.context import Context
from llamafleet.memory.ledger import usage
from llamafleet.memory.placement import Placement
from llamafleet.memory.weights import Model
from llamafleet.model.gguf import Header, read_path
from llamafleet.units import MIB
from sandbox import models
from sandbox.layouts import PUBLISHED
from sandbox.oracle import Breakdown, Oracle, ask

EXPERTS = r"ffn_(up|down|gate|gate_up)_(ch|)exps\."
DENSE = r"ffn_(up|down|gate)\.weight"
PARTS = ("weights", "kv", "compute")


@dataclass(frozen=True)
class Case:
    """A model with its context and placement, which llama-server and the ledger both compute."""

    layout: str
    quant: str
    context: Context
    counts: tuple[int, ...]  # layers of each device, the output counted on the last; the other layers are on the host
    spilled: tuple[int, ...] = ()  # layers on devices whose experts, or feed-forward matrices, are on the host

    @property
    def name(self) -> str:
        """The case in one line."""
        c = self.context
        shared = f"u{c.pool_tokens or ''}" if c.unified else ""
        parts = [self.layout, self.quant, f"{c.tokens}x{c.slots}{shared}", c.kv_type,
                 f"ub{c.ubatch_tokens}", "fa" if c.flash_attention else "nofa",
                 "gpu" + "+".join(map(str, self.counts or (0,)))]  # fmt: skip
        parts += [] if c.repack else ["norepack"]
        return " ".join([*parts, f"spill{len(self.spilled)}"] if self.spilled else parts)

    def flags(self, is_moe: bool) -> list[str]:
        """The flags of llama-server for this case."""
        c = self.context
        flags = ["-c", str(c.stream_cells * c.streams), "-np", str(c.slots), "-kvu" if c.unified else "-no-kvu",
                 "-ctk", c.key_type, "-ctv", c.value_type, "-fa", "on" if c.flash_attention else "off",
                 "-b", str(c.ubatch_tokens if c.pooling else max(2048, c.ubatch_tokens)), "-ub", str(c.ubatch_tokens),
                 "-ngl", str(sum(self.counts))]  # fmt: skip
        if c.pooling:
            flags += ["--rerank"] if c.pooling == "rank" else ["--embedding", "--pooling", c.pooling]
        if not c.repack:
            flags += ["--no-repack"]
        if len(self.counts) > 1:
            flags += ["-ts", ",".join(map(str, self.counts))]
        if self.spilled:
            layers = "|".join(map(str, self.spilled))
            flags += ["-ot", rf"blk\.({layers})\.{EXPERTS if is_moe else DENSE}=CPU"]
        return flags

    def placement(self, layers: int) -> Placement:
        """The ledger's placement for this case."""
        holders = [device for device, count in enumerate(self.counts) for _ in range(count)]
        front = [None] * (layers + 1 - len(holders))
        return Placement.of((*front, *holders), frozenset(self.spilled))

    def ask(self, folder: Path, oracle: Oracle | None = None) -> Breakdown:
        """llama-server's breakdown; the model's file is made in `folder` if it is missing."""
        return ask(file(folder, self.layout, self.quant), self.flags(model(folder, self.layout, self.quant).is_moe),
                   len(self.counts), oracle=oracle)  # fmt: skip

    def compare(self, folder: Path, oracle: Oracle | None = None) -> list[Comparison]:
        """Every part of memory on every device, by the ledger and by llama-server (`oracle`: of another release)."""
        known = model(folder, self.layout, self.quant)
        # An RPC device has neither op-offload nor pinned memory, as the traits of the CPU say.
        devices, host = usage(known, self.context, self.placement(known.layers), "cpu")
        breakdown = self.ask(folder, oracle)
        rows = [*((row.name, ours, row) for row, ours in zip(breakdown.devices, devices.values(), strict=True)),
                ("host", host, breakdown.host)]  # fmt: skip
        comparisons = []
        for name, ours, row in rows:
            repacked = ours.repacked_bytes if name == "host" else 0
            sizes = (ours.weights_bytes - repacked, ours.kv_bytes, ours.compute_bytes)
            for part, size, mib in zip(PARTS, sizes, (row.model, row.context, row.compute), strict=True):
                comparisons.append(Comparison(self, name, part, size, mib))
        comparisons.append(Comparison(self, "host", "repacked", host.repacked_bytes, breakdown.repacked))
        return comparisons


@dataclass(frozen=True)
class Comparison:
    """One part of memory (such as "kv") on one device, by the ledger and by llama-server."""

    case: Case
    device: str
    part: str
    ours_bytes: int
    theirs_mib: int  # rounded down by llama-server

    @property
    def off_mib(self) -> int:
        """The ledger's MiB, rounded down as llama-server does, less llama-server's MiB."""
        return self.ours_bytes // MIB - self.theirs_mib

    @property
    def is_good(self) -> bool:
        """Is the difference 0 MiB? Compute buffers may differ by 1 MiB, since identical layers are laid out once."""
        return abs(self.off_mib) <= (1 if self.part == "compute" else 0)


_made = threading.Lock()


def file(folder: Path, layout: str, quant: str) -> Path:
    """The file of the weightless model, made at the first call."""
    with _made:  # without the lock two threads could write the same file
        return _file(folder, layout, quant)


@cache
def _file(folder: Path, layout: str, quant: str) -> Path:
    return models.weightless(folder, layout, quant)


@cache
def model(folder: Path, layout: str, quant: str) -> Model:
    """The model of the file's header, as the ledger reads it."""
    return Model.of(_header(folder, layout, quant))


@cache
def _header(folder: Path, layout: str, quant: str) -> Header:
    return read_path(file(folder, layout, quant))


def matrix(per_layout: int) -> Iterator[Case]:
    """`per_layout` cases of each published layout, over all dimensions; every call gives the same cases."""
    for layout in PUBLISHED.values():
        dice = random.Random(zlib.crc32(layout.name.encode()))
        quant = next(iter(layout.sizes), layout.quant)
        seen: set[Case] = set()
        while len(seen) < per_layout:
            case = Case(layout.name, quant, _context(dice, layout.context), *_placed(dice, layout.blocks))
            if case not in seen:
                seen.add(case)
                yield case


def _context(dice: random.Random, full: int) -> Context:
    slots = dice.choice((1, 1, 4, 16))
    tokens = dice.choice((4096, 8192, 32768, full)) if slots < 16 else dice.choice((4096, 16384))
    kv_type = dice.choice(("f16", "f16", "q8_0"))
    flash = kv_type != "f16" or dice.random() < 0.75
    return Context(min(tokens, full, 262144), slots, kv_type, dice.choice((512, 512, 2048)), flash, dice.random() < 0.3)


def _placed(dice: random.Random, layers: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Numbers of layers by device, and the layers whose experts or feed-forward matrices are on the host."""
    devices = dice.choice((0, 1, 1, 1, 2, 3))
    if not devices:
        return (), ()
    total = layers + 1 if dice.random() < 0.7 else dice.randint(devices + 1, layers)
    cuts = sorted(dice.sample(range(1, total), devices - 1))
    counts = tuple(b - a for a, b in zip((0, *cuts), (*cuts, total), strict=True))
    if dice.random() < 0.6:
        return counts, ()
    held = range(layers + 1 - total, layers)
    return counts, tuple(held[-dice.randint(1, len(held)) :])
