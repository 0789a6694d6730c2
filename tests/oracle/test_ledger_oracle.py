"""The ledger against llama-server, live: every published layout in three situations, all dimensions among them.

The situations are the first of those in bench/results/oracle_table.csv, drawn by lot but always the same: contexts,
slots, unified or not, batches, cache types, flash attention, one to three devices or none, whole layers, experts
and feed-forward matrices on the host.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest

from bench.oracle_cases import Comparison, matrix
from sandbox.layouts import PUBLISHED

pytestmark = pytest.mark.oracle
SITUATIONS = 3  # of each layout
MANY = 30  # the first three among them


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
        found = [one for many in pool.map(lambda case: case.compare(folder), cases) for one in many]
    assert len(found) >= 4 * len(cases)
    assert [said(one) for one in found if not one.is_good] == []


def said(one: Comparison) -> str:
    return f"{one.off_mib:+} of {one.theirs_mib} MiB {one.part} on {one.device}: {one.case.name}"
