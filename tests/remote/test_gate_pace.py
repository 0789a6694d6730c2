"""The gate's guard against regressions: what a measurement asks of a server, and what fails, passes or is only told."""

from __future__ import annotations

import time

import gate_pace
import gate_spec
import pytest
from gate_reply import speed_key

from tests.serving import Server, serving

OLD, NEW = "a" * 40, "b" * 40


class Measured(Server):
    """llama-server with these speeds, one for each completion, the last one for ever; its one slot has been used."""

    def __init__(self):
        super().__init__()
        self.speeds, self.busy, self.bodies = [20.0], False, []

    def respond(self, path, body, headers):
        if path == "/tokenize":
            return 200, {"tokens": [3, 4, 5]}
        if path == "/slots":
            return 200, [{"id": 0, "is_processing": self.busy, "id_task": 7, "n_prompt_tokens": 900}]
        if path == "/props":
            return 200, {"is_sleeping": True}
        self.bodies.append(body)
        speed = self.speeds.pop(0) if len(self.speeds) > 1 else self.speeds[0]
        return 200, {"tokens_predicted": body["n_predict"], "timings": {
            "prompt_n": len(body["prompt"]), "prompt_per_second": 100.0, "predicted_per_second": speed}}  # fmt: skip


class Others:
    """CPU seconds of other programs, asked before and after each request: so many CPUs, the last number for ever."""

    def __init__(self):
        self.cpus, self.began = [0.0], None

    def __call__(self, pid):
        if self.began is None:
            self.began = time.monotonic()
            return 0.0
        took, self.began = time.monotonic() - self.began, None
        return took * (self.cpus.pop(0) if len(self.cpus) > 1 else self.cpus[0])


@pytest.fixture
def model():
    with serving(Measured()) as one:
        yield one


@pytest.fixture(autouse=True)
def others(monkeypatch):
    found = Others()
    monkeypatch.setattr(gate_pace, "others_seconds", found)
    monkeypatch.setattr(gate_pace, "cpus", lambda: 8)
    monkeypatch.setattr(gate_pace, "main_pid", lambda unit: 42)
    for name in ("PAUSE_SECONDS", "IDLE_SECONDS", "ROUND_PAUSE_SECONDS"):
        monkeypatch.setattr(gate_pace, name, 0.0)
    return found


@pytest.fixture
def spec(model):
    return {"url": model.url, "unit": "llama-server-a.service", "api_keys": None, "files": [], "gpus": [],
            "argv": ["/r2/llama-server", "--threads", "8"], "backend": "cpu", "measured": {}, "last": {},
            "serves": "chat", "speed_floor_percent": 40, "deploying": True, "context_tokens": 1024, "release": "r2",
            "commit": NEW, "accept_slower": None}  # fmt: skip


def before(spec, decode, **more):
    """The spec with the pace of the release before it, measured a minute ago."""
    pace = {**gate_pace.state(spec), "release": "r1", "commit": OLD, "time": time.time() - 60, "tokens": [64, 16],
            "prompt": [100.0] * 5, "decode": decode, "others": [0.0] * 5, **more}  # fmt: skip
    assert gate_spec.is_pace(pace)
    return {**spec, "last": {"ok": True, "pace": pace}}


def test_a_slower_build_fails_with_both_speeds_both_builds_and_the_way_out(spec, model):
    model.speeds = [10.0]
    found = gate_pace.check_pace(before(spec, [20.0] * 5))
    assert not found["ok"] and spec["measured"] == {}
    assert "20.0 ± 0.0 tokens/s written (aaaaaaaaaaaa, release r1" in found["expected"]
    assert "10.0 ± 0.0 tokens/s written (bbbbbbbbbbbb, release r2" in found["found"]
    assert f'accept_slower = "{NEW}"' in found["hint"] and "0.00 of 8 CPUs" in found["hint"]
    assert len(model.bodies) == gate_pace.ROUNDS * (1 + gate_pace.REQUESTS)


