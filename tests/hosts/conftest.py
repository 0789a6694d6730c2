"""Checks of deployed hosts: `pytest tests/hosts --inventory inventory/fleet.py`.

`pytest` over the whole project needs no deployed host: without --inventory it leaves this folder out. `pytest
tests/hosts` without --inventory ends with a message.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import testinfra  # type: ignore[import-untyped]  # it ships no types

from llamafleet import causes
from llamafleet.printable import printable
from llamafleet.remote.common import INSTANCES
from llamafleet.settings.copies import PER_GPU
from tests.hosts import checks, facts
from tests.hosts.inventory_bridge import BridgeError, Target, targets, with_copies

HERE = Path(__file__).resolve().parent
COLLECTOR = HERE / "collect.py"
PARALLEL = 16  # hosts that are read at the same time
# Of each host: to hash model files of some 500 GB from a slow disk, and else to ask every instance's gate.
READ_SECONDS, QUICK_SECONDS = 7200, 1800
TIMED_OUT = 124  # exit status of coreutils' timeout
NO_PROGRAM = 127  # of a shell that does not find the program, here ssh
TARGETS = pytest.StashKey[list[Target]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("llamafleet", "checks of deployed hosts (tests/hosts)")
    group.addoption("--inventory", help="the inventory of the deployed hosts, e.g. inventory/fleet.py")
    group.addoption(
        "--limit",
        action="append",
        default=[],
        metavar="NAME",
        help="check only this group or host; may be repeated (write --limit=@local: pytest takes a word that begins "
        "with @ for a file's name)",
    )
    group.addoption(
        "--quick",
        action="store_true",
        default=False,
        help="do not read model files: take the checksum in FILE.verified if the file did not change since",
    )


def pytest_sessionstart(session: pytest.Session) -> None:
    """Read the inventory. pytest calls this only if the command line names this folder."""
    config = session.config
    if not config.getoption("--inventory"):
        raise pytest.UsageError(
            "tests/hosts checks deployed hosts: add --inventory inventory/fleet.py "
            "(and --limit GROUP or --limit HOST to check some of them)"
        )
    folder = config.stash.setdefault(FOLDER, _temporary(config))
    try:
        found = targets(config.getoption("--inventory"), config.getoption("--limit"), folder)
    except BridgeError as error:
        raise pytest.UsageError(str(error)) from error
    with ThreadPoolExecutor(PARALLEL) as pool:
        config.stash[TARGETS] = list(pool.map(lambda target: _with_copies(target, config), found))


def _with_copies(target: Target, config: pytest.Config) -> Target:
    """The target with an instance for each copy; how many there are for its GPUs only the host tells."""
    installed: list[str] = []
    if any(one.copies == PER_GPU for one in target.settings.models):
        host = testinfra.get_host(
            target.spec, sudo=config.getoption("--sudo"), sudo_user=config.getoption("--sudo-user")
        )
        with contextlib.suppress(RuntimeError, OSError, subprocess.SubprocessError):  # the checks say why
            installed = host.run("ls %s", INSTANCES).stdout.split()
    return replace(target, settings=with_copies(target.settings, installed))


FOLDER = pytest.StashKey[Path]()


def _temporary(config: pytest.Config) -> Path:
    """A temporary folder for this session's SSH configuration; pytest removes it."""
    factory: pytest.TempPathFactory = config._tmp_path_factory  # type: ignore[attr-defined]  # before fixtures
    return factory.mktemp("ssh")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave this folder out if there is no inventory."""
    return None if TARGETS in config.stash else True


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    hosts = metafunc.config.stash.get(TARGETS, [])
    if "box" in metafunc.fixturenames:
        metafunc.parametrize("box", hosts, ids=[host.name for host in hosts], indirect=True)
    if "served" in metafunc.fixturenames:
        pairs = [(host, instance) for host in hosts for instance in host.settings.models]
        ids = [f"{host.name}/{instance.name}" for host, instance in pairs]
        metafunc.parametrize("served", pairs, ids=ids, indirect=True)


@pytest.fixture(scope="session")
def collected(pytestconfig: pytest.Config) -> dict[str, Any]:
    """By host the facts of `collect.py`, or a text that says why the host cannot be read. Hosts are read concurrently."""
    hosts = pytestconfig.stash[TARGETS]
    with ThreadPoolExecutor(max_workers=PARALLEL) as pool:
        return dict(zip((host.name for host in hosts), pool.map(_reader(pytestconfig), hosts), strict=True))


def _reader(config: pytest.Config) -> Any:
    sudo, sudo_user = config.getoption("--sudo"), config.getoption("--sudo-user")
    quick = config.getoption("--quick")
    seconds = QUICK_SECONDS if quick else READ_SECONDS

    def read(target: Target) -> Mapping[str, Any] | str:
        names = [instance.name for instance in target.settings.models]
        request = json.dumps({"instances": names, "quick": quick})
        host = testinfra.get_host(target.spec, sudo=sudo, sudo_user=sudo_user)
        try:
            result = host.run(
                "timeout -k 10 %s %s -I -B -c %s %s",
                str(seconds),
                target.settings.python,
                COLLECTOR.read_text(),
                request,
            )
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            return f"{target.name}: cannot be reached: {causes.of_connection(_message(error))}"
        if result.rc == TIMED_OUT:
            return f"{target.name}: cannot be read: it did not answer within {seconds} s"
        if result.rc:
            said = result.stderr_bytes.decode("utf-8", "replace").strip()[-800:]
            cause = causes.of_local(said) if result.rc == NO_PROGRAM else said
            return f"{target.name}: cannot be read, exit code {result.rc}: {causes.of_command(cause)}"
        try:
            found = facts.read(result.stdout_bytes.decode("utf-8", "replace"), names)
        except facts.FactsError as error:
            return f"{target.name}: {error}"
        if found["euid"] != 0:
            return f"{target.name}: read as user id {found['euid']}, not as root: set `_sudo`, or use --sudo"
        return found

    return read


def _message(error: Exception) -> str:
    """The error output of ssh, if testinfra's exception has it, else the exception's text."""
    result = error.args[0] if error.args else error
    return str(getattr(result, "stderr", result)).strip()[-800:]


@pytest.fixture
def box(request: pytest.FixtureRequest, collected: dict[str, Any]) -> checks.Box:
    """A host with its facts."""
    return _box(request.param, collected)


@pytest.fixture
def served(request: pytest.FixtureRequest, collected: dict[str, Any]) -> checks.Served:
    """An instance with its facts."""
    target, instance = request.param
    return checks.served(_box(target, collected), instance)


def _box(target: Target, collected: dict[str, Any]) -> checks.Box:
    found = collected[target.name]
    if isinstance(found, str):
        pytest.fail(printable(found), pytrace=False)
    return checks.Box(target.name, target.settings, found)
