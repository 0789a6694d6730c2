"""Compare the ledger with llama-server for every architecture with an outline in architectures/, one file each.

The models are small, so that an error in one tensor or rule shows: weights and caches must agree to the MiB, compute
buffers to 0.01 MiB. `cache: bound` or `compute: bound` in an outline means that the ledger gives an upper bound only.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest

from bench.outline_cases import OUTLINES, compared, is_right, situations
from llamafleet.memory.kv_cache import takes_cache_of
from llamafleet.memory.weights import Model
from llamafleet.model.gguf import read_path
from sandbox import outlines

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize("outline", sorted(OUTLINES.glob("*.yaml")), ids=lambda path: path.stem)
def test_llama_server_allocates_what_the_ledger_says(outline, tmp_path):
    fields = outlines.read(outline)
    path = outlines.weightless(outline, tmp_path)
    model = Model.of(read_path(path))
    assert model.shape.cache_is_exact is (fields.get("cache") != "bound")
    assert model.compute.is_exact is (fields.get("compute") != "bound")
    possible = {
        name: case for name, case in situations(model.layers).items() if takes_cache_of(model.shape, case[0].kv_type)
    }
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda name: list(compared(path, model, possible[name])), possible)
        wrong = [
            f"{name}: {part} on {device}: {ours:.2f} MiB, should be {theirs}"
            for name, figures in zip(possible, results, strict=True)
            for device, part, ours, theirs in figures
            if not is_right(part, ours, theirs, fields)
        ]
    assert wrong == []
