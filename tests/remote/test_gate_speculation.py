"""The gate's comparison with and without guesses, asked of a server that counts: after n comes n + 1."""

import gate
import gate_reply
import gate_spec
import pytest
from gate_speculation import PASSAGE_TOKENS, check_speculation

from tests.serving import Server, serving


class Counting(Server):
    """A model whose next token is the last one and one more. `wrong`: its replies of several tokens have this in the
    place of their fourth token; `gap`: nats by which that is less likely than the right one."""

    def __init__(self):
        super().__init__()
        self.drafted, self.wrong, self.gap, self.words = 9, None, 5.0, 200

    def respond(self, path, body, headers):
        if path == "/tokenize":
            return 200, {"tokens": list(range(self.words))}
        count, last = body["n_predict"], body["prompt"][-1]
        tokens = [last + n + 1 for n in range(count)]
        if count > 1 and self.wrong:
            tokens = [*tokens[:3], self.wrong, *(self.wrong + n + 1 for n in range(count - 4))]
        top = [{"id": tokens[0], "logprob": -0.1}, {"id": self.wrong or 0, "logprob": -0.1 - self.gap}]
        timings = {"draft_n": self.drafted, "draft_n_accepted": 7} if self.drafted and count > 1 else {}
        return 200, {"tokens_predicted": count, "tokens": tokens, "timings": timings,
                     "completion_probabilities": [{"id": tokens[0], "top_logprobs": top}]}  # fmt: skip


@pytest.fixture
def server():
    with serving(Counting()) as one:
        yield one


def checked(server, kind="draft", least=0):
    spec = {"url": server.url, "api_keys": None, "measured": {}, "speculation": {"kind": kind, "least": least}}
    return check_speculation(spec), spec["measured"]


def test_without_speculation_nothing_is_asked(server):
    assert check_speculation({"url": server.url, "speculation": None}) is None and server.asked == []


def test_equal_replies_pass_and_what_was_guessed_is_remembered(server):
    found, measured = checked(server)
    assert found["ok"] and "7 of 9" in found["found"]
    assert measured["speculation"] == {"drafted": 9, "accepted": 7}


def test_each_token_is_asked_for_alone_behind_those_before_it(server):
    checked(server)
    asked = [body for path, body in server.asked if path == "/completion"]
    first, alone = asked[0], asked[1:]
    assert [body["cache_prompt"] for body in asked] == [False, False, *(True,) * 11]
    assert first["n_predict"] == 12 and {body["n_predict"] for body in alone} == {1}
    assert [len(body["prompt"]) - len(first["prompt"]) for body in alone] == list(range(12))
    assert first["prompt"][:PASSAGE_TOKENS] == first["prompt"][PASSAGE_TOKENS : 2 * PASSAGE_TOKENS]
    assert len(first["prompt"]) + 12 < 256


def test_another_token_fails_with_its_place_and_how_much_less_likely_it_is(server):
    server.wrong = 900
    found, _ = checked(server)
    assert not found["ok"] and "at place 4" in found["expected"] and "token 900, 5.0 nats less likely" in found["found"]


def test_a_token_that_the_model_does_not_consider_fails(server):
    server.wrong, server.gap = 900, float("1e30")
    assert not checked(server)[0]["ok"]


def test_tokens_that_are_equally_likely_are_a_tie(server):
    server.wrong, server.gap = 900, 0.3
    assert checked(server)[0]["ok"]


@pytest.mark.parametrize(
    ("kind", "least", "ok"),
    [("draft", 0, False), ("mtp", 0, False), ("eagle3", 0, False), ("ngram", 48, True), ("draft", 100, True)],
)
def test_a_server_that_never_guesses_does_not_use_its_draft(server, kind, least, ok):
    """A table of n-grams guesses only what is repeated; a draft that must guess more at once than the gate asks for
    does not guess there."""
    server.drafted = 0
    assert checked(server, kind, least)[0]["ok"] is ok


def test_a_draft_with_a_least_number_gets_a_longer_reply(server):
    checked(server, least=20)
    assert server.asked[1][1]["n_predict"] == 22


def test_a_server_without_a_tokenizer_is_told(server):
    server.words = 0
    assert "status 200 of /tokenize" in checked(server)[0]["found"]


def test_plans_of_earlier_versions_have_none():
    assert gate_spec.ABSENT["speculation"] is None and check_speculation in gate.CHECKS


@pytest.mark.parametrize(
    ("value", "is_so"),
    [(None, True), ({"kind": "draft", "least": 0, "kv_type": "f16"}, True), ({"kind": "ngram", "least": 48, "kv_type": None}, True),
     ({"kind": "draft"}, False), ("draft", False), ({"kind": 3, "least": 0, "kv_type": None}, False)],
)  # fmt: skip
def test_what_the_gate_takes_of_a_plan(value, is_so):
    assert gate_spec.is_speculation(value) is is_so


def places(*told):
    return {"completion_probabilities": [{"id": 1, "top_logprobs": [{"id": 1, "logprob": -0.1}] if one else []} for one in told]}  # fmt: skip


@pytest.mark.parametrize(
    ("speculation", "told", "is_good"),
    [
        ({"kind": "draft"}, (True, *(False,) * 11), True),
        ({"kind": "draft"}, (False, *(True,) * 11), False),  # the first token is never a guess
        (None, (True, *(False,) * 11), False),
    ],
)
def test_guessed_tokens_have_no_likelihoods(speculation, told, is_good):
    """llama-server tells those of the tokens that it sampled alone."""
    spec = {"speculation": speculation}
    if is_good:
        gate_reply.check_numbers(spec, places(*told))
    else:
        with pytest.raises(gate_reply.Bad):
            gate_reply.check_numbers(spec, places(*told))
