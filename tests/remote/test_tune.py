"""The runner of a tune's trials: what is recorded, what is lost, and that it goes on where it was.

The server is the test's own, and its unit is a stand-in; tests with systemd and llama-server are elsewhere.
"""

import contextlib
import json
import threading

import common
import pytest
import tune
import tune_trials

from tests.serving import Server, serving

KEY = "0123456789abcdef"
WORKLOAD = {"prompt": 64, "reply": 32, "depth": 16, "concurrency": 2}
DIRECTIVES = [
    "User=llamafleet",
    "MemoryMax=100M",
    "ExecStart=/bin/false",
    "SocketBindDeny=any",
    "SocketBindAllow=tcp:8080",
]


class Machine:
    """What a trial's unit does: the server answers, or it ended with these words, or it never gets ready."""

    def __init__(self):
        self.started, self.stopped, self.crashes, self.hangs = [], [], {}, set()
        self.asked, self.lock = [], threading.Lock()
        self.label = ""

    def reply(self, path, body):
        if path == "/health":
            return (503, {"status": "loading"}) if self.label in self.hangs else (200, {"status": "ok"})
        if path == "/tokenize":
            return 200, {"tokens": list(range(1000))}
        with self.lock:
            self.asked.append(body)
        count, prompt = body["n_predict"], len(body["prompt"])
        cached = WORKLOAD["depth"] if count and body["cache_prompt"] else 0
        timings = {"prompt_n": prompt - cached, "prompt_ms": 500.0, "predicted_n": count, "predicted_ms": 10.0 * count}
        return 200, {"timings": timings}


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

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def wait(self, seconds):
            return 134 if machine.label in machine.crashes else None

        def said(self):
            return machine.crashes.get(machine.label, "")

    with serving(Llama()) as server:
        monkeypatch.setattr(common, "VAR", str(tmp_path))
        monkeypatch.setattr(tune, "free_port", lambda host: server.server_port)
        monkeypatch.setattr(tune, "Started", Unit)
        monkeypatch.setattr(tune, "forget", machine.stopped.append)
        monkeypatch.setattr(tune, "show", lambda unit, *names: {"MemoryPeak": "12345"})
        monkeypatch.setattr(tune, "POLL_SECONDS", 0.01)
        yield machine


@pytest.fixture
def run(tmp_path):
    """Runs a batch with these labels; the trials that the host has then."""

    def go(*labels, key=KEY, budget=600.0, trial_seconds=20.0):
        trials = [
            {
                "id": n,
                "candidate": n,
                "label": label,
                "stage": 1,
                "environment": {"X": "y"},
                "argv": ["/opt/llama-server", "--port", "{port}", label],
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
        }
        (tmp_path / "spec.json").write_text(json.dumps(spec))
        assert tune.main(["run", str(tmp_path / "spec.json")]) == 0
        return tune_trials.read("chat", key)

    return go


def test_a_trial_has_exact_counts_and_the_workload_s_seconds(machine, run):
    [trial] = run("plan")
    assert trial["error"] is None and trial["seconds"] == pytest.approx(0.5 + 0.010 * WORKLOAD["reply"])
    assert trial["decode_tokens_per_s"] == pytest.approx(2 / 0.010)  # of both requests together
    assert trial["prompt_tokens_per_s"] == pytest.approx(2 * 64 / 0.5)
    assert trial["peak_bytes"] == 12345 and trial["spread"] == 1.0 and trial["candidate"] == 0
    measured = [body for body in machine.asked if body["n_predict"]]
    assert len(measured) == 2 * (1 + tune.MOST_REPETITIONS), "the first pair warms up"
    assert len({(body["id_slot"], *body["prompt"]) for body in measured}) == len(measured), "no slot has it already"


def test_the_server_has_the_service_s_sandbox(machine, run):
    run("plan")
    [words] = machine.started
    assert "--property=User=llamafleet" in words and "--property=MemoryMax=100M" in words
    assert not any("ExecStart" in word for word in words)
    port = words[words.index("--port") + 1]
    assert f"--property=SocketBindAllow=tcp:{port}" in words and "--property=SocketBindAllow=tcp:8080" not in words
    assert "--setenv=X=y" in words and machine.stopped.count(machine.stopped[0]) == 2, "before, and afterwards"


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (
            lambda machine: machine.crashes.update({"bad": "ggml: out of memory\nerror: failed to load"}),
            "failed to load",
        ),
        (lambda machine: machine.hangs.add("bad"), "did not load its model within"),
    ],
    ids=["crashes", "hangs"],
)
def test_a_server_that_does_not_work_is_a_lost_trial_and_not_the_end(plant, said, machine, run):
    plant(machine)
    good, bad, after = run("good", "bad", "after", trial_seconds=1.0)
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
    monkeypatch.setattr(tune, "measured", lambda spec, trial: {**slow(spec, trial), "took_seconds": 50.0})
    assert len(run("a", "b", "c", "d", budget=120.0)) == 2  # of 50 s each


def test_what_is_no_spec_is_told(tmp_path, capsys):
    (tmp_path / "x.json").write_text("[]")
    assert tune.main(["run", str(tmp_path / "x.json")]) == 1
    assert "error:" in capsys.readouterr().err
    with contextlib.redirect_stdout(None):
        assert tune.main(["go"]) == 1
