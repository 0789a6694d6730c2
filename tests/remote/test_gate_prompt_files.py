"""The operator's chat template and grammar, as the running server tells them."""

from __future__ import annotations

import hashlib

import gate_reply
import gate_spec
import pytest
from gate_prompt_files import FREE, check_prompt_files

from tests.remote.test_gate import Answers
from tests.serving import serving

TEMPLATE, GRAMMAR = "{{ messages }}", 'root ::= "a"\n'


def sums(text):
    return {"sha256": "0" * 64, "served_sha256": hashlib.sha256(text.encode()).hexdigest()}


@pytest.fixture
def server():
    with serving(Answers()) as one:
        one.answer("/props", (200, {"chat_template": TEMPLATE}))
        one.answer("/apply-template", (200, {"prompt": "a"}))
        one.answer("/completion", (200, {"content": "a", "generation_settings": {"grammar": GRAMMAR}}))
        yield one


def found(server, **texts):
    files = {name.replace("_", "-"): sums(text) for name, text in texts.items()}
    return check_prompt_files({"url": server.url, "api_keys": None, "prompt_files": files})


def test_without_files_nothing_is_asked(server):
    assert found(server) is None
    assert check_prompt_files({"url": server.url, "api_keys": None}) is None and server.asked == []


def test_the_files_of_the_plan_are_in_use(server):
    assert found(server, chat_template=TEMPLATE, grammar=GRAMMAR)["ok"]
    assert found(server, json_schema="anything")["ok"]  # which llama-server makes a grammar of


@pytest.mark.parametrize(
    ("path", "answer", "what"),
    [
        ("/props", (200, {"chat_template": "other"}), "template"),
        ("/props", (200, {}), "template"),
        ("/props", (503, {}), "template"),
        ("/apply-template", (500, {"error": "no"}), "template"),
        ("/apply-template", (200, {"prompt": ""}), "template"),
        ("/completion", (400, {"error": "failed to parse grammar"}), "grammar"),
        ("/completion", (200, {"content": "a"}), "grammar"),
        ("/completion", (200, {"generation_settings": {"grammar": ""}}), "grammar"),
        ("/completion", (200, {"generation_settings": {"grammar": "other"}}), "grammar"),
    ],
)
def test_what_is_not_in_use_fails(server, path, answer, what):
    server.answer(path, answer)
    bad = found(server, chat_template=TEMPLATE, grammar=GRAMMAR)
    assert (bad["ok"], bad["name"]) == (False, "prompt files") and bad["hint"] and what in str(bad)


def test_a_template_that_llama_cpp_patches_is_the_file_s(server):
    server.answer("/props", (200, {"chat_template": "{%- if false %}"}))
    assert found(server, chat_template=TEMPLATE)["ok"]


@pytest.mark.parametrize(("files", "more"), [({}, {}), ({"chat-template": sums("a")}, {}), ({"grammar": sums("a")}, FREE),
                                             ({"json-schema": sums("a")}, FREE)])  # fmt: skip
def test_other_checks_answer_without_the_grammar(server, files, more):
    server.answer("/completion", (200, {"tokens_predicted": 3}))
    gate_reply.complete({"url": server.url, "api_keys": None, "prompt_files": files}, "a", 3)
    [(_, body)] = server.asked
    assert {key: body[key] for key in FREE if key in body} == more


@pytest.mark.parametrize(("value", "usable"), [({}, True), ({"grammar": sums("a")}, True), ({"grammar": "a"}, False),
                                               ({"grammar": {"sha256": "a"}}, False), ([], False)])  # fmt: skip
def test_the_form_in_plan_json_is_checked(value, usable):
    assert gate_spec.is_prompt_files(value) is usable
