"""What servers were asked for, from lines that llama-server b11434 logged at the level of its unit."""

import json
import re
import subprocess
import sys
from pathlib import Path

import common
import pytest
import workload

from tests.serving import Server, serving

LOGS = Path(__file__).parent / "workload_logs"
NOON = 1796040000.0
STAMP = re.compile(r"(\d+)\.(\d\d)\.(\d\d\d)\.(\d\d\d) ")


def journal(text, pid=321, start=NOON):
    """Lines of a log as journalctl prints them with --output=short-unix, by their own times."""
    lines = [f"{start:.6f} gpu1 systemd[1]: Started llama-server-chat.service - llama-server."]
    for line in text.splitlines():
        minutes, seconds, milli, micro = map(int, STAMP.match(line).groups())
        lines.append(
            f"{start + 60 * minutes + seconds + milli / 1e3 + micro / 1e6:.6f} gpu1 llama-server[{pid}]: {line}"
        )
    return lines


CHAT = (LOGS / "chat.log").read_text()


def test_a_chat_is_read_from_its_timings():
    """Two short requests, three long ones of which two came at once and the third, a repeated one, waited; and one that
    the client left."""
    found = workload.of_journal(journal(CHAT))
    assert (found["requests"], found["cut_short"], found["checks"]) == (5, 1, 0)
    assert found["prompt_tokens"]["mean"] == pytest.approx((53 + 1 + 1418 + 1376 + 1) / 5, abs=0.1)
    assert (found["prompt_tokens"]["p50"], found["prompt_tokens"]["max"]) == (53, 1418)
    assert found["reply_tokens"] == {"mean": 44, "p10": 20, "p50": 60, "p90": 60, "p99": 60, "max": 60}
    live = (2 * 20 * (72 - 10) + 3 * 60 * (1477 - 30)) / (2 * 20 + 3 * 60)
    assert found["live_tokens"]["mean"] == pytest.approx(live, abs=0.1)
    assert NOON < found["since"] < found["until"] < NOON + 16
    # Of 15 busy seconds, 11.5 had two requests.
    assert found["concurrency"]["max"] == found["concurrency"]["p50"] == 2
    assert found["concurrency"]["mean"] == pytest.approx(1.7, abs=0.05) and found["concurrency"]["p10"] == 1


def test_a_server_of_embeddings_has_inputs_and_no_replies():
    found = workload.of_journal(journal((LOGS / "embedding.log").read_text()), writes=False)
    assert (found["requests"], found["cut_short"]) == (2, 0)
    assert found["prompt_tokens"]["mean"] == 9 and found["reply_tokens"]["max"] == 0
    assert found["live_tokens"]["mean"] == 9 and found["concurrency"]["max"] == 2


def test_a_chat_whose_requests_were_all_cut_short_has_no_figures():
    lines = [line for line in journal(CHAT) if "print_timing" not in line]
    found = workload.of_journal(lines)
    assert (found["requests"], found["cut_short"], found["prompt_tokens"]) == (0, 6, None)


@pytest.mark.parametrize(("serves", "chat"), [("chat", True), ("embedding", False), ("reranking", False), (None, True)])
def test_the_plan_says_what_it_serves(tmp_path, monkeypatch, serves, chat):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"gate": {"serves": serves}} if serves else {}))
    monkeypatch.setattr(workload, "plan_path", lambda name: str(plan))
    assert workload.is_chat("a") is chat


def test_each_start_of_a_server_counts_its_tasks_anew():
    twice = [*journal(CHAT), *journal(CHAT, pid=654, start=NOON + 3600)]
    assert workload.of_journal(twice)["requests"] == 10
    # The lines of two processes may lie between each other, as where one ends while the next starts.
    mixed = [line for pair in zip(journal(CHAT), journal(CHAT, pid=654), strict=True) for line in pair]
    found = workload.of_journal(mixed)
    assert found["requests"] == 10 and found["concurrency"]["max"] == 4


def test_requests_of_the_liveness_check_are_in_no_figure():
    check = [line.replace("/    53 tokens", "/     2 tokens").replace("/    20 tokens", "/     1 tokens")
                 .replace("n_tokens = 72", "n_tokens = 2") for line in CHAT.splitlines()]  # fmt: skip
    found = workload.of_journal(journal("\n".join(check)))
    assert (found["requests"], found["checks"]) == (3, 2)
    assert found["reply_tokens"]["p10"] == 60


def test_a_request_that_began_before_the_first_line_counts_without_its_time():
    lines = journal(CHAT)
    begun = next(number for number, line in enumerate(lines) if "print_timing" in line)
    found = workload.of_journal(lines[begun:])
    assert found["requests"] == 5
    assert found["concurrency"] == workload.of_journal(lines[begun + 6 :])["concurrency"]


def test_timings_without_the_slot_before_each_line_are_the_slot_s():
    """As builds before these log them."""
    old = re.sub(r"^(\S+ \S) slot print_timing: id +\d+ \| task \d+ \| ( +eval)", r"\1 \2", CHAT, flags=re.M)
    old = old.replace("n_tokens = 72, truncated", "n_past = 72, truncated")
    assert old != CHAT and workload.of_journal(journal(old)) == workload.of_journal(journal(CHAT))


