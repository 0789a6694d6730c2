"""What breaks by itself or by hand comes back: by systemd, by the liveness check, or by the next run.

Elsewhere: a unit edited by hand and a download killed with its host (test_2), a port taken by another program,
no space for a model from the start, a wrong checksum, a host that is down (test_3).
"""

import json
import threading
import time

import pytest

from tests.e2e.deploying import ask, main_pid, on, pyinfra, serves

UNIT = "llama-server-tiny.service"
LIVENESS = {"liveness_seconds": 5, "liveness_interval_seconds": 2}


@pytest.fixture(scope="module")
def host(builder):
    return builder


@pytest.fixture
def deploy(settings, inventory, host):
    """A run that must end green, on the host with these settings."""

    def run(*options, **overrides):
        done = pyinfra(inventory((host, settings(host, **{**LIVENESS, **overrides}))), *options)
        assert done.code == 0, done.text
        return done

    return run


@pytest.fixture(autouse=True)
def deployed(deploy):
    """It serves before anything goes wrong."""
    deploy()


def until(true, seconds):
    """Waits for it; how long that took."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds, f"not within {seconds} s"
        time.sleep(0.2)
    return time.monotonic() - began


def shown(host, name):
    return on(host, "systemctl", "show", f"--property={name}", "--value", UNIT)


def test_a_killed_server_is_back_by_itself(host):
    before = main_pid(host, "tiny")
    on(host, "kill", "-9", str(before))
    took = until(lambda: main_pid(host, "tiny") not in (0, before) and serves(host), 30)
    print(f"served again {took:.1f} s after SIGKILL")


def test_a_stopped_server_is_restarted_by_the_liveness_check(host):
    before = main_pid(host, "tiny")
    on(host, "kill", "-STOP", str(before))
    # Two pauses at most before it is asked, then the deadline, the poll of /slots, and a restart.
    took = until(lambda: main_pid(host, "tiny") not in (0, before) and serves(host), 2 * 2 + 5 + 5 + 20)
    print(f"served again {took:.1f} s after SIGSTOP")
    noted = json.loads(on(host, "cat", "/var/lib/llamafleet/gate/tiny.liveness.json"))
    assert noted["restarts"] >= 1 and "no token within 5 s" in noted["why"]
    assert "is wedged" in on(host, "journalctl", "--no-pager", "-u", "llama-server-tiny-liveness.service")


def test_a_busy_server_is_left_alone(host):
    before, restarts = main_pid(host, "tiny"), on(host, "cat", "/var/lib/llamafleet/gate/tiny.liveness.json")
    checks = int(
        on(host, "sh", "-c", "journalctl -q --no-pager -u llama-server-tiny-liveness.service | grep -c Finished")
    )
    stop = threading.Event()

    def talk():
        while not stop.is_set():  # its one slot is never free for long
            ask(host, "/completion", {"prompt": "Once upon a time", "n_predict": 900, "ignore_eos": True})

    talkers = [threading.Thread(target=talk) for _ in range(3)]
    for one in talkers:
        one.start()
    try:
        count = "journalctl -q --no-pager -u llama-server-tiny-liveness.service | grep -c Finished"
        until(lambda: int(on(host, "sh", "-c", count)) >= checks + 3, 60)
    finally:
        stop.set()
        for one in talkers:
            one.join()
    assert main_pid(host, "tiny") == before
    assert on(host, "cat", "/var/lib/llamafleet/gate/tiny.liveness.json") == restarts


def test_a_stopped_liveness_check_is_drift_and_is_mended_without_a_restart(host, deploy):
    before = main_pid(host, "tiny")
    on(host, "systemctl", "stop", "llama-server-tiny-liveness.timer")
    assert [name for name in deploy("--dry").changed() if "liveness check" in name]
    assert [name for name in deploy().changed() if "Install the liveness check" in name]
    assert on(host, "systemctl", "is-active", "llama-server-tiny-liveness.timer") == "active"
    assert main_pid(host, "tiny") == before
    assert deploy("--dry").changed() == []
