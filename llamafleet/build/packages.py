"""The distribution packages that a host needs to run a release of llama.cpp, and those to compile one."""

from __future__ import annotations

from collections.abc import Iterable

from llamafleet.build.release import JOB_BYTES

# By package manager.
RUN_PACKAGES = {
    "apt": ("ca-certificates", "curl", "libgomp1"),
    "dnf": ("ca-certificates", "curl", "libgomp"),
}
COMPILE_PACKAGES = {
    "apt": ("cmake", "g++", "git", "make", "ninja-build"),
    "dnf": ("cmake", "gcc-c++", "git", "make", "ninja-build"),
}
BACKEND_PACKAGES: dict[tuple[str, str], tuple[str, ...]] = {
    ("vulkan", "apt"): ("libvulkan-dev", "glslc", "spirv-headers"),
    ("vulkan", "dnf"): ("vulkan-loader-devel", "glslc", "spirv-headers-devel"),
    ("hip", "apt"): ("hipcc", "libamdhip64-dev", "libhipblas-dev", "librocblas-dev"),
    ("hip", "dnf"): ("hipcc", "rocm-hip-devel", "hipblas-devel", "rocblas-devel"),
}
RUN_BACKEND_PACKAGES: dict[tuple[str, str], tuple[str, ...]] = {
    ("vulkan", "apt"): ("libvulkan1", "mesa-vulkan-drivers"),
    ("vulkan", "dnf"): ("vulkan-loader", "mesa-vulkan-drivers"),
}
# OpenSSL to run with ("openssl" needs the library, whose own name differs by release) and to compile with.
TLS_PACKAGES = {
    ("apt", False): "openssl", ("apt", True): "libssl-dev",
    ("dnf", False): "openssl-libs", ("dnf", True): "openssl-devel",
}  # fmt: skip


def packages(manager: str, backend: str, compiling: bool, tls: bool = False) -> tuple[str, ...]:
    """The packages that this backend needs to run, and where `compiling` those to compile with; sorted."""
    names: list[str] = [*RUN_PACKAGES[manager], *_of(RUN_BACKEND_PACKAGES, backend, manager)]
    if compiling:
        names += [*COMPILE_PACKAGES[manager], *_of(BACKEND_PACKAGES, backend, manager)]
    if tls:
        names += [TLS_PACKAGES[manager, False], *([TLS_PACKAGES[manager, True]] if compiling else [])]
    return tuple(sorted(names))


def _of(table: dict[tuple[str, str], tuple[str, ...]], backend: str, manager: str) -> Iterable[str]:
    return table.get((backend, manager), ())


def all_packages() -> dict[str, tuple[str, ...]]:
    """Every package that any backend could need, by package manager: the survey reports which are missing."""
    return {
        manager: tuple(sorted({name for backend in JOB_BYTES
                               for name in packages(manager, backend, compiling=True, tls=True)}))
        for manager in RUN_PACKAGES
    }  # fmt: skip
