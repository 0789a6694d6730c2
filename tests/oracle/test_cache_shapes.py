"""Caches with other types of K than of V, and pools that several slots share, by the ledger and by llama-server."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from bench.oracle_cases import Case
from bench.outline_cases import OUTLINES, cache_shapes, compared, is_right
from llamafleet.memory.context import Context
from llamafleet.memory.kv_cache import has_one_type, takes_cache_of
from llamafleet.memory.weights import Model
from llamafleet.model.gguf import read_path
from sandbox import outlines
from sandbox.layouts import PUBLISHED
from sandbox.oracle import OracleError

pytestmark = pytest.mark.oracle
# Dense, sliding windows, a recurrent state in most layers, MLA, compressed cells, an indexer's own cache.
SOME = ["arcee", "gemma2", "cohere2", "gemma4", "granitehybrid", "lfm2", "deepseek32", "deepseek4", "minimax-m3"]
CASES = [
    pytest.param(path, id=path.stem, marks=() if path.stem in SOME else pytest.mark.long)
    for path in sorted(OUTLINES.glob("*.yaml"))
]


def known(outline, folder):
    path = outlines.weightless(outline, folder)
    return path, Model.of(read_path(path))


@pytest.mark.parametrize("outline", CASES)
def test_llama_server_allocates_what_the_ledger_says(outline, tmp_path):
    fields = outlines.read(outline)
    path, model = known(outline, tmp_path)
    wanted = {name: one for name, one in cache_shapes(model.layers).items()
              if takes_cache_of(model.shape, one[0].kv_type)}  # fmt: skip
    assert len(wanted) >= 2
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda name: list(compared(path, model, wanted[name])), wanted)
        wrong = [
            f"{name}: {part} on {device}: {ours:.2f} MiB, should be {theirs}"
            for name, figures in zip(wanted, results, strict=True)
            for device, part, ours, theirs in figures
            if not is_right(part, ours, theirs, fields)
        ]
    assert wrong == []


@pytest.mark.parametrize("outline", ["deepseek32", "deepseek4"])
def test_mla_has_one_type_for_k_and_v(outline, tmp_path):
    path, model = known(OUTLINES / f"{outline}.yaml", tmp_path)
    assert has_one_type(model.shape) and not takes_cache_of(model.shape, "q8_0/f16")
    situation = cache_shapes(model.layers)["K of q8_0, V of f16, two slots"]
    with pytest.raises(OracleError, match="does not support different K"):
        list(compared(path, model, situation))


POOL = {"unified": True, "pool_tokens": 16384}
LARGE = [  # published layouts: dense, windows, a recurrent state in most layers, MLA; on one device, two, and in part
    ("Llama-3.1-8B", Context(8192, 1, "q8_0/f16", 512), (33,)),
    ("Llama-3.1-8B", Context(32768, 8, "f16", 512, unified=True, pool_tokens=65536), (20,)),
    ("Gemma-3-27B", Context(8192, 2, "f16/q8_0", 512), (30, 33)),
    ("Gemma-3-12B", Context(8192, 4, "f16", 512, **POOL), (49,)),
    ("gpt-oss-120b", Context(8192, 4, "q8_0/f16", 512, **POOL), (37,)),
    ("Qwen3-Next-80B-A3B", Context(8192, 2, "q8_0/f16", 512), (49,)),
    ("Qwen3.6-35B-A3B", Context(16384, 4, "f16/q8_0", 512, **POOL), (41,)),
    ("DeepSeek-R1", Context(8192, 4, "q8_0", 512, **POOL), (62,)),
]


@pytest.mark.parametrize(("layout", "context", "counts"), LARGE, ids=[f"{one[0]} {one[1].kv_type}" for one in LARGE])
def test_published_layouts(layout, context, counts, tmp_path):
    quant = next(iter(PUBLISHED[layout].sizes), PUBLISHED[layout].quant)
    rows = Case(layout, quant, context, counts).compare(tmp_path)
    assert [(row.device, row.part, row.ours_bytes, row.theirs_mib) for row in rows if not row.is_good] == []
    assert sum(row.theirs_mib for row in rows if row.part == "kv") > 400