def test_it_is_accepted_by_its_commit_alone(spec, model):
    model.speeds = [10.0]
    assert not gate_pace.check_pace({**before(spec, [20.0] * 5), "accept_slower": OLD})["ok"]
    found = gate_pace.check_pace({**before(spec, [20.0] * 5), "accept_slower": NEW})
    assert found["ok"] and "accepted" in found["hint"]
    assert spec["measured"]["pace"]["decode"] == [10.0] * gate_pace.REQUESTS


def test_one_slow_round_is_no_regression(spec, model):
    model.speeds = [10.0] * (1 + gate_pace.REQUESTS) + [20.0]
    assert gate_pace.check_pace(before(spec, [20.0] * 5))["ok"]
    assert spec["measured"]["pace"]["decode"] == [20.0] * gate_pace.REQUESTS


def test_a_request_counts_only_while_others_compute_no_more(spec, model, others):
    others.cpus = [4.0] * 4 + [0.0]
    model.speeds = [20.0, *[2.0] * 4, 20.0]  # of the warm-up, of four requests, of all others
    found = gate_pace.check_pace(before(spec, [20.0] * 5))
    assert found["ok"] and spec["measured"]["pace"]["decode"] == [20.0] * gate_pace.REQUESTS
    assert max(spec["measured"]["pace"]["others"]) <= 0.2


def test_where_others_compute_all_the_time_nothing_is_compared_and_that_is_told(spec, model, others, monkeypatch):
    monkeypatch.setattr(gate_pace, "QUIET_SECONDS", 0.1)
    others.cpus, model.speeds = [4.0], [2.0]
    found = gate_pace.check_pace(before(spec, [20.0] * 5))
    assert found["ok"] and found["hint"] == "nothing was compared" and "pace" not in spec["measured"]
    assert found["found"].startswith("not measured: other programs use ") and "of 8 CPUs" in found["found"]


@pytest.mark.parametrize("more", [{"kernel": "1"}, {"driver": "570"}, {"time": 1.0}])
def test_what_was_not_measured_in_this_switch_is_told_and_turns_nothing_away(spec, model, more):
    model.speeds = [10.0]
    found = gate_pace.check_pace(before(spec, [20.0] * 5, **more))
    assert found["ok"] and "the cause may be the host" in found["hint"] and "10.0 ± 0.0" in found["found"]
    assert len(model.bodies) == 1 + gate_pace.REQUESTS


@pytest.mark.parametrize("more", [{"key": "of other flags"}, {"decode": [10.0] * 5}])
def test_what_is_another_thing_or_no_slower_passes(spec, model, more):
    model.speeds = [10.0]
    found = gate_pace.check_pace(before(spec, **{"decode": [20.0] * 5, **more}))
    assert found["ok"] and not found["hint"] and spec["measured"]["pace"]["release"] == "r2"


def test_both_read_and_write_as_many_tokens_and_nothing_of_the_cache(spec, model):
    gate_pace.check_pace(before(spec, [20.0] * 5))
    [measured] = {(len(body["prompt"]), body["n_predict"], body["cache_prompt"]) for body in model.bodies[1:]}
    assert measured == (64, 16, False)
    assert not any("id_slot" in body for body in model.bodies)  # the server keeps the latest conversations


@pytest.mark.parametrize(
    ("known", "context", "sizes"),
    [
        ({}, 4096, [32, 8]),
        ({"prompt_tokens_per_s": 300.0, "decode_tokens_per_s": 40.0}, 4096, [150, 20]),
        ({"prompt_tokens_per_s": 9000.0, "decode_tokens_per_s": 900.0}, 4096, [512, 64]),
        ({"prompt_tokens_per_s": 9000.0, "decode_tokens_per_s": 900.0}, 256, [184, 64]),
    ],
)
def test_a_request_takes_about_half_a_second_for_reading_and_for_writing(spec, known, context, sizes):
    assert gate_pace.sizes_for({**spec, "measured": known, "context_tokens": context}) == sizes
    last = {"prompt_tokens_per_s": 90.0, "speeds": [10.0, 24.0, 99.0]}
    assert gate_pace.sizes_for({**spec, "last": last}) == [45, 12]


