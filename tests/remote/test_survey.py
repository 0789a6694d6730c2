"""What the survey says is ours, missing, or verified."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import common
import pytest

from llamafleet.remote import survey
from llamafleet.tuning.candidates import PLANNED_NUMBER

SHA = "5e" * 32


@pytest.mark.parametrize(
    ("content", "ours"),
    [
        (b"# Made by llamafleet; changes are lost\n[Unit]\n", True),
        (b"[Unit]\n# Made by llamafleet\n", False),  # quoted further down by somebody else's
        (b"[Unit]\nDescription=llama-server\n", False),
        (b"", False),
        (b"\xff\xfe\n", False),
    ],
)
def test_a_unit_is_ours_by_its_first_line(tmp_path, monkeypatch, content, ours):
    monkeypatch.setattr(survey, "UNITS", str(tmp_path))
    (tmp_path / "llama-server-chat.service").write_bytes(content)
    assert survey.is_ours("llama-server-chat.service") is ours


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 4096, b"# Made by ll", b"\x7fELF\0\1"], ids=["empty", "zeros", "cut", "bytes"]
)
@pytest.mark.parametrize("folder", ["instances/chat", "good/chat", None])
@pytest.mark.parametrize("unit", ["llama-server-chat.service", "llama-server-chat-liveness.timer"])
def test_a_unit_that_a_power_cut_emptied_is_ours_where_its_folder_is(tmp_path, monkeypatch, content, folder, unit):
    for name in ("units", "instances", "good"):
        monkeypatch.setattr(survey if name == "units" else common, name.upper(), str(tmp_path / name))
        (tmp_path / name).mkdir()
    if folder:
        (tmp_path / folder).mkdir()
    (tmp_path / "units" / unit).write_bytes(content)
    assert survey.is_ours(unit) is bool(folder)
    (tmp_path / "units" / unit).write_text("[Unit]\nDescription=of somebody else\n")
    assert survey.is_ours(unit) is False


def test_damaged_helpers_count_as_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "HELPERS", str(tmp_path))
    assert survey.current_helpers() is None
    (tmp_path / "k1").mkdir()
    (tmp_path / "current").symlink_to("k1")
    assert survey.current_helpers() is None
    (tmp_path / "k1/common.py").write_text("x = 1")
    (tmp_path / "k1" / common.SUMS).write_text(f"{common.sha256(b'x = 1')}  common.py\n")
    assert survey.current_helpers() == "k1"
    (tmp_path / "k1/common.py").write_text("")
    assert survey.current_helpers() is None


def test_a_dangling_link_is_not_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "UNITS", str(tmp_path))
    (tmp_path / "llama-server-chat.service").symlink_to(tmp_path / "nowhere")
    assert survey.is_ours("llama-server-chat.service") is False


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "MODELS", str(tmp_path / "models"))
    path = tmp_path / "models" / "m-0123" / "x.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"GGUF")
    path.chmod(0o644)
    record = {"size_bytes": 4, "mtime_ns": path.stat().st_mtime_ns, "sha256": SHA}
    (path.parent / "x.gguf.verified").write_text(json.dumps(record))
    return path


def test_a_verified_model_is_told_with_its_checksum(model):
    assert survey.verified_models() == {str(model): {"size_bytes": 4, "sha256": SHA}}


def test_every_name_that_a_model_may_have_is_found(model):
    """Downloaded it would be at every run, if it were not."""
    for name in ("X.GGUF", "a+b=c.Gguf"):
        shutil.copy2(model, model.with_name(name))
        shutil.copy2(f"{model}.verified", model.with_name(name + ".verified"))
    shutil.copy2(model, model.with_name("x.gguf.partial"))
    assert [os.path.basename(path) for path in survey.verified_models()] == ["X.GGUF", "a+b=c.Gguf", "x.gguf"]


def test_a_model_changed_since_is_not_verified(model):
    os.utime(model, ns=(0, 0))
    assert survey.verified_models() == {}


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.chmod(0o600),
        lambda path: path.write_bytes(b"GGUX"),
        lambda path: (path.rename(path.with_name("y")), path.symlink_to("y")),
    ],
    ids=["mode", "bytes", "link"],
)
def test_a_model_that_was_touched_is_not_verified_whatever_its_time_says(model, harm):
    before = model.stat().st_mtime_ns
    time.sleep(0.02)  # past a tick of the file system's clock
    harm(model)
    os.utime(model, ns=(before, before))
    assert model.stat().st_size == 4 and survey.verified_models() == {}


def test_a_model_that_grew_is_not_verified(model):
    before = model.stat().st_mtime_ns
    model.write_bytes(b"GGUF!")
    os.utime(model, ns=(before, before))
    assert survey.verified_models() == {}


def test_a_model_without_a_record_is_not_verified(model):
    for damaged in ("{", "[]", '{"size_bytes": 4}'):
        (model.parent / "x.gguf.verified").write_text(damaged)
        assert survey.verified_models() == {}
    (model.parent / "x.gguf.verified").unlink()
    assert survey.verified_models() == {}


def test_a_liveness_check_is_no_instance_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "UNITS", str(tmp_path))
    monkeypatch.setattr(common, "UNITS", str(tmp_path))
    monkeypatch.setattr(survey, "show", lambda unit, *_: {"ActiveState": "active"})
    for name in ("llama-server-chat.service", "llama-server-chat-liveness.service", "llama-server-chat-liveness.timer"):
        (tmp_path / name).write_text("# Made by llamafleet\n")
    found = survey.instances()
    assert list(found) == ["chat"] and found["chat"]["liveness"] == "active"
    assert sorted(found["chat"]["liveness_sha256"]) == [
        "llama-server-chat-liveness.service",
        "llama-server-chat-liveness.timer",
    ]


@pytest.mark.parametrize(
    "record",
    [
        [1],
        {},
        {"sha256": SHA},
        {"size_bytes": 4, "sha256": 5},
        {"size_bytes": [], "mtime_ns": {}, "sha256": SHA},
        "{",
        "\xff",
    ],
)
def test_a_damaged_note_of_a_model_is_worth_nothing(model, record):
    text = record if isinstance(record, str) else json.dumps(record)
    (model.parent / "x.gguf.verified").write_text(text, encoding="latin-1")
    assert survey.verified_models() == {}


@pytest.mark.parametrize(
    "record", [[1], 5, {"files": 5}, {"files": {"a": 1}, "sizes": []}, {"files": [[]]}, "text", None]
)
def test_a_damaged_record_of_a_release_is_worth_nothing(tmp_path, monkeypatch, record):
    monkeypatch.setattr(survey, "RELEASES", str(tmp_path))
    (tmp_path / "0123456789abcdef").mkdir()
    (tmp_path / "0123456789abcdef/release.json").write_text(json.dumps(record))
    assert survey.releases() == {}


def test_a_listener_may_have_any_name():
    """An ordinary user names his process, and the kernel cuts the name in mid-character."""
    code = (
        "import socket, sys; open('/proc/self/comm', 'wb').write(b'\\x1b[2J\\xff\\n' + 'é'.encode() * 9)\n"
        "s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        port = int(process.stdout.readline())
        [found] = [one for one in survey.listeners() if one["port"] == port]
        process.stdin.close()
    assert found["pid"] == process.pid and found["process"] == "\x1b[2J\ufffd\n" + "é" * 4 + "\ufffd"


@pytest.mark.parametrize(
    ("cgroups", "service"),
    [
        ("0::/system.slice/llama-server-a.service\n", "llama-server-a.service"),
        ("0::/user.slice/user-1000.slice/session-3.scope\n", None),
        # A user's own manager has services of any name.
        ("0::/user.slice/user-1000.slice/user@1000.service/app.slice/llama-server-a.service\n", "user@1000.service"),
        ("0::/machine.slice/systemd-nspawn@b.service/payload/system.slice/ssh.service\n", "ssh.service"),
        ("1:name=systemd:/system.slice/x.service\n0::/\n", "x.service"),
        ("", None),
    ],
)
def test_whose_service_a_process_is(cgroups, service):
    assert survey.service_in(cgroups) == service


def test_records_of_tunes_are_told_without_their_trials_and_damaged_ones_as_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "TUNED", str(tmp_path))
    (tmp_path / "chat.json").write_text(json.dumps({"schema": 1, "trials": [1, 2], "settings": {"threads": 2}}))
    (tmp_path / "code.json").write_text('{"schema": 1')
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "other.txt").write_text("{}")
    assert survey.tuned() == {"chat": {"schema": 1, "settings": {"threads": 2}}, "code": {}, "list": {}}


def test_of_a_record_the_trials_of_the_plan_are_told_as_far_as_they_tell_rates(tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "TUNED", str(tmp_path))
    speeds = {"prompt_tokens_per_s": 50.0, "decode_tokens_per_s": 15.0, "drafted": 0}
    trials = [{"candidate": number, "state": {"celsius": 70}, "label": "x", **speeds} for number in (0, 1, 2, 1)]
    (tmp_path / "chat.json").write_text(json.dumps({"schema": 1, "trials": trials}))
    assert survey.PLANNED == PLANNED_NUMBER
    assert survey.tuned() == {"chat": {"schema": 1, "trials": [{"candidate": 1, **speeds}] * 2}}


def test_a_host_that_was_never_tuned_has_no_records(tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "TUNED", str(tmp_path / "tuned"))
    assert survey.tuned() == {}
