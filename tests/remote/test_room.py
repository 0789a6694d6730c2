"""Making room: as few others as needed leave, only those that nobody uses or whose replies have ended, and nothing
that is being switched is touched. Servers, systemd and the files are stand-ins; connections are real."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time

import common
import draining
import pytest
import room

ROOM = {"host": 10}
NAMES = dict(enumerate("abcd", 1000))  # by the process that clients reach


class Host:
    """Instances on demand with what they need; those of `up` are active, each at a listening socket of its own."""

    def __init__(self, monkeypatch, folder):
        for name in ("UNITS", "RUN", "INSTANCES"):
            (folder / name.lower()).mkdir()
            monkeypatch.setattr(common, name, str(folder / name.lower()))
        self.states, self.stopped, self.busy, self.listeners, self.held = {}, [], {}, {}, []
        self.invocations = {}
        monkeypatch.setattr(room, "plan_path", lambda name: f"{common.INSTANCES}/{name}/plan.json")
        monkeypatch.setattr(room, "show", self.show)
        monkeypatch.setattr(room, "systemctl", self.systemctl)
        monkeypatch.setattr(draining, "running", self.running)
        monkeypatch.setattr(draining, "door_of", lambda name: {one: pid for pid, one in NAMES.items()}[name])
        monkeypatch.setattr(draining, "hold", lambda server: self.held.append(server.name))
        monkeypatch.setattr(draining, "release", lambda server: self.held.remove(server.name))
        monkeypatch.setattr(draining, "wait", self.wait)
        self.signals = []
        monkeypatch.setattr(room, "processes_of", lambda pid: [pid])
        monkeypatch.setattr(room, "connections", lambda pid: self.busy.get(NAMES[pid], 0))
        monkeypatch.setattr(room, "waiting", lambda pid: 0)
        monkeypatch.setattr(room, "send", lambda pid, number: self.signals.append((NAMES[pid], number.name)))
        monkeypatch.setattr(room, "POLL_SECONDS", 0.01)
        monkeypatch.setattr(room, "HOLD_AFTER_SECONDS", 0.2)
        monkeypatch.setenv("INVOCATION_ID", "me")

    def has(self, name, needs, state=None, sub="running", room=ROOM):
        open(f"{common.UNITS}/{common.demand_units(name)[0]}", "w").close()
        os.makedirs(f"{common.INSTANCES}/{name}")
        with open(f"{common.INSTANCES}/{name}/plan.json", "w") as file:
            json.dump({"demand": {"needs_bytes": needs, "room_bytes": room}} if needs else {}, file)
        self.states[name] = (state or "inactive", sub if state else "dead", len(self.states))

    def show(self, unit, *_, seconds=None):
        state, sub, since = self.states[common.instance_of(unit)]
        found = self.invocations.get(common.instance_of(unit), "other")
        return {
            "ActiveState": state,
            "SubState": sub,
            "InvocationID": found,
            "ActiveEnterTimestampMonotonic": str(since),
        }

    def systemctl(self, verb, *units):
        assert verb == "stop"
        for name in map(common.instance_of, units):
            assert self.busy.get(name, 0) == 0, "a running reply was cut"
            self.states[name] = ("inactive", "dead", 0)
            self.stopped.append(name)

    def running(self, name):
        listener = socket.create_server(("127.0.0.1", 0))
        self.listeners[name] = listener
        return draining.Server(name, "http://x", None, None, listener, 0, "/s")

    def wait(self, servers, seconds, certain=False):
        assert certain
        over = time.monotonic() + seconds
        while any(self.busy.get(one.name) for one in servers):
            if time.monotonic() >= over:
                return False
            time.sleep(0.01)
        return True


@pytest.fixture
def host(monkeypatch, tmp_path):
    return Host(monkeypatch, tmp_path)


def used(host, *names):
    """Clients have connections to these servers, whose replies run until `busy` says otherwise."""
    for name in names:
        host.busy[name] = 1


def test_what_fits_is_started_beside_the_others(host):
    host.has("a", {"host": 4})
    host.has("b", {"host": 6}, "active")
    assert room.make("a") is None
    assert host.stopped == [] and room.reserved("a") == "me"


def test_one_that_nobody_uses_makes_room_and_no_more_than_needed(host):
    host.has("a", {"host": 4})
    host.has("b", {"host": 4}, "active")
    host.has("c", {"host": 4}, "active")
    assert room.make("a") is None
    assert host.stopped == ["b"], "the longest there, and it alone"
    assert host.held == [], "nobody is held any more"


def test_two_leave_where_one_is_not_enough(host):
    host.has("a", {"host": 9})
    for name in "bc":
        host.has(name, {"host": 4}, "active")
    assert room.make("a") is None
    assert sorted(host.stopped) == ["b", "c"]


def test_of_two_the_unused_one_leaves(host):
    host.has("a", {"host": 4})
    for name in "bc":
        host.has(name, {"host": 4}, "active")
    used(host, "b")
    assert room.make("a") is None
    assert host.stopped == ["c"]


def test_a_running_reply_ends_first(host):
    host.has("a", {"host": 6})
    host.has("b", {"host": 6}, "active")
    used(host, "b")
    threading.Timer(0.4, lambda: host.busy.update(b=0)).start()
    assert room.make("a", seconds=20) is None  # the stand-in for systemd sees that nothing was cut
    assert host.stopped == ["b"]


def test_who_connects_at_the_last_moment_keeps_the_server(host):
    """Between the look and the freeze; then the process runs on."""
    host.has("a", {"host": 6})
    host.has("b", {"host": 6}, "active")
    real = host.running

    def running(name):
        host.busy["b"] = 1
        return real(name)

    draining.running = running
    assert room.make("a", seconds=0.15) is not None
    assert host.stopped == []
    assert host.signals and [number for _, number in host.signals] == ["SIGSTOP", "SIGCONT"] * (len(host.signals) // 2)


def test_a_frozen_process_is_not_woken_up_to_end(host):
    host.has("a", {"host": 6})
    host.has("b", {"host": 6}, "active")
    assert room.make("a") is None
    assert host.signals == [("b", "SIGSTOP"), ("b", "SIGKILL")]


def test_a_reply_that_does_not_end_keeps_its_server(host):
    host.has("a", {"host": 6})
    host.has("b", {"host": 6}, "active")
    used(host, "b")
    why = room.make("a", seconds=0.6)
    assert "no room for llama-server-a.service" in why and "llama-server-b.service is at work" in why
    assert host.stopped == [] and host.held == []


def test_a_server_that_starts_is_not_stopped(host):
    host.has("a", {"host": 6})
    host.has("b", {"host": 6}, "activating", "start-post")
    assert room.make("a", seconds=0.3) is not None
    assert host.stopped == []


def test_one_that_waits_itself_has_no_memory_yet_and_one_with_a_promise_has(host):
    host.has("a", {"host": 6})
    host.has("b", {"host": 6}, "activating", "condition")
    host.invocations["b"] = "its own"
    assert room.make("a", seconds=0.3) is None
    with open(f"{common.RUN}/room-b", "w") as file:
        file.write("its own")
    assert room.make("a", seconds=0.3) is not None


def test_what_is_being_switched_stays(host):
    host.has("a", {"host": 6})
    host.has("b", {"host": 6}, "active")
    with open(f"{common.RUN}/switch-b.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert room.make("a", seconds=0.3) is not None
    assert host.stopped == []
    assert room.make("a", seconds=0.3) is None and host.stopped == ["b"]


def test_beside_one_of_unknown_size_nothing_fits(host):
    host.has("a", {"host": 1})
    host.has("b", None, "active")
    assert room.make("a") is None
    assert host.stopped == ["b"]


def test_all_leave_for_a_switch_of_what_starts_with_the_host(host):
    for name in "bcd":
        host.has(name, {"host": 1}, "active")
    assert room.make("boot", besides=["d"], alone=True) is None
    assert sorted(host.stopped) == ["b", "c"]


def test_only_devices_that_it_needs_count(host):
    host.has("a", {"GPU0": 4, "host": 1}, room={"GPU0": 8, "host": 9})
    host.has("b", {"GPU1": 8, "host": 1}, "active")
    assert room.make("a") is None and host.stopped == []


def test_the_program_says_why(host, monkeypatch, capsys):
    host.has("a", {"host": 6})
    host.has("b", {"host": 6}, "activating", "start")
    monkeypatch.setattr(room.make, "__defaults__", (0.2, (), False))
    assert room.main(["a"]) == 1 and "starts or ends" in capsys.readouterr().out
    host.states["b"] = ("inactive", "dead", 0)
    for name in os.listdir(common.RUN):
        os.unlink(f"{common.RUN}/{name}")
    os.rmdir(common.RUN)
    before = os.umask(0)
    try:
        assert room.main(["a"]) == 0
    finally:
        os.umask(before)
    modes = {os.stat(path).st_mode & 0o777 for path in (common.RUN, f"{common.RUN}/room.lock", f"{common.RUN}/room-a")}
    assert modes == {0o755, 0o644}, "nobody else may write there, whatever the unit's umask"


# --- who has a connection -------------------------------------------------------------------------------


def test_a_connection_counts_before_and_after_it_is_accepted(monkeypatch):
    monkeypatch.setattr(draining, "door_of", lambda name: os.getpid())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        before = room.connections(os.getpid())
        assert room.waiting(os.getpid()) == 0
        client = socket.create_connection(listener.getsockname())
        assert room.waiting(os.getpid()) == 1 and not room.looks_unused("chat"), "nobody has accepted it yet"
        accepted, _ = listener.accept()
        assert room.waiting(os.getpid()) == 0
        assert room.connections(os.getpid()) == before + 2 and not room.looks_unused("chat"), "both ends are ours"
        accepted.close()
        client.close()


def test_children_count_too():
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            time.sleep(30)
        os._exit(0)
    try:
        assert set(room.processes_of(os.getpid())) >= {os.getpid(), child}
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
