"""What the operator is shown of a job's log."""

from __future__ import annotations

import pytest

from llamafleet.remote import job


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


@pytest.mark.parametrize(
    ("running", "code", "state"), [(True, None, "running"), (False, 3, "ended"), (False, None, "absent")]
)
def test_look_tells_what_became_of_it(tmp_path, monkeypatch, running, code, state):
    monkeypatch.setattr(job, "JOBS", str(tmp_path))
    monkeypatch.setattr(job, "is_running", lambda name: running)
    if code is not None:
        (tmp_path / "build.exit").write_text(f"{code}\n")
    (tmp_path / "build.log").write_text("one\ntwo\n")
    assert job.look("build") == {"state": state, "exit_code": code, "line": "two", "tail": ["one", "two"]}
