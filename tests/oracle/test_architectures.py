"""The ledger against llama-server for every architecture that has an outline in architectures/, one file each.

Small models, so that a wrong tensor or a wrong rule stands out: sizes are compared to the MiB for weights and caches and
to the hundredth of one for compute. What the ledger only bounds says so in its outline: `cache: bound`, `compute: bound`.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest

from bench.outline_cases import OUTLINES, compared, is_right, situations
from llamafleet.memory.ledger import Model
from llamafleet.model.gguf import read_path
from llamafleet.model.shape import is_known, takes_cache_of
from sandbox import outlines

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize("outline", sorted(OUTLINES.glob("*.yaml")), ids=lambda path: path.stem)
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
        found = pool.map(lambda name: list(compared(path, model, tried[name])), tried)
        wrong = [
            f"{name}: {part} on {device}: {ours:.2f} MiB, should be {theirs}"
            for name, many in zip(tried, found, strict=True)
            for device, part, ours, theirs in many
            if not is_right(part, ours, theirs, told)
        ]
    assert wrong == []
