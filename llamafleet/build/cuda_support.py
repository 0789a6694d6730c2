"""CUDA's own rules: which toolkit can target which GPU, driver, compiler and C library.

Versions are (major, minor). Sources, all read in 2026:
  [install] docs.nvidia.com/cuda/cuda-installation-guide-linux (and /cuda/archive/VERSION/...)
  [ptx]     docs.nvidia.com/cuda/parallel-thread-execution, release notes: first PTX with a target
  [compat]  docs.nvidia.com/deploy/cuda-compatibility, "minor version compatibility"
"""

from __future__ import annotations

import re

Version = tuple[int, int]

# Toolkits in NVIDIA's package repositories from 11.8 on; 12.7 was never released.
RELEASES: tuple[Version, ...] = (
    (11, 8), (12, 0), (12, 1), (12, 2), (12, 3), (12, 4), (12, 5), (12, 6), (12, 8), (12, 9),
    (13, 0), (13, 1), (13, 2), (13, 3), (13, 4),
)  # fmt: skip

# Compute capability: the first toolkit with it, and the first that dropped it. [ptx]; CUDA 13.0's
# release notes drop Maxwell, Pascal and Volta; 10.1 (Thor) was renamed 11.0 in 13.0. 5.0 is the
# oldest that llama.cpp still lists (comments in ggml/src/ggml-cuda/CMakeLists.txt).
_SUPPORT: dict[str, tuple[Version, Version | None]] = {
    "5.0": ((10, 0), (13, 0)), "5.2": ((10, 0), (13, 0)), "5.3": ((10, 0), (13, 0)),
    "6.0": ((10, 0), (13, 0)), "6.1": ((10, 0), (13, 0)), "6.2": ((10, 0), (13, 0)),
    "7.0": ((10, 0), (13, 0)), "7.2": ((10, 0), (13, 0)),
    "7.5": ((10, 0), None),
    "8.0": ((11, 0), None), "8.6": ((11, 1), None), "8.7": ((11, 4), None),
    "8.9": ((11, 8), None), "9.0": ((11, 8), None),
    "10.0": ((12, 8), None), "10.1": ((12, 8), (13, 0)), "10.3": ((12, 9), None), "11.0": ((13, 0), None),
    "12.0": ((12, 8), None), "12.1": ((12, 9), None),
}  # fmt: skip

# The newest gcc that a toolkit's crt/host_config.h accepts, from this toolkit on. [install], "host
# compiler support policy"; 13.0's header says 15 itself. 16 came with 13.4.
_GCC = (((11, 8), 11), ((12, 0), 12), ((12, 4), 13), ((12, 8), 14), ((13, 0), 15), ((13, 4), 16))

# From this glibc on, toolkits before that one fail in bits/mathcalls.h with "exception specification
# is incompatible": 2.41 declares cospi and sinpi (cuda-samples #378), 2.42 rsqrt (llama.cpp #17615,
# #19100; 13.2 has _NV_RSQRT_SPECIFIER).
_GLIBC = (((2, 41), (13, 0), "cospi"), ((2, 42), (13, 2), "rsqrt"))

# Toolkits whose compiler makes wrong code of llama.cpp: the version, the build of nvcc (its patch release) that has it
# right again, what is wrong, and where that was found.
_WRONG = (
    ((13, 2), (13, 2, 86), "computes IQ1_S, IQ2_S and IQ3_S wrongly",
     "unslothai/unsloth#4849, ggml-org/llama.cpp#28581"),
)  # fmt: skip


def version(text: str) -> Version:
    """`"12.8"` or `"12.8.1"` as (12, 8); raises ValueError for anything else."""
    match = re.match(r"(\d+)\.(\d+)", text)
    if not match:
        raise ValueError(f"not a version such as 12.8: {text!r}")
    return int(match[1]), int(match[2])


def text(toolkit: Version) -> str:
    """(12, 8) as "12.8"."""
    return f"{toolkit[0]}.{toolkit[1]}"


def unfit_for_gpu(toolkit: Version, capability: str) -> str | None:
    """Why the toolkit cannot compile for this compute capability; None if it can."""
    if capability not in _SUPPORT:
        if version(capability) < (5, 0):
            return f"compute capability {capability} is older than what llama.cpp supports (5.0)"
        if version(capability) > version("12.1") and toolkit > RELEASES[-1]:
            return None  # both newer than this table: nvcc decides
        return f"compute capability {capability} is not known to CUDA up to {text(RELEASES[-1])}"
    first, dropped = _SUPPORT[capability]
    if toolkit < first:
        return f"compute capability {capability} needs CUDA {text(first)} or newer"
    if dropped and toolkit >= dropped:
        return f"CUDA {text(dropped)} dropped compute capability {capability}"
    return None


def unfit_for_driver(toolkit: Version, driver: Version) -> str | None:
    """Why programs of this toolkit do not run with a driver of this CUDA version.

    Within a major version every toolkit runs on every driver of that major, also a newer toolkit on
    an older driver, as long as code for the very GPU is compiled in: only the just-in-time compiler
    for PTX is the driver's own. [compat] Our builds name the GPU's architecture.
    """
    if toolkit[0] > driver[0]:
        return f"CUDA {text(toolkit)} needs a driver for CUDA {toolkit[0]}, this one runs up to {text(driver)}"
    return None


def unfit_for_compiler(toolkit: Version, gcc_major: int | None) -> str | None:
    """Why nvcc refuses this gcc."""
    limit = max((gcc for first, gcc in _GCC if toolkit >= first), default=None)
    if gcc_major is None or limit is None or gcc_major <= limit:
        return None
    return f"CUDA {text(toolkit)} accepts gcc up to {limit}, the distribution's is {gcc_major}"


def unfit_for_glibc(toolkit: Version, libc: str) -> str | None:
    """Why NVIDIA's headers clash with this glibc; distributions patch theirs."""
    if not re.match(r"\d+\.\d+", libc):
        return None
    for first, mended, function in _GLIBC:
        if version(libc) >= first and toolkit < mended:
            return (f"CUDA {text(toolkit)} cannot compile with glibc {libc}, whose {function}() clashes "
                    f"with its headers; {text(mended)} can")  # fmt: skip
    return None


def known_wrong(toolkit: Version, build: str | None = None) -> str | None:
    """Why no toolkit of this version is used; with the `build` of its nvcc, such as "13.2.86", where it is known."""
    for wrong, mended, what, source in _WRONG:
        numbers = tuple(int(part) for part in re.findall(r"\d+", build or ""))
        if toolkit == wrong and numbers < mended:
            right = ".".join(map(str, mended))
            return f"CUDA {text(toolkit)} before {right} {what} ({source})"
    return None
