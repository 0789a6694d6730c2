"""The gate of a server with LoRA adapters."""

from __future__ import annotations

import gate_spec
import pytest
from gate_adapters import check_adapters

from tests.remote.test_gate import Answers
from tests.serving import serving

A, B = {"path": "/m/a.gguf", "scale": 1.0}, {"path": "/m/b.gguf", "scale": 0.1}


class Adapted(Answers):
    """Answers a completion by the scales that it asks for."""

    dead, told, status = (), ({"id": 0, **A}, {"id": 1, **B}), 200

    def respond(self, path, body, headers):
        if path == "/lora-adapters":
            return 200, list(self.told)
        scales = tuple(0.0 if one["id"] in self.dead else one["scale"] for one in body["lora"])
        top = [{"id": 7, "logprob": -1.0 - sum(scale * (n + 1) for n, scale in enumerate(scales))}]
        return self.status, {"tokens_predicted": 1, "completion_probabilities": [{"id": 7, "top_logprobs": top}]}


@pytest.fixture
def server():
    with serving(Adapted()) as one:
        yield one


def found(server, *planned):
    return check_adapters({"url": server.url, "api_keys": None, "adapters": list(planned)})


def test_without_adapters_nothing_is_asked(server):
    assert found(server) is None and server.asked == []
    assert check_adapters({"url": server.url, "api_keys": None}) is None


def test_of_an_embedding_server_the_list_alone_is_asked(server):
    spec = {"url": server.url, "api_keys": None, "adapters": [A, B], "serves": "embedding"}
    assert check_adapters(spec)["ok"] and server.paths == ["/lora-adapters"]
    server.told = [{"id": 0, **A}]
    assert not check_adapters(spec)["ok"]


def test_each_adapter_is_asked_for_alone(server):
    assert found(server, A, B)["ok"]
    asked = [[one["scale"] for one in body["lora"]] for path, body in server.asked if path == "/completion"]
    assert asked == [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize(
    ("told", "what"),
    [
        ([{"id": 0, **A}], "/m/b.gguf"),  # one was not loaded
        ([{"id": 0, **B}, {"id": 1, **A}], "/m/a.gguf"),  # in another order
        ([{"id": 0, **A}, {"id": 1, **B, "scale": 0.2}], "0.2"),  # a client has set it
        ([{"id": 0, **A}, {"id": 1, "path": "/m/b.gguf"}], "None"),
        ([1, 2], "200"),
    ],
)
def test_other_adapters_than_the_planned_ones_fail(server, told, what):
    server.told = told
    bad = found(server, A, B)
    assert not bad["ok"] and bad["name"] == "adapters" and what in f"{bad['expected']} {bad['found']}"


def test_a_scale_is_compared_as_llama_server_keeps_it(server):
    server.told = [{"id": 0, **A}, {"id": 1, **B, "scale": 0.10000000149011612}]
    assert found(server, A, B)["ok"]


def test_an_adapter_that_changes_nothing_fails_unless_it_waits_for_its_words(server):
    server.dead = (1,)
    bad = found(server, A, B)
    assert not bad["ok"] and "/m/b.gguf" in bad["expected"]
    server.told = [{"id": 0, **A}, {"id": 1, **B, "alora_invocation_tokens": [5, 6]}]
    assert found(server, A, B)["ok"]


def test_a_server_that_does_not_answer_with_an_adapter_fails(server):
    server.status = 500
    assert not found(server, A, B)["ok"]


@pytest.mark.parametrize(("value", "usable"), [([], True), ([A], True), ([{"path": "/a"}], False), ([{**A, "scale": "1"}], False),
                                               ({}, False)])  # fmt: skip
def test_the_form_in_plan_json_is_checked(value, usable):
    assert gate_spec.is_adapters(value) is usable
