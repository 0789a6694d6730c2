"""What stands in for functions of pyinfra gives what pyinfra's give, and a run may have many connections."""

import inspect
import resource
import subprocess
import sys
import time
import types
from pathlib import Path

import paramiko
import pyinfra
import pytest
from pyinfra.api import arguments
from pyinfra.api import util as pyinfra_util

from bench.fleet.ssh import Servers
from tasks.lib import pace

ROOT = Path(__file__).resolve().parents[2]


def both(state):
    return [order(state) for order in (pyinfra_util.get_operation_order_from_stack, pace.order_from_stack)]


def deeper(state, times):
    if times:
        return deeper(
            state,
            times - 1,
        )
    return both(state)


@pytest.mark.parametrize("deploy", [__file__, "of another file.py", None])
@pytest.mark.parametrize("is_cli", [True, False])
def test_the_order_of_an_operation_is_pyinfras(monkeypatch, deploy, is_cli):
    """By it pyinfra knows an operation again on other hosts."""
    monkeypatch.setattr(pyinfra, "is_cli", is_cli)
    state = types.SimpleNamespace(current_deploy_filename=deploy, current_op_file_number=7)
    for theirs, ours in (both(state), deeper(state, 3)):
        assert theirs == ours and ours[:1] == ([7] if is_cli else ours[:1])
    lines = [inspect.currentframe().f_lineno - 2] if deploy != "of another file.py" else []
    assert set(lines) <= set(ours) and (lines or ours == [7] * is_cli)


def test_the_arguments_of_every_operation_are_pyinfras_and_found_once():
    found = arguments.all_global_arguments()
    assert found is arguments.all_global_arguments()
    assert dict(found) == dict(arguments.all_global_arguments.__wrapped__()) and "_sudo" in dict(found)


def test_many_connections_may_be_open_where_the_system_allows_them():
    """Debian's limit for a login is 1024, of at most 1048576."""
    program = "import resource, tasks.lib; print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    for limits, wanted in (((256, 4000), "4000 4000"), ((256, 256), "256 256")):
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL,
            preexec_fn=lambda limits=limits: resource.setrlimit(resource.RLIMIT_NOFILE, limits),
        )  # fmt: skip
        assert done.stdout.strip() == wanted, done.stderr


def test_a_connection_without_traffic_wakes_seldom_and_still_ends_at_once(tmp_path):
    """A thousand of them, each ten times a second, are a whole processor."""
    with Servers({"127.0.0.1": lambda words: "hello\n"}) as servers:
        servers.write_known_hosts(tmp_path / "known_hosts")
        with paramiko.SSHClient() as client:
            client.load_host_keys(str(tmp_path / "known_hosts"))
            client.connect(
                "127.0.0.1", servers.port("127.0.0.1"), "root", pkey=paramiko.ECDSAKey.generate(), look_for_keys=False
            )
            transport = client.get_transport()
            assert transport.sock.gettimeout() == pace.IDLE_SECONDS
            _, out, _ = client.exec_command("true")
            assert out.read() == b"hello\n" and out.channel.recv_exit_status() == 0
            assert servers.asked == {"true": 1}
    began = time.monotonic()  # the server closed it
    while transport.is_active():
        assert time.monotonic() - began < pace.IDLE_SECONDS / 2
        time.sleep(0.02)
