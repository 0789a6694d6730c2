"""The runner of a tune's trials: what is recorded, what is lost, and that it goes on where it was.

The server is the test's own, and its unit is a stand-in; tests with systemd and llama-server are elsewhere.
"""

import json
import threading
import time

import common
import lock
import pytest
import tune
import tune_server
import tune_service
import tune_state
import tune_trials
import tune_watch

from tests.serving import Server, serving

KEY = "0123456789abcdef"
WORKLOAD = {"prompt": 64, "reply": 32, "depth": 16, "concurrency": 2}
READ_SECONDS, EACH_SECONDS = 0.02, 0.001  # for a prompt, and for a token of a reply
DIRECTIVES = [
    "User=llamafleet",
    "MemoryMax=100M",
    "ExecStart=/bin/false",
    "    --flag=x",
    "SocketBindDeny=any",
    "SocketBindAllow=tcp:8080",
    "LoadCredential=api-keys:/etc/x",
    "LoadCredential=chat-template:/etc/y",
]


class Machine:
    """What a trial's unit does: the server answers, or it ended with these words, or it never gets ready."""

    def __init__(self):
        self.started, self.stopped, self.crashes, self.hangs = [], [], {}, set()
        self.asked, self.lock = [], threading.Lock()
        self.label, self.reply_tokens, self.reread = "", None, 0

    def reply(self, path, body):
        if path == "/health":
            return (503, {"status": "loading"}) if self.label in self.hangs else (200, {"status": "ok"})
        if path == "/props":
            return 200, {"total_slots": 2}
        if path == "/apply-template":
            return 200, {"prompt": f"<user>{body['messages'][0]['content']}<assistant>"}
        if path == "/tokenize":
            return 200, {"tokens": [ord(letter) for letter in body["content"]]}
        with self.lock:
            self.asked.append(body)
        count = body["n_predict"] if body.get("ignore_eos", True) else self.reply_tokens or body["n_predict"]
        cached = WORKLOAD["depth"] - self.reread if body["n_predict"] and body["cache_prompt"] else 0
        time.sleep(READ_SECONDS + count * EACH_SECONDS)
        timings = {
            "prompt_n": len(body["prompt"]) - cached, "predicted_n": count, "predicted_ms": 1000 * EACH_SECONDS * count,
            "draft_n": 8, "draft_n_accepted": 6,
        }  # fmt: skip
        return 200, {"timings": timings}

    @property
    def measured(self):
        """The requests that were measured, with what warmed up."""
        return [body for body in self.asked if body["n_predict"]]


@pytest.fixture
def machine(monkeypatch, tmp_path):
    machine = Machine()

    class Llama(Server):
        def respond(self, path, body, headers):
            return machine.reply(path, body)

    class Unit:
        def __init__(self, unit, words):
            machine.started.append(words)
            machine.label = words[-1]

        def __exit__(self, *_):
            pass

        def wait(self, seconds):
            return 134 if machine.label in machine.crashes else None

        def said(self):
            return machine.crashes.get(machine.label, "")

    with serving(Llama()) as server:
        for name in ("VAR", "RUN", "UNITS"):
            (tmp_path / name).mkdir()
            monkeypatch.setattr(common, name, str(tmp_path / name))
        monkeypatch.setattr(tune_server, "free_port", lambda host: server.server_port)
        monkeypatch.setattr(tune_server, "Started", Unit)
        monkeypatch.setattr(tune_server, "forget", machine.stopped.append)
        monkeypatch.setattr(tune_server, "show", lambda unit, *names: {"MemoryPeak": "12345"})
        monkeypatch.setattr(tune_server, "POLL_SECONDS", 0.01)
        monkeypatch.setattr(tune_service, "runs", lambda name: False)
        monkeypatch.setattr(tune_state, "LOOK_SECONDS", 0.01)
        monkeypatch.setattr(tune_watch, "LOOK_SECONDS", 0.01)
        monkeypatch.setattr(tune_watch, "forget", machine.stopped.append)
        monkeypatch.setattr(tune, "_unknown", [])
        yield machine


