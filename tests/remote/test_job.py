"""Jobs: how they start, what is said of their end, and what the operator is shown of a job's log."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from llamafleet.remote import job
from tasks.lib.sending import packed


@pytest.mark.parametrize(
    ("written", "told"),
    [
        (b"", []),
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\n\n  \ntwo", ["one", "two"]),
        (b"Receiving: 1%\rReceiving: 2%\rReceiving: 100%\ndone\n", ["Receiving: 100%", "done"]),
        (b"Receiving: 1%\rReceiving: 2%\r", ["Receiving: 2%"]),  # git ends its progress with one
        (b"one\r\ntwo\r\n", ["one", "two"]),
        (b"caf\xc3\xa9 \xff\n", ["café �"]),
    ],
)
def test_tail_shows_lines_as_a_terminal_would(tmp_path, written, told):
    log = tmp_path / "build.log"
    log.write_bytes(written)
    assert job.tail_of(str(log)) == told


def test_tail_of_a_long_log_is_its_end(tmp_path):
    log = tmp_path / "build.log"
    log.write_text("".join(f"line {number}\n" for number in range(100_000)))
    assert job.tail_of(str(log)) == [f"line {number}" for number in range(100_000 - job.TAIL_LINES, 100_000)]


def test_no_log_has_no_tail(tmp_path):
    assert job.tail_of(str(tmp_path / "build.log")) == []


@pytest.fixture
def clock(monkeypatch):
    """The seconds since the start; `at` has what happens when."""
    clock = types.SimpleNamespace(now=0.0, at={})

    def sleep(seconds):
        clock.now += seconds
        for when in [one for one in clock.at if one <= clock.now]:
            clock.at.pop(when)()

    monkeypatch.setattr(job, "time", types.SimpleNamespace(sleep=sleep, monotonic=lambda: clock.now))
    return clock


@pytest.fixture
def host(tmp_path, monkeypatch):
    """Folders of jobs, a systemd that notes what it is asked; `running` says whether the job still runs."""

    class Host:
        jobs, run, running, calls, fails = tmp_path / "jobs", tmp_path / "run", False, [], None

        def look(self):
            return job.look("build-1")

    def run(words, check):
        one.calls.append(words)
        if one.fails:
            raise one.fails

    one = Host()
    for name in ("jobs", "run"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(job, "JOBS", str(tmp_path / "jobs"))
    monkeypatch.setattr(job, "RUN", str(tmp_path / "run"))
    monkeypatch.setattr(job, "is_running", lambda name: one.running)
    monkeypatch.setattr(job.subprocess, "run", run)
    monkeypatch.setattr(job.job_limits, "for_job", lambda name: job.job_limits.limits(name.split("-")[0]))
    monkeypatch.setattr(job.prune, "prune", lambda *now: one.pruned.append(now))
    one.calls, one.pruned = [], []
    return one


def end(monkeypatch, result, code="exited", status="0", secret=None):
    """As systemd runs the unit's ExecStopPost=."""
    for name, value in {"SERVICE_RESULT": result, "EXIT_CODE": code, "EXIT_STATUS": status}.items():
        monkeypatch.setenv(name, value)
    assert job.main(["ended", "build-1", *([secret] if secret else [])], io.BytesIO()) == 0


def test_a_job_that_runs(host):
    host.running = True
    (host.jobs / "build-1.log").write_text("one\ntwo\n")
    assert host.look() == {"state": "running", "exit_code": None, "how": "", "line": "two", "tail": ["one", "two"]}


@pytest.mark.parametrize(
    ("result", "code", "status", "exit_code", "how"),
    [
        ("success", "exited", "0", 0, "exit code 0"),
        ("exit-code", "exited", "3", 3, "exit code 3"),
        ("signal", "killed", "KILL", None, "it was killed by SIGKILL"),
        ("core-dump", "dumped", "SEGV", None, "it was killed by SIGSEGV"),
        ("oom-kill", "killed", "KILL", None, "it was killed, because memory ran out"),
        ("timeout", "killed", "TERM", None, "it was ended at its time limit"),
        ("resources", "", "", None, "systemd could not start it"),
        ("", "", "", None, "it was killed"),
    ],
)
def test_how_a_job_ended_is_noted_by_systemd_s_own_words(host, monkeypatch, result, code, status, exit_code, how):
    end(monkeypatch, result, code, status)
    assert {**host.look(), "tail": 0} == {"state": "ended", "exit_code": exit_code, "how": how, "line": "", "tail": 0}


