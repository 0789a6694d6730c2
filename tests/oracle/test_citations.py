"""Citations of llama.cpp's source, checked against the pinned tree: files exist and have what they are cited for.

It needs the tree alone, no build.
"""

import pytest

from bench.adopting import citations, source
from sandbox import upstream

pytestmark = pytest.mark.oracle


def test_what_is_cited_is_in_the_pinned_tree():
    pinned = source.obtain(upstream.TAG)
    found = list(citations.in_project())
    assert len(found) >= 80  # of outlines alone
    assert list(citations.problems(found, source.files(pinned), lambda path: source.read(pinned, path))) == []