@pytest.fixture
def run(tmp_path):
    """Runs a batch with these labels; the trials that the host has then."""

    def go(*labels, key=KEY, budget=600.0, trial_seconds=20.0, code=0, **more):
        trials = [
            {
                "id": n,
                "candidate": n,
                "label": label,
                "stage": 1,
                "environment": {"X": "y"},
                "argv": ["/opt/llama-server", "--port", "{port}", "--host", "{host}", label],
            }
            for n, label in enumerate(labels)
        ]
        spec = {
            "schema": 1,
            "instance": "chat",
            "key": key,
            "trials": trials,
            "directives": DIRECTIVES,
            "workload": WORKLOAD,
            "text": None,
            "trial_seconds": trial_seconds,
            "budget_seconds": budget,
            "idle_seconds": 0,
            **more,
        }
        (tmp_path / "spec.json").write_text(json.dumps(spec))
        assert tune.main(["run", str(tmp_path / "spec.json")]) == code
        return tune_trials.read("chat", key)

    return go


def test_a_trial_has_exact_counts_and_the_seconds_that_a_user_feels(machine, run):
    [trial] = run("plan")
    assert trial["error"] is None and trial["peak_bytes"] == 12345 and trial["candidate"] == 0
    least = READ_SECONDS + EACH_SECONDS * WORKLOAD["reply"]
    assert least <= trial["seconds"] < 20 * least and trial["spread"] >= 1
    assert trial["decode_tokens_per_s"] == pytest.approx(2 / EACH_SECONDS)  # of both requests together
    assert 0 < trial["prompt_tokens_per_s"] <= 2 * 64 / READ_SECONDS
    assert (trial["prompt_tokens"], trial["reply_tokens"], trial["reread_tokens"]) == (64, 32, 0)
    assert trial["state"]["busy_cpus"] >= 0 and trial["state"]["gpus"] == {}
    assert len(machine.measured) == 2 * (1 + tune.MOST_REPETITIONS), "the first pair warms up"
    behind = {tuple(body["prompt"][WORKLOAD["depth"] :]) for body in machine.measured}
    assert len(behind) == len(machine.measured), "nothing is asked twice"
    assert all(body["ignore_eos"] for body in machine.measured)


@pytest.mark.parametrize("told", ["[not set]", "18446744073709551615", ""])
def test_memory_that_nobody_counts_is_not_known(told, machine, run, monkeypatch):
    monkeypatch.setattr(tune_server, "show", lambda unit, *names: {"MemoryPeak": told})
    assert run("plan")[0]["peak_bytes"] is None


def test_what_the_server_reads_again_of_the_depth_is_told(machine, run):
    machine.reread = 10
    assert run("plan")[0]["reread_tokens"] == 10


def test_messages_are_sent_whole_once_and_may_end_early(machine, run, tmp_path):
    (tmp_path / "text").write_text("First,\n50% of it.\n%\nSecond.\n%\n\n")
    machine.reply_tokens = 20
    [trial] = run("plan", text=str(tmp_path / "text"))
    _, _, *texts = machine.measured  # two that warm up
    prompts = ["".join(map(chr, body["prompt"][WORKLOAD["depth"] :])) for body in texts]
    assert sorted(prompts) == ["<user>First,\n50% of it.<assistant>", "<user>Second.<assistant>"]
    assert trial["reply_tokens"] == 20 and not any(body["ignore_eos"] for body in texts)
    # What of the reply was not written counts as if it were: per token.
    assert trial["seconds"] >= READ_SECONDS + EACH_SECONDS * WORKLOAD["reply"] and trial["accepted"] == 12


def test_a_user_without_a_message_sends_words(machine, run, tmp_path):
    (tmp_path / "text").write_text("Only one.")
    run("plan", text=str(tmp_path / "text"))
    assert sorted(body["ignore_eos"] for body in machine.measured) == [False, True, True, True]


def test_a_reply_that_says_nothing_of_the_speed_is_a_lost_trial(machine, run, tmp_path):
    (tmp_path / "text").write_text("Say yes.")
    machine.reply_tokens = 1
    assert "ends its reply to the text after 1 tokens" in run("plan", text=str(tmp_path / "text"))[0]["error"]


@pytest.mark.parametrize("content", [None, "%\n \n"], ids=["missing", "empty"])
def test_a_text_that_cannot_be_used_is_told(content, machine, run, tmp_path, capsys):
    if content:
        (tmp_path / "text").write_text(content)
    assert run("plan", text=str(tmp_path / "text"), code=1) == []
    assert str(tmp_path / "text") in capsys.readouterr().err


