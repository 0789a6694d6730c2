"""llama.cpp itself, built once for the CPU with its RPC backend: what the `oracle` tests compare against.

`build()` compiles llama-server and ggml-rpc-server of the upstream stand-in into `.cache/llama.cpp-cpu/`,
about four minutes on four cores, and afterwards only returns the paths. Needs git, cmake, ninja and a C++
compiler.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import IO

from sandbox import upstream

FOLDER = upstream.CACHE / "llama.cpp-cpu"
PACKAGES = ("git", "cmake", "ninja-build", "g++")  # Debian names of what a build needs
TARGETS = ("llama-server", "ggml-rpc-server")
FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",  # each program one file
    "-DGGML_RPC=ON",  # an RPC device stands in for a GPU
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",  # else the build fetches the web UI
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DGGML_CCACHE=OFF",
)
BUILD_TIMEOUT_SECONDS = 3600
START_TIMEOUT_SECONDS = 60
STOP_TIMEOUT_SECONDS = 10


class OracleError(RuntimeError):
    """The oracle could not be built or started; the message carries the end of its log."""


@dataclass(frozen=True)
class Oracle:
    """The built programs."""

    llama_server: Path
    rpc_server: Path


def build(jobs: int | None = None) -> Oracle:
    """The programs, compiled if the cache has none for this commit and these flags. Raises OracleError."""
    commit = upstream.ensure()
    key = hashlib.sha256("\n".join((commit, *FLAGS)).encode()).hexdigest()[:12]
    folder = FOLDER / key
    oracle = Oracle(folder / "bin" / TARGETS[0], folder / "bin" / TARGETS[1])
    FOLDER.mkdir(parents=True, exist_ok=True)
    with upstream.locked(FOLDER / "lock"):
        if not (folder / "done").exists():
            _compile(folder, commit, jobs or os.cpu_count() or 1)
            (folder / "done").touch()
    return oracle


@contextmanager
def serving(command: Sequence[str | Path], port: int, log: Path) -> Iterator[str]:
    """Run llama-server (the given argv, which must listen on `port`) until the block ends; gives its URL once
    healthy.

    Raises OracleError if it exits or is not healthy within a minute.
    """
    with (
        log.open("wb") as out,
        subprocess.Popen([str(part) for part in command], stdout=out, stderr=out) as process,
    ):
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_healthy(process, url, log)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = monotonic() + START_TIMEOUT_SECONDS
    while monotonic() < deadline and process.poll() is None:
        with suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=2):
            return  # 503 while loading is an OSError too (HTTPError)
        sleep(0.1)
    state = "still not healthy" if process.returncode is None else f"exited with {process.returncode}"
    raise OracleError(f"llama-server {state} after at most {START_TIMEOUT_SECONDS} s; {log} ends:\n{_end(log)}")


def _compile(folder: Path, commit: str, jobs: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    source = folder / "source"
    source.mkdir(parents=True)
    with (folder / "build.log").open("wb") as log:
        archive = ["git", f"--git-dir={upstream.REPOSITORY}", "archive", commit]
        with subprocess.Popen(archive, stdout=subprocess.PIPE) as tree:
            _run(["tar", "-x", "-C", str(source)], log, stdin=tree.stdout)
        number = upstream.TAG.removeprefix("b")
        stamp = (f"-DLLAMA_BUILD_NUMBER={number}", f"-DLLAMA_BUILD_COMMIT={commit[:7]}")
        _run(["cmake", "-S", str(source), "-B", str(folder / "build"), "-G", "Ninja", *FLAGS, *stamp], log)
        _run(["cmake", "--build", str(folder / "build"), "-j", str(jobs), "--target", *TARGETS], log)
    (folder / "build" / "bin").rename(folder / "bin")
    shutil.rmtree(folder / "build")  # 90 MB of objects; the programs are static
    shutil.rmtree(source)


def _run(command: list[str], log: IO[bytes], stdin: IO[bytes] | None = None) -> None:
    try:
        done = subprocess.run(command, stdin=stdin, stdout=log, stderr=log, timeout=BUILD_TIMEOUT_SECONDS, check=False)
    except FileNotFoundError as error:
        raise OracleError(f"{command[0]} is not installed; a build needs: {' '.join(PACKAGES)}") from error
    if done.returncode != 0:
        raise OracleError(f"{' '.join(command)} ended with {done.returncode}; {log.name} ends:\n{_end(Path(log.name))}")


def _end(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]
