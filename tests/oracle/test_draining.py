"""A real llama-server under load is replaced: no reply is cut, and no request refused where the kernel holds connections."""

import collections
import http.client
import json
import threading
import time

import draining
import pytest

from sandbox import models, oracle
from sandbox.layouts import TINY

pytestmark = pytest.mark.oracle
CLIENTS, TOKENS, SECONDS = 4, 100, 60


def asks(port, until, found):
    """One streamed reply after another, each over a connection of its own, until the event; what became of each."""
    while not until.is_set():
        body = {"prompt": "Once", "n_predict": TOKENS, "stream": True, "ignore_eos": True}
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
        try:
            connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            found.append("whole" if b'"stop":true' in answer.read() else str(answer.status))
        except (OSError, http.client.HTTPException) as error:
            found.append(type(error).__name__)
            time.sleep(0.05)
        finally:
            connection.close()


def test_a_server_is_replaced_under_load(tmp_path, monkeypatch):
    import psutil

    model, port = models.make(TINY["dense"], tmp_path, seed=0), oracle.free_port()
    command = [oracle.build().llama_server, "--model", model, "--host", "127.0.0.1", "--port", str(port), "--ctx-size",
               "4096", "--parallel", str(CLIENTS), "--threads", "1", "--metrics", "--no-ui", "--offline"]  # fmt: skip
    spec = {"url": f"http://127.0.0.1:{port}", "api_keys": None, "tls_certificate": None, "socket": None}
    monkeypatch.setattr(draining, "read_spec", lambda path: spec)
    until, found = threading.Event(), []
    clients = [threading.Thread(target=asks, args=(port, until, found)) for _ in range(CLIENTS)]
    try:
        with oracle.serving(command, port, tmp_path / "old.log"):
            old = next(one for one in psutil.Process().children() if str(port) in one.cmdline())
            monkeypatch.setattr(draining, "pid_of", lambda name: old.pid)
            for client in clients:
                client.start()
            while len(found) < CLIENTS:
                time.sleep(0.1)
            drained = draining.Draining(["x"], SECONDS)
            if drained.servers[0].listener is None:
                pytest.skip("the kernel does not give the sockets of other processes")
            with drained.begun():
                before = len(found)
                old.terminate()
                old.wait(20)
        with oracle.serving(command, port, tmp_path / "new.log"):
            deadline = time.monotonic() + SECONDS
            while len(found) < before + 2 * CLIENTS and time.monotonic() < deadline:
                time.sleep(0.1)
            until.set()
            for client in clients:
                client.join()
    finally:
        until.set()
        for client in clients:
            client.join() if client.ident else None
    counted = collections.Counter(found)
    assert set(counted) <= {"whole", "503", "ConnectionRefusedError"}, counted
    assert counted["whole"] > 2 * CLIENTS
