"""Against the pinned release `make adopt` has nothing to report: what it reads of llama.cpp is where it looks.

Memory is left out here: test_architectures.py and test_ledger_oracle.py hold it against the same release.
"""

import pytest

from bench import adopt
from bench.adopting import attention, flags, source
from sandbox import oracle, upstream

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def pinned():
    return adopt.Release(source.obtain(upstream.TAG))


def test_nothing_changed_with_the_pinned_release(pinned):
    sections = dict(adopt.cheap(pinned, pinned, oracle.build().llama_server))
    assert sections == {"flags": [], "architectures": [], "flash attention": [], "numbers": [], "citations": []}


def test_the_pinned_release_is_read_in_full(pinned):
    listed = flags.parse(adopt.help_of(oracle.build().llama_server))
    assert len(listed) > 200
    assert "--ctx-size" in flags.used(flags.groups(pinned.read(flags.DEFINITIONS)))
    assert len(pinned.architectures) > 100
    sizes, pairs = pinned.head_sizes
    assert {64, 128, 256, 576} <= sizes and "576/512" in pairs
    assert pinned.read(attention.FILE) != "" and list(adopt.differing(pinned, pinned)) == []