def test_the_server_has_the_service_s_sandbox_and_none_of_its_secrets(machine, run):
    run("plan")
    [words] = machine.started
    assert "--property=User=llamafleet" in words and "--property=MemoryMax=100M" in words
    assert not any("ExecStart" in word or "--flag" in word or "api-keys" in word for word in words)
    assert "--property=LoadCredential=chat-template:/etc/y" in words
    port = words[words.index("--port") + 1]
    assert f"--property=SocketBindAllow=tcp:{port}" in words and "--property=SocketBindAllow=tcp:8080" not in words
    assert "--property=RuntimeMaxSec=80" in words, "20 s of the trial, and some"
    assert "--setenv=X=y" in words and machine.stopped.count(machine.stopped[0]) == 2, "before, and afterwards"


def test_the_nodes_of_an_nvidia_gpu_are_made_as_the_unit_makes_them(machine, run, monkeypatch):
    made = []
    monkeypatch.setattr(tune_server.boot, "make_nodes", lambda: made.append(machine.started[:]))
    run("cpu")
    assert made == []
    run("gpu", key="e" * 16, directives=[*DIRECTIVES, "DeviceAllow=char-nvidia-uvm rwm"])
    assert made == [machine.started[:1]], "before the server starts"


def test_a_server_on_demand_is_measured_at_its_own_socket(machine, run, monkeypatch):
    trusted = []
    monkeypatch.setattr(tune_server.gate_server, "trust", trusted.append)
    argv = ["/opt/llama-server", "--host", "{socket}", "--port", "{port}", "x"]
    trial = {"id": 0, "candidate": 0, "label": "x", "stage": 1, "environment": {}, "argv": argv}
    assert run("x", trials=[trial])[0]["error"] is None
    [words] = machine.started
    path = words[words.index("--host") + 1]
    assert path == "/run/llamafleet-tune-chat/http.sock" == trusted[0]["socket"]
    assert "--property=RuntimeDirectory=llamafleet-tune-chat" in words


def test_ipv6_is_measured_at_its_loopback(machine, run, monkeypatch):
    assert run("x", host="::1", trial_seconds=1.0)[0]["error"]  # the test's server has another address
    [words] = machine.started
    assert words[words.index("--host") + 1] == "::1"


def test_a_directive_that_systemd_does_not_know_is_left_out_as_of_a_unit_file(machine, run, monkeypatch):
    known = "--property=SocketBindDeny=any"

    def said(unit):
        return "Unknown assignment: SocketBindDeny=any" if known in machine.started[-1] else ""

    monkeypatch.setattr(tune_server.Started, "wait", lambda unit, seconds: 1 if said(unit) else None)
    monkeypatch.setattr(tune_server.Started, "said", said)
    one, other = run("one", "other")
    assert one["error"] is None and other["error"] is None
    assert [known in words for words in machine.started] == [True, False, False]


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (
            lambda machine: machine.crashes.update({"bad": "error: failed to load"}),
            "the server ended: exit code 134 | error: failed to load",
        ),
        (lambda machine: machine.hangs.add("bad"), "did not load its model within"),
        (
            lambda machine: machine.crashes.update({"bad": "CUDA error\nggml: cudaMalloc failed: out of memory\nx"}),
            "out of memory: ggml: cudaMalloc failed",
        ),
        (
            lambda machine: machine.crashes.update({"bad": "      Finished with result: oom-kill\nMain processes"}),
            "out of memory: the server was killed, for it needed more than MemoryMax=100M",
        ),
    ],
    ids=["crashes", "hangs", "out of a device's memory", "out of its own"],
)
def test_a_server_that_does_not_work_is_a_lost_trial_and_not_the_end(plant, said, machine, run):
    plant(machine)
    good, bad, after = run("good", "bad", "after", trial_seconds=4.0 if machine.hangs else 60.0)
    assert said in bad["error"] and bad["seconds"] is None
    assert good["error"] is None and after["error"] is None


def test_a_batch_goes_on_where_it_was(machine, run):
    run("a", "b")
    assert [one["label"] for one in run("a", "b", "c")] == ["a", "b", "c"]
    assert [words[-1] for words in machine.started] == ["a", "b", "c"], "none was measured twice"


def test_a_torn_line_is_measured_again(machine, run):
    run("a", "b")
    with open(tune_trials.path("chat"), "rb+") as file:
        file.truncate(len(file.read()) - 20)
    assert [one["label"] for one in run("a", "b")] == ["a", "b"]
    assert [words[-1] for words in machine.started] == ["a", "b", "b"]


def test_another_tune_s_trials_are_set_aside(machine, run):
    run("a")
    assert [one["label"] for one in run("x", key="f" * 16)] == ["x"]
    assert tune_trials.read("chat", KEY) == []