def test_a_server_that_is_slower_for_a_minute_is_not_measured_again(spec, model, monkeypatch):
    monkeypatch.setattr(gate_pace, "ROUNDS_SECONDS", 0.0)
    model.speeds = [10.0]
    assert not gate_pace.check_pace(before(spec, [20.0] * 5))["ok"]
    assert len(model.bodies) == 1 + gate_pace.REQUESTS


def test_a_slow_server_is_measured_by_fewer_requests(spec, model, monkeypatch):
    monkeypatch.setattr(gate_pace, "MOST_SECONDS", 0.0)
    assert gate_pace.measure(spec)["decode"] == [20.0] * gate_pace.LEAST


def test_the_same_build_is_not_measured_again(spec, model):
    same = gate_pace.state(spec)
    assert gate_pace.check_pace(before(spec, [20.0] * 5, **same)) is None and model.bodies == []


@pytest.mark.parametrize("more", [{"deploying": False}, {"speed_floor_percent": 0}, {"serves": "embedding"}])
def test_not_outside_of_a_deploy_and_not_where_speed_does_not_count(spec, model, more):
    assert gate_pace.check_pace({**before(spec, [20.0] * 5), **more}) is None and model.bodies == []


def test_a_server_at_work_one_that_sleeps_and_one_beside_others_on_its_gpu_are_left_alone(spec, model, monkeypatch):
    model.busy = True
    found = gate_pace.check_pace(before(spec, [20.0] * 5))
    assert found["ok"] and found["found"] == "not measured: its slots are at work"
    model.busy = False
    with pytest.raises(gate_pace.Busy, match="sleeps"):
        gate_pace.measure({**spec, "argv": ["llama-server", "--sleep-idle-seconds", "60"]})
    monkeypatch.setattr(gate_pace, "used_by_others", lambda uuids: dict.fromkeys(uuids, 37))
    with pytest.raises(gate_pace.Busy, match="37 % of GPU-1"):
        gate_pace.measure({**spec, "gpus": [{"uuid": "GPU-1"}], "backend": "cuda"})
    assert model.bodies == []


def test_the_old_server_is_measured_only_where_it_has_passed_a_gate(spec):
    assert not gate_pace.check_old_pace(spec)["ok"] and spec["measured"] == {}
    assert gate_pace.check_old_pace({**spec, "last": {"ok": True}})["ok"]
    assert spec["measured"]["pace"]["release"] == "r2" and spec["measured"]["pace"]["key"] == speed_key(spec)


def test_a_build_that_is_slower_since_the_kernel_changed_is_told_once(spec, model):
    spec["last"] = before(spec, [30.0] * 5, release="r2", kernel="1")["last"]
    assert gate_pace.check_again(spec)["ok"]
    told = spec["measured"]["slower"]
    assert "kernel 1;" in told and "20.0 ± 0.0 tokens/s written in place of 30.0 ± 0.0" in told
    spec["last"] = {**spec["last"], **spec["measured"]}
    model.bodies.clear()
    assert not gate_pace.check_again(spec)["ok"] and model.bodies == []


@pytest.mark.parametrize("more", [{}, {"kernel": "1", "release": "r1"}, {"kernel": "1", "key": "of other flags"}])
def test_nothing_is_due_under_the_same_kernel_or_for_another_build(spec, model, more):
    spec["last"] = before(spec, [30.0] * 5, **{"release": "r2", **more})["last"]
    assert not gate_pace.check_again(spec)["ok"] and model.bodies == []


def test_what_others_compute_is_all_but_the_server_and_the_idle_time(tmp_path):
    (tmp_path / "42").mkdir()
    (tmp_path / "stat").write_text("cpu  100 20 30 9000 500 1 2 47 5 0\ncpu0 1 1 1 1\n")
    (tmp_path / "42" / "stat").write_text("42 (a b) c) S 1 42 42 0 -1 4194560 1 0 0 0 60 15 0 0 20 0\n")
    ticks = gate_pace.os.sysconf("SC_CLK_TCK")
    assert REAL(42, str(tmp_path)) == pytest.approx((200 - 75) / ticks)
    assert REAL(43, str(tmp_path)) is None


REAL = gate_pace.others_seconds
