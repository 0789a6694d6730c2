"""The gate and `llamafleet status` leave a server asleep; a switch wakes the one that it has started."""

from __future__ import annotations

import gate_sleep
import pytest
import status

from llamafleet.remote import gate
from tests.serving import Server, serving

MAY_SLEEP = ["llama-server", "--sleep-idle-seconds", "60"]


class Sleeper(Server):
    """Sleeps until it is asked for more than /health and /props; `wakes` says whether it can wake up."""

    def __init__(self):
        super().__init__()
        self.asleep, self.wakes = True, True

    def respond(self, path, body, headers):
        if path not in ("/health", "/props"):
            self.asleep = self.asleep and not self.wakes
        if path == "/props":
            return 200, {"is_sleeping": self.asleep}
        return 200, {}


@pytest.fixture
def server():
    with serving(Sleeper()) as one:
        yield one


@pytest.fixture
def spec(server):
    return {"url": server.url, "api_keys": None, "tls_certificate": None, "argv": MAY_SLEEP, "health_seconds": 5.0}


def counted(calls, ok=True):
    def one(spec):
        calls.append(1)
        return gate.result("context", ok, "", "")

    return one


def test_a_sleeping_server_is_asked_no_further(spec, server):
    calls = []
    found = gate.check(spec, [gate.check_asleep, counted(calls)])
    assert found["ok"] and [one["name"] for one in found["checks"]] == ["asleep"]
    assert server.asleep and calls == [] and set(server.paths) == {"/props"}


def test_a_server_that_is_awake_is_checked(spec, server):
    server.asleep, calls = False, []
    found = gate.check(spec, [gate.check_asleep, counted(calls)])
    assert calls == [1] and [one["name"] for one in found["checks"]] == ["context"]


def test_a_server_that_cannot_sleep_is_not_asked(spec, server):
    assert gate.check_asleep({**spec, "argv": ["llama-server"]}) is None
    assert server.paths == []


def test_a_switch_wakes_what_it_has_started(spec, server):
    assert gate.check_asleep({**spec, "wake": True}) is None
    assert not server.asleep


def test_a_switch_takes_no_server_that_cannot_wake(spec, server):
    server.wakes, calls = False, []
    found = gate.check({**spec, "wake": True}, [gate.check_asleep, counted(calls)])
    assert not found["ok"] and found["checks"][-1]["found"] == "it sleeps on" and calls == []


@pytest.mark.parametrize(("words", "wake"), [(["check", "p"], False), (["check", "p", "--record"], True)])
def test_only_the_gate_of_a_switch_wakes(monkeypatch, spec, words, wake):
    seen = []
    monkeypatch.setattr(gate, "read_spec", lambda path: dict(spec))
    monkeypatch.setattr(gate, "check", lambda spec, every: seen.append(spec["wake"]) or {"ok": True, "checks": []})
    gate.verdict(words)
    assert seen == [wake]


def test_status_asks_as_nobody_and_wakes_nothing(spec, server, monkeypatch):
    monkeypatch.setattr("gate_spec.read_spec", lambda path: spec)
    assert status.is_asleep("chat") and server.asleep and set(server.paths) == {"/props"}
    server.asleep = False
    assert not status.is_asleep("chat")
    assert not gate_sleep.sleeps({**spec, "url": "http://127.0.0.1:9"})
