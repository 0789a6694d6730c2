"""Waiting for running replies: a stand-in for llama-server in a process of its own, whose socket the kernel filters."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time

import common
import draining
import pytest

NAME = "chat"
# Answers /metrics with the number in a file, for a key; a reply takes as long as it is asked for.
SERVER = """\
import http.server, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *_): pass
    def do_GET(self):
        if self.path == "/metrics":
            ok = self.headers.get("Authorization") == "Bearer a-key"
            text = open(sys.argv[1]).read() if ok else "no key"
            body = f"# HELP\\nllamacpp:requests_processing {text}\\nllamacpp:requests_deferred 0\\n".encode()
        else:
            body = b"hello"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


class Llama:
    """The server, its port, and how many requests it says to have."""

    def __init__(self, folder):
        self.count = folder / "count"
        self.requests(0)
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(self.count)], stdout=subprocess.PIPE, text=True
        )
        self.port = int(self.process.stdout.readline())

    def requests(self, number):
        new = self.count.with_suffix(".new")
        new.write_text(str(number))
        new.rename(self.count)

    def end(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def answers(self, seconds=60.0):
        """Whether a new connection is answered in that time."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        try:
            connection.request("GET", "/hello")
            return connection.getresponse().read() == b"hello"
        except OSError:
            return False
        finally:
            connection.close()


@pytest.fixture
def llama(tmp_path, monkeypatch):
    """A server that is the instance's, as systemd and plan.json say."""
    one = Llama(tmp_path)
    keys = tmp_path / "api-keys"
    keys.write_text("a-key\n")
    plan = tmp_path / NAME / "plan.json"
    plan.parent.mkdir()
    gate = {"unit": common.unit_of(NAME), "argv": [], "url": f"http://127.0.0.1:{one.port}", "api_keys": str(keys),
            "health_seconds": 1, "context_tokens": 1, "slots": 1, "backend": "cpu", "gpus": []}  # fmt: skip
    plan.write_text(json.dumps({"schema": 1, "gate": gate}))
    monkeypatch.setattr(common, "INSTANCES", str(tmp_path))
    monkeypatch.setattr(draining, "show", lambda *_, **__: {"ActiveState": "active", "MainPID": str(one.process.pid)})
    yield one
    one.end()


@contextlib.contextmanager
def later(seconds, action):
    timer = threading.Timer(seconds, action)
    timer.start()
    try:
        yield
    finally:
        timer.join()


def took(began):
    return time.monotonic() - began


def test_an_idle_server_is_stopped_at_once(llama):
    began = time.monotonic()
    with draining.Draining([NAME], 30).begun():
        assert took(began) < 5


def test_running_requests_are_waited_for(llama, capfd):
    llama.requests(2)
    began = time.monotonic()
    with later(1.0, lambda: llama.requests(0)), draining.Draining([NAME], 30).begun():
        assert 1.0 < took(began) < 8
    assert "waiting for 2 running requests, 30 s at most" in capfd.readouterr().out


def test_the_deadline_ends_the_waiting(llama, capfd):
    llama.requests(1)
    began = time.monotonic()
    with draining.Draining([NAME], 1).begun():
        assert 1.0 <= took(began) < 5
    assert "stopped after 1 s although requests are running" in capfd.readouterr().out


def test_with_wait_the_deadline_ends_nothing(llama, capfd):
    llama.requests(1)
    began = time.monotonic()
    with later(2.0, lambda: llama.requests(0)), draining.Draining([NAME], 1, "wait").begun():
        assert 2.0 < took(began) < 10
    assert "although" not in capfd.readouterr().out


@pytest.mark.parametrize("overdue", ["stop", "wait"])
def test_what_may_not_be_cut_is_not_stopped(llama, monkeypatch, capfd, overdue):
    monkeypatch.setattr(draining, "PATIENT_SECONDS", 1.0)
    llama.requests(1)
    with (
        pytest.raises(draining.Overdue, match="still running on llama-server-chat"),
        draining.Draining([NAME], 1, overdue).begun(),
    ):
        pytest.fail("it was stopped")
    assert "stopped" not in capfd.readouterr().out and llama.answers()
    llama.requests(0)
    with draining.Draining([NAME], 30, overdue).begun():
        pass


def test_without_seconds_nothing_is_waited_for_whatever_is_overdue(llama):
    llama.requests(1)
    assert draining.Draining([NAME], 0, "wait").servers == []


@pytest.fixture
def can_hold(llama):
    listener = draining.listener_of(llama.process.pid)
    if listener is None:
        pytest.skip("the kernel does not give the sockets of other processes")
    listener.close()


def test_new_connections_are_held_and_open_ones_go_on(llama, can_hold):
    open_one = http.client.HTTPConnection("127.0.0.1", llama.port, timeout=60)
    open_one.connect()
    with draining.Draining([NAME], 30).begun():
        assert not llama.answers(0.5)
        open_one.request("GET", "/hello")
        assert open_one.getresponse().read() == b"hello"
    open_one.close()


def test_a_held_connection_reaches_the_next_server(llama, can_hold):
    """The client's kernel tries again after a second."""
    waiting = socket.socket()
    waiting.settimeout(60)
    with draining.Draining([NAME], 30).begun():
        connecting = threading.Thread(target=waiting.connect, args=(("127.0.0.1", llama.port),))
        connecting.start()
        time.sleep(0.3)
        assert connecting.is_alive()
        llama.end()
    with socket.socket() as next_server:
        next_server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        next_server.bind(("127.0.0.1", llama.port))
        next_server.listen()
        connecting.join(timeout=60)
        assert not connecting.is_alive() and waiting.getpeername()
    waiting.close()


def test_where_the_stop_fails_connections_are_let_in_again(llama, can_hold):
    with pytest.raises(OSError, match="systemctl"), draining.Draining([NAME], 30).begun():
        raise OSError("systemctl")
    assert llama.answers()


def test_after_a_kill_in_mid_switch_connections_are_let_in_again(llama, can_hold):
    server = draining.running(NAME)
    draining.hold(server)
    server.listener.close()
    assert not llama.answers(0.5)
    draining.let_in(NAME)
    assert llama.answers()


def test_a_server_that_does_not_say_is_not_waited_for(llama):
    llama.process.send_signal(19)  # SIGSTOP: it accepts, and never answers
    began = time.monotonic()
    with draining.Draining([NAME], 60).begun():
        assert took(began) < 15
    llama.process.send_signal(18)


def test_nothing_is_waited_for_without_a_server_or_its_plan(llama, monkeypatch, capfd):
    os.unlink(common.plan_path(NAME))
    assert draining.Draining([NAME], 30).servers == []
    assert "stopped without waiting for its replies" in capfd.readouterr().out
    monkeypatch.setattr(draining, "show", lambda *_, **__: {"ActiveState": "inactive", "MainPID": "0"})
    assert draining.Draining([NAME], 30).servers == [] and capfd.readouterr().out == ""
