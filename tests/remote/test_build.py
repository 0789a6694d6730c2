"""The host's build program: the shared cache, its lock, and what is left behind."""

from __future__ import annotations

import fcntl
import json
import os

import pytest

from llamafleet.remote import build

RECORD = {"cmake": "3.31", "compiled_on": "anna"}


@pytest.fixture
def spec(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "RELEASES", str(tmp_path / "releases"))
    return {"key": "k1", "commit": "c" * 40, "source": "/nonexistent", "tree": str(tmp_path / "trees" / "one"),
            "cmake_flags": [], "jobs": 1, "build_cache": str(tmp_path / "cache"), "record": RECORD}  # fmt: skip


def server(folder, code=0):
    program = folder / "bin" / "llama-server"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\necho 'version: 1'\nexit {code}\n")
    program.chmod(0o755)


@pytest.fixture
def cached(spec, tmp_path):
    """The cache as another host left it; this one has no release yet."""
    partial = tmp_path / "partial"
    server(partial)
    build.describe(spec, str(partial))
    build.give_name(spec, str(partial))
    (tmp_path / "cache").mkdir()
    build.publish(spec)
    os.rename(tmp_path / "releases", tmp_path / "the other host's")
    return tmp_path / "cache" / "k1.tar"


def test_a_cached_release_is_taken_whole_with_its_record(spec, cached, tmp_path):
    before = json.loads((tmp_path / "the other host's/k1/release.json").read_text())
    build.build({**spec, "record": {"compiled_on": "bert"}})
    release = tmp_path / "releases" / "k1"
    assert json.loads((release / "release.json").read_text()) == before
    assert before["compiled_on"] == "anna" and before["files"].keys() == {"llama-server"}
    assert build.sha256_of(str(release / "bin/llama-server")) == before["files"]["llama-server"]
    assert os.access(release / "bin/llama-server", os.X_OK)
    assert sorted(os.listdir(tmp_path / "releases")) == ["k1"]


def test_a_damaged_archive_fails_by_name(spec, cached, tmp_path):
    with cached.open("ab") as file:
        file.write(b"x")
    with pytest.raises(build.Failed, match="should have sha256") as failed:
        build.build(spec)
    assert str(cached) in str(failed.value) and "delete it and run again" in str(failed.value)
    assert not (tmp_path / "releases").exists()


@pytest.mark.parametrize("lost", ["k1.tar", "k1.tar.sha256"])
def test_half_a_cache_entry_is_none(spec, cached, lost):
    (cached.parent / lost).unlink()
    assert build.take_from_cache(spec) is False


def test_without_a_cache_nothing_is_taken_or_kept(spec, tmp_path):
    spec["build_cache"] = None
    assert build.take_from_cache(spec) is False
    build.publish(spec)
    with build.turn(spec):
        assert os.listdir(tmp_path) == []


def test_a_cached_release_that_does_not_run_here_is_not_given_its_name(spec, tmp_path, cached):
    other = tmp_path / "other"
    server(other, code=127)
    (other / "release.json").write_text('{"files": {}}')
    os.makedirs(tmp_path / "releases")
    os.rename(other, tmp_path / "releases/k1")
    build.publish(spec)
    os.rename(tmp_path / "releases", tmp_path / "away")
    with pytest.raises(build.Failed, match="does not run on this host"):
        build.build(spec)
    assert not (tmp_path / "releases/k1").exists()


def test_a_complete_release_is_not_made_again(spec, tmp_path, capsys):
    (tmp_path / "releases/k1").mkdir(parents=True)
    (tmp_path / "releases/k1/release.json").write_text('{"files": {}}')
    build.build(spec)
    assert "already complete" in capsys.readouterr().out
    assert not (tmp_path / "cache").exists()


def test_a_second_host_waits_for_the_first_and_says_for_whom(spec, tmp_path, monkeypatch, capsys):
    (tmp_path / "cache").mkdir()
    with open(tmp_path / "cache/k1.lock", "w") as held:
        held.write("anna")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        slept = []

        def sleep(seconds):
            slept.append(seconds)
            if len(slept) == 2:
                fcntl.flock(held, fcntl.LOCK_UN)  # anna is done

        monkeypatch.setattr(build.time, "sleep", sleep)
        with build.turn(spec):
            assert len(slept) == 2
            assert (tmp_path / "cache/k1.lock").read_text() == os.uname().nodename
            with pytest.raises(BlockingIOError):
                fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
    assert capsys.readouterr().out.count("waiting for anna, which compiles the same build") == 2


def test_only_this_build_folder_is_kept(tmp_path):
    for name in ("one", "two", "three"):
        (tmp_path / "trees" / name / "bin").mkdir(parents=True)
    build.forget_other_trees(str(tmp_path / "trees/one"))
    assert os.listdir(tmp_path / "trees") == ["one"]
    assert (tmp_path / "trees/one/bin").is_dir()
    build.forget_other_trees(str(tmp_path / "nowhere/one"))


def test_a_failed_command_is_told_by_the_lines_that_say_why(capsys):
    script = "echo compiling a; echo 'b.cpp:1: error: no such thing'; echo ninja: stopped; exit 3"
    with pytest.raises(build.Failed) as failed:
        build.run(["sh", "-c", script], "it does not compile")
    assert str(failed.value) == "it does not compile (exit code 3):\nb.cpp:1: error: no such thing"
    assert capsys.readouterr().out.splitlines()[0] == "compiling a"
