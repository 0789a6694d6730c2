"""For tests of switches and of the probe."""

import os
import tempfile

import pytest

from tests.fake_nvml import build
from tests.remote.probing import Host


@pytest.fixture
def memory_folder():
    """In memory where there is such a place: some thousand switches write and sync there."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as path:
        yield path


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """The stand-in for NVML."""
    return build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def host(tmp_path, library):
    """A host for the probe."""
    return Host(tmp_path, library)
