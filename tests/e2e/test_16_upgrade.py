"""A host that an earlier release deployed meets this one: the server runs on, and a second run changes nothing.

The earlier code is taken from this repository's history and run as it was, with this environment's libraries.

Decision 16: docs/decisions/0016-records-are-versioned.md.
"""

import os
import subprocess
import tarfile
import threading
import time

import pytest

from sandbox import oracle_build
from tests.e2e import deploying
from tests.e2e.deploying import ROOT, ask, main_pid, on, pyinfra, serves

EARLIER = "39f1a14"  # before the folders of `llamafleet/`: what users deployed in November 2026
PREFIX = "upgrade"
UNIT = "llama-server-tiny.service"
KEY = "a-key-of-the-operator"
# What an upgrade may do beside a running server.
QUIET = ("helpers", "lock", "plan.json", "while its server runs on", "liveness", "recover", "Say how to use")


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """The earlier release's files."""
    folder = tmp_path_factory.mktemp("earlier")
    archive = subprocess.run(["git", "archive", EARLIER], cwd=ROOT, capture_output=True)
    if archive.returncode:
        pytest.skip(f"this checkout has no history: {archive.stderr.decode().strip()}")
    (folder / "tree.tar").write_bytes(archive.stdout)
    with tarfile.open(folder / "tree.tar") as tar:
        tar.extractall(folder / "tree", filter="data")
    return folder / "tree"


@pytest.fixture(scope="module")
def host(boot, turn):
    (one,) = boot(1, PREFIX, 7, packages=oracle_build.COMPILER)
    turn.close()
    return one


@pytest.fixture(scope="module")
def pair(host, outside, tmp_path_factory):
    """The host with its settings, among them keys, and none that the earlier release does not know."""
    file = tmp_path_factory.mktemp("keys") / "api-keys"
    file.write_text(f"{KEY}\n")
    file.chmod(0o600)
    settings = deploying.settings(outside, host, model={"api_key_file": str(file)})
    del settings["site"]
    return host, settings


@pytest.fixture(scope="module")
def inventory(pair, tmp_path_factory):
    return deploying.write_inventory(tmp_path_factory.mktemp("inventory") / "inventory.py", [pair])


class Asking:
    """Asks a server for its health all the time; `missed` counts what was not answered by 200."""

    def __init__(self, host):
        self.asked, self.missed, self._end = 0, [], threading.Event()
        self._thread = threading.Thread(target=self._run, args=(host,))

    def _run(self, host):
        while not self._end.wait(0.1):
            status, _ = ask(host, "/health")
            self.asked += 1
            if status != 200:
                self.missed.append((time.strftime("%H:%M:%S"), status))

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        self._thread.join()


def test_the_earlier_release_deploys(earlier, host, pair, tmp_path):
    (tmp_path / "group_data").symlink_to(earlier / "inventory/group_data")
    words = deploying.command(deploying.write_inventory(tmp_path / "inventory.py", [pair]), "-y")
    environment = {**deploying.environment(), "PYTHONPATH": str(earlier)}
    with oracle_build.compiling():
        done = subprocess.run(words, cwd=earlier, env=environment, stdin=subprocess.DEVNULL, capture_output=True,
                              text=True, timeout=1500)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "helpers/current/gate.py" in on(host, "cat", f"/etc/systemd/system/{UNIT}")
    assert serves(host, key=KEY)


def test_the_upgrade_leaves_no_gap(host, inventory):
    pid = main_pid(host, "tiny")
    with Asking(host) as asking:
        run = pyinfra(inventory)
    assert run.code == 0, run.text
    assert "Traceback" not in run.text
    assert main_pid(host, "tiny") == pid
    assert asking.asked > 5 and asking.missed == []
    loud = [name for name in run.changed() if not any(word in name for word in QUIET)]
    assert loud == []
    assert serves(host, key=KEY)


def test_the_next_run_changes_nothing(inventory):
    run = pyinfra(inventory)
    assert run.code == 0, run.text
    assert run.changed() == []


def test_the_checks_of_deployed_hosts_and_status_are_content(inventory):
    environment = {**os.environ, "LLAMAFLEET_INVENTORY": str(inventory)}
    done = subprocess.run(
        [str(deploying.PYINFRA.with_name("llamafleet")), "status", "--inventory", str(inventory)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " none" in done.stdout


def test_after_a_restart_of_the_unit_it_serves_with_its_keys(host):
    on(host, "systemctl", "restart", UNIT)
    assert serves(host, key=KEY)
    assert ask(host, "/v1/completions", {"prompt": "a", "max_tokens": 1})[0] == 401


def test_the_way_back_leaves_nothing_of_ours_but_the_models(host, inventory):
    """On a host of Debian 13; test_05_uninstall.py compares every file, on one of 12."""
    run = pyinfra(inventory, deploy="tasks.uninstall.uninstall")
    assert run.code == 0, run.text
    left = on(
        host, "sh", "-c", "ls -d /opt/llamafleet /etc/llamafleet /etc/systemd/system/llama* /var/cache/llama-* || true"
    )
    assert left == ""
    assert on(host, "sh", "-c", "ls /var/lib/llamafleet; getent passwd llamafleet || true") == "models"
