"""Following jobs: names, what the operator is told, and when the lock stays."""

import json
import re
import types
from dataclasses import replace

import pytest

from llamafleet.host.answers import Job
from tasks.lib import host_lock, jobs, remote

RUNNING = Job("running", None, "1/9", ["1/9"])
DONE = Job("ended", 0, "done", ["note: it was slow", "done"], "exit code 0")


@pytest.mark.parametrize(
    ("kind", "what", "name"),
    [
        ("build", "0123456789abcdef", "build-0123456789abcdef"),
        ("fetch", "Qwen3-8B-Q4_K_M-0123", "fetch-Qwen3-8B-Q4_K_M-0123"),
        ("fetch", "m;touch${IFS}x;.gguf", "fetch-m_touch__IFS_x_.gguf-2be2e2e3"),
    ],
)
def test_a_job_s_name(kind, what, name):
    found = jobs.name_of(kind, what)
    assert re.sub("-[0-9a-f]{8}$", "", found) == re.sub("-[0-9a-f]{8}$", "", name)
    assert re.fullmatch(r"[A-Za-z0-9_.-]+", found)


def test_names_of_different_things_differ():
    odd = ["a b", "a;b", "a/b", "a_b", "a\nb", "ä" * 200, "ä" * 201, "x" * 200, "x" * 201, "..", "."]
    names = {jobs.name_of("fetch", one) for one in odd}
    assert len(names) == len(odd)
    assert all(re.fullmatch(r"fetch-[A-Za-z0-9_.-]*", name) and len(name) < 140 for name in names)


@pytest.fixture
def host(monkeypatch):
    """A host that answers what is in `answers`; what was asked is in `asked`."""
    one = types.SimpleNamespace(name="box1", lines=[], asked=[], answers=[], again=0, working="")
    one.log = lambda text, *_: one.lines.append(text)
    one.log_styled = lambda text, **_: one.lines.append(text)

    def run_json(host, command, read=None):
        host.asked.append(command)
        answer = host.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def connect_again(host):
        host.again += 1

    monkeypatch.setattr(remote, "run_json", run_json)
    monkeypatch.setattr(remote, "connect_again", connect_again)
    monkeypatch.setattr(remote, "space_left", lambda host, text: "0 of 99 bytes are free" * ("disk is full" in text))
    monkeypatch.setattr(jobs, "hold", lambda state, host: True)
    monkeypatch.setattr(host_lock, "check", lambda host: None)
    monkeypatch.setattr(host_lock, "working", lambda host, job: setattr(host, "working", job))
    return one


def follow(host, *answers, secret=None):
    host.answers = list(answers)
    return jobs.follow(None, host, "build-1", ["python3", "build.py"], secret)


def test_a_job_is_followed_to_its_end(host):
    assert follow(host, RUNNING, RUNNING, DONE)
    assert host.lines == ["1/9", "it was slow"]
    assert [command.words[5] for command in host.asked] == ["start", "follow", "follow"]
    assert host.working == ""


def test_a_failed_job_says_how_it_ended_and_its_errors(host):
    tail = [*(f"line {number}" for number in range(20)), "error: the disk is full"]
    assert not follow(host, Job("ended", 1, tail[-1], tail, "exit code 1"))
    [text] = host.lines
    assert text.startswith("build-1 failed (exit code 1): line 5\n") and "error: the disk is full" in text
    assert text.endswith("0 of 99 bytes are free\nwhole log: /var/lib/llamafleet/jobs/build-1.log")
    assert host.working == ""


@pytest.mark.parametrize("code", [None, 1])
def test_a_job_whose_exit_code_is_lost_is_no_success(host, code):
    assert not follow(host, replace(DONE, exit_code=code, how="its exit code is lost"))
    assert "its exit code is lost" in host.lines[-1]


def test_a_host_that_is_silent_for_a_while_is_connected_to_again(host):
    assert follow(host, RUNNING, remote.NoAnswerError("silent"), remote.NoAnswerError("silent"), RUNNING, DONE)
    assert host.again == 2


def test_a_host_that_stays_silent_fails_and_its_job_goes_on_under_the_lock(host):
    assert not follow(host, RUNNING, *[remote.NoAnswerError("it did not end within 75 s")] * jobs.SILENT_LOOKS)
    assert "build-1: it did not end within 75 s; what was started goes on there" in host.lines[-1]
    assert host.working == "build-1"


def test_a_job_that_did_not_start_holds_nothing(host):
    assert not follow(host, remote.RemoteError("error: the job build-1: No space left on device"))
    assert host.lines == ["build-1: error: the job build-1: No space left on device"] and host.working == ""


def test_a_lost_lock_ends_the_following(host, monkeypatch):
    def lost(host):
        raise remote.RemoteError("this run lost the host's lock to bob@desk: run again")

    monkeypatch.setattr(host_lock, "check", lost)
    assert not follow(host, RUNNING)
    assert "lost the host's lock to bob@desk" in host.lines[-1]


def test_a_secret_goes_by_standard_input(host):
    secret = jobs.Secret("/run/llamafleet/token", "secret-token\n")
    assert follow(host, DONE, secret=secret)
    [start] = host.asked
    secretly = ["--secret", "/run/llamafleet/token"]
    assert start.words[5:] == ["start", "build-1", *secretly, "--", "python3", "build.py"]
    assert "secret-token" not in str(start) and "secret" not in repr(secret)
    digest, text = start.stdin.split("\n")
    assert len(digest) == 64 and json.loads(text)[0][0] == 0o600