def test_the_end_of_a_job_is_seen_at_once_and_systemd_is_seldom_asked(host, monkeypatch, clock):
    asked = []
    monkeypatch.setattr(job, "is_running", lambda name: asked.append(clock.now) or host.running)

    def ends():
        host.running = False
        end(monkeypatch, "success")

    host.running, clock.at = True, {12.0: ends}
    assert job.follow("build-1", "", 60.0)["exit_code"] == 0
    assert clock.now == 12.0 and asked == [0.0, 5.0, 10.0, 12.0]


def test_a_job_that_was_killed_without_a_note_is_seen_too(host, clock):
    host.running, clock.at = True, {1.0: lambda: setattr(host, "running", False)}
    assert job.follow("build-1", "", 60.0)["state"] == "absent" and clock.now == job.ASK_SECONDS


def test_a_new_line_is_told_ten_seconds_after_the_last_one(host, clock):
    host.running, clock.at = True, {2.0: lambda: (host.jobs / "build-1.log").write_text("1\n")}
    assert job.follow("build-1", "", 60.0)["line"] == "1" and clock.now == 10.0
    assert job.follow("build-1", "1", 15.0)["line"] == "1" and clock.now == 25.0


def test_a_job_that_left_nothing_was_killed_with_its_host(host):
    assert {**host.look(), "tail": 0} == {
        "state": "absent", "exit_code": None, "how": "it was killed, or the host restarted", "line": "", "tail": 0,
    }  # fmt: skip


@pytest.mark.parametrize("text", ["", "x", "[1]", "{", "12345678901234567890123", "\x00" * 40])
def test_a_damaged_note_is_said_and_is_no_success(host, text):
    (host.jobs / "build-1.exit").write_text(text)
    found = host.look()
    assert (found["state"], found["exit_code"]) == ("ended", None)
    assert f"its exit code is lost: {host.jobs}/build-1.exit is empty or damaged" in found["how"]


@pytest.mark.parametrize(("text", "code"), [("0\n", 0), ("3\n", 3)])
def test_the_note_of_llamafleet_0_1_0(host, text, code):
    (host.jobs / "build-1.exit").write_text(text)
    assert (host.look()["exit_code"], host.look()["how"]) == (code, f"exit code {code}")


def test_on_a_full_disk_the_first_cause_is_kept_and_said(host, monkeypatch):
    """The note goes into memory, and the disk is named."""

    def full(path, value):
        if path.startswith(str(host.jobs)):
            raise OSError(28, "No space left on device", path)
        (host.run / "build-1.exit").write_text(json.dumps(value))

    monkeypatch.setattr(job, "write_json", full)
    monkeypatch.setattr(job.os, "statvfs", lambda folder: types.SimpleNamespace(f_bavail=3, f_frsize=4096))
    end(monkeypatch, "exit-code", status="1")
    found = host.look()
    assert (found["state"], found["exit_code"]) == ("ended", 1)
    assert found["how"] == f"exit code 1; the disk of {host.jobs} has no space left"


def start(host, *options, stream=b""):
    return job.main(["start", "build-1", *options, "--", "python3", "build.py", "a b"], io.BytesIO(stream))


def properties(host):
    [words] = host.calls
    return [word.removeprefix("--property=") for word in words if word.startswith("--property=")], words


def test_a_job_is_a_transient_unit_that_notes_its_end(host, capsys):
    for name in ("exit", "log"):
        (host.jobs / f"build-1.{name}").write_text("of an earlier one")
    assert start(host) == 0
    set_, words = properties(host)
    assert "--unit=llamafleet-job-build-1.service" in words and words[-3:] == ["python3", "build.py", "a b"]
    assert f"StandardOutput=append:{host.jobs}/build-1.log" in set_
    [after] = [one for one in set_ if one.startswith("ExecStopPost=")]
    assert after == f"ExecStopPost={sys.executable} -s -E -B {job.__file__} ended build-1"
    assert sorted(host.jobs.iterdir()) == []
    assert json.loads(capsys.readouterr().out)["state"] == "absent"


@pytest.mark.parametrize(("kind", "seconds"), job.job_limits.LONGEST.items())
def test_a_job_s_limits_are_those_of_its_kind(host, kind, seconds):
    assert job.main(["start", f"{kind}-1", "--", "true"], io.BytesIO()) == 0
    assert f"RuntimeMaxSec={seconds}" in properties(host)[0] and host.pruned == [()]


@pytest.mark.parametrize("name", ["m;touch${IFS}x;.gguf", "a b", "../x", "-rf", "", "a\nb", "a%i"])
def test_a_name_that_is_no_plain_one_starts_nothing(host, capsys, name):
    assert job.main(["start", "--", name, "true"], io.BytesIO()) == 1
    assert host.calls == [] and "a job's name has letters, digits" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["/run/a b", "/run/%n", "/run/$X", "/run/'x"])
