"""What a host needs to run a release of llama.cpp, and to compile one: programs and libraries, how a host shows that it
has them, and the packages that bring them.

A host is asked for the program or the file, because the packages' names differ: curl-minimal has curl too, and what an
owner has put into /usr/local does as well.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MANAGERS = ("apt", "dnf", "zypper", "pacman")


@dataclass(frozen=True)
class Need:
    """One program or library."""

    name: str
    # Names of programs, or paths with wildcards: any of them shows that the host has it.
    shown_by: tuple[str, ...]
    # By package manager the packages that bring it, the best first; an entry with blanks names several.
    packages: Mapping[str, tuple[str, ...]]
    # The host does without it.
    optional: bool = False
    # The service that comes with the package: it starts neither now nor with the host.
    unit: str = ""

    def to_json(self, manager: str) -> dict[str, Any]:
        """As `llamafleet/remote/packages.py` is asked."""
        packages = self.packages.get(manager, ())
        found = {"shown_by": list(self.shown_by), "packages": list(packages), "optional": self.optional}
        return {**found, "unit": self.unit} if self.unit else found


def _library(name: str) -> tuple[str, ...]:
    """Where the loader finds a library, on any distribution."""
    return (f"/usr/lib64/{name}", f"/usr/lib/{name}", f"/lib64/{name}", f"/lib/{name}", f"/usr/lib/*-linux-gnu/{name}")


def _all(*names: str) -> dict[str, tuple[str, ...]]:
    return dict.fromkeys(MANAGERS, names)


_CERTIFICATES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt",
                 "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem", "/etc/ssl/ca-bundle.pem",
                 "/var/lib/ca-certificates/ca-bundle.pem")  # fmt: skip
RUN = (
    Need("ca-certificates", _CERTIFICATES, {**_all("ca-certificates"), "zypper": ("ca-certificates-mozilla",)}),
    Need("curl", ("curl",), {**_all("curl"), "dnf": ("curl", "curl-minimal")}),
    Need("libgomp", _library("libgomp.so.1"),
         {"apt": ("libgomp1",), "dnf": ("libgomp",), "zypper": ("libgomp1",), "pacman": ("libgomp", "gcc-libs")}),
)  # fmt: skip
COMPILER = Need("g++", ("g++",), {"apt": ("g++",), "dnf": ("gcc-c++",), "zypper": ("gcc-c++",), "pacman": ("gcc",)})
COMPILE = (
    Need("cmake", ("cmake",), _all("cmake")),
    COMPILER,
    Need("git", ("git",), {**_all("git"), "dnf": ("git-core", "git"), "zypper": ("git-core", "git")}),
    Need("make", ("make",), _all("make")),
    # make does as well, more slowly: on RHEL's rebuilds Ninja is in CRB, which is off (rocky#9, ninja#2199).
    Need(
        "ninja",
        ("ninja", "ninja-build"),
        {**_all("ninja"), "apt": ("ninja-build",), "dnf": ("ninja-build",)},
        optional=True,
    ),
)  # fmt: skip
HIP = Need(
    "hip", ("/usr/include/hip/hip_version.h", "/opt/rocm/include/hip/hip_version.h"),
    {"apt": ("libamdhip64-dev hipcc",), "dnf": ("rocm-hip-devel hipcc",), "pacman": ("hip-runtime-amd rocm-llvm",)},
)  # fmt: skip
_LOADER = _library("libvulkan.so.1")
BACKEND: Mapping[str, tuple[Need, ...]] = {
    "vulkan": (
        Need("vulkan headers", ("/usr/include/vulkan/vulkan.h", "/usr/local/include/vulkan/vulkan.h"),
             {"apt": ("libvulkan-dev",), "dnf": ("vulkan-loader-devel",), "zypper": ("vulkan-devel",),
              "pacman": ("vulkan-headers",)}),
        Need("vulkan library", (*_library("libvulkan.so"), "/usr/local/lib*/libvulkan.so"),
             {"apt": ("libvulkan-dev",), "dnf": ("vulkan-loader-devel",), "zypper": ("vulkan-devel",),
              "pacman": ("vulkan-icd-loader",)}),
        Need("glslc", ("glslc",),
             {"apt": ("glslc",), "dnf": ("glslc",), "zypper": ("shaderc",), "pacman": ("shaderc",)}),
        Need("spirv headers", ("/usr/include/spirv/unified1/spirv.hpp", "/usr/local/include/spirv/unified1/spirv.hpp"),
             {**_all("spirv-headers"), "dnf": ("spirv-headers-devel",)}),
    ),
    "hip": (
        HIP,
        Need("hipblas", ("/usr/include/hipblas/hipblas.h", "/opt/rocm/include/hipblas/hipblas.h"),
             {"apt": ("libhipblas-dev",), "dnf": ("hipblas-devel",), "pacman": ("hipblas",)}),
        Need("rocblas", ("/usr/include/rocblas/rocblas.h", "/opt/rocm/include/rocblas/rocblas.h"),
             {"apt": ("librocblas-dev",), "dnf": ("rocblas-devel",), "pacman": ("rocblas",)}),
    ),
}  # fmt: skip
RUN_BACKEND: Mapping[str, tuple[Need, ...]] = {
    "vulkan": (
        Need("vulkan loader", _LOADER,
             {"apt": ("libvulkan1",), "dnf": ("vulkan-loader",), "zypper": ("libvulkan1",),
              "pacman": ("vulkan-icd-loader",)}),
        Need("vulkan driver", ("/usr/share/vulkan/icd.d/*.json", "/etc/vulkan/icd.d/*.json"),
             {"apt": ("mesa-vulkan-drivers",), "dnf": ("mesa-vulkan-drivers",),
              "zypper": ("libvulkan_radeon libvulkan_intel", "Mesa-vulkan-device-select"),
              "pacman": ("vulkan-radeon vulkan-intel",)}),
    ),
}  # fmt: skip
# To run with ("openssl" needs the library, whose own name differs by release) and to compile with.
TLS = Need(
    "openssl", _library("libssl.so.*"),
    {"apt": ("openssl",), "dnf": ("openssl-libs",), "zypper": ("libopenssl3", "openssl"), "pacman": ("openssl",)},
)  # fmt: skip
TLS_COMPILE = Need(
    "openssl headers", ("/usr/include/openssl/ssl.h",),
    {"apt": ("libssl-dev",), "dnf": ("openssl-devel",), "zypper": ("libopenssl-devel",), "pacman": ("openssl",)},
)  # fmt: skip
# For hosts of the group `gateway`.
GATEWAY = Need("haproxy", ("haproxy",), _all("haproxy"))
# For hosts that give files to others of their site: where `llamafleet/remote/share.py` starts it.
SITE = Need("nginx", ("/usr/sbin/nginx",), _all("nginx"), unit="nginx.service")
# For hosts of the group `monitoring`, and for all hosts that these watch.
PROMETHEUS = Need(
    "prometheus", ("prometheus",),
    {**_all("prometheus"), "dnf": ("golang-github-prometheus",), "zypper": ("golang-github-prometheus-prometheus",)},
)  # fmt: skip
EXPORTER = Need(
    "node-exporter", ("prometheus-node-exporter", "node_exporter"),
    {**_all("prometheus-node-exporter"), "dnf": ("golang-github-prometheus-node-exporter", "node-exporter"),
     "zypper": ("golang-github-prometheus-node_exporter",)},
)  # fmt: skip


# The oldest that compile llama.cpp: before g++ 9 the library has no std::filesystem (common/common.cpp), and the build
# rules name CMake's (cmake_minimum_required in the CMakeLists.txt of ggml/src/ggml-BACKEND).
OLDEST_COMPILER = (9,)
OLDEST_CMAKE = {"cpu": (3, 14), "cuda": (3, 18), "vulkan": (3, 19), "hip": (3, 21)}


def too_old(backend: str, versions: Mapping[str, str | None]) -> Iterator[tuple[str, str, str]]:
    """What is too old to compile with, by the word of its need: the version, and the oldest that does. `versions` are
    those that the host has or will have; None: not known."""
    for word, oldest in ((COMPILER.name, OLDEST_COMPILER), ("cmake", OLDEST_CMAKE.get(backend, OLDEST_CMAKE["cpu"]))):
        text = versions.get(word) or ""
        numbers = tuple(int(part) for part in re.findall(r"\d+", text.partition(":")[2] or text))
        if numbers and numbers[: len(oldest)] < oldest:
            yield word, text, ".".join(map(str, oldest))


def needs(backend: str, compiling: bool, tls: bool = False) -> tuple[Need, ...]:
    """What this backend needs to run, and where `compiling` to compile with."""
    found: list[Need] = [*RUN, *RUN_BACKEND.get(backend, ())]
    if compiling:
        found += [*COMPILE, *BACKEND.get(backend, ())]
    if tls:
        found += [TLS, *([TLS_COMPILE] if compiling else [])]
    return tuple(found)


def all_needs() -> dict[str, Need]:
    """Everything that any backend could need, by its word."""
    of_backends = (need for group in (BACKEND, RUN_BACKEND) for of in group.values() for need in of)
    every: Iterable[Need] = (*RUN, *COMPILE, *of_backends, TLS, TLS_COMPILE, GATEWAY, SITE, PROMETHEUS,
                             EXPORTER)  # fmt: skip
    return {need.name: need for need in every}


@functools.cache
def asked_of_hosts() -> Mapping[str, Mapping[str, Any]]:
    """What the survey is asked, by package manager: it reports what is missing."""
    return {manager: {name: need.to_json(manager) for name, need in all_needs().items()} for manager in MANAGERS}
