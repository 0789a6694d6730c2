"""A checkout at exactly one commit, from a repository of this machine."""

from __future__ import annotations

import os
import subprocess

import pytest

from llamafleet.remote import checkout, git_pack


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


def test_a_path_on_the_host_is_a_repository_too(upstream, tmp_path, capfd):
    folder, commits = upstream
    source = tmp_path / "src"
    for commit, text in zip((*commits, commits[0]), ("one", "two", "one"), strict=True):
        assert checkout.main([str(source), str(folder), commit]) == 0, capfd.readouterr().out
        assert git(source, "rev-parse", "HEAD") == commit and (source / "file").read_text() == text
    assert git(source, "fsck") == ""
    # A commit of an address after that.
    (folder / "file").write_text("three")
    git(folder, "commit", "--quiet", "-am", "three")
    third = git(folder, "rev-parse", "HEAD")
    assert checkout.main([str(source), f"file://{folder}", third]) == 0 and (source / "file").read_text() == "three"


def test_a_pack_that_was_sent_is_used_once(upstream, tmp_path):
    folder, commits = upstream
    with git_pack.of_commit(str(folder), commits[1]) as pack:
        (tmp_path / "sent.pack").write_bytes(pack.read())
    source = tmp_path / "src"
    assert checkout.main([str(source), str(tmp_path / "sent.pack"), commits[1]]) == 0
    assert (source / "file").read_text() == "two" and not (tmp_path / "sent.pack").exists()
    assert checkout.main([str(source), str(tmp_path / "sent.pack"), commits[1]]) == 0, "the commit is there"


def test_a_repository_of_another_user_is_read(upstream, tmp_path):
    if os.geteuid():
        pytest.skip("needs root")
    folder, commits = upstream
    subprocess.run(["chown", "-R", "nobody", str(folder)], check=True)
    assert checkout.main([str(tmp_path / "src"), str(folder), commits[0]]) == 0
    assert git_pack.commit_of(str(folder), "master") == commits[1]


@pytest.mark.parametrize("damage", ["cut", "no pack", "no file"])
def test_a_damaged_pack_is_an_error(upstream, tmp_path, capfd, damage):
    folder, commits = upstream
    with git_pack.of_commit(str(folder), commits[0]) as pack:
        data = pack.read()
    sent = tmp_path / "sent.pack"
    if damage != "no file":
        sent.write_bytes(data[:-30] if damage == "cut" else b"<html>")
    assert checkout.main([str(tmp_path / "src"), str(sent), commits[0]]) == 1
    assert capfd.readouterr().out.splitlines()[-1].startswith("error: ")


def test_a_ref_that_a_path_lacks_is_named(upstream):
    folder, _ = upstream
    with pytest.raises(git_pack.Failed, match="no tag, branch or commit 'b9'"):
        git_pack.commit_of(str(folder), "b9")
    with pytest.raises(git_pack.Failed, match="fatal: not a git repository"):
        git_pack.commit_of("/proc", "b9")
