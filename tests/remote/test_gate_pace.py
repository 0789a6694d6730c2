"""The gate's guard against regressions: what counts as slower, and what a measurement may cost."""

from __future__ import annotations

import gate_pace
import gate_spec
import pytest
from gate_reply import speed_key

from tests.serving import Server, serving

OLD, NEW = "a" * 40, "b" * 40


class Measured(Server):
    """llama-server with these speeds, one for each completion, the last one for ever; `bare` slots of two."""

    def __init__(self):
        super().__init__()
        self.speeds, self.bare, self.busy, self.bodies = [20.0], [0, 1], False, []

    def respond(self, path, body, headers):
        if path == "/tokenize":
            return 200, {"tokens": [3, 4, 5]}
        if path == "/slots":
            return 200, [{"id": number, "is_processing": self.busy, "id_task": 7,
                          "n_prompt_tokens": 0 if number in self.bare else 900} for number in range(2)]  # fmt: skip
        self.bodies.append(body)
        speed = self.speeds.pop(0) if len(self.speeds) > 1 else self.speeds[0]
        return 200, {"tokens_predicted": body["n_predict"], "timings": {
            "prompt_n": len(body["prompt"]), "prompt_per_second": 100.0, "predicted_per_second": speed}}  # fmt: skip


@pytest.fixture
def model():
    with serving(Measured()) as one:
        yield one


@pytest.fixture
def spec(model, monkeypatch):
    monkeypatch.setattr(gate_pace, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(gate_pace, "IDLE_SECONDS", 0.0)
    return {"url": model.url, "api_keys": None, "argv": ["/r2/llama-server", "--threads", "8"], "gpus": [],
            "files": [], "measured": {}, "last": {}, "serves": "chat", "speed_floor_percent": 40, "deploying": True,
            "context_tokens": 1024, "release": "r2", "commit": NEW, "accept_slower": None}  # fmt: skip


def before(spec, decode, **more):
    """The spec with the pace of the release before it."""
    pace = {"key": speed_key(spec), "release": "r1", "commit": OLD, "driver": gate_pace.driver(), "kernel": "1",
            "prompt": [100.0] * 5, "decode": decode, **more}  # fmt: skip
    assert gate_spec.is_pace(pace)
    return {**spec, "last": {"pace": pace}}


@pytest.mark.parametrize(
    ("old", "new", "slower"),
    [
        ([20.0] * 5, [18.0] * 5, True),
        ([20.0] * 5, [19.2] * 5, False),  # 4 %
        ([20.0] * 5, [25.0] * 5, False),
        ([20.0, 20.1, 19.9, 20.0, 5.0], [20.0, 19.9, 20.1, 4.0, 20.0], False),  # a spike on both sides
        ([20.0, 14.0, 26.0, 17.0, 23.0], [17.0, 12.0, 22.0, 15.0, 20.0], False),  # 15 %, within the spread
        ([20.0, 14.0, 26.0, 17.0, 23.0], [5.0, 5.2, 4.8, 5.1, 4.9], True),
    ],
)
def test_slower_is_what_is_slower_by_more_than_the_spread(old, new, slower):
    assert gate_pace.is_slower(old, new) is slower


def test_a_slower_build_fails_with_both_speeds_both_builds_and_the_way_out(spec, model):
    model.speeds = [10.0]
    found = gate_pace.check_pace(before(spec, [20.0] * 5))
    assert not found["ok"] and spec["measured"] == {}
    assert "20.0 ± 0.0 tokens/s written (aaaaaaaaaaaa, release r1" in found["expected"]
    assert "10.0 ± 0.0 tokens/s written (bbbbbbbbbbbb, release r2" in found["found"]
    assert f'accept_slower = "{NEW}"' in found["hint"]


def test_it_is_accepted_by_its_commit_alone(spec, model):
    model.speeds = [10.0]
    assert not gate_pace.check_pace({**before(spec, [20.0] * 5), "accept_slower": OLD})["ok"]
    found = gate_pace.check_pace({**before(spec, [20.0] * 5), "accept_slower": NEW})
    assert found["ok"] and "accepted" in found["hint"]
    assert spec["measured"]["pace"]["decode"] == [10.0] * 5


def test_load_that_passes_is_no_regression(spec, model):
    model.speeds = [10.0] * (1 + gate_pace.REQUESTS) + [20.0]
    assert gate_pace.check_pace(before(spec, [20.0] * 5))["ok"]
    assert spec["measured"]["pace"]["decode"] == [20.0] * 5


@pytest.mark.parametrize("more", [{"key": "of other flags"}, {"decode": [10.0] * 5}])
def test_what_is_another_thing_or_no_slower_passes(spec, model, more):
    model.speeds = [10.0]
    assert gate_pace.check_pace(before(spec, **{"decode": [20.0] * 5, **more}))["ok"]


def test_the_same_build_is_not_measured_again(spec, model):
    same = gate_pace.state(spec)
    assert gate_pace.check_pace(before(spec, [20.0] * 5, **same)) is None and model.bodies == []


@pytest.mark.parametrize("more", [{"deploying": False}, {"speed_floor_percent": 0}, {"serves": "embedding"}])
def test_not_outside_of_a_deploy_and_not_where_speed_does_not_count(spec, model, more):
    assert gate_pace.check_pace({**before(spec, [20.0] * 5), **more}) is None and model.bodies == []


def test_a_slot_with_a_conversation_is_never_taken(spec, model):
    model.bare = [0]
    gate_pace.measure(spec)
    assert {body["id_slot"] for body in model.bodies} == {0} and not any(body["cache_prompt"] for body in model.bodies)
    model.bodies.clear()
    for one in ({**spec, "argv": ["llama-server", "--kv-unified"]}, spec):
        with pytest.raises(gate_pace.Busy, match="conversation"):
            gate_pace.measure(one)
        model.bare = []
    assert model.bodies == []


def test_a_busy_server_is_left_alone(spec, model):
    model.busy = True
    found = gate_pace.check_pace(before(spec, [20.0] * 5))
    assert found["ok"] and found["found"] == "not measured: its slots are at work" and model.bodies == []


def test_the_old_server_is_measured_only_where_it_has_passed_a_gate(spec):
    assert not gate_pace.check_old_pace(spec)["ok"] and spec["measured"] == {}
    assert (
        gate_pace.check_old_pace({**spec, "last": {"ok": True}})["ok"] and spec["measured"]["pace"]["release"] == "r2"
    )


def test_one_build_that_is_slower_since_the_kernel_changed_is_told(spec):
    now = gate_pace.state(spec)
    old = {**now, "kernel": "1", "prompt": [100.0] * 5, "decode": [30.0] * 5}
    spec["last"] = {"ok": True, "pace": old}
    told = gate_pace.check_old_pace(spec)["hint"]
    assert f"(1 to {now['kernel']})" in told and "20.0" in told and "30.0" in told
    assert gate_pace.changed({**old, "release": "r1"}, spec["measured"]["pace"]) == ""
