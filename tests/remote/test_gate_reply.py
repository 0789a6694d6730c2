"""What the gate calls a healthy answer and a good speed, against a small model of our own in a server's place.

The model is what any is to the gate: the next token's likelihoods follow from the tokens before. Each way in
which it can be broken has a name and is caught.
"""

from __future__ import annotations

import json
import math
import random
import zlib

import pytest

from llamafleet.remote import gate_reply
from tests.serving import Server, serving

VOCABULARY = 40


class Model(Server):
    def __init__(self):
        super().__init__()
        self.broken, self.speeds, self.busy = "", [50.0], 0

    def likelihoods(self, before, one_by_one):
        """Log-probabilities of all tokens after these."""
        seed = zlib.crc32(bytes(before))
        if self.broken == "release":
            seed += 1
        if self.broken == "one by one" and one_by_one:
            seed += 7
        if self.broken == "deaf":
            seed = 0
        chance = random.Random(seed)
        if self.broken == "random":
            chance = random.Random()
        logits = [chance.uniform(-8, 8) for _ in range(VOCABULARY)]
        total = math.log(sum(math.exp(value) for value in logits))
        found = dict(enumerate(value - total for value in logits))
        return dict.fromkeys(found, math.nan) if self.broken == "nan" else found

    def complete(self, body):
        prompt = body["prompt"]
        tokens = self.tokens(prompt) if isinstance(prompt, str) else list(prompt)
        read = len(tokens) - (3 if self.broken == "cut" else 0)
        made, places = [], []
        for step in range(body["n_predict"] - (1 if self.broken == "early" else 0)):
            likely = self.likelihoods([*tokens, *made], step > 0)
            top = sorted(likely, key=lambda token: -likely[token])[: max(1, body["n_probs"])]
            token = 39 if self.broken == "chosen" and step == 4 and 39 not in top else top[0]
            made.append(token)
            places.append({"id": token, "logprob": likely[token], "top_logprobs": [{"id": one, "logprob": likely[one]} for one in top]})  # fmt: skip
        speed = self.speeds.pop(0) if len(self.speeds) > 1 else self.speeds[0]
        return {"tokens_predicted": len(made), "tokens": made, "tokens_evaluated": read,
                "completion_probabilities": places if body["n_probs"] else None,
                "timings": {"predicted_per_second": speed, "prompt_per_second": 700.0}}  # fmt: skip

    @staticmethod
    def tokens(text):
        return [ord(letter) % VOCABULARY for letter in text]

    def respond(self, path, body, headers):
        if path == "/tokenize":
            return 200, {"tokens": self.tokens(body["content"])}
        if path == "/slots":
            return 200, [{"id": number, "is_processing": number < self.busy} for number in range(2)]
        if self.broken == "error":
            return 500, {"error": "Compute error."}
        return 200, self.complete(body)


@pytest.fixture
def model():
    with serving(Model()) as one:
        yield one


@pytest.fixture
def spec(model, monkeypatch):
    monkeypatch.setattr(gate_reply, "SPEED_PAUSE", 0.0)
    return {"url": model.url, "api_keys": None, "argv": ["/r1/llama-server", "--threads", "8"], "gpus": [],
            "files": [{"path": "/m/x.gguf", "size_bytes": 9, "sha256": "ab"}], "last": {}, "measured": {},
            "record": "/g/chat.json", "serves": "chat", "speed_floor_percent": 40, "predicted_tokens_per_s": 20.0}  # fmt: skip


# --- the answer ---------------------------------------------------------------------------------


def test_a_healthy_model_passes_and_is_remembered(spec):
    assert gate_reply.check_completion(spec)["ok"]
    assert spec["measured"]["prompt_tokens_per_s"] == 700.0
    assert len(spec["measured"]["first"]["top"]) == gate_reply.TOP


@pytest.mark.parametrize(
    ("broken", "expected", "found"),
    [
        ("error", "200 and 12 tokens", "500, 0 tokens"),
        ("early", "200 and 12 tokens", "200, 11 tokens"),
        ("random", "the same answer twice", "4 different ones"),
        ("nan", "likelihoods that add up", "nan"),
        ("chosen", "the token among them", "for token 39"),
        ("cut", "a prompt of 85 tokens", "82"),
        ("one by one", "at once and one by one", "{"),
        ("deaf", "another prompt", "the same likelihoods"),
    ],
)
def test_each_way_to_answer_garbage_is_caught(spec, model, broken, expected, found):
    model.broken = broken
    told = gate_reply.check_completion(spec)
    assert told["ok"] is False and told["hint"]
    assert expected in told["expected"] and found in str(told["found"])
    assert spec["measured"] == {}


