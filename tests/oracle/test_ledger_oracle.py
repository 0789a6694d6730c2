"""Compare the ledger with a running llama-server for every published layout, in three situations each.

The situations are the first ones of bench/results/oracle_table.csv, drawn at random from a fixed seed: contexts,
slots, unified or not, batches, cache types, flash attention, zero to three devices, whole layers, experts
and feed-forward matrices on the host.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest

from bench.oracle_cases import Comparison, matrix
from sandbox.layouts import PUBLISHED

pytestmark = pytest.mark.oracle
SITUATIONS = 2  # of each layout
MANY = 30  # the first ones among them


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def test_the_situations_cover_all_dimensions():
    cases = list(matrix(SITUATIONS))
    contexts = [case.context for case in cases]
    assert len(cases) >= 60
    assert {context.slots for context in contexts} == {1, 4, 16}
    assert {context.kv_type for context in contexts} == {"f16", "q8_0"}
    assert {context.ubatch_tokens for context in contexts} == {512, 2048}
    assert (
        {context.unified for context in contexts} == {context.flash_attention for context in contexts} == {True, False}
    )
    assert {len(case.counts) for case in cases} == {0, 1, 2, 3}
    assert any(case.spilled for case in cases)


@pytest.mark.parametrize("situations", [SITUATIONS, pytest.param(MANY, marks=pytest.mark.long)])
@pytest.mark.parametrize("layout", PUBLISHED)
def test_llama_server_allocates_what_the_ledger_says(layout, situations, folder):
    cases = [case for case in matrix(situations) if case.layout == layout]
    with ThreadPoolExecutor(2) as pool:
        comparisons = [row for rows in pool.map(lambda case: case.compare(folder), cases) for row in rows]
    assert len(comparisons) >= 4 * len(cases)
    assert [difference(row) for row in comparisons if not row.is_good] == []


def difference(row: Comparison) -> str:
    return f"{row.off_mib:+} of {row.theirs_mib} MiB {row.part} on {row.device}: {row.case.name}"
