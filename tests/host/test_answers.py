"""What programs on a host print beside the survey becomes values, or one sentence that names the program."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamafleet.host import answers
from llamafleet.host.answers import AnswerError
from llamafleet.host.installed import Holder
from llamafleet.host.machine import MachineError
from tests.host.test_installed import ANSWER as FOUND
from tests.host.test_machine import FILE as MACHINE
from tests.mutations import FUZZ, broken

GATE = {
    "ok": False, "checks": [{"name": "health", "ok": True, "expected": "e", "found": 5, "hint": ""},
                            {"name": "speed", "ok": False, "expected": 9.0, "found": None, "hint": "slow"}],
    "decode_tokens_per_s": 25.5, "time": "2026-11-21T15:00:00Z", "identity": "5e" * 8, "release": "k1",
    "speed_key": "k", "speeds": [25.5], "last_failure": {"time": "t", "release": "k0", "check": {"name": "speed"}},
}  # fmt: skip
HOLDER = FOUND["lock"]
FIGURES = {"mean": 5.5, "p10": 1, "p50": 5, "p90": 9, "p99": 9, "max": 9}
# By the name of the function: the program, and what it prints.
ANSWERS = {
    "survey": ("survey.py", {"machine": MACHINE, "found": FOUND}),
    "holder": ("lock.py", HOLDER),
    "job": ("job.py", {"state": "ended", "exit_code": 1, "line": "b", "tail": ["a", "b"]}),
    "memory": ("verify.py", {"told": {"CUDA0": 5, "Host": 7}, "why": "", "room": True}),
    "sizes": ("verify.py", {"CUDA0": 5, "Host": 7}),
    "status": ("status.py", {"demo": {"rss_bytes": 5, "cgroup_bytes": None, "gpu_bytes": {"GPU-1": 5, "GPU-2": None},
                                      "since": "Sat", "gate": GATE}}),
    "removable": ("uninstall.py", {"euid": 0, "lock": HOLDER, "units": ["a.service"], "paths": ["/opt/llamafleet"],
                                   "models": ["/m"], "user": True}),
    "observed": ("workload.py", {"demo": {"since": None, "until": 9.5, "requests": 2, "cut_short": 0, "checks": 1,
                                          "prompt_tokens": FIGURES, "reply_tokens": FIGURES, "live_tokens": FIGURES,
                                          "concurrency": FIGURES, "counters": None}}),
    "built": ("build.py", {"digest": "5e" * 32}),
    "packed": ("build.py", {"digest": "5e" * 32, "sha256": "a1" * 32, "size_bytes": 5}),
    "apart": ("share.py", {"apart": ["10.0.0.2", "fd00::2"]}),
    "gate": ("gate.py", {"ok": True, "checks": [], "decode_tokens_per_s": None}),
}  # fmt: skip


def read(name, value):
    return getattr(answers, name)(value if isinstance(value, str) else json.dumps(value))


def refusal(name, value):
    with pytest.raises(AnswerError) as error:
        read(name, value)
    return str(error.value)


def test_every_answer_becomes_values():
    found = {name: read(name, value) for name, (_, value) in ANSWERS.items()}
    assert found["survey"].installed.lock == found["holder"] == Holder(**HOLDER)
    assert (found["job"].exit_code, found["job"].tail) == (1, ("a", "b"))
    assert (found["memory"].told, found["sizes"]) == ({"CUDA0": 5, "Host": 7}, {"CUDA0": 5, "Host": 7})
    assert found["status"]["demo"].gpu_bytes == {"GPU-1": 5, "GPU-2": None}
    assert [check.name for check in found["status"]["demo"].gate.checks if not check.ok] == ["speed"]
    assert found["status"]["demo"].gate.record == GATE
    assert (found["removable"].units, found["gate"].ok) == (("a.service",), True)
    assert found["built"].digest == "5e" * 32


def test_the_sizes_stand_behind_a_word_in_the_log():
    assert read("sizes", 'told: {"Host": 7}') == {"Host": 7}


def test_a_text_in_place_of_gpu_memory_is_its_problem():
    live = read("status", {"demo": {**ANSWERS["status"][1]["demo"], "gpu_bytes": "NVML: Driver Not Loaded"}})["demo"]
    assert (live.gpu_bytes, live.gpu_problem) == ({}, "NVML: Driver Not Loaded")


@pytest.mark.parametrize("gate", [[1], 5, {}, {"ok": "yes"}, {"ok": True, "checks": {}}, {**GATE, "schema": 2}])
def test_a_damaged_record_of_a_gate_spoils_no_other_value(gate):
    live = read("status", {"demo": {**ANSWERS["status"][1]["demo"], "gate": gate}})["demo"]
    assert live.rss_bytes == 5 and not live.gate.ok and live.gate.problem.startswith("record")


def test_a_holder_of_another_version_is_known_by_its_run():
    assert read("holder", {"run": "r", "boot": 5}) == Holder(run="r")


LOOK = ANSWERS["job"][1]


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("job", "", r"job\.py on the host: answer: is no JSON \(Expecting value.*\): ''"),
        ("job", "Traceback (most recent", r"answer: is no JSON .*: 'Traceback \(most recent'"),
        ("job", '{"state": "running"', "answer: is no JSON"),
        ("job", "[" * 100_000, "answer: is nested too deeply: '\\[\\[\\["),
        ("job", "[" * 70 + "]" * 70, "answer: is nested more than 60 times"),
        ("job", "9" * 5000, "answer: is no JSON .*digits"),
        ("job", "NaN", "answer: is no JSON .NaN is no number"),
        ("job", "1e999", "answer: is no JSON .a number is too large"),
        ("job", '{"state": 1, "state": 2}', "answer: is no JSON .it has a key twice"),
        ("job", " " * (16 * 2**20 + 1), "answer: should have at most 16777216 characters, has 16777217"),
        ("job", "[]", r"answer: should be an object, is \[\]"),
        ("job", {**LOOK, "state": "odd"}, "answer.state: should be one of running, ended, absent, is 'odd'"),
        ("job", {**LOOK, "exit_code": 10**30}, "answer.exit_code: should be a whole number from -255 to 255 or null"),
        ("job", {**LOOK, "tail": "a"}, "answer.tail: should be a list of"),
        ("job", {**LOOK, "tail": ["a"] * 1001}, "answer.tail: should have at most 1000 items, has 1001"),
        ("job", {"state": "running"}, r"answer.exit_code: missing.* \(and 2 more problems\)"),
        ("holder", {"who": "x"}, "answer.run: missing; should be text"),
        ("sizes", {"CUDA0": -1}, "answer.CUDA0: should be a whole number from 0 to"),
        ("sizes", {"CUDA0": True}, "answer.CUDA0: should be a whole number from 0 to"),
        ("memory", {"told": [], "why": "", "room": True}, r"answer.told: should be an object or null, is \[\]"),
        ("status", [], "answer: should be an object"),
        ("status", {"demo": 5}, "answer.demo: should be an object, is 5"),
        ("survey", "[1]", r"answer: should have machine and found, is \[1\]"),
    ],
)
def test_refused_in_one_sentence_that_names_the_program(name, line, message):
    text = refusal(name, line)
    assert re.search(message, text), text
    assert text.startswith(f"{ANSWERS[name][0]} on the host: answer") and len(text) < 400 and text.isprintable()


def test_what_is_no_utf8_is_shown_with_question_marks():
    assert read("job", {**LOOK, "tail": ["caf\udcc3"]}).tail == ("caf?",)


@pytest.mark.parametrize("count", [25, pytest.param(300, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", ANSWERS)
def test_a_broken_answer_is_read_or_refused(name, count):
    @settings(FUZZ, max_examples=count)
    @given(broken(ANSWERS[name][1]), st.none() | st.integers(0, 400))
    def check(value, cut):
        try:
            line = json.dumps(value)
        except (ValueError, RecursionError):  # a number or a depth that Python does not print
            return
        try:
            read(name, line[:cut])
        except MachineError as error:
            assert len(str(error)) < 400 and str(error).isprintable()

    check()