@pytest.mark.parametrize("lines", [[], ["nothing of ours"], journal("")])
def test_nothing_that_was_asked_is_no_figure(lines):
    found = workload.of_journal(lines)
    assert found["requests"] == 0 and found["since"] is None
    assert [found[key] for key in ("prompt_tokens", "reply_tokens", "live_tokens", "concurrency")] == [None] * 4


def test_a_text_in_the_log_is_neither_kept_nor_printed():
    """A server whose operator has set a higher level logs prompts."""
    line = "0.14.734.100 D srv  process_singl: prompt: 'my secret'\n0.14.734.200 D slot update_slots: id  0 | task 45 | my secret"
    found = workload.of_journal(journal(CHAT + line + "\n"))
    assert "secret" not in json.dumps(found) and found["requests"] == 5


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([(1.0, 1.0), (2.0, 1.0), (3.0, 1.0), (4.0, 1.0)], {"mean": 2.5, "p10": 1, "p50": 2, "p90": 4, "max": 4}),
        ([(1.0, 9.0), (10.0, 1.0)], {"mean": 1.9, "p10": 1, "p50": 1, "p90": 1, "p99": 10, "max": 10}),
        ([(5.0, 0.25)], {"mean": 5, "p10": 5, "max": 5}),
    ],
)
def test_quantiles_are_by_weight(values, said):
    found = workload.figures(values)
    assert {key: found[key] for key in said} == said


def test_time_without_a_request_is_not_counted():
    assert sorted(workload.at_once([(0, 10), (5, 10), (100, 101)])) == [(1.0, 6.0), (2.0, 5.0)]


METRICS = """\
# HELP llamacpp:prompt_tokens_total Number of prompt tokens processed, excluding cached tokens
# TYPE llamacpp:prompt_tokens_total counter
llamacpp:prompt_tokens_total 3.75144e+06
# HELP llamacpp:prompt_tokens_cached_total Number of prompt tokens reused from the cache
# TYPE llamacpp:prompt_tokens_cached_total counter
llamacpp:prompt_tokens_cached_total 1511
# HELP llamacpp:prompt_seconds_total Total time spent processing prompts
# TYPE llamacpp:prompt_seconds_total counter
llamacpp:prompt_seconds_total 6.58174
# HELP llamacpp:tokens_predicted_total Number of generation tokens processed
# TYPE llamacpp:tokens_predicted_total counter
llamacpp:tokens_predicted_total 220
"""


class Counting(Server):
    """Answers /metrics, and no other address."""

    status, told = 200, METRICS

    def respond(self, path, body, headers):
        return (self.status, self.told) if path == "/metrics" else (404, "")


@pytest.fixture
def counting(monkeypatch):
    with serving(Counting()) as server:
        spec = {"url": server.url, "api_keys": None, "tls_certificate": None, "socket": None}
        monkeypatch.setattr(workload, "read_spec", lambda path: spec)
        yield server


def test_the_counters_of_a_running_server_are_read(counting):
    assert workload.counters("chat") == {"prompt_tokens": 3751440.0, "cached_tokens": 1511.0, "reply_tokens": 220.0}
    assert counting.paths == ["/metrics"], "/slots may hold what users wrote"


@pytest.mark.parametrize(
    ("status", "told"),
    [(401, "no"), (200, "nothing"), (200, METRICS.replace("220", "1e999")), (200, METRICS.replace("220", "1e+e"))],
)
def test_counters_that_cannot_be_read_are_none(counting, status, told):
    counting.status, counting.told = status, told
    assert workload.counters("chat") is None


def test_a_plan_that_cannot_be_read_has_no_counters(tmp_path, monkeypatch):
    monkeypatch.setattr(workload, "plan_path", lambda name: str(tmp_path / "plan.json"))
    assert workload.counters("chat") is None


FAKE = """#!/bin/sh
printf '%s\\n' "$*" >>{folder}/asked
case "$*" in *nonsense*) echo 'Failed to parse timestamp: nonsense' >&2; exit 1 ;; esac
cat {folder}/journal
"""


@pytest.fixture
def host(tmp_path, monkeypatch):
    (tmp_path / "journalctl").write_text(FAKE.format(folder=tmp_path))
    (tmp_path / "journalctl").chmod(0o755)
    (tmp_path / "journal").write_text("\n".join(journal(CHAT)) + "\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def run(*arguments):
    program = Path(workload.__file__)
    return subprocess.run([sys.executable, "-s", "-E", "-B", str(program), *arguments], capture_output=True, text=True)


def test_the_program_prints_each_instance(host):
    done = run("7 days ago", "chat", "code")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == ["chat", "code"]
    assert found["chat"] == {**workload.of_journal(journal(CHAT)), "counters": None}
    asked = (host / "asked").read_text().splitlines()
    assert [f"--unit={common.unit_of(name)}" in line for name, line in zip(("chat", "code"), asked, strict=True)] == [
        True
    ] * 2
    assert all("--since=7 days ago" in line for line in asked)


def test_what_journalctl_does_not_understand_is_said(host):
    done = run("nonsense", "chat")
    assert done.returncode == 1 and "error: journalctl: Failed to parse timestamp: nonsense" in done.stderr
    assert run().returncode == 1
