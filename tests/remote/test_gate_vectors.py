"""What the gate calls sound vectors, sound scores and a good speed of reading, against a small model of our own in a
server's place. Each way in which it can be broken has a name and is caught."""

from __future__ import annotations

import math
import random
import time
import zlib

import pytest

from llamafleet.remote import gate, gate_reading, gate_reply, gate_scores, gate_spec, gate_vectors
from tests.serving import Server, serving

LENGTH = 16
EXAMPLE = {"query": "Where is Rome?", "relevant": "Rome is in Italy.", "irrelevant": "Fish swim."}


class Model(Server):
    def __init__(self):
        super().__init__()
        self.broken, self.seconds, self.busy = "", 0.0, 0

    def vector(self, text):
        chance = random.Random(0 if self.broken == "deaf" else zlib.crc32(text.encode()))
        if self.broken == "random":
            chance = random.Random()
        found = [chance.gauss(0, 1) for _ in range(LENGTH - (self.broken == "short"))]
        norm = math.sqrt(sum(one * one for one in found)) * (2 if self.broken == "long" else 1)
        found = [0.0 if self.broken == "zero" else one / norm for one in found]
        return [None, *found[1:]] if self.broken == "nan" else found

    def score(self, query, text):
        chance = random.Random(zlib.crc32(f"{query}{text}".encode()))
        score = {"tiny": 1e-22, "nan": None, "infinite": math.inf, "random": random.random() * 9}.get(
            self.broken, chance.uniform(-5, 5)
        )
        if text == EXAMPLE["relevant"]:
            return -8.0 if self.broken == "reversed" else 8.0
        return score

    def respond(self, path, body, headers):
        if self.broken == "error":
            return 500, {"error": "input is too large"}
        if path == "/tokenize":
            return 200, {"tokens": list(body["content"].encode())}
        if path == "/slots":
            return 200, [{"id": number, "is_processing": number < self.busy} for number in range(2)]
        time.sleep(self.seconds)
        if path == "/embeddings":
            count = len(body["content"]) - (self.broken == "one less")
            return 200, [{"index": 0, "embedding": [self.vector(f"{body['content']}{n}") for n in range(count)]}]
        if path == "/v1/rerank":
            rows = [{"index": n, "relevance_score": self.score(body["query"], text)} for n, text in enumerate(body["documents"])]  # fmt: skip
            return 200, {"results": sorted(rows, key=lambda row: -(row["relevance_score"] or 0))}
        assert path == "/v1/embeddings"
        return 200, {"data": [{"index": 0, "embedding": self.vector(body["input"])}], "usage": {}}


@pytest.fixture
def model():
    with serving(Model()) as model:
        yield model


def spec_of(model, **told):
    return {"url": model.url, "api_keys": None, "context_tokens": 1024, "files": [], "argv": ["s"], "gpus": [],
            "speed_floor_percent": 40, "predicted_tokens_per_s": 20.0, "last": {}, "measured": {}, "record": "/g/a.json",
            "serves": "embedding", "pooling": "mean", "vector_elements": LENGTH, "rerank_example": None, "deploying": True, **told}  # fmt: skip


def remembered(spec, model, **more):
    return spec_of(
        model, last={"speed_key": gate_reply.speed_key(spec), **spec["measured"], **more}, serves=spec["serves"]
    )


@pytest.mark.parametrize("pooling", ["mean", "none"])
def test_a_sound_embedder_passes(model, pooling):
    spec = spec_of(model, pooling=pooling)
    found = gate_vectors.check_embedding(spec)
    assert found["ok"], found
    assert len(spec["measured"]["first_vector"]["vector"]) == LENGTH
    assert set(model.paths) <= ({"/embeddings", "/tokenize"} if pooling == "none" else {"/v1/embeddings"})


@pytest.mark.parametrize(
    ("broken", "expected", "found"),
    [
        ("error", "200 and a vector", "500: "),
        ("short", "vectors of 16 elements", "one of 15"),
        ("long", "the norm 1", "0.5"),
        ("zero", "the norm 1", "0.0"),
        ("nan", "finite numbers", "None"),
        ("random", "the same vector for the same text", "a distance"),
        ("deaf", "another vector for another text", "a distance"),
    ],
)
def test_each_way_to_embed_garbage_is_caught(model, broken, expected, found):
    model.broken = broken
    told = gate_vectors.check_embedding(spec_of(model))
    assert (told["name"], told["ok"]) == ("embedding", False)
    assert expected in told["expected"] and found in told["found"] and told["hint"]


def test_a_vector_for_each_token(model):
    model.broken = "one less"
    told = gate_vectors.check_embedding(spec_of(model, pooling="none"))
    assert not told["ok"] and "a vector for each of 85 tokens" in told["expected"] and told["found"] == "84 vectors"


def test_the_same_model_embeds_as_at_the_last_gate(model):
    spec = spec_of(model)
    assert gate_vectors.check_embedding(spec)["ok"]
    again = remembered(spec, model)
    assert gate_vectors.check_embedding(again)["ok"]
    again["last"]["first_vector"]["vector"].reverse()
    told = gate_vectors.check_embedding(again)
    assert not told["ok"] and "the last gate" in told["expected"] and "rm /g/a.json" in told["hint"]
    # Of another model, or another pooling, nothing is expected.
    assert gate_vectors.check_embedding({**again, "files": [{"path": "/m", "size_bytes": 1, "sha256": None}]})["ok"]


def test_a_sound_reranker_passes(model):
    spec = spec_of(model, serves="reranking", rerank_example=EXAMPLE)
    assert gate_scores.check_scores(spec)["ok"] and len(spec["measured"]["first_scores"]["scores"]) == 2