def test_two_answers_of_a_busy_server_may_differ(spec, model, monkeypatch):
    answers = [[1], [2], [1]]
    monkeypatch.setattr(gate_reply, "complete", lambda *_: {"tokens": answers.pop(0)})
    assert gate_reply.same_twice(spec) == {"tokens": [1]} and answers == []


def after(spec, **last):
    """The spec of the next gate, as it is read back from the record."""
    record = json.loads(json.dumps({**spec["measured"], **last}))
    return {**spec, "last": record, "measured": {}}


def test_the_same_model_answers_as_at_the_last_gate(spec, model):
    gate_reply.check_completion(spec)
    assert gate_reply.check_completion(after(spec))["ok"]
    model.broken = "release"
    told = gate_reply.check_completion(after(spec))
    assert told["ok"] is False and "as at the last gate" in told["expected"] and "rm /g/chat.json" in told["hint"]


def test_another_model_may_answer_otherwise(spec, model):
    gate_reply.check_completion(spec)
    model.broken = "release"
    other = {**spec, "files": [{"path": "/m/x.gguf", "size_bytes": 9, "sha256": "cd"}]}
    assert gate_reply.check_completion(after(other))["ok"]


def test_rounding_of_another_kernel_is_no_garbage():
    gate_reply.compare({1: -0.5, 2: -1.0}, {2: -0.6, 1: -0.9}, "", "")
    with pytest.raises(gate_reply.Bad):
        gate_reply.compare({1: -0.5, 2: -3.0}, {2: -0.5, 1: -3.0}, "", "")
    with pytest.raises(gate_reply.Bad):  # not even a candidate
        gate_reply.compare({1: -0.5}, {2: -0.5}, "", "")


# --- the speed ----------------------------------------------------------------------------------


def known(spec, *speeds, **changes):
    changed = {**spec, **changes}
    return {**changed, "last": {"speed_key": gate_reply.speed_key(spec), "speeds": list(speeds)}}


@pytest.mark.parametrize(
    ("speeds", "ok"), [([39.0], False), ([41.0], True), ([10.0, 10.0, 10.0, 10.0, 80.0], True)], ids=str
)
def test_the_floor_is_a_share_of_the_usual_speed(spec, model, speeds, ok):
    model.speeds = speeds
    told = gate_reply.check_speed(known(spec, 500.0, 100.0, 90.0))  # one lucky figure does not raise it
    assert ("with a load of" in told["found"]) is not ok
    assert told["ok"] is ok and "at least 40.0 tokens/s (40 % of 100.0" in told["expected"]
    assert told["hint"] == "" or "rm /g/chat.json" in told["hint"]


def test_the_best_of_some_tries_is_remembered(spec, model):
    model.speeds = [50.0, 70.0, 60.0]
    assert gate_reply.check_speed(spec)["ok"]
    assert spec["measured"] == {"decode_tokens_per_s": 70.0, "prompt_tokens_per_s": 700.0}


def test_without_an_earlier_figure_little_is_asked(spec, model):
    model.speeds = [0.9]
    assert gate_reply.check_speed(spec)["expected"] == "at least 1.0 tokens/s (5 % of 20.0, a rough prediction)"
    assert gate_reply.check_speed(spec)["ok"] is False
    model.speeds = [1.1]
    assert gate_reply.check_speed(spec)["ok"] is True


def test_a_tiny_model_s_prediction_asks_no_more_than_a_large_one_s(spec):
    assert gate_reply.floor({**spec, "predicted_tokens_per_s": 90_000.0})[0] == 5.0


def test_other_flags_are_not_compared_and_another_release_is(spec):
    assert gate_reply.floor(known(spec, 100.0, argv=["/r2/llama-server", "--threads", "8"]))[0] == 40.0
    assert gate_reply.floor(known(spec, 100.0, argv=["/r1/llama-server", "--threads", "4"]))[0] == 1.0


def test_no_floor(spec, model):
    model.speeds = [0.001]
    assert gate_reply.check_speed(known(spec, 100.0, speed_floor_percent=0))["ok"]


def test_a_busy_server_is_not_measured(spec, model):
    model.busy, model.speeds = 1, [0.001]
    told = gate_reply.check_speed(known(spec, 100.0))
    assert told["ok"] and "1 slots are busy" in told["found"] and "decode_tokens_per_s" not in spec["measured"]


def test_the_best_speed_of_reading_a_prompt_is_remembered(spec):
    before = known(spec, 100.0)
    before["last"]["prompt_tokens_per_s"] = 900.0
    gate_reply.check_speed(before)
    assert before["measured"]["prompt_tokens_per_s"] == 900.0
    other = {**before, "argv": ["/r1/llama-server", "--threads", "1"], "measured": {}}
    gate_reply.check_speed(other)  # other flags: other speeds
    assert other["measured"]["prompt_tokens_per_s"] == 700.0
