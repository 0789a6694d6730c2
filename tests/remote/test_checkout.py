"""A checkout at exactly one commit, from a repository of this machine."""

from __future__ import annotations

import subprocess

import pytest

from llamafleet.remote import checkout


def git(folder, *words):
    return subprocess.run(
        ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@t", *words],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip


@pytest.fixture
def upstream(tmp_path):
    """A repository with two commits; their names."""
    folder = tmp_path / "up stream;$(x)"
    folder.mkdir()
    git(folder, "init", "--quiet")
    git(folder, "config", "uploadpack.allowAnySHA1InWant", "true")
    commits = []
    for text in ("one", "two"):
        (folder / "file").write_text(text)
        git(folder, "add", "file")
        git(folder, "commit", "--quiet", "-m", text)
        commits.append(git(folder, "rev-parse", "HEAD"))
    return folder, commits


def test_each_commit_is_checked_out_clean(upstream, tmp_path):
    folder, commits = upstream
    source = tmp_path / "my src"
    for commit, text in zip((*commits, commits[0]), ("one", "two", "one"), strict=True):
        assert checkout.main([str(source), f"file://{folder}", commit]) == 0
        assert git(source, "rev-parse", "HEAD") == commit and (source / "file").read_text() == text
        (source / "file").write_text("edited")
        (source / "left").write_text("x")
    assert checkout.main([str(source), f"file://{folder}", commits[0]]) == 0
    assert (source / "file").read_text() == "one" and not (source / "left").exists()


def test_a_commit_that_is_there_needs_no_repository(upstream, tmp_path):
    folder, commits = upstream
    assert checkout.main([str(tmp_path / "src"), f"file://{folder}", commits[0]]) == 0
    assert checkout.main([str(tmp_path / "src"), "file:///nowhere", commits[0]]) == 0


def test_locks_of_a_git_that_was_killed_stop_nobody(upstream, tmp_path):
    folder, commits = upstream
    assert checkout.main([str(tmp_path / "src"), f"file://{folder}", commits[0]]) == 0
    for name in ("shallow.lock", "index.lock"):
        (tmp_path / "src/.git" / name).write_text("")
    assert checkout.main([str(tmp_path / "src"), f"file://{folder}", commits[1]]) == 0


@pytest.mark.parametrize("repository", ["file:///nowhere", "--upload-pack=touch bad"])
def test_a_repository_that_does_not_give_it_is_named_with_git_s_own_words(tmp_path, capfd, monkeypatch, repository):
    monkeypatch.chdir(tmp_path)
    assert checkout.main([str(tmp_path / "src"), repository, "a" * 40]) == 1
    out = capfd.readouterr().out
    assert out.splitlines()[-1] == f"error: llama_cpp_ref: the repository does not give commit {'a' * 40} to this host"
    assert "fatal:" in out and not (tmp_path / "src/bad").exists() and not (tmp_path / "bad").exists()
