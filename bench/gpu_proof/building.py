"""llama-server for this machine's card, compiled as the project compiles it, with the kernels that the proof needs."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

from llamafleet.build.release import Build, jobs

ROOT = Path(__file__).resolve().parents[2]
TAG = "b11434"
UPSTREAM = ROOT / ".cache" / "upstream" / TAG / "llama.cpp.git"  # made by sandbox/upstream.py
# Other kernels of flash attention (GGML_CUDA_FA_QUANTS) are half of the compilation; caches are f16 here.
ONLY_F16 = "-DGGML_CUDA_FA_QUANTS=f16-f16"
NVCC = ("/usr/local/cuda/bin/nvcc", "/usr/bin/nvcc")


class BuildError(RuntimeError):
    """There is no llama-server to measure; the text says why, and the way out."""


def server(folder: Path, source: Path | None, backend: str, capability: str | None, deadline: float) -> Path:
    """llama-server in `folder`, compiled if it is not there. `source`: a tree of llama.cpp, its bare repository or its
    archive; `capability`: of the CUDA card, such as "9.0"; `deadline`: of time.monotonic(). Raises BuildError."""
    program = folder / "bin" / "llama-server"
    if program.exists():
        return program
    folder.mkdir(parents=True, exist_ok=True)
    tree = checkout(source, folder / "src")
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    parallel = jobs(backend, len(os.sched_getaffinity(0)), available, None)
    with (folder / "build.log").open("wb") as log:
        _run(["cmake", "-S", str(tree), "-B", str(folder), *flags(backend, capability)], log, deadline)
        _run(["cmake", "--build", str(folder), "--target", "llama-server", "-j", str(parallel)], log, deadline)
    return program


def flags(backend: str, capability: str | None) -> list[str]:
    """CMake's options: those of a deploy, for one card, and with the cache type that is measured."""
    architecture = capability.replace(".", "") if backend == "cuda" and capability else ""
    build = Build(
        commit=TAG, backend=backend, toolkit=None, architectures=(f"{architecture}-real",) if architecture else (),
        machine_arch=platform.machine(), libc="", cpu_flags=(), kv_types=("f16",), ui=False, tls=False,
    )  # fmt: skip
    words = [*build.cmake_flags(), "-DLLAMA_BUILD_NUMBER=" + TAG.removeprefix("b"), f"-DLLAMA_BUILD_COMMIT={TAG}"]
    if shutil.which("ninja"):
        words += ["-G", "Ninja"]
    if backend == "cuda":
        nvcc = shutil.which("nvcc") or next((path for path in NVCC if Path(path).exists()), None)
        if nvcc is None:
            raise BuildError("there is no nvcc: install the CUDA toolkit, or give --server with a finished build")
        words += [ONLY_F16, f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    return words


def checkout(source: Path | None, target: Path) -> Path:
    """The source tree; a repository or an archive is unpacked into `target`. Raises BuildError."""
    source = source or UPSTREAM
    if (source / "CMakeLists.txt").exists():
        return source
    if (target / "CMakeLists.txt").exists():
        return target
    target.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        archive = target.with_suffix(".tar")
        command = ["git", "-c", "safe.directory=*", "-C", str(source), "archive", "-o", str(archive.absolute()), TAG]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise BuildError(f"{source}: no source of {TAG}: {done.stderr.strip()[-300:]}")
        with tarfile.open(archive) as tar:
            tar.extractall(target, filter="data")
        archive.unlink()
        return target
    if not source.exists():
        raise BuildError(f"{source}: not there; give llama.cpp's source of {TAG} with --source")
    with tarfile.open(source) as tar:
        tar.extractall(target, filter="data")
    found = sorted(target.rglob("CMakeLists.txt"), key=lambda path: len(path.parts))
    tops = [path.parent for path in found if (path.parent / "ggml").is_dir()]
    if not tops:
        raise BuildError(f"{source}: has no source tree of llama.cpp")
    return tops[0]


def _run(command: Sequence[str], log: object, deadline: float) -> None:
    """Run until the deadline; raises BuildError with the log's name."""
    name = getattr(log, "name", "")
    try:
        done = subprocess.run(command, stdout=log, stderr=log, timeout=max(1.0, deadline - time.monotonic()))  # type: ignore[call-overload]
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"the time was over while llama-server was compiled; run again to go on: {name}") from error
    except OSError as error:
        raise BuildError(f"{command[0]}: {error.strerror}: install it, or give --server") from error
    if done.returncode:
        end = Path(name).read_bytes()[-2000:].decode(errors="replace")
        raise BuildError(f"{' '.join(command[:2])} failed; {name} ends:\n{end}")
