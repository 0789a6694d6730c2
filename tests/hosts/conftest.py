"""Checks of deployed hosts: `pytest tests/hosts --inventory inventory/fleet.py`.

Not part of `pytest` over the whole project, which needs no deployed host: without --inventory this
folder is left out there, and refused with a message where it was named.
"""

from __future__ import annotations

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import testinfra  # type: ignore[import-untyped]  # it ships no types

from tests.hosts import checks
from tests.hosts.inventory_bridge import BridgeError, Target, targets

HERE = Path(__file__).resolve().parent
COLLECTOR = HERE / "collect.py"
# Hosts read at the same time.
PARALLEL = 16
TARGETS = pytest.StashKey[list[Target]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("llamafleet", "checks of deployed hosts (tests/hosts)")
    group.addoption("--inventory", help="the inventory that was deployed, e.g. inventory/fleet.py")
    group.addoption(
        "--limit",
        action="append",
        default=[],
        metavar="NAME",
        help="only this group or host (--limit=@local: pytest reads a word that begins with @ as a "
        "file's name); may be repeated",
    )
    group.addoption(
        "--quick",
        action="store_true",
        default=False,
        help="do not read model files: trust the checksum noted when they were verified",
    )


def pytest_sessionstart(session: pytest.Session) -> None:
    """Only called where this folder was named on the command line."""
    config = session.config
    if not config.getoption("--inventory"):
        raise pytest.UsageError(
            "tests/hosts checks deployed hosts: say which, with --inventory inventory/fleet.py "
            "(and --limit GROUP or HOST for some of them)"
        )
    folder = config.stash.setdefault(FOLDER, _temporary(config))
    try:
        config.stash[TARGETS] = targets(config.getoption("--inventory"), config.getoption("--limit"), folder)
    except BridgeError as error:
        raise pytest.UsageError(str(error)) from error


FOLDER = pytest.StashKey[Path]()


def _temporary(config: pytest.Config) -> Path:
    """A folder of ours for this session, which pytest removes."""
    factory: pytest.TempPathFactory = config._tmp_path_factory  # type: ignore[attr-defined]  # before fixtures
    return factory.mktemp("ssh")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Without an inventory there is nothing to check."""
    return None if TARGETS in config.stash else True


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    found = metafunc.config.stash.get(TARGETS, [])
    if "box" in metafunc.fixturenames:
        metafunc.parametrize("box", found, ids=[one.name for one in found], indirect=True)
    if "served" in metafunc.fixturenames:
        pairs = [(one, instance) for one in found for instance in one.settings.models]
        ids = [f"{one.name}/{instance.name}" for one, instance in pairs]
        metafunc.parametrize("served", pairs, ids=ids, indirect=True)


@pytest.fixture(scope="session")
def collected(pytestconfig: pytest.Config) -> dict[str, Any]:
    """What was found on each host, all of them read at once; a text where one cannot be read."""
    found = pytestconfig.stash[TARGETS]
    with ThreadPoolExecutor(max_workers=PARALLEL) as pool:
        return dict(zip((one.name for one in found), pool.map(_reader(pytestconfig), found), strict=True))


def _reader(config: pytest.Config) -> Any:
    asked_sudo, sudo_user = config.getoption("--sudo"), config.getoption("--sudo-user")
    quick = config.getoption("--quick")

    def read(target: Target) -> dict[str, Any] | str:
        asked = json.dumps({"instances": [one.name for one in target.settings.models], "quick": quick})
        host = testinfra.get_host(target.spec, sudo=asked_sudo, sudo_user=sudo_user)
        try:
            done = host.run("python3 -I -B -c %s %s", COLLECTOR.read_text(), asked)
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            return f"{target.name}: cannot be reached: {_said(error)}"
        if done.rc:
            return f"{target.name}: cannot be read, exit code {done.rc}: {done.stderr.strip()[-800:]}"
        facts: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        if facts["euid"] != 0:
            return f"{target.name}: read as user id {facts['euid']}, not as root: set `_sudo`, or use --sudo"
        return facts

    return read


def _said(error: Exception) -> str:
    """testinfra puts its whole result into the exception: what ssh itself said is enough."""
    result = error.args[0] if error.args else error
    return str(getattr(result, "stderr", result)).strip()[-800:]


@pytest.fixture
def box(request: pytest.FixtureRequest, collected: dict[str, Any]) -> checks.Box:
    """One host with what was found on it."""
    return _box(request.param, collected)


@pytest.fixture
def served(request: pytest.FixtureRequest, collected: dict[str, Any]) -> checks.Served:
    """One instance of a host."""
    target, instance = request.param
    return checks.served(_box(target, collected), instance)


def _box(target: Target, collected: dict[str, Any]) -> checks.Box:
    facts = collected[target.name]
    if isinstance(facts, str):
        pytest.fail(facts, pytrace=False)
    return checks.Box(target.name, target.settings, facts)
