"""llama-server for this machine's card, compiled as the project compiles it, with the kernels that the proof needs."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from llamafleet.build.cuda_toolkit import (
    Install,
    InstalledToolkit,
    Toolkit,
    Unsuitable,
    architectures,
    choose_toolkit,
)
from llamafleet.build.release import Build, jobs
from llamafleet.host.machine import Machine

ROOT = Path(__file__).resolve().parents[2]
TAG = "b11434"
UPSTREAM = ROOT / ".cache" / "upstream" / TAG / "llama.cpp.git"  # made by sandbox/upstream.py
# Other kernels of flash attention (GGML_CUDA_FA_QUANTS) are half of the compilation; caches are f16 here.
ONLY_F16 = "-DGGML_CUDA_FA_QUANTS=f16-f16"


class BuildError(RuntimeError):
    """There is no llama-server to measure; the text says why, and the way out."""


def toolkit(host: Machine) -> Toolkit | Install | Unsuitable:
    """The CUDA toolkit of those here that a deploy would take; else what it would install, or why none fits."""
    program = ROOT / "llamafleet" / "remote" / "toolkits.py"
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=True)
    return choose_toolkit("auto", host, [InstalledToolkit.from_json(one) for one in json.loads(done.stdout)])


def lacking(backend: str, source: Path | None, host: Machine) -> Iterator[str]:
    """What is missing to compile, with the way out."""
    if missing := [name for name in ("cmake", "g++") if not shutil.which(name)]:
        yield f"{' and '.join(missing)}: install them, or give --server"
    if backend == "cuda" and not isinstance(found := toolkit(host), Toolkit):
        how = f"install {' '.join(found.packages)}" if isinstance(found, Install) else found.reason
        yield f"a CUDA toolkit (nvcc) that fits the driver and the card: {how}, or give --server"
    if backend == "vulkan" and not shutil.which("glslc"):
        yield "glslc: install it with the headers of Vulkan, or give --server"
    if not (source or UPSTREAM).exists():
        yield f"{source or UPSTREAM}: give llama.cpp's source of {TAG} with --source"


def server(folder: Path, source: Path | None, backend: str, host: Machine, deadline: float) -> Path:
    """llama-server in `folder`, compiled if it is not there. `source`: a tree of llama.cpp or its git repository;
    `host`: with the card alone; `deadline`: of time.monotonic(). Raises BuildError."""
    program = folder / "bin" / "llama-server"
    if program.exists():
        return program
    folder.mkdir(parents=True, exist_ok=True)
    tree = checkout(source or UPSTREAM, folder / "src")
    parallel = jobs(backend, len(os.sched_getaffinity(0)), host.memory.available_bytes, None)
    with (folder / "build.log").open("wb") as log:
        _run(["cmake", "-S", str(tree), "-B", str(folder), *flags(backend, host)], log, deadline)
        _run(["cmake", "--build", str(folder), "--target", "llama-server", "-j", str(parallel)], log, deadline)
    return program


def flags(backend: str, host: Machine) -> list[str]:
    """CMake's options: those of a deploy, for the host's card alone, and with the cache type that is measured."""
    build = Build(
        commit=TAG, backend=backend, toolkit=None, architectures=architectures(host) if backend == "cuda" else (),
        machine_arch=platform.machine(), libc="", cpu_flags=(), kv_types=("f16",), ui=False, tls=False,
    )  # fmt: skip
    words = [*build.cmake_flags(), "-DLLAMA_BUILD_NUMBER=" + TAG.removeprefix("b"), f"-DLLAMA_BUILD_COMMIT={TAG}"]
    if shutil.which("ninja"):
        words += ["-G", "Ninja"]
    if backend == "cuda" and isinstance(cuda := toolkit(host), Toolkit):
        words += [ONLY_F16, f"-DCMAKE_CUDA_COMPILER={cuda.nvcc}"]
        words += [f"-DCMAKE_CUDA_HOST_COMPILER={cuda.host_compiler}"] if cuda.host_compiler else []
    return words


def libraries(backend: str, host: Machine) -> dict[str, str]:
    """Where llama-server finds the toolkit's libraries, which some toolkits do not tell the linker."""
    if backend != "cuda" or not isinstance(cuda := toolkit(host), Toolkit):
        return {}
    folders = [f"{cuda.path}/lib64", os.environ.get("LD_LIBRARY_PATH", "")]
    return {"LD_LIBRARY_PATH": ":".join(folder for folder in folders if folder)}


def checkout(source: Path, target: Path) -> Path:
    """The source tree; that of a repository is unpacked into `target`. Raises BuildError."""
    if (source / "CMakeLists.txt").exists():
        return source
    if (target / "CMakeLists.txt").exists():
        return target
    archive = target.with_suffix(".tar").absolute()
    command = ["git", "-c", "safe.directory=*", "-C", str(source), "archive", "-o", str(archive), TAG]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{source}: no source of {TAG}: {done.stderr.strip()[-300:]}")
    with tarfile.open(archive) as tar:
        tar.extractall(target, filter="data")
    archive.unlink()
    return target


def _run(command: Sequence[str], log: BinaryIO, deadline: float) -> None:
    """Run until the deadline; raises BuildError with the log's name."""
    try:
        left = max(1.0, deadline - time.monotonic())
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=left)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"the time is over while llama-server is compiled: run again to go on; {log.name}") from error
    if done.returncode:
        end = Path(log.name).read_bytes()[-2000:].decode(errors="replace")
        raise BuildError(f"{' '.join(command[:2])} failed; {log.name} ends:\n{end}")