def test_no_trial_begins_that_would_end_too_late(machine, run, monkeypatch):
    slow = tune.measured
    monkeypatch.setattr(tune, "measured", lambda *of: {**slow(*of), "took_seconds": 50.0})
    assert len(run("a", "b", "c", "d", budget=120.0)) == 2  # of 50 s each


def test_what_is_no_spec_is_told(tmp_path, capsys):
    (tmp_path / "x.json").write_text("[]")
    assert tune.main(["run", str(tmp_path / "x.json")]) == 1
    assert "error:" in capsys.readouterr().err
    assert tune.main(["go"]) == 1
    assert "usage" in capsys.readouterr().err


def test_a_batch_ends_where_another_run_takes_the_host(machine, run, monkeypatch, capsys):
    monkeypatch.setattr(lock, "read", lambda: {"run": "mine" if len(machine.started) < 2 else "other", "who": "eve"})
    assert [one["label"] for one in run("a", "b", "c", run="mine", code=5)] == ["a"]
    assert "eve" in capsys.readouterr().err
    assert [one["label"] for one in run("a", "b", "c", run="other")] == ["a", "b", "c"]


def test_a_trial_under_way_ends_when_somebody_comes(machine, run, monkeypatch):
    machine.hangs.add("a")
    monkeypatch.setattr(tune_watch, "forget", lambda unit: machine.crashes.update({"a": "stopped"}))
    monkeypatch.setattr(lock, "read", lambda: {"run": "other" if machine.started else "mine", "who": "eve"})
    began = time.monotonic()
    assert run("a", run="mine", code=5, trial_seconds=100.0) == []
    assert time.monotonic() - began < 60


def test_a_run_that_joins_the_batch_goes_on_with_it(machine, run, monkeypatch, tmp_path):
    def joined():
        if machine.started:
            (tmp_path / "spec.json").write_text(json.dumps({"run": "other"}))
        return {"run": "other" if machine.started else "mine"}

    monkeypatch.setattr(lock, "read", joined)
    assert [one["label"] for one in run("a", "b", run="mine")] == ["a", "b"]


def test_a_host_that_another_run_holds_is_not_measured(machine, run, monkeypatch, capsys):
    monkeypatch.setattr(lock, "read", lambda: {"run": "other", "who": "eve"})
    assert run("a", run="mine", code=5) == []
    assert "eve" in capsys.readouterr().err


def test_the_wait_for_an_idle_host_is_a_part_of_the_budget(machine, run, monkeypatch):
    monkeypatch.setattr(tune_state, "busy_cpus", lambda: 64.0)
    waited = [one["state"] for one in run("a", "b", budget=10.0, idle_seconds=30)]
    assert 1.0 <= waited[0]["waited_seconds"] < 1.5 and waited[1]["waited_seconds"] < 0.5, "a tenth of 10 s"
    assert not waited[0]["is_idle"]


def test_embeddings_are_measured_by_their_inputs(machine, run, monkeypatch):
    inputs = []

    def reply(path, body, before=machine.reply):
        if path != "/v1/embeddings":
            return before(path, body)
        inputs.append(tuple(body["input"]))
        time.sleep(READ_SECONDS)
        return 200, {"data": [{"embedding": [0.0]}]}

    monkeypatch.setattr(machine, "reply", reply)
    monkeypatch.setattr(tune.tune_vectors, "MEASURED_SECONDS", 0.2)
    [trial] = run("plan", serves="embedding")
    assert trial["error"] is None and trial["decode_tokens_per_s"] is None
    assert trial["inputs_per_s"] == pytest.approx(2 / trial["seconds"]) and trial["seconds"] >= READ_SECONDS
    assert {len(one) for one in inputs} == {WORKLOAD["prompt"]} and len(set(inputs)) >= 4


def test_scores_are_measured_by_their_documents(machine, run, monkeypatch):
    def reply(path, body, before=machine.reply):
        if path == "/detokenize":
            return 200, {"content": "".join(map(chr, body["tokens"]))}
        return (200, {"results": [{"index": 0}]}) if path == "/v1/rerank" and body["query"] else before(path, body)

    monkeypatch.setattr(machine, "reply", reply)
    monkeypatch.setattr(tune.tune_vectors, "MEASURED_SECONDS", 0.05)
    assert run("plan", serves="reranking")[0]["inputs_per_s"] > 0
