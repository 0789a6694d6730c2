"""Wedged or merely busy? Told apart by what the slots do, against a small HTTP server in llama-server's place."""

from __future__ import annotations

import fcntl
import json
import threading

import common
import pytest

from llamafleet.remote import liveness
from tests.serving import Server, serving

UNIT = "llama-server-chat.service"


class Slots(Server):
    """`slots` is what /slots tells, or a list of what it tells in turn, None for no answer; `status` answers
    completions, None waits until the server ends."""

    def __init__(self):
        super().__init__()
        self.status, self.slots, self.over = 200, [[slot(1)]], threading.Event()

    def respond(self, path, body, headers):
        if path == "/slots":
            told = self.slots.pop(0) if len(self.slots) > 1 else self.slots[0]
            return (200 if told is not None else 503), told
        assert body["n_predict"] == 1
        if self.status is None:
            self.over.wait(10)
            return None
        return self.status, {}


def slot(task, working=False, read=0, written=0, number=0):
    return {"id": number, "id_task": task, "is_processing": working, "n_prompt_tokens_processed": read,
            "next_token": [{"n_decoded": written}]}  # fmt: skip


@pytest.fixture
def server():
    with serving(Slots()) as one:
        yield one
        one.over.set()


class Systemd:
    def __init__(self):
        self.state, self.pids, self.calls = "active/running", [7], []

    def pid(self, unit):
        return self.pids.pop(0) if len(self.pids) > 1 else self.pids[0]


@pytest.fixture
def systemd(monkeypatch):
    one = Systemd()
    monkeypatch.setattr(liveness, "unit_state", lambda unit: one.state)
    monkeypatch.setattr(liveness, "main_pid", one.pid)
    monkeypatch.setattr(liveness, "systemctl", lambda *words: one.calls.append(["systemctl", *words]))
    return one


@pytest.fixture
def check(server, systemd, tmp_path, monkeypatch):
    """One run of the liveness check; its exit code."""
    monkeypatch.setattr(liveness, "RUN", str(tmp_path / "run"))
    monkeypatch.setattr(common, "GATES", str(tmp_path / "gate"))
    monkeypatch.setattr(liveness, "POLL_SECONDS", 0.02)
    gate = {"unit": UNIT, "url": server.url, "api_keys": None, "context_tokens": 4096, "slots": 2}
    (tmp_path / "plan.json").write_text(json.dumps({"gate": gate, "batch_tokens": 2048}))
    return lambda seconds=0.3: liveness.main([str(tmp_path / "plan.json"), str(seconds)])


def restarts(systemd):
    return [words for words in systemd.calls if "restart" in words]


def test_an_idle_server_is_asked_for_a_token(check, server, systemd):
    assert check() == 0
    assert server.paths.count("/completion") == 1 and not restarts(systemd)


def test_a_server_that_worked_since_is_not_asked(check, server):
    check()
    server.asked.clear()
    server.slots = [[slot(5)]]  # a request came and went
    assert check() == 0 and "/completion" not in server.paths
    assert check() == 0 and "/completion" in server.paths  # nothing since


@pytest.mark.parametrize("slots", [None, [slot(1)]], ids=["stopped", "its GPU hangs"])
def test_a_server_without_a_token_is_restarted(check, server, systemd, tmp_path, capsys, slots):
    server.status, server.slots = None, [slots]
    assert check() == 1
    assert restarts(systemd) == [["systemctl", "restart", "--no-block", UNIT]]
    noted = json.loads((tmp_path / "gate/liveness/chat.json").read_text())
    assert noted["restarts"] == 1 and "no token within 0 s" in noted["why"]
    assert f"{UNIT} is wedged" in capsys.readouterr().out
    check()
    assert json.loads((tmp_path / "gate/liveness/chat.json").read_text())["restarts"] == 2


def test_our_own_request_that_hangs_is_no_sign_of_life(check, server, systemd):
    server.status = None
    server.slots = [[slot(1)], [slot(2, working=True)]]
    assert check() == 1 and restarts(systemd)


def test_a_request_of_others_that_hangs_is_no_sign_of_life(check, server, systemd):
    server.status, server.slots = None, [[slot(1, working=True, read=512, written=40)]]
    assert check() == 1 and restarts(systemd)


@pytest.mark.parametrize(
    "then",
    [slot(1, True, 512, 41), slot(1, True, 2048, 40), slot(1, False, 512, 44), slot(2, True, 64, 0)],
    ids=["writes", "reads", "ends", "took the next"],
)
def test_a_busy_server_is_left_alone(check, server, systemd, then):
    server.status = None  # ours waits behind theirs
    server.slots = [[slot(1, True, 512, 40)], [slot(1, True, 512, 40)], [then]]
    assert check() == 0 and not restarts(systemd)


def test_one_slot_that_gets_on_is_enough(check, server, systemd):
    server.status = None
    stuck = slot(1, True, 512, 40)
    server.slots = [[stuck, slot(3, True, 9, 1, number=1)], [stuck, slot(3, True, 9, 2, number=1)]]
    assert check() == 0 and not restarts(systemd)


def test_errors_all_the_time_are_as_bad_as_no_answer(check, server, systemd):
    server.status = 500
    assert check() == 1 and restarts(systemd)


def test_a_server_that_refuses_our_key_lives(check, server, systemd):
    server.status = 401
    assert check() == 0 and not restarts(systemd)


@pytest.mark.parametrize("state", ["activating/start-post", "inactive/dead", "failed/failed", "deactivating/stop"])
def test_a_unit_that_does_not_run_is_not_looked_at(check, server, systemd, state):
    systemd.state = state
    assert check() == 0 and server.asked == []


def test_a_server_that_was_replaced_meanwhile_is_not_restarted(check, server, systemd):
    server.status, systemd.pids = None, [7, 8]
    assert check() == 0 and not restarts(systemd)


def test_a_deploy_that_is_at_it_is_not_disturbed(check, server, systemd, tmp_path):
    server.status = None
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run/switch-chat.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert check() == 0 and not restarts(systemd)


def test_a_slow_host_is_given_the_time_of_its_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "GATES", str(tmp_path))
    spec = {"unit": UNIT, "batch_tokens": 2048, "context_tokens": 4096, "slots": 2}
    assert liveness.patience(spec, 120.0) == 120.0
    (tmp_path / "chat.json").write_text('{"prompt_tokens_per_s": 16.0}')
    assert liveness.patience(spec, 120.0) == 3 * 2048 / 16.0
    spec["batch_tokens"] = None  # a record of an earlier version: no batch is longer than all slots' context
    assert liveness.patience(spec, 120.0) == 3 * 8192 / 16.0


def test_a_record_of_an_earlier_version_is_enough(check, server, systemd, tmp_path):
    plan = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps({"gate": plan["gate"]}))
    (tmp_path / "gate").mkdir()
    (tmp_path / "gate/chat.json").write_text('{"prompt_tokens_per_s": 1e9}')
    server.status = None
    assert check() == 1 and restarts(systemd)
