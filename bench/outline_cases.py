"""The small models of tests/oracle/architectures in several situations: the ledger's figures beside llama-server's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.oracle_cases import Case
from llamafleet.memory.context import Context
from llamafleet.memory.ledger import usage
from llamafleet.memory.weights import Model
from llamafleet.units import MIB
from sandbox.oracle import Oracle, ask

OUTLINES = Path(__file__).resolve().parent.parent / "tests" / "oracle" / "architectures"
ROUNDING_MIB = 0.02  # llama-server's two decimals, and 64 bytes of alignment of the CPU's tensors where ours are 128

Situation = tuple[Context, tuple[int, ...], Sequence[int]]  # layers of each device, layers with experts on the host
Figure = tuple[str, str, float, float]  # device, part, MiB of the ledger, MiB of llama-server


def situations(layers: int) -> dict[str, Situation]:
    """Contexts, slots, cache types, attention with and without flash, on no, one and two devices, partly and whole."""
    half, all_ = layers // 2, layers + 1
    return {
        "one device": (Context(8192, 1, "f16", 512), (all_,), ()),
        "one device, four slots with caches of their own": (Context(4096, 4, "q8_0", 512), (all_,), ()),
        "one device, one cache of f32 for four slots": (Context(2048, 4, "f32", 512, unified=True), (all_,), ()),
        "no flash attention": (Context(4096, 1, "f16", 256, flash_attention=False), (all_,), ()),
        "two devices": (Context(8192, 1, "f16", 512), (half, all_ - half), ()),
        "the last half of the layers": (Context(8192, 1, "f16", 1024), (half + 1,), ()),
        "experts or feed-forward of half of the layers on the host": (
            Context(8192, 2, "f16", 512), (all_,), range(half)),
        "all experts or feed-forward but the first's on the host, odd numbers": (
            Context(1000, 1, "bf16", 777), (all_,), range(1, layers)),
        "no device": (Context(8192, 1, "f16", 512), (), ()),
    }  # fmt: skip


def compared(path: Path, model: Model, situation: Situation, oracle: Oracle | None = None) -> Iterator[Figure]:
    """Weights and caches in whole MiB, as llama-server prints them, compute buffers to the hundredth.

    Raises OracleError if llama-server does not load the model. `oracle`: another release than the pinned one.
    """
    context, counts, spilled = situation
    if not model.shape.architecture.computes_logits:
        context = replace(context, pooling=model.shape.pooling)
    case = Case(path.stem, "Q8_0", context, counts, tuple(spilled))
    devices, host = usage(model, context, case.placement(model.layers), "cpu")
    theirs = ask(path, case.flags(model.is_moe), len(counts), oracle=oracle)
    for row, ours in [*zip(theirs.devices, devices.values(), strict=True), (theirs.host, host)]:
        repacked, buffer = (ours.repacked_bytes, "CPU") if row is theirs.host else (0, row.name)
        yield row.name, "weights", (ours.weights_bytes - repacked) // MIB, row.model
        yield row.name, "cache", ours.kv_bytes // MIB, row.context
        yield row.name, "compute", ours.compute_bytes / MIB, theirs.buffers[buffer]


def is_right(part: str, ours: float, theirs: float, outline: Mapping[str, Any]) -> bool:
    """Exact, or, where the outline says so, not below what is true."""
    if outline.get(part) == "bound":
        return ours >= theirs
    return abs(ours - theirs) <= (ROUNDING_MIB if part == "compute" else 0)