@pytest.mark.parametrize(
    ("broken", "expected", "found"),
    [
        ("error", "200 and scores", "500: "),
        ("nan", "finite scores of 2 documents", "None"),
        ("infinite", "finite scores of 2 documents", "inf"),
        ("random", "the same scores", "then"),
        ("tiny", "different scores for different documents", "1e-22"),
        ("reversed", "rerank_example", "-8"),
    ],
)
def test_each_way_to_score_garbage_is_caught(model, broken, expected, found):
    model.broken = broken
    told = gate_scores.check_scores(spec_of(model, serves="reranking", rerank_example=EXAMPLE))
    assert (told["name"], told["ok"]) == ("scores", False)
    assert expected in told["expected"] and found in told["found"] and told["hint"]


def test_the_same_model_scores_as_at_the_last_gate(model):
    spec = spec_of(model, serves="reranking")
    assert gate_scores.check_scores(spec)["ok"]
    again = remembered(spec, model)
    again["last"]["first_scores"]["scores"][0] += 3
    told = gate_scores.check_scores(again)
    assert not told["ok"] and "the scores of the last gate" in told["expected"]


@pytest.mark.parametrize("serves", ["embedding", "reranking"])
def test_the_speed_of_reading_is_that_of_an_input(model, serves):
    model.seconds = 0.02
    spec = spec_of(model, serves=serves)
    assert gate_reading.check_reading(spec)["ok"]
    # PROMPT has 85 characters, one token each here.
    assert 85 / 0.08 < spec["measured"]["read_tokens_per_s"] < 85 / 0.02
    assert spec["measured"]["prompt_tokens_per_s"] == spec["measured"]["read_tokens_per_s"]


def test_the_input_is_longer_where_the_model_has_longer_tokens_and_never_beyond_the_context(model, monkeypatch):
    monkeypatch.setattr(gate_reading, "tokenized", lambda spec, text: text.split())
    assert gate_reading.long_input(spec_of(model))[1] == 119  # PROMPT has 17 words
    assert gate_reading.long_input(spec_of(model, context_tokens=60))[1] == 34


def test_a_server_that_reads_much_more_slowly_than_before_is_rejected(model):
    model.seconds = 0.02
    spec = spec_of(model)
    assert gate_reading.check_reading(spec)["ok"]
    usual = spec["measured"]["read_tokens_per_s"]
    # The floor is 40 %; what servers that write have measured counts for nothing.
    assert gate_reading.check_reading(remembered(spec, model, read_speeds=[usual * 2], speeds=[1e9]))["ok"]
    told = gate_reading.check_reading(remembered(spec, model, read_speeds=[usual * 5]))
    assert not told["ok"] and "40 %" in told["expected"] and "tokens/s" in told["found"]


@pytest.mark.parametrize("serves", ["embedding", "reranking"])
def test_a_deploy_asks_for_the_longest_input_where_that_does_not_take_long(model, serves):
    spec = spec_of(model, serves=serves, measured={"read_tokens_per_s": 100.0})
    assert gate_reading.check_longest(spec)["found"] == "an answer to 945 tokens"  # of 1024, in pieces of 86
    assert gate_reading.check_longest({**spec, "deploying": False}) is None
    slow = gate_reading.check_longest({**spec, "measured": {"read_tokens_per_s": 10.0}})
    assert slow["ok"] and slow["found"] == "not asked: it would take about 102 s"
    model.broken = "error"
    told = gate_reading.check_longest(spec)
    assert (told["name"], told["ok"]) == ("longest input", False) and "smaller context_tokens" in told["hint"]
    assert gate_reading.check_longest({**spec, "serves": "chat"}) is None


def test_a_busy_reader_is_not_measured(model):
    model.busy = 1
    spec = spec_of(model)
    assert gate_reading.check_reading(spec)["found"] == "not measured: 1 slots are busy" and spec["measured"] == {}


def test_each_server_is_asked_what_it_serves(model):
    asked = {}
    for serves in ("chat", "embedding", "reranking"):
        spec = spec_of(model, serves=serves)
        names = [
            check(spec)
            for check in (gate_vectors.check_embedding, gate_scores.check_scores, gate_reading.check_reading)
        ]
        asked[serves] = [one["name"] for one in names if one]
        if serves != "chat":
            assert gate_reply.check_completion(spec) is gate_reply.check_speed(spec) is None
    assert asked == {"chat": [], "embedding": ["embedding", "speed"], "reranking": ["scores", "speed"]}


def test_the_record_keeps_speeds_of_reading_apart(model):
    spec = {**spec_of(model), "identity": "i", "release": "r", "expected": None}
    spec["measured"] = {"read_tokens_per_s": 50.0}
    spec["last"] = {"speed_key": gate_reply.speed_key(spec), "read_speeds": [40.0], "speeds": [7.0]}
    record = gate.record_of(spec, {"ok": True, "checks": [], "decode_tokens_per_s": None})
    assert record["read_speeds"] == [40.0, 50.0] and record["expected"] is None
    assert gate_spec.usable(record)["read_speeds"] == [40.0, 50.0]
    for damaged in ({"read_speeds": ["x"]}, {"first_vector": {"vector": []}}, {"first_scores": {"scores": [None]}}):
        assert gate_spec.usable(damaged) == {}
    # Another command line has other speeds.
    spec["last"]["speed_key"] = "other"
    assert gate.record_of(spec, {"ok": True, "checks": []})["read_speeds"] == [50.0]
