"""Sandbox hosts and the stand-ins for the outside, once a session; down again whatever happens."""

import contextlib
import json
import os
from pathlib import Path

import pytest

from sandbox import compiler_cache, oracle_build, roots, upstream
from sandbox import hosts as sandbox
from sandbox import outside as stand_ins
from tests.e2e import deploying
from tests.e2e.deploying import on, pyinfra, write_inventory

ON_HOST = stand_ins.BUILDS_ON_HOST
# Two checkouts on one machine, and two lanes of `make test`, run side by side where names and addresses differ.
PREFIX = os.environ.get("E2E_PREFIX") or sandbox.PREFIX
FIRST_ADDRESS = int(os.environ.get("E2E_FIRST_ADDRESS") or 1)


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
    """A build cache that the hosts share: empty, or the one that $E2E_BUILDS names, as other sessions' hosts have it."""
    return Path(os.environ.get("E2E_BUILDS") or tmp_path_factory.mktemp("builds"))


@pytest.fixture(scope="session")
def boot(builds):
    """Boots bare hosts of this prefix, which have the build cache and a compiler cache; down at the end."""
    booted, kept = set(), upstream.CACHE / "optimised-builds"
    kept.mkdir(parents=True, exist_ok=True)

    def down(prefix):
        """Ours alone: other lanes have hosts of other names."""
        sandbox.down([one.name for one in sandbox.listed() if one.name.rstrip("0123456789") == prefix])

    def make(count, prefix, address, packages=(), binds=(), suite=roots.SUITE, isolated=False, optimised=False):
        """`optimised`: they compile as a user's host does, for tests that measure speed; what they have compiled is kept."""
        sandbox.prepare()
        down(prefix)
        booted.add(prefix)
        made = sandbox.up(
            count, prefix=prefix, first_address=FIRST_ADDRESS + address,
            packages=[*([] if optimised else [compiler_cache.PACKAGE]), *packages],
            binds=[f"{kept if optimised else builds}:{ON_HOST}", compiler_cache.bind(), *binds], suite=suite,
            isolated=isolated,
        )  # fmt: skip
        for host in () if optimised else made:
            compiler_cache.equip(host)
        return made

    try:
        yield make
    finally:
        for prefix in booted:
            down(prefix)


@pytest.fixture(scope="session")
def has_first_deploy(request):
    """Does the session have the tests of a deploy to bare hosts?"""
    return any(item.path.stem == "test_01_deploy" for item in request.session.items)


@pytest.fixture(scope="session")
def turn(has_first_deploy):
    """To compile llama.cpp: the first deploy has it from the start, and sessions beside find object files when they get
    theirs. `close()` ends it."""
    with contextlib.ExitStack() as stack:
        if has_first_deploy:
            stack.enter_context(oracle_build.compiling())
        yield stack


@pytest.fixture(scope="session")
def hosts(turn, boot, has_first_deploy):
    """Three hosts: bare ones for a first deploy, else with a compiler."""
    return boot(3, PREFIX, 0, packages=() if has_first_deploy else oracle_build.COMPILER)


@pytest.fixture(scope="session")
def deployed(hosts, outside, turn, tmp_path_factory):
    """The first two hosts serve: a dense model, and one with experts. Bare ones are deployed to."""
    pairs = [
        (host, deploying.settings(outside, host, kind)) for host, kind in zip(hosts[:2], ("dense", "moe"), strict=True)
    ]
    turn.close()
    with oracle_build.compiling():
        done = pyinfra(write_inventory(tmp_path_factory.mktemp("deployed") / "inventory.py", pairs), forks=False)
    assert done.code == 0, done.text
    return hosts[:2]


@pytest.fixture(scope="session")
def builder(deployed):
    """The host that compiled, if one of these did: it has the build folder, so that another commit is compiled quickly."""
    record = json.loads(on(deployed[0], "cat", "/opt/llamafleet/current/release.json"))
    return next((one for one in deployed if one.name == record["built_on"]), deployed[0])


@pytest.fixture
def settings(outside):
    """Settings of one host with one model; a test overrides what it is about."""

    def make(host, kind="dense", **overrides):
        return deploying.settings(outside, host, kind, **overrides)

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
