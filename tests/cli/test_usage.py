"""What is told of a deployed instance; the request to copy is run by a shell and curl against a server."""

import json
import shutil
import subprocess

import pytest

from llamafleet.cli import usage
from llamafleet.host.answers import Gate
from llamafleet.planner.roofline import Prediction
from tests import planning
from tests.serving import Server, serving

KEY = "a-key-of-some-length"


class Chat(Server):
    """Answers chats of whoever has the key."""

    def respond(self, path, body, headers):
        self.seen = (path, body, headers.get("Authorization"), headers.get("Content-Type"))
        return 200, {"choices": []}


def instance(**asked):
    return planning.settings({"name": "chat", **asked}).models[0]


@pytest.mark.parametrize(
    ("asked", "host", "expected"),
    [
        ({}, "box1", "http://127.0.0.1:9000"),
        ({"listen": "10.0.0.7"}, "box1", "http://10.0.0.7:9000"),
        ({"listen": "0.0.0.0"}, "box1.example.net", "http://box1.example.net:9000"),
        ({"listen": "::"}, "fd00::7", "http://[fd00::7]:9000"),
        ({"listen": "0.0.0.0"}, "@local", "http://127.0.0.1:9000"),
        ({"listen": "::"}, "@local", "http://[::1]:9000"),
        ({"tls_certificate_file": "/c", "tls_key_file": "/k"}, "box1", "https://127.0.0.1:9000"),
    ],
)
def test_the_address_is_the_one_that_clients_reach(asked, host, expected):
    assert usage.url(instance(allow_unauthenticated=True, **asked), host) == expected


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
@pytest.mark.parametrize("place", ["none", "file", "variable"])
def test_the_request_works_as_it_is_copied(tmp_path, monkeypatch, place):
    keys = tmp_path / "keys of mine"
    keys.write_text(f"# ours\n{KEY}\nanother-key\n")
    monkeypatch.setenv("CHAT_KEY", KEY)
    asked = {"none": {}, "file": {"api_key_file": str(keys)}, "variable": {"api_key_file": "env:CHAT_KEY"}}[place]
    with serving(Chat()) as server:
        port = int(server.url.rpartition(":")[2])
        command = usage.request(instance(port=port, **asked), "@local")
        assert KEY not in command
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0 and json.loads(done.stdout) == {"choices": []}, done.stderr
    path, body, authorization, kind = server.seen
    assert (path, kind) == ("/v1/chat/completions", "application/json")
    assert body["messages"]
    assert authorization == (None if place == "none" else f"Bearer {KEY}")


def test_what_the_gate_measured_is_told_beside_what_was_predicted():
    gate = Gate(True, decode_tokens_per_s=23.14, record={"prompt_tokens_per_s": 140.6})
    *_, measured = usage.lines(instance(), "box1", gate, Prediction(12.04, 72.3))
    assert measured == "chat, measured: 23.1 tokens/s written, 141 read; predicted were 12 and 72.3"
    assert len(list(usage.lines(instance(), "box1", None, Prediction(12.0, 72.0)))) == 2


def test_an_instance_on_loopback_is_told_with_the_way_from_here():
    [serves, _] = usage.lines(instance(), "box1", None, Prediction(1.0, 1.0))
    assert serves == (
        "chat serves at http://127.0.0.1:9000, on the host itself; from here by ssh -L 9000:127.0.0.1:9000 box1"
    )
    [serves, _] = usage.lines(instance(), "@local", None, Prediction(1.0, 1.0))
    assert serves == "chat serves at http://127.0.0.1:9000"


def test_with_tls_the_certificate_is_named():
    assert "--cacert /c.pem" in usage.request(instance(tls_certificate_file="/c.pem", tls_key_file="/k"), "box1")


@pytest.mark.parametrize(
    ("asked", "path", "key"),
    [
        ({"serves": "embedding"}, "/v1/embeddings", "input"),
        ({"serves": "embedding", "pooling": "none"}, "/embeddings", "content"),
        ({"serves": "reranking"}, "/v1/rerank", "documents"),
    ],
)
def test_the_request_is_one_that_the_server_answers(asked, path, key):
    words = usage.request(instance(**asked), "@local")
    assert words.endswith(f"http://127.0.0.1:9000{path}") and f'"{key}"' in words


def test_of_a_server_that_writes_nothing_the_speed_of_reading_is_told():
    gate = Gate(True, decode_tokens_per_s=None, record={"prompt_tokens_per_s": 140.6})
    *_, measured = usage.lines(instance(serves="embedding"), "box1", gate, Prediction(0.0, 72.3))
    assert measured == "chat, measured: 141 tokens/s read; predicted were 72.3"
