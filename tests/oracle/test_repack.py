"""Weights in the CPU's own order, and as they are in the file: the same bytes by the ledger and by llama-server."""

import pytest

from bench.oracle_cases import Case
from llamafleet.memory.context import Context

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize("repack", [True, False])
@pytest.mark.parametrize(
    ("layout", "quant"), [("Llama-3.2-3B", "Q4_K_M"), ("Qwen3-30B-A3B", "Q4_K_M"), ("gpt-oss-20b", "MXFP4")]
)
def test_llama_server_allocates_what_the_ledger_says(layout, quant, repack, tmp_path):
    case = Case(layout, quant, Context(8192, 1, "f16", 512, repack=repack), ())
    compared = case.compare(tmp_path)
    assert [one for one in compared if not one.is_good] == []
    [repacked] = [one for one in compared if one.part == "repacked"]
    assert (repacked.theirs_mib > 1000) is repack
