"""`Compute.of` keeps an instance for each header, for callers in several threads too."""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from llamafleet.memory.compute import KNOWN_LIMIT, Compute
from tests import planning


@pytest.fixture
def busy():
    """Threads change places as often as possible."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_many_threads_ask_for_more_headers_than_are_kept(busy):
    known = planning.header("Llama-3.2-3B")
    headers = [replace(known) for _ in range(10 * KNOWN_LIMIT)]
    with ThreadPoolExecutor(8) as pool:
        computes = list(pool.map(Compute.of, headers))
    assert all(compute.header is header for compute, header in zip(computes, headers, strict=True))


def test_a_header_that_was_asked_for_lately_keeps_its_instance():
    header = replace(planning.header("Llama-3.2-3B"))
    assert Compute.of(header) is Compute.of(header)
