"""What to compile, and by which name the result is known.

A build key is the hash of everything that changes the artefact: the same key is the same artefact,
on any host, so a key that is installed is never built again.

Decision 8: docs/decisions/0008-source-pinned-known-by-a-build-key.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

from llamafleet.remote.common import BUILD, RELEASES

MIB = 1024**2
# RAM for one compiler job, bytes. CUDA: 3 to 5 GB are reported for nvcc (llama.cpp #17844);
# C++: g++ stays below 1 GiB on llama.cpp's largest file.
JOB_BYTES = {"cuda": 4096 * MIB, "hip": 4096 * MIB, "vulkan": 1024 * MIB, "cpu": 1024 * MIB}

# The K-V pairs that ggml-cuda compiles flash-attention kernels for by default
# (GGML_CUDA_FA_QUANTS in ggml/CMakeLists.txt). Another pair is converted to f16 at run time, up to 45 times slower.
DEFAULT_FA_TYPES = ("f16", "bf16", "q8_0", "q4_0")
# The others that have kernels (ggml/cmake/common.cmake). Of f32 and iq4_nl there are none, and CMake refuses them.
MORE_FA_TYPES = ("q4_1", "q5_0", "q5_1")


@dataclass(frozen=True)
class Build:
    """One build of llama.cpp; every field but the last two is part of the key."""

    commit: str
    backend: str
    # Identity of the CUDA toolkit, such as "cuda-12.8"; None for other backends.
    toolkit: str | None
    # CUDA or AMD GPU architectures, such as ("89",); empty for other backends.
    architectures: tuple[str, ...]
    machine_arch: str
    libc: str
    # Instruction sets of the CPU: ggml is compiled for exactly these (GGML_NATIVE).
    cpu_flags: tuple[str, ...]
    kv_types: tuple[str, ...]
    ui: bool
    # Some instance speaks https itself.
    tls: bool
    # Path of nvcc; None before the toolkit is installed. In the key the identity of the toolkit stands for it.
    nvcc: str | None = None
    # Path of the g++ that nvcc calls; None: nvcc chooses.
    host_compiler: str | None = None

    @property
    def key(self) -> str:
        """16 hexadecimal digits."""
        return _hash([self.commit, *self._configuration])

    @property
    def tree(self) -> str:
        """The build folder on the host, shared by all commits of a configuration, so that Ninja compiles
        only what a new commit changed."""
        return f"{BUILD}/{_hash(self._configuration)}"

    @property
    def _configuration(self) -> list[object]:
        return [self.backend, self.toolkit, self.machine_arch, self.libc, self.cpu_flags, self.cmake_flags()]

    @property
    def release(self) -> str:
        """The release's folder on the host."""
        return f"{RELEASES}/{self.key}"

    @property
    def mixed_pairs(self) -> tuple[str, ...]:
        """The pairs of different types of K and V that flash attention is compiled for: an f32 cache is converted to
        f16 before (build_attn_mha), and iq4_nl has no kernel."""
        pairs = [kv.replace("f32", "f16").split("/") for kv in self.kv_types if "/" in kv]
        known = {*DEFAULT_FA_TYPES, *MORE_FA_TYPES}
        return tuple(sorted({f"{key}-{value}" for key, value in pairs if key != value and {key, value} <= known}))

    def cmake_flags(self) -> tuple[str, ...]:
        """CMake's -D options, without paths of this or that host."""
        ui = "ON" if self.ui else "OFF"
        common = {
            "CMAKE_BUILD_TYPE": "Release",
            "BUILD_SHARED_LIBS": "ON",
            # A release is moved into its place after it was linked: libraries beside the binary.
            "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
            "CMAKE_INSTALL_RPATH": "$ORIGIN",
            "GGML_NATIVE": "ON",
            "GGML_CCACHE": "OFF",
            "LLAMA_BUILD_IS_DEV": "OFF",
            "LLAMA_BUILD_TESTS": "OFF",
            "LLAMA_BUILD_EXAMPLES": "OFF",
            "LLAMA_BUILD_APP": "OFF",
            "LLAMA_BUILD_UI": ui,
            "LLAMA_USE_PREBUILT_UI": ui,
            # Only where it is asked for: else the service runs on loopback or behind a proxy, and downloads nothing.
            "LLAMA_OPENSSL": "ON" if self.tls else "OFF",
        }
        return tuple(f"-D{name}={value}" for name, value in {**common, **self._backend_flags()}.items())

    def _backend_flags(self) -> dict[str, str]:
        if self.backend == "cuda":
            flags = {"GGML_CUDA": "ON", "CMAKE_CUDA_ARCHITECTURES": ";".join(self.architectures)}
            extra = [kv for kv in self.kv_types if kv in MORE_FA_TYPES]
            return flags | (_compiled_pairs(extra, self.mixed_pairs) if extra or self.mixed_pairs else {})
        if self.backend == "hip":
            flags = {"GGML_HIP": "ON", "GPU_TARGETS": ";".join(self.architectures)}
            return flags | (_compiled_pairs([], self.mixed_pairs) if self.mixed_pairs else {})
        if self.backend == "vulkan":
            return {"GGML_VULKAN": "ON"}
        return {}


def _compiled_pairs(extra: Iterable[str], mixed: Iterable[str]) -> dict[str, str]:
    pairs = [*(f"{kv}-{kv}" for kv in (*DEFAULT_FA_TYPES, *extra)), *mixed]
    return {"GGML_CUDA_FA_QUANTS": ";".join(pairs)}


def _hash(parts: Iterable[object]) -> str:
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()[:16]


def jobs(backend: str, cores: int, available_bytes: int, asked: int | None) -> int:
    """How many compilers run in parallel: one for each core, as many as memory holds, at least one."""
    return asked or max(1, min(cores, available_bytes // JOB_BYTES[backend]))
