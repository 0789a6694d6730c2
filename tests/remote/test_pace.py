"""When the gate is asked to measure a server: before another build takes its place, and under another kernel."""

from __future__ import annotations

import fcntl
import json
import os

import common
import pace
import pytest

COUNTS = {"speed_floor_percent": 40, "serves": "chat"}


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """What the gate is asked, in a folder of installed instances; it finds what `asked.found` says."""

    class Asked(list):
        def __init__(self):
            super().__init__()
            self.found = {"ok": True, "found": "20.0 tokens/s written"}

        def __call__(self, verb, name):
            self.append((verb, name))
            return self.found

    one = Asked()
    monkeypatch.setattr(pace, "measured", one)
    for name in ("GATES", "INSTANCES", "RUN"):
        monkeypatch.setattr(common, name, str(tmp_path / name))
        (tmp_path / name).mkdir()
    return one


def write(path, value):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        json.dump(value, file)
    return str(path)


@pytest.mark.parametrize(
    ("staged", "due"),
    [
        ({"release": "r2", "gate": COUNTS}, True),
        ({"release": "r1", "gate": COUNTS}, False),
        ({"release": "r2", "gate": {**COUNTS, "speed_floor_percent": 0}}, False),
        ({"release": "r2", "gate": {**COUNTS, "serves": "embedding"}}, False),
        ({"release": "r2", "gate": 7}, False),
        ({}, False),
    ],
)
def test_an_old_server_is_measured_where_another_build_takes_its_place(asked, tmp_path, staged, due, capsys):
    write(common.plan_path("chat"), {"release": "r1"})
    pace.measure_old("chat", write(tmp_path / "plan.json", staged))
    assert asked == ([("pace", "chat")] if due else [])
    assert (capsys.readouterr().out == "llama-server-chat.service before the switch: 20.0 tokens/s written\n") is due


def test_one_that_cannot_be_measured_says_why(asked, tmp_path, capsys):
    asked.found = {"ok": False, "found": "its slots are at work"}
    write(common.plan_path("chat"), {"release": "r1"})
    pace.measure_old("chat", write(tmp_path / "plan.json", {"release": "r2", "gate": COUNTS}))
    assert "before the switch: not measured: its slots are at work" in capsys.readouterr().out


def test_a_server_is_measured_again_under_another_kernel_and_not_during_a_switch(asked, capsys):
    now = {"kernel": os.uname().release, "driver": pace.driver()}
    for record, due in (({"pace": now}, False), ({}, False), ({"pace": {**now, "kernel": "1"}}, True)):
        write(common.gate_record("chat"), record)
        pace.measure_again("chat")
        assert asked == ([("again", "chat")] if due else [])
    assert "under another driver or kernel: 20.0 tokens/s" in capsys.readouterr().out
    with open(f"{common.RUN}/switch-chat.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        pace.measure_again("chat")
    assert len(asked) == 1


def test_a_gate_that_says_nothing_usable_measures_nothing(tmp_path, monkeypatch):
    for said in ("raise SystemExit(1)", "print(7)", "print('{\"checks\": []}')"):
        (tmp_path / "gate.py").write_text(said)
        monkeypatch.setattr(pace, "GATE", str(tmp_path / "gate.py"))
        assert pace.measured("pace", "chat") is None
    (tmp_path / "gate.py").write_text(
        "import json, sys\n"
        "print(json.dumps({'checks': [{'ok': True, 'found': sys.argv[1:], 'hint': ''}]}))\n"
    )  # fmt: skip
    assert pace.measured("again", "chat") == {"ok": True, "found": ["again", common.plan_path("chat")]}
