"""Handing connections on: to the server where it listens; else 503 with Retry-After, whatever was sent."""

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

import forward
import pytest

from tests.tasks.test_certificates import make


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as one:
        yield one


def turning_away(listener, tls=None, seconds=1.0):
    found = []
    thread = threading.Thread(target=lambda: found.append(forward.turn_away(listener, tls, seconds)))
    thread.start()
    return thread, found


@pytest.mark.parametrize("size", [0, 100, 5 << 20])
def test_whoever_waits_gets_503_with_retry_after(listener, size):
    port = listener.getsockname()[1]
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    client.connect()  # before anybody accepts
    thread, found = turning_away(listener)
    client.request("POST", "/v1/chat/completions", b"x" * size)
    answer = client.getresponse()
    told = json.loads(answer.read())
    assert answer.status == 503 and int(answer.getheader("Retry-After")) > 0
    assert told["error"]["code"] == 503 and told["error"]["type"] == "unavailable_error"
    client.close()
    thread.join()
    assert found == [1]


def test_a_client_that_sends_nothing_holds_nobody_up(listener, monkeypatch):
    monkeypatch.setattr(forward, "CLIENT_SECONDS", 0.5)
    with socket.create_connection(listener.getsockname()):
        thread, found = turning_away(listener, seconds=2.0)
        time.sleep(0.1)
        client = http.client.HTTPConnection(*listener.getsockname(), timeout=60)
        client.request("GET", "/health")
        assert client.getresponse().status == 503
        client.close()
        thread.join(60)
    assert found == [2]


def test_with_tls_the_answer_is_encrypted(listener, tmp_path, monkeypatch):
    import ssl

    cert, key = make(tmp_path)
    os.rename(cert, tmp_path / "tls-certificate")
    os.rename(key, tmp_path / "tls-key")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    thread, _ = turning_away(listener, forward.context())
    client = http.client.HTTPSConnection(*listener.getsockname(), context=ssl._create_unverified_context(), timeout=60)
    client.request("GET", "/health")
    assert client.getresponse().status == 503
    client.close()
    thread.join()


def test_without_a_certificate_nothing_is_encrypted(monkeypatch, tmp_path):
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert forward.context() is None
    monkeypatch.delenv("CREDENTIALS_DIRECTORY")
    assert forward.context() is None


def test_the_server_is_there_where_it_listens(tmp_path):
    path = str(tmp_path / "http.sock")
    assert not forward.listens(path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        assert forward.listens(path)
    assert not forward.listens(path), "a socket that nobody listens at"


class Echo(threading.Thread):
    """In llama-server's place: sends back what it gets, until the socket is removed."""

    def __init__(self, path):
        super().__init__(daemon=True)
        self.path, self.sock = path, socket.socket(socket.AF_UNIX)
        self.sock.bind(path)
        self.sock.listen()

    def run(self):
        while True:
            client, _ = self.sock.accept()
            threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def serve(self, client):
        while part := client.recv(1 << 16):
            client.sendall(part)
        client.close()


@contextlib.contextmanager
def started(listener, path, seconds):
    """The program as systemd starts it, for a block: its listening socket is descriptor 3."""
    start = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
    program = subprocess.Popen(
        [sys.executable, "-c", start, str(listener.fileno()), "-s", "-E", "-B", forward.__file__, path, str(seconds)],
        pass_fds=[listener.fileno()], env={**os.environ, "LISTEN_FDS": "1"},
    )  # fmt: skip
    try:
        yield program
    finally:
        program.kill()
        program.wait()


proxied = pytest.mark.skipif(
    not any(map(os.path.exists, forward.PROXIES)), reason="this machine has no systemd-socket-proxyd"
)


@proxied
def test_bytes_go_to_the_server_and_back_until_nobody_is_connected(listener, tmp_path):
    path = str(tmp_path / "http.sock")
    Echo(path).start()
    with started(listener, path, 2) as program:
        with socket.create_connection(listener.getsockname(), timeout=60) as client:
            client.sendall(b"hello")
            assert client.recv(100) == b"hello"
            time.sleep(2.5)
            client.sendall(b"still there")
            assert client.recv(100) == b"still there", "a connection that is open keeps it"
        began = time.monotonic()
        assert program.wait(60) == 0
        assert time.monotonic() - began > 1.5


@proxied
def test_without_any_connection_it_ends_too(listener, tmp_path):
    path = str(tmp_path / "http.sock")
    Echo(path).start()
    with started(listener, path, 1) as program:
        assert program.wait(60) == 0


@proxied
def test_it_ends_with_the_server(listener, tmp_path):
    path = str(tmp_path / "http.sock")
    Echo(path).start()
    with (
        started(listener, path, 60) as program,
        socket.create_connection(listener.getsockname(), timeout=60) as client,
    ):
        client.sendall(b"hello")
        assert client.recv(100) == b"hello"
        os.unlink(path)
        assert program.wait(60) == 0


def test_a_server_that_has_not_started_is_told(listener, tmp_path):
    with started(listener, str(tmp_path / "http.sock"), 60) as program:
        client = http.client.HTTPConnection(*listener.getsockname(), timeout=60)
        client.request("POST", "/v1/completions", "{}")
        assert client.getresponse().status == 503
        client.close()
        assert program.wait(forward.PAUSE_SECONDS + 60) == 0


def test_without_a_socket_of_systemd_s_it_says_so(monkeypatch, capsys):
    monkeypatch.delenv("LISTEN_FDS", raising=False)
    assert forward.main(["/s", "60"]) == 1
    assert "systemctl status" in capsys.readouterr().out
