"""How a run of pyinfra's command ends: not without a host, by Ctrl-C within seconds, with the names of failed hosts."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tasks.lib import ends
from tests import forked

ROOT = Path(__file__).resolve().parents[2]
PYINFRA = Path(sys.executable).with_name("pyinfra")
# An operation with a command that runs on this machine and is deaf to Ctrl-C; after it nothing may be begun. `job` goes on
# there, or nothing; to release the lock takes longer than the command.
DEPLOY = """\
import sys

import gevent
from pyinfra.api import FunctionCommand, operation
from tasks.lib import host_lock, remote

def begin(state, host):
    host_lock.release = lambda host: (gevent.sleep(1.5), host.log("the lock is released"))
    host_lock._held[host] = host_lock._Held(host_lock.now(), job={job!r})
    print("BEGUN", file=sys.stderr, flush=True)
    return True

@operation()
def work():
    yield FunctionCommand(begin, (), {{}})
    yield remote.HostCommand(["sh", "-c", "trap '' INT; exec sleep {seconds}"], purpose="the long command")
    yield remote.HostCommand(["touch", {after!r}], purpose="what follows")

work(name="Work")
"""


def started(tmp_path, *options, job="", stdin=subprocess.DEVNULL, seconds=60.0):
    deploy = tmp_path / "deploy.py"
    deploy.write_text(DEPLOY.format(job=job, seconds=seconds, after=str(tmp_path / "after")))
    environment = {**os.environ, "PYINFRA_PROGRESS": "off", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [str(PYINFRA), *options, "@local", str(deploy)],
        cwd=ROOT, env=environment, stdin=stdin, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        process_group=0,
    )  # fmt: skip


def until(process, text):
    lines = []
    for line in process.stderr:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError("".join(lines))


def interrupted(process, seconds=30.0):
    """Send Ctrl-C as a terminal does, to all processes of the run; what it printed, and that it ended in time: a run ends
    after 2.7 s at the latest, and a busy machine gets more."""
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    try:
        text = process.stderr.read()
        code = process.wait(timeout=60)
    finally:
        subprocess.run(["kill", "-KILL", "--", f"-{process.pid}"], capture_output=True)
    assert time.monotonic() - began < seconds, text
    assert code == 130, text
    return text


def test_ctrl_c_in_mid_command_says_what_goes_on_and_begins_nothing_more(tmp_path):
    process = started(tmp_path, "-y", job="build-0123")
    until(process, "BEGUN")
    time.sleep(0.3)
    text = interrupted(process)
    assert "[@local] build-0123 goes on there" in text and "run the same again to join it" in text
    assert "systemctl stop llamafleet-job-build-0123.service" in text
    assert "the lock is released" not in text
    assert "Traceback" not in text and "Success" not in text
    assert not (tmp_path / "after").exists()


def test_ctrl_c_where_no_job_goes_on_releases_the_lock(tmp_path):
    process = started(tmp_path, "-y", seconds=1.0)
    until(process, "BEGUN")
    assert "the lock is released" in interrupted(process)
    assert not (tmp_path / "after").exists()


def test_ctrl_c_at_pyinfra_s_question(tmp_path):
    """There no other greenlet can run."""
    process = started(tmp_path, stdin=subprocess.PIPE)
    until(process, "Detected changes displayed above")
    time.sleep(0.3)
    assert "interrupted" in interrupted(process)


def pyinfra(tmp_path, inventory, *options):
    path = tmp_path / "inventory.py"
    path.write_text(inventory)
    environment = {**os.environ, "PYINFRA_PROGRESS": "off", "NO_COLOR": "1"}
    return forked.pyinfra().run(["-m", "pyinfra", "-y", *options, path, "exec", "--", "true"], env=environment)


@pytest.mark.parametrize(
    ("inventory", "options", "says"),
    [
        ("web = ['@local']\n", ("--limit", "nosuch"), "known hosts and groups: @local, inventory, web"),
        ("web = ['@local']\n", ("--exclude", "web"), "leave no host"),
        ("models = []\n", (), "the inventory has no host"),
        ("hosts = []\n", (), "the inventory has no host"),
    ],
)
def test_a_run_without_a_host_is_no_success(tmp_path, inventory, options, says):
    done = pyinfra(tmp_path, inventory, *options)
    assert done.returncode == 1 and says in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_hosts_that_failed_are_named_at_the_end(tmp_path):
    gone = '("gone", {"ssh_hostname": "127.0.0.1", "ssh_port": 1})'
    done = pyinfra(tmp_path, f"web = ['@local', {gone}]\n")
    assert done.returncode == 1
    *_, heading, line = done.stderr.strip().splitlines()
    assert heading == "1 of 2 hosts failed:"
    assert line.startswith("    gone: cannot be reached: nothing answers at its SSH port") and "ssh_port" in line


def test_the_first_reason_counts(monkeypatch):
    monkeypatch.setattr(ends, "_reasons", {})
    ends.note("box1", "the disk is full")
    ends.note("box1", "the operation failed")
    assert (ends.reason("box1"), ends.reason("box2")) == ("the disk is full", "")
