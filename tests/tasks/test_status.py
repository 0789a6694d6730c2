"""`llamafleet status`, once and with `--watch`: what is printed where, and how it ends."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llamafleet.cli import main as cli
from llamafleet.cli.status import HostStatus
from tasks import status
from tasks.lib import ends, lookups
from tests.cli.test_fleet_status import CASES, LOST, host

ROOT = Path(__file__).resolve().parents[2]


class Enough(Exception):
    """The watch has looked as often as the test wants."""


@pytest.fixture
def looks(monkeypatch):
    """What the hosts are at each look; returns a function that runs the command."""
    monkeypatch.setattr(ends, "take_interrupts", lambda: None)

    def run(each, *options):
        left = iter(each)

        def over_all(*_):
            for hosts in left:
                return hosts
            raise Enough

        monkeypatch.setattr(status, "over_all", over_all)
        monkeypatch.setattr(status.gevent, "sleep", waited.append)
        return status.main(["inv.py", *options])

    waited = run.waited = []
    return run


@pytest.mark.parametrize(("state", "code"), [(state, 0 if state == "fine" else 1) for state in CASES])
def test_the_exit_status_says_whether_everything_is_fine(looks, state, code):
    assert looks([{"a": host(), "b": CASES[state]}]) == code
    assert looks([{"a": host(), "b": CASES[state]}], "--json") == code


def test_without_a_terminal_a_watch_prints_the_page_once_and_then_a_line_for_each_change(looks, capsys):
    fine, bad = {"a": host(), "b": host()}, {"a": host(), "b": CASES["not serving"]}
    with pytest.raises(Enough):
        looks([fine, fine, bad, fine], "--watch=7")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 hosts: 2 fine" and sum(line.startswith("2 hosts") for line in lines) == 1
    assert [line.split(" ", 1)[1] for line in lines if "b: state: " in line] == [
        "b: state: fine -> not serving", "b: state: not serving -> fine",
    ]  # fmt: skip
    assert looks.waited == [7.0] * 4


def test_every_change_has_its_time(looks, capsys):
    with pytest.raises(Enough):
        looks([{"a": host()}, {"a": host()}, {"a": LOST}], "--watch=1")
    lines = capsys.readouterr().out.splitlines()
    changes = [line for line in lines if "->" in line]
    assert changes and lines[-len(changes) :] == changes
    assert time.strptime(changes[0].split()[0], "%Y-%m-%dT%H:%M:%SZ")
    assert changes[0].split(" ", 1)[1] == "a: state: fine -> cannot be read"


def test_as_json_each_look_is_a_line(looks, capsys):
    with pytest.raises(Enough):
        looks([{"a": host()}, {"a": LOST}], "--json", "--watch=1")
    one, two = map(json.loads, capsys.readouterr().out.splitlines())
    assert (one["a"]["state"], two["a"]["state"]) == ("fine", "cannot be read")


def test_every_host_has_a_line_where_that_is_asked_for(looks, capsys):
    hosts = {f"gpu{n}": host() for n in range(4)}
    looks([hosts])
    assert "gpu0 and 3 more" in capsys.readouterr().out
    looks([hosts], "--all")
    assert "more" not in capsys.readouterr().out


def test_what_failed_at_one_look_is_tried_again_at_the_next(looks, monkeypatch):
    """A Hub that did not answer once, a host that could not be reached."""
    monkeypatch.setattr(lookups, "_known", {"good": 5, "bad": lookups.LookupFailed("no answer")})
    monkeypatch.setattr(ends, "_reasons", {"a": "cannot be reached: no route"})
    with pytest.raises(Enough):
        looks([{"a": host()}], "--watch=1")
    assert lookups._known == {"good": 5} and ends.reason("a") == ""


def test_a_reader_that_has_enough_is_no_error(looks, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

        def fileno(self):
            return 9

    monkeypatch.setattr(os, "dup2", lambda *_: None)
    monkeypatch.setattr(sys, "stdout", Closed())
    assert looks([{"a": host()}]) == 0


@pytest.mark.parametrize("seconds", ["0", "-1", "x", "1.5", "1e9", "99999999999"])
def test_seconds_that_are_none_are_bad_input(tmp_path, capsys, seconds):
    with pytest.raises(SystemExit) as ended:
        cli.main(["status", "--inventory", str(tmp_path / "inv.py"), f"--watch={seconds}"])
    assert ended.value.code == 2 and "should be whole seconds" in capsys.readouterr().err


@pytest.mark.parametrize("terminal", [True, False])
def test_ctrl_c_ends_a_watch_with_130_and_a_terminal_is_drawn_anew(tmp_path, terminal):
    """The command itself, over hosts that cannot be reached."""
    inventory = tmp_path / "fleet.py"
    data = {"ssh_hostname": "127.0.0.1", "ssh_port": 1, "ssh_connect_retries": 0}
    inventory.write_text(f"hosts = [({'one'!r}, {data}), ({'two'!r}, {data})]\n")
    ours, theirs = pty.openpty() if terminal else os.pipe()
    words = [sys.executable, "-m", "llamafleet.cli", "status", "--inventory", str(inventory), "--watch", "1"]
    run = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=theirs, stderr=subprocess.PIPE, cwd=ROOT,
                           process_group=0)  # fmt: skip
    os.close(theirs)
    try:
        shown = b""
        while shown.count(b"2 hosts: 0 fine; cannot be read: 2") < (2 if terminal else 1):
            shown += os.read(ours, 65536)
        os.killpg(run.pid, signal.SIGINT)
        _, told = run.communicate(timeout=30)
    finally:
        run.kill()
        os.close(ours)
    assert run.returncode == 130 and b"interrupted" in told and b"Traceback" not in told
    assert shown.count(b"\x1b[H\x1b[2J") == (2 if terminal else 0)


def test_a_host_that_cannot_be_read_has_what_the_inventory_wants_there():
    class Unread:
        data = type(
            "Data", (), {"dict": staticmethod(lambda: {"models": [{"name": "chat", "source": "hf:o/r/m?x=1"}]})}
        )

    assert status.lost(Unread(), "gone") == HostStatus(problem="gone", expected={"chat": "hf:o/r/m?x=1"})
