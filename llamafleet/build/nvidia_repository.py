"""Where a toolkit's packages come from: NVIDIA's repositories, and the distribution's own.

Not every repository holds every toolkit: a release's repository begins with the toolkit that first
supported that release, and toolkits that dropped it never come. The ranges are those of the archived
installation guides (docs.nvidia.com/cuda/archive) and of packages that people name in public build
files; where neither says anything the narrower range is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

from llamafleet.build.cuda_support import RELEASES, Version
from llamafleet.host.machine import Os

BASE = "https://developer.download.nvidia.com/compute/cuda/repos"
# NVIDIA's name of 64-bit ARM servers, GB10 and GH200 included; Jetsons have their own, which is not this.
_ARCHITECTURES = {"x86_64": "x86_64", "aarch64": "sbsa"}
_NEVER: Version = (99, 0)


@dataclass(frozen=True)
class _Release:
    """Toolkits of one release's repository, from `first` to before `end`, and the release's own gcc."""

    first: Version
    gcc_major: int
    end: Version = _NEVER
    architectures: tuple[str, ...] = ("x86_64", "sbsa")


_RELEASES = {
    "ubuntu2004": _Release((11, 8), 9, end=(13, 0)),
    "ubuntu2204": _Release((11, 8), 11),
    "ubuntu2404": _Release((12, 5), 13),
    # Published after 13.2 (cuda-samples #417); no 12.x.
    "ubuntu2604": _Release((13, 3), 15),
    "debian11": _Release((11, 8), 10, end=(13, 0), architectures=("x86_64",)),
    "debian12": _Release((12, 3), 12),
    # Begins with the driver branch 590, the one of 13.1 (cuda-repo-management #38, #40).
    "debian13": _Release((13, 1), 14),
    "fedora41": _Release((12, 8), 14, end=(13, 0), architectures=("x86_64",)),
    "fedora42": _Release((13, 0), 15, architectures=("x86_64",)),
    "fedora43": _Release((13, 2), 15, architectures=("x86_64",)),
    "fedora44": _Release((13, 3), 16, architectures=("x86_64",)),
    "rhel8": _Release((11, 8), 8),
    "rhel9": _Release((11, 8), 11),
    "rhel10": _Release((13, 0), 14),
}

# The distribution's own toolkit, by os.id and version; Fedora and RHEL have none. Debian's were read from
# its package lists (amd64 and arm64), Ubuntu's are 11.5.1, 12.0.140 and 12.4 in users' reports.
_DISTRO = {
    ("debian", "12"): (11, 8), ("debian", "13"): (12, 4),
    ("ubuntu", "22.04"): (11, 5), ("ubuntu", "24.04"): (12, 0), ("ubuntu", "26.04"): (12, 4),
}  # fmt: skip
# Where it and what it depends on are: Debian's libcuda1 wants nvidia-support from contrib.
DISTRO_COMPONENTS = {"debian": ("contrib", "non-free"), "ubuntu": ("universe", "multiverse")}


@dataclass(frozen=True)
class Repository:
    """NVIDIA's package repository for one release and architecture, and the toolkits it has."""

    name: str
    manager: str
    url: str
    versions: tuple[Version, ...]
    gcc_major: int

    @property
    def key_package(self) -> str:
        """Address of the package that carries the repository's signing key (apt only)."""
        return f"{self.url}/cuda-keyring_1.1-1_all.deb"

    @property
    def repo_file(self) -> str:
        """Address of the repository's description, signing key included (dnf only)."""
        return f"{self.url}/cuda-{self.name}.repo"


def repository(os: Os) -> Repository | None:
    """NVIDIA's repository for this system; None where there is none that we know."""
    name, arch = _name(os), _ARCHITECTURES.get(os.arch)
    release = _RELEASES.get(name)
    if release is None or arch not in release.architectures:
        return None
    return Repository(
        name=name,
        manager="apt" if name.startswith(("ubuntu", "debian")) else "dnf",
        url=f"{BASE}/{name}/{arch}",
        versions=tuple(version for version in RELEASES if release.first <= version < release.end),
        gcc_major=release.gcc_major,
    )


def _name(os: Os) -> str:
    """NVIDIA's name of the release: ubuntu2404, debian13, fedora42, rhel9."""
    if os.id == "ubuntu":
        return "ubuntu" + os.version.replace(".", "")
    if os.id in ("debian", "fedora"):
        return os.id + os.version.split(".")[0]
    if os.id == "rhel" or "rhel" in os.id_like:
        return "rhel" + os.version.split(".")[0]
    return ""


def packages(manager: str, version: Version) -> tuple[str, ...]:
    """What ggml-cuda is compiled and linked with, without the toolkit's debuggers and other libraries.

    nvcc; the runtime with its headers, to which CUB belongs; cuBLAS; and the stub of libcuda.so that
    stands for the driver while linking (CUDA::cuda_driver in ggml/src/ggml-cuda/CMakeLists.txt).
    """
    end, dev = f"-{version[0]}-{version[1]}", "dev" if manager == "apt" else "devel"
    return (f"cuda-nvcc{end}", f"cuda-cudart-{dev}{end}", f"cuda-driver-{dev}{end}", f"libcublas-{dev}{end}")


def distro_version(os: Os) -> Version | None:
    """CUDA version of the distribution's own package `nvidia-cuda-toolkit`; None where it has none."""
    return _DISTRO.get((os.id, os.version if os.id == "ubuntu" else os.version.split(".")[0]))
