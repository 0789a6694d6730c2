"""For tests of switches."""

import os
import tempfile

import pytest


@pytest.fixture
def memory_folder():
    """In memory where there is such a place: some thousand switches write and sync there."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as path:
        yield path
