"""The liveness check costs a real llama-server's users nothing, and notices when it hangs.

Not simulated: server, model, cached tokens, sleep, and a device that stops answering (an RPC device whose server is
stopped). systemd's answers are the tests' own; tests/e2e/test_07_faults.py has the check as installed.
"""

import contextlib
import dataclasses
import http.client
import json
import signal
import time

import common
import psutil
import pytest

from llamafleet.remote import gate_server, gate_sleep, liveness
from sandbox import models, oracle
from sandbox.layouts import TINY

pytestmark = pytest.mark.oracle
CACHED_TOKENS, SLOT_TOKENS, LOOKS = 6000, 8192, 3
CONVERSATION = [1, *(5 + place % 400 for place in range(CACHED_TOKENS - 1))]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Small enough to read 6000 tokens in a second."""
    layout = dataclasses.replace(
        TINY["dense"], name="tiny-talk", blocks=1, embd=32, heads=1, kv_heads=1, head_dim=32, ff=32
    )
    return models.make(layout, tmp_path_factory.mktemp("model"), seed=0)


@pytest.fixture
def serving(model, tmp_path):
    """Serve with the flags of a unit and these; gives (URL, process)."""

    @contextlib.contextmanager
    def start(*flags, slots=1):
        port = oracle.free_port()
        command = [
            oracle.build().llama_server, "--model", model, "--host", "127.0.0.1", "--port", str(port), "--fit", "off",
            "--ctx-size", str(slots * SLOT_TOKENS), "--parallel", str(slots), "--no-kv-unified", "--cache-ram", "0",
            "--threads", "1", "--metrics", "--slots", "--no-ui", "--offline", *flags,
        ]  # fmt: skip
        with oracle.serving(command, port, tmp_path / "server.log") as url:
            yield url, started(str(port))

    return start


def started(word):
    """The child process with this word on its command line."""
    return next(one for one in psutil.Process().children() if word in one.cmdline())


@pytest.fixture
def check(tmp_path, monkeypatch):
    """One look at the server of (URL, process); its exit code. `restarts` has what systemd was told."""
    restarts = []
    for module in (liveness, common):
        monkeypatch.setattr(module, "RUN", str(tmp_path / "run"))
    monkeypatch.setattr(common, "GATES", str(tmp_path / "gate"))
    monkeypatch.setattr(liveness, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(liveness, "unit_state", lambda unit: "active/running")
    monkeypatch.setattr(liveness, "systemctl", lambda *words: restarts.append(words))

    def look(server, seconds=30.0):
        url, process = server
        monkeypatch.setattr(liveness, "main_pid", lambda unit: process.pid)
        gate = {"unit": "llama-server-talk.service", "url": url, "api_keys": None, "context_tokens": 8192, "slots": 1}
        (tmp_path / "plan.json").write_text(json.dumps({"gate": gate}))
        return liveness.main([str(tmp_path / "plan.json"), str(seconds)])

    look.restarts = restarts
    return look


@contextlib.contextmanager
def stopped(process):
    """The process does nothing within the block."""
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def ask(url, path, body=None):
    status, told = gate_server.ask(url, path, body=body, seconds=60.0)
    assert status == 200, told
    return told


def turn(url, prompt, slot=None):
    """A turn of a conversation; (tokens read, tokens taken from the cache)."""
    which = {} if slot is None else {"id_slot": slot}
    timings = ask(url, "/completion", {"prompt": prompt, "n_predict": 1, **which})["timings"]
    return timings["prompt_n"], timings["cache_n"]


@contextlib.contextmanager
def talking(url):
    """A request is under way within the block: a long answer to somebody who goes away at its end."""
    body = json.dumps({"prompt": "a", "n_predict": SLOT_TOKENS, "ignore_eos": True})
    client = http.client.HTTPConnection(url.removeprefix("http://"))
    try:
        client.request("POST", "/completion", body, {"Content-Type": "application/json"})
        until(lambda: ask(url, "/slots")[0]["is_processing"])
        yield
    finally:
        client.close()


def until(true, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


@pytest.mark.parametrize("slots", [1, 4])
def test_a_conversation_keeps_every_cached_token(serving, check, slots):
    """Of the slot that was used last, and of all others: none is displaced, and none becomes the next to be."""
    with serving(slots=slots) as server:
        url, _ = server
        for slot in range(slots):
            assert turn(url, [*CONVERSATION[:-1], 410 + slot], slot) == (CACHED_TOKENS, 0)
        assert [check(server) for _ in range(LOOKS)] == [0] * LOOKS
        for slot in range(slots):
            assert turn(url, [*CONVERSATION[:-1], 410 + slot, 7, 7], slot) == (2, CACHED_TOKENS)
    assert not check.restarts


def test_a_server_without_cached_tokens_gives_one(serving, check):
    """It has nothing to lose. The token's slot is the one that llama-server would use last."""
    with serving(slots=2) as server:
        url, _ = server
        assert [check(server) for _ in range(LOOKS)] == [0] * LOOKS
        first, second = ask(url, "/slots")
        assert first["n_prompt_tokens"] > 0 and "id_task" not in second
        used = first["id_task"]
        turn(url, CONVERSATION)
        assert [slot.get("id_task", used) == used for slot in ask(url, "/slots")] == [True, False]


