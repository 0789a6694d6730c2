"""The ledger against llama-server for every architecture that has an outline in architectures/, one file each.

Small models, so that a wrong tensor or a wrong rule stands out: sizes are compared to the MiB for weights and caches and
to the hundredth of one for compute. What the ledger only bounds says so in its outline: `cache: bound`, `compute: bound`.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bench.oracle_cases import Case
from llamafleet.memory.context import Context
from llamafleet.memory.kv_cache import takes_cache_of
from llamafleet.memory.ledger import usage
from llamafleet.memory.weights import Model
from llamafleet.model.gguf import read_path
from llamafleet.units import MIB
from sandbox import outlines
from sandbox.oracle import ask

pytestmark = pytest.mark.oracle
OUTLINES = sorted((Path(__file__).parent / "architectures").glob("*.yaml"))

ROUNDING_MIB = 0.02  # llama-server's two decimals, and 64 bytes of alignment of the CPU's tensors where ours are 128


def situations(layers):
    """Contexts, slots, cache types, attention with and without flash, on no, one and two devices, partly and whole."""
    half, all_ = layers // 2, layers + 1
    return {
        "one device": (Context(8192, 1, "f16", 512), (all_,), ()),
        "one device, four slots with caches of their own": (Context(4096, 4, "q8_0", 512), (all_,), ()),
        "one device, one cache of f32 for four slots": (Context(2048, 4, "f32", 512, unified=True), (all_,), ()),
        "no flash attention": (Context(4096, 1, "f16", 256, flash_attention=False), (all_,), ()),
        "two devices": (Context(8192, 1, "f16", 512), (half, all_ - half), ()),
        "the last half of the layers": (Context(8192, 1, "f16", 1024), (half + 1,), ()),
        "experts or feed-forward of half of the layers on the host": (Context(8192, 2, "f16", 512), (all_,), range(half)),
        "all experts or feed-forward but the first's on the host, odd numbers": (
            Context(1000, 1, "bf16", 777), (all_,), range(1, layers)),
        "no device": (Context(8192, 1, "f16", 512), (), ()),
    }  # fmt: skip


def compared(path, model, context, counts, spilled):
    """Device, part, and MiB of the ledger and of llama-server: whole ones, of compute buffers to the hundredth."""
    case = Case(path.stem, "Q8_0", context, counts, tuple(spilled))
    devices, host = usage(model, context, case.placement(model.layers), "cpu")
    told = ask(path, case.flags(model.is_moe), len(counts))
    rows = [*zip(told.devices, devices.values(), strict=True), (told.host, host)]
    for row, ours in rows:
        repacked, buffer = (ours.repacked_bytes, "CPU") if row is told.host else (0, row.name)
        yield row.name, "weights", (ours.weights_bytes - repacked) // MIB, row.model
        yield row.name, "cache", ours.kv_bytes // MIB, row.context
        yield row.name, "compute", ours.compute_bytes / MIB, told.buffers[buffer]


def is_right(part, ours, theirs, told):
    """Exact, or, where the outline says so, not below what is true."""
    if told.get(part) == "bound":
        return ours >= theirs
    return abs(ours - theirs) <= (ROUNDING_MIB if part == "compute" else 0)


@pytest.mark.parametrize("outline", OUTLINES, ids=lambda path: path.stem)
def test_llama_server_allocates_what_the_ledger_says(outline, tmp_path):
    told = outlines.read(outline)
    path = outlines.weightless(outline, tmp_path)
    header = read_path(path)
    model = Model.of(header)
    assert model.shape.cache_is_exact is (told.get("cache") != "bound")
    assert model.compute.is_exact is (told.get("compute") != "bound")
    tried = {
        name: asked for name, asked in situations(model.layers).items() if takes_cache_of(model.shape, asked[0].kv_type)
    }
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda name: list(compared(path, model, *tried[name])), tried)
        wrong = [
            f"{name}: {part} on {device}: {ours:.2f} MiB, should be {theirs}"
            for name, many in zip(tried, found, strict=True)
            for device, part, ours, theirs in many
            if not is_right(part, ours, theirs, told)
        ]
    assert wrong == []