def test_a_path_that_systemd_would_read_otherwise_starts_nothing(host, capsys, path, monkeypatch):
    monkeypatch.setattr(job, "replace_file", lambda *_: None)
    monkeypatch.setattr(job.os, "unlink", lambda *_: None)
    assert start(host, "--secret", path, stream=packed([(0o600, b"x")]).encode()) == 1
    assert host.calls == [] and "cannot stand in a unit's ExecStopPost=" in capsys.readouterr().err


def test_systemd_puts_no_variables_into_a_job_s_words(host):
    assert job.main(["start", "build-1", "--", "printf", "m;${IFS}x", "$$", "100%"], io.BytesIO()) == 0
    assert properties(host)[1][-3:] == ["m;$${IFS}x", "$$$$", "100%"]


def test_a_job_that_runs_already_is_joined(host, capsys):
    host.running = True
    (host.jobs / "build-1.log").write_text("3/9\n")
    assert start(host) == 0
    assert host.calls == [] and json.loads(capsys.readouterr().out)["line"] == "3/9"


def test_a_secret_is_there_while_the_job_runs(host, monkeypatch):
    secret = host.run / "token"
    assert start(host, "--secret", str(secret), stream=packed([(0o600, b"secret\n")]).encode()) == 0
    assert secret.read_bytes() == b"secret\n" and oct(secret.stat().st_mode & 0o777) == "0o600"
    set_, words = properties(host)
    assert [one for one in set_ if one.endswith(f" ended build-1 {secret}")] and "secret\n" not in " ".join(words)
    end(monkeypatch, "signal", "killed", "KILL", secret=str(secret))
    assert not secret.exists()


def variables(words):
    return dict(word.removeprefix("--setenv=").split("=", 1) for word in words if word.startswith("--setenv="))


def test_a_job_has_no_variables_unless_they_are_asked_for(host):
    assert start(host) == 0
    assert variables(properties(host)[1]) == {}


def test_a_job_reads_by_the_proxy_and_trusts_the_company_s_authority(host, monkeypatch):
    """ollama/ollama#729, #3816, #5446."""
    monkeypatch.setattr(job, "RUN", str(host.run))
    sent = packed([(0o600, b"secret\n"), (0o644, b"CERTIFICATE\n")]).encode()
    options = ("--secret", str(host.run / "token"), "--proxy", "http://p:3128", "--no-proxy=.example", "--certificates")
    assert start(host, *options, stream=sent) == 0
    found = variables(properties(host)[1])
    assert found["https_proxy"] == "http://p:3128" and found["no_proxy"].endswith(",.example")
    for name in ("CURL_CA_BUNDLE", "GIT_SSL_CAINFO", "SSL_CERT_FILE"):
        assert (
            Path(found[name]).read_bytes().endswith(b"CERTIFICATE\n") and "secret" not in Path(found[name]).read_text()
        )
    assert Path(found["APT_CONFIG"]).read_text() == f'Acquire::https::CAInfo "{found["SSL_CERT_FILE"]}";\n'
    assert (host.run / "token").read_bytes() == b"secret\n"


def test_a_job_that_systemd_does_not_start_leaves_no_secret_and_says_why(host, capsys):
    host.fails = subprocess.CalledProcessError(1, ["systemd-run"])
    secret = host.run / "token"
    assert start(host, "--secret", str(secret), stream=packed([(0o600, b"secret\n")]).encode()) == 1
    assert not secret.exists() and "error: the job build-1: " in capsys.readouterr().err


def test_a_secret_that_did_not_arrive_whole_starts_nothing(host, capsys):
    assert start(host, "--secret", str(host.run / "token"), stream=packed([(0o600, b"secret\n")]).encode()[:-3]) == 1
    assert host.calls == [] and "another SHA-256" in capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError("systemd is away"), subprocess.TimeoutExpired("systemctl", 60)])
def test_a_systemd_that_cannot_be_asked_is_one_line(host, monkeypatch, capsys, error):
    def fails(name):
        raise error

    monkeypatch.setattr(job, "is_running", fails)
    assert job.main(["follow", "build-1"], io.BytesIO()) == 1
    assert capsys.readouterr().err.startswith("error: the job build-1: ")


def test_lines_for_the_operator_s_program(host, capsys):
    (host.jobs / "build-1.log").write_text('one\ntold: {"CUDA0": 5}\ntwo\n')
    assert job.main(["told", "build-1"], io.BytesIO()) == 0
    assert capsys.readouterr().out == 'told: {"CUDA0": 5}\n'
