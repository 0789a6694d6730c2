"""Compiles the oracle: llama-server and ggml-rpc-server of the upstream stand-in, for this machine's CPU.

Where sandbox hosts can run, that is done in their own root, with the options of a deploy and through the test hosts'
compiler cache: what it has compiled a deploy does not compile again, and the other way round. The programs then run
here with the root's libraries, by small scripts. Elsewhere the machine's own compiler does it, in about ten minutes on
two cores.

`python -m sandbox.oracle_build` compiles it, or waits for who does; with `--layers` it only makes the root.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

from sandbox import compiler_cache, machine, roots, upstream
from sandbox.state import SandboxError, current

FOLDER = upstream.CACHE / "llama.cpp-cpu"
COMPILER = ("cmake", "curl", "g++", "git", "make", "ninja-build")  # Debian packages, all that a deploy installs
TARGETS = ("llama-server", "ggml-rpc-server")
# Those of a deploy for the CPU (llamafleet/build/release.py), or its object files would be others; and RPC.
FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON",
    "-DCMAKE_INSTALL_RPATH=$ORIGIN",
    "-DGGML_NATIVE=ON",
    "-DGGML_CCACHE=OFF",
    "-DLLAMA_BUILD_IS_DEV=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",  # else the build fetches the web UI
    "-DLLAMA_OPENSSL=OFF",
    "-DGGML_RPC=ON",  # an RPC device stands in for a GPU
)
BUILD_TIMEOUT_SECONDS = 3600
# Where a deploy has its checkout and its build folders: paths are part of what the compiler cache compares.
SOURCE = "var/lib/llamafleet/src"
TREE = "var/lib/llamafleet/build/oracle"
# Mounts of its own, and with its first process all others end.
ENTER = """
set -e
disk=$1 lower=$2 cache=$3 cache_inside=$4; shift 4
mkdir -p "$disk/upper$cache_inside" "$disk/work" "$disk/root"
mount -t overlay overlay -o "lowerdir=$lower,upperdir=$disk/upper,workdir=$disk/work" "$disk/root"
mount --bind "$cache" "$disk/root$cache_inside"
mount --rbind /dev "$disk/root/dev"
mount -t proc proc "$disk/root/proc"
exec chroot "$disk/root" "$@"
"""
COPY_LIBRARIES = r"""
mkdir -p "$1/lib"
ldd "$1"/bin/llama-server "$1"/bin/ggml-rpc-server | grep -oE '(^|\s)/(usr/)?lib\S*' | sort -u | xargs cp -Lt "$1/lib"
"""
RUN = """#!/bin/sh
here=${0%/*}
exec "$here"/lib/ld-*.so.* --library-path "$here/lib" "$here/bin/${0##*/}" "$@"
"""


class OracleError(RuntimeError):
    """The oracle could not be built or started; the message carries the end of its log."""


@dataclass(frozen=True)
class Source:
    """A release of llama.cpp in a local git repository."""

    repository: Path
    commit: str
    tag: str  # bNNNNN


@dataclass(frozen=True)
class Oracle:
    """The built programs."""

    llama_server: Path
    rpc_server: Path


@contextmanager
def compiling(suite: str = roots.SUITE) -> Iterator[None]:
    """One compilation of llama.cpp for the CPU at a time on that release of Debian: who waits finds the object files of
    the one before."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with upstream.locked(FOLDER / f"{suite}.lock"):
        yield


@cache
def build(jobs: int | None = None, source: Source | None = None) -> Oracle:
    """The programs, compiled if the cache has none for this commit and these flags. Raises OracleError.

    `source` is another release than the pinned one (bench/adopt.py).
    """
    source = source or Source(upstream.REPOSITORY, upstream.ensure(), upstream.TAG)
    recipe = (source.commit, roots.SUITE, *FLAGS, *compiler_cache.FILES.values(), ENTER, COPY_LIBRARIES, RUN)
    folder = FOLDER / hashlib.sha256("\n".join(recipe).encode()).hexdigest()[:12]
    if not (folder / "done").exists():
        with compiling():
            if not (folder / "done").exists():
                _compile(folder, source, jobs or os.cpu_count() or 1)
                (folder / "done").touch()
    return Oracle(folder / TARGETS[0], folder / TARGETS[1])


def _compile(folder: Path, source: Source, jobs: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    disk = folder / "disk"
    tree = disk / "upper" / TREE
    tree.mkdir(parents=True)
    with (folder / "build.log").open("wb") as log:
        _export(source, disk / "upper" / SOURCE, log)
        within = _root(disk)
        at = Path("/") if within else disk / "upper"
        number = source.tag.removeprefix("b")
        stamp = (f"-DLLAMA_BUILD_NUMBER={number}", f"-DLLAMA_BUILD_COMMIT={source.commit[:7]}")
        configure = ["cmake", "-S", str(at / SOURCE), "-B", str(at / TREE), "-G", "Ninja", *FLAGS, *stamp]
        _run([*within, *configure], log)
        _run([*within, "cmake", "--build", str(at / TREE), "-j", str(jobs), "--target", *TARGETS], log)
        if within:
            _run([*within, "sh", "-ec", COPY_LIBRARIES, "sh", str(at / TREE)], log)
            (tree / "lib").rename(folder / "lib")
    (tree / "bin").rename(folder / "bin")
    for name in TARGETS:
        _make_runnable(folder, name, bool(within))
    shutil.rmtree(disk)


def _export(source: Source, folder: Path, log: IO[bytes]) -> None:
    """The files of that commit, without git's folder."""
    folder.mkdir(parents=True)
    archive = ["git", f"--git-dir={source.repository}", "archive", source.commit]
    with subprocess.Popen(archive, stdout=subprocess.PIPE) as tree:
        _run(["tar", "-x", "-C", str(folder)], log, stdin=tree.stdout)


def _root(disk: Path) -> list[str]:
    """Words before a command that run it in a Debian root with a compiler; none where such roots cannot be made."""
    if not (lower := layers()):
        return []
    cache = [str(compiler_cache.ensure()), compiler_cache.ON_HOST]
    unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", ENTER, "sh"]
    launcher = [f"{name}={value}" for name, value in compiler_cache.ENVIRONMENT.items()]
    return [*unshare, str(disk), ":".join(map(str, lower)), *cache, "env", *launcher]


def layers() -> list[Path]:
    """Those of a root with a compiler, of the hosts of most tests too; none where such roots cannot be made."""
    try:
        machine.check()
    except SandboxError:
        return []
    state = current()
    with state.locked():
        return roots.ensure(state, [*COMPILER, compiler_cache.PACKAGE])


def _make_runnable(folder: Path, name: str, with_libraries: bool) -> None:
    if with_libraries:
        (folder / name).write_text(RUN)
        (folder / name).chmod(0o755)
    else:
        (folder / name).symlink_to(f"bin/{name}")


def _run(command: Sequence[str], log: IO[bytes], stdin: IO[bytes] | None = None) -> None:
    try:
        done = subprocess.run(command, stdin=stdin, stdout=log, stderr=log, timeout=BUILD_TIMEOUT_SECONDS, check=False)
    except FileNotFoundError as error:
        raise OracleError(f"{command[0]} is not installed; a build needs: {' '.join(COMPILER)}") from error
    if done.returncode != 0:
        raise OracleError(f"{' '.join(command)} ended with {done.returncode}; {log.name} ends:\n{end(Path(log.name))}")


def end(log: Path) -> str:
    """The end of a log, for a message."""
    return log.read_text(errors="replace")[-2000:]


if __name__ == "__main__":
    print(layers() if sys.argv[1:] == ["--layers"] else build().llama_server)
