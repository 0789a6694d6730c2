"""The ledger against llama-server for every architecture that has an outline in architectures/, one file each.

Small models, so that a wrong tensor or a wrong rule stands out: sizes are compared to the MiB for weights and caches and
to within 1 MiB for compute. What the ledger only bounds says so in its outline: `cache: bound`, `compute: bound`.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bench.oracle_cases import Case, Comparison
from llamafleet.gguf import read_path
from llamafleet.kv import Context, is_known, takes_cache_of
from llamafleet.ledger import Model, usage
from sandbox import outlines
from sandbox.oracle import ask

pytestmark = pytest.mark.oracle
OUTLINES = sorted((Path(__file__).parent / "architectures").glob("*.yaml"))


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
        "no device": (Context(8192, 1, "f16", 512), (), ()),
    }  # fmt: skip


def compared(path, model, context, counts, spilled):
    """Each figure of the ledger beside llama-server's."""
    case = Case(path.stem, "Q8_0", context, counts, tuple(spilled))
    devices, host = usage(model, context, case.placement(model.layers), "cpu")
    told = ask(path, case.flags(model.is_moe), len(counts))
    rows = [*zip(told.devices, devices.values(), strict=True), (told.host, host)]
    for row, ours in rows:
        repacked = ours.repacked_bytes if row is told.host else 0
        yield Comparison(case, row.name, "weights", ours.weights_bytes - repacked, row.model)
        yield Comparison(case, row.name, "kv", ours.kv_bytes, row.context)
        yield Comparison(case, row.name, "compute", ours.compute_bytes, row.compute)


def is_right(one, told):
    """Exact, or, where the outline says so, not below what is true."""
    kind = {"kv": "cache", "compute": "compute"}.get(one.part, "")
    if told.get(kind) == "bound":
        return one.off_mib >= 0
    return abs(one.off_mib) <= (1 if one.part == "compute" else 0)


@pytest.mark.parametrize("outline", OUTLINES, ids=lambda path: path.stem)
def test_llama_server_allocates_what_the_ledger_says(outline, tmp_path):
    told = outlines.read(outline)
    path = outlines.weightless(outline, tmp_path)
    header = read_path(path)
    model = Model.of(header)
    assert is_known(header) is (told.get("cache") != "bound")
    assert model.compute.is_exact is (told.get("compute") != "bound")
    tried = {
        name: asked for name, asked in situations(model.layers).items() if takes_cache_of(header, asked[0].kv_type)
    }
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda name: (name, list(compared(path, model, *tried[name]))), tried)
        wrong = [said(name, one) for name, many in found for one in many if not is_right(one, told)]
    assert wrong == []


def said(name: str, one: Comparison) -> str:
    return f"{name}: {one.part} on {one.device} {one.off_mib:+} of {one.theirs_mib} MiB"