def test_a_sleeping_server_sleeps_on(serving, check):
    with serving("--sleep-idle-seconds", "1") as server:
        url, _ = server
        turn(url, CONVERSATION)
        until(lambda: ask(url, "/props")["is_sleeping"])
        assert [check(server) for _ in range(LOOKS)] == [0] * LOOKS
        assert ask(url, "/props")["is_sleeping"]


def test_the_gate_lets_a_server_sleep_and_a_switch_wakes_it(serving):
    with serving("--sleep-idle-seconds", "1") as server:
        url, process = server
        spec = {"url": url, "api_keys": None, "argv": process.cmdline(), "health_seconds": 60}
        turn(url, CONVERSATION)
        until(lambda: ask(url, "/props")["is_sleeping"])
        resident = process.memory_info().rss
        assert [gate_sleep.check_asleep(spec)["name"] for _ in range(LOOKS)] == ["asleep"] * LOOKS
        assert ask(url, "/props")["is_sleeping"]
        assert gate_sleep.check_asleep({**spec, "wake": True}) is None
        assert process.memory_info().rss > resident, "the model is loaded again"


def test_looks_do_not_keep_a_server_awake(serving, check):
    with serving("--sleep-idle-seconds", "2") as server:
        url, _ = server
        turn(url, CONVERSATION)
        looks = 0

        def asleep():
            nonlocal looks
            looks += 1
            assert check(server) == 0
            time.sleep(0.3)
            return ask(url, "/props")["is_sleeping"]

        until(asleep, 10)
        assert looks >= LOOKS


@pytest.mark.parametrize("flags", [(), ("--sleep-idle-seconds", "60")], ids=["", "may sleep"])
def test_a_device_that_hangs_is_noticed_as_soon_as_there_is_work(serving, check, flags, capsys):
    with oracle.rpc_server(1) as endpoint:
        device = started(endpoint.rpartition(":")[2])
        with serving("--rpc", endpoint, "--device", "RPC0", "--n-gpu-layers", "99", *flags) as server:
            url, _ = server
            turn(url, CONVERSATION)
            with talking(url):
                assert check(server) == 0  # at work, and its counters move
                with stopped(device):
                    check(server, 1.0)  # they may have moved since the look before
                    assert check(server, 1.0) == 10
                    # llama-server itself answers all the while.
                    assert ask(url, "/health") == {"status": "ok"} and ask(url, "/slots")[0]["is_processing"]
                assert "slots at work whose counters stand still: 0" in capsys.readouterr().out
                assert check(server) == 0
    assert {words[0] for words in check.restarts} == {"restart"}


@pytest.mark.parametrize("flags", [(), ("--sleep-idle-seconds", "60")], ids=["", "may sleep"])
def test_a_stopped_server_is_noticed_without_any_request(serving, check, monkeypatch, flags, capsys):
    monkeypatch.setattr("liveness_server.ANSWER_SECONDS", 0.5)
    with serving(*flags) as server:
        turn(server[0], CONVERSATION)
        assert check(server) == 0
        with stopped(server[1]):
            assert check(server, 1.0) == 10
    assert "no sign of life within 1 s: /props: no answer" in capsys.readouterr().out
