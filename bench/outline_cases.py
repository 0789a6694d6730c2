"""The small models of tests/oracle/architectures in several situations: the ledger's figures beside llama-server's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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


def cache_shapes(layers: int) -> dict[str, Situation]:
    """Types of K and V apart, and one pool for several slots, of other sizes than all their contexts together."""
    half, all_ = layers // 2, layers + 1
    pool = {"unified": True, "pool_tokens": 6144}
    return {
        "K of q8_0, V of f16, two slots": (Context(4096, 2, "q8_0/f16", 512), (all_,), ()),
        "K of f16, V of q4_0, two devices": (Context(8192, 1, "f16/q4_0", 512), (half, all_ - half), ()),
        "K of q8_0, V of bf16, no flash attention": (
            Context(4096, 1, "q8_0/bf16", 256, flash_attention=False), (all_,), ()),
        "K of f32, V of q8_0, no device": (Context(4096, 1, "f32/q8_0", 512), (), ()),
        "K of q5_1, V of f32, one pool, experts or feed-forward of half of the layers on the host": (
            Context(4096, 4, "q5_1/f32", 512, **pool), (all_,), range(half)),
        "a pool of 1.5 contexts for four slots": (Context(4096, 4, "f16", 512, **pool), (all_,), ()),
        "a pool of 1.5 contexts for three slots, no flash attention": (
            Context(4096, 3, "f16", 512, flash_attention=False, **pool), (all_,), ()),
        "a pool below the ubatch": (
            Context(512, 4, "q8_0", 2048, unified=True, pool_tokens=1000), (all_,), ()),
    }  # fmt: skip


def compared(path: Path, model: Model, situation: Situation, oracle: Oracle | None = None) -> Iterator[Figure]:
    """Weights and caches in whole MiB, as llama-server prints them, compute buffers to the hundredth.

    Raises OracleError if llama-server does not load the model. `oracle`: another release than the pinned one.
    """
    context, counts, spilled = situation
    if not (context.pooling or model.shape.architecture.computes_logits):
        context = context.pooled(model.shape.pooling)
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
