"""What the gate and the liveness check read of a server that may have been taken over: bounded in time and in bytes, and
the check is told what was wrong."""

import json
import resource
import time

import gate
import gate_server
import gate_spec
import pytest
from gate_server import ask

from tests.serving import dripping, flood, raw, serving

OK = b"HTTP/1.1 200 OK\r\n"


@pytest.fixture
def served():
    running = []

    def start(*script):
        running.append(serving(raw(script[0] if callable(script[0]) else lambda _: iter(script))))
        return running[-1].__enter__().url

    yield start
    for server in running:
        server.__exit__(None, None, None)


def answer(body):
    return OK + b"Content-Length: %d\r\n\r\n" % len(body) + body


def test_json_and_text_and_status(served):
    assert ask(served(answer(b'{"status": "ok"}')), "/health") == (200, {"status": "ok"})
    assert ask(served(OK + b"\r\n[1]"), "/x") == (200, [1])
    chunked = OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\n[1,\r\n2\r\n2]\r\n0\r\n\r\n"
    assert ask(served(chunked), "/x") == (200, [1, 2])
    assert ask(served(b"HTTP/1.1 503 Busy\r\nContent-Length: 2\r\n\r\nno"), "/x") == (503, "no")


@pytest.mark.parametrize(
    "start",
    [b"", OK, OK + b"X: ", OK + b"Content-Length: 100000\r\n\r\n", OK + b"\r\n", OK + b"\r\n[1]",
     OK + b"Transfer-Encoding: chunked\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"],
    ids=["status", "headers", "header", "body", "body without a length", "json", "chunk", "continue"],
)  # fmt: skip
def test_a_byte_now_and_then_ends_after_the_time(served, start):
    url, began = served(dripping(start)), time.monotonic()
    assert ask(url, "/slots", seconds=0.3) == (0, "no whole answer within 0 s")
    assert time.monotonic() - began < 20


def test_a_tls_handshake_that_drips_ends_after_the_time(served):
    url, began = served(dripping(b"\x16\x03\x03\x3f\xff", 0.02)), time.monotonic()
    assert ask(url.replace("http:", "https:"), "/slots", seconds=0.3) == (0, "no whole answer within 0 s")
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("start", "block", "why"),
    [(OK + b"\r\n", b"a" * 65536, "more than 8388608 bytes"),
     (OK + b"Content-Length: 2147483648\r\n\r\n", b"a" * 65536, "more than 8388608 bytes"),
     (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b"a" * 65536 + b"\r\n", "more than 8388608 bytes"),
     (OK, b"X-Fill: " + b"a" * 60000 + b"\r\n", "got more than 100 headers"),
     (OK, b"a" * 65536, "LineTooLong"), (b"", b"a" * 65536, "LineTooLong")],
    ids=["body", "length", "chunks", "headers", "header", "status"],
)  # fmt: skip
def test_an_answer_without_end_is_cut_off(served, start, block, why):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status, told = ask(served(flood(start, block)), "/props", seconds=20.0)
    assert status == 0 and why in told
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"[" * 100_000, "[[["),
        (b"9" * 100_000, "999"),
        (b'{"a": -' + b"9" * 30 + b"}", '{"a"'),
        (b"", ""),
        (b"\xff\xfe", "\ufffd"),
    ],
    ids=["deep", "long number", "negative", "empty", "bytes"],
)
def test_what_is_no_json_is_text_of_limited_length(served, body, why):
    status, told = ask(served(answer(body)), "/x")
    assert status == 200 and isinstance(told, str) and told.startswith(why) and len(told) <= 2**14


def test_numbers_of_a_counter_are_read(served):
    body = b'{"a": 18446744073709551615, "b": -5, "c": 0, "d": 1.5e3}'
    assert ask(served(answer(body)), "/x")[1] == {"a": 2**64 - 1, "b": -5, "c": 0, "d": 1500.0}


def test_an_answer_that_ends_too_early_is_none(served):
    assert ask(served(OK + b"Content-Length: 10\r\n\r\n[1]"), "/x") == (0, "OSError: the answer ended too early")


def test_a_redirect_is_not_followed(served):
    url = served(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n")
    assert ask(url, "/x") == (302, "")


def test_nobody_answers():
    status, told = ask("http://127.0.0.1:9", "/x", seconds=1.0)
    assert status == 0 and "refused" in told


@pytest.mark.parametrize(
    "told", [{}, 5, None, "x", [5], [[]], [None], [{}] * 257, {"error": "no"}], ids=lambda told: repr(told)[:12]
)
def test_slots_of_another_form_are_none(served, told):
    spec = {"url": served(answer(json.dumps(told).encode())), "api_keys": None}
    assert gate_server.slots(spec) is None


def test_slots(served):
    told = [{"id": n} for n in range(256)]
    assert gate_server.slots({"url": served(answer(json.dumps(told).encode())), "api_keys": None}) == told


def test_a_key_file_of_any_length_gives_a_key(tmp_path):
    (tmp_path / "keys").write_text("k" * 10**6)
    assert len(gate_server.first_key({"api_keys": str(tmp_path / "keys")})) == 2**16
    (tmp_path / "keys").write_text("one\ntwo\n")
    assert gate_server.first_key({"api_keys": str(tmp_path / "keys")}) == "one"


@pytest.mark.parametrize("check", [gate.check_key, gate.check_context], ids=["key", "context"])
def test_a_check_says_what_was_wrong_with_the_answer(served, monkeypatch, check):
    monkeypatch.setattr(gate, "kv_types", lambda unit: [])
    spec = {
        "url": served(flood(OK + b"\r\n")),
        "api_keys": None,
        "context_tokens": 1,
        "slots": 1,
        "unit": "u",
        "kv_type": None,
    }
    if check is gate.check_key:
        spec["api_keys"] = "/dev/null"
    found = check(spec)
    assert not found["ok"] and "more than 8388608 bytes" in str(found["found"])


def test_a_plan_of_a_size_that_no_server_told_is_read_and_one_of_any_length_is_not(tmp_path, monkeypatch):
    path, gate_of = tmp_path / "plan.json", {key: None for key in gate_spec.GATE}
    gate_of |= {**gate_spec.ABSENT, "unit": "llama-server-x.service", "argv": [], "url": "u", "health_seconds": 1, "context_tokens": 1, "slots": 1,
                "speed_floor_percent": 0, "backend": "cpu", "gpus": []}  # fmt: skip
    plan = {"schema": 1, "gate": gate_of, "files": [{"path": "/m/x.gguf", "size_bytes": None, "sha256": "ab"}]}
    path.write_text(json.dumps(plan))
    assert gate_spec.read_spec(str(path))["files"] == plan["files"]
    monkeypatch.setattr(gate_spec, "JSON_LIMIT_BYTES", 100)
    with pytest.raises(gate_spec.Unreadable, match=r"plan\.json: it has more than 100 characters"):
        gate_spec.read_spec(str(path))
