"""Sandbox hosts and the stand-ins for the outside, once a session; down again whatever happens."""

import json
import os
from pathlib import Path

import pytest

from sandbox import hosts as sandbox
from sandbox import outside as stand_ins
from sandbox import upstream
from tests.e2e.deploying import PORT, on, write_inventory

ON_HOST = stand_ins.BUILDS_ON_HOST


def pytest_collection_modifyitems(items):
    for item in items:
        if "e2e" in item.path.parts:
            item.add_marker(pytest.mark.e2e)
            if os.geteuid() != 0:
                item.add_marker(pytest.mark.skip(reason="sandbox hosts need root"))


@pytest.fixture(scope="session")
def outside(tmp_path_factory):
    """The stand-ins, over a copy of the upstream repository that tests may add commits to."""
    upstream.ensure()
    repository = upstream.fork(tmp_path_factory.mktemp("upstream") / "llama.cpp.git")
    with stand_ins.running(repository) as running:
        yield running


@pytest.fixture(scope="session")
def builds(tmp_path_factory):
    """An empty build cache that the hosts share; while working on a test, $E2E_BUILDS may name one that is kept."""
    return Path(os.environ.get("E2E_BUILDS") or tmp_path_factory.mktemp("builds"))


@pytest.fixture(scope="session")
def hosts(builds):
    """Three bare hosts."""
    sandbox.prepare()
    _down()
    try:
        # $E2E_FIRST_ADDRESS: two checkouts on one machine can run these tests side by side.
        first = int(os.environ.get("E2E_FIRST_ADDRESS") or 1)
        yield sandbox.up(3, binds=[f"{builds}:{ON_HOST}"], first_address=first)
    finally:
        _down()


def _down():
    """Ours alone: test_04_vulkan runs beside, with a host of its own."""
    sandbox.down([one.name for one in sandbox.listed() if one.name.startswith(sandbox.PREFIX)])


@pytest.fixture(scope="session")
def builder(hosts):
    """The host that compiled: it has the build folder, so that another commit is compiled quickly.

    Needs the deploy of test_01_deploy.
    """
    record = json.loads(on(hosts[0], "cat", "/opt/llamafleet/current/release.json"))
    return next(one for one in hosts if one.name == record["built_on"])


@pytest.fixture
def settings(outside):
    """Settings of one host with one model; a test overrides what it is about."""

    def make(host, kind="dense", **overrides):
        model = {"name": "tiny", "source": outside.sources[kind], "port": PORT, "listen": host.address,
                 # One thread: several that wait for each other crawl where cores are shared.
                 "context_tokens": 1024, "threads": 1, **overrides.pop("model", {})}  # fmt: skip
        return {**outside.settings(), "build_cache": ON_HOST, "models": [model], **overrides}

    return make


@pytest.fixture
def inventory(tmp_path):
    """Writes an inventory file of (host, settings) pairs."""
    count = 0

    def make(*pairs):
        nonlocal count
        count += 1
        return write_inventory(tmp_path / f"inventory{count}.py", pairs)

    return make
