"""Where a toolkit's packages come from: NVIDIA's repositories, and the distribution's own.

Not every repository holds every toolkit: a release's repository begins with the toolkit that first
supported that release, and toolkits that dropped it never come. The ranges are those of the archived
installation guides (docs.nvidia.com/cuda/archive) and of packages that people name in public build
files; where neither says anything the narrower range is taken.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from llamafleet.build import cuda_support
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
    "amzn2023": _Release((12, 6), 11),
    "opensuse15": _Release((11, 8), 7, architectures=("x86_64",)),
    "sles15": _Release((11, 8), 7),
    # Leap 16, SLES 16 and Tumbleweed.
    "suse16": _Release((13, 2), 15),
    # Without drivers: under WSL the driver is Windows'.
    "wsl-ubuntu": _Release((11, 8), 13, architectures=("x86_64",)),
}
# Releases of Ubuntu and Debian by their code names. Between two long-term releases of Ubuntu the earlier one's packages
# are taken, and on Debian's testing those of the newest release: a toolkit needs little of a system, and what its
# compiler and headers need is compared with the host's own gcc and glibc.
_CODENAMES = {
    "focal": "ubuntu2004", "jammy": "ubuntu2204", "noble": "ubuntu2404", "resolute": "ubuntu2604",
    "bullseye": "debian11", "bookworm": "debian12", "trixie": "debian13",
    # Devuan.
    "chimaera": "debian11", "daedalus": "debian12", "excalibur": "debian13",
}  # fmt: skip
_APT_FAMILIES = {"ubuntu": ("ubuntu2004", "ubuntu2204", "ubuntu2404", "ubuntu2604"),
                 "debian": ("debian11", "debian12", "debian13")}  # fmt: skip
# What a release of the family has at the least: the first glibc, by which a derivative with a code name of its own is
# told.
_GLIBC_OF = {"ubuntu2004": (2, 31), "ubuntu2204": (2, 35), "ubuntu2404": (2, 39), "ubuntu2604": (2, 43),
             "debian11": (2, 31), "debian12": (2, 36), "debian13": (2, 41)}  # fmt: skip
# Rebuilds of RHEL that name only Fedora as what they are like (Oracle Linux), or nothing.
_RHEL = ("rhel", "ol", "centos", "rocky", "almalinux", "scientific", "cloudlinux")

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
        """Address of the repository's description, signing key included (dnf and zypper)."""
        return f"{self.url}/cuda-{self.name}.repo"


def repository(os: Os) -> Repository | None:
    """NVIDIA's repository for this system; None where there is none that we know."""
    name, arch = _name(os), _ARCHITECTURES.get(os.arch)
    release = _RELEASES.get(name)
    if release is None or arch not in release.architectures:
        return None
    return Repository(
        name=name,
        manager=_manager(name),
        url=f"{BASE}/{name}/{arch}",
        versions=tuple(version for version in RELEASES if release.first <= version < release.end),
        gcc_major=release.gcc_major,
    )


def _manager(name: str) -> str:
    """Package manager of a release, by NVIDIA's name of it."""
    if name.startswith(("ubuntu", "debian", "wsl")):
        return "apt"
    return "zypper" if "suse" in name or name.startswith("sles") else "dnf"


def _name(os: Os) -> str:
    """NVIDIA's name of the release that the system is, or is made from: ubuntu2404, debian13, fedora42, rhel9; empty
    where none fits."""
    like = {os.id, *os.id_like}
    if like & _APT_FAMILIES.keys():
        return "wsl-ubuntu" if os.is_wsl else _apt_name(os, "ubuntu" if "ubuntu" in like else "debian")
    if os.id == "amzn":
        return f"amzn{os.version.split('.')[0]}"
    if like & {*_RHEL, "fedora"}:
        return _rpm_name(os)
    return _suse_name(os, like) if any("suse" in one or one in ("sles", "sled") for one in like) else ""


def _apt_name(os: Os, family: str) -> str:
    """By the code name of the release that it is made from, by its version, or else by its glibc."""
    known, major = _APT_FAMILIES[family], os.version.split(".")[0]
    for codename in (os.base_codename, os.version_codename):
        if codename in _CODENAMES:
            return _CODENAMES[codename]
    if os.id == family and os.version:
        own = [name for name in known if _number(name) <= _number(os.version if family == "ubuntu" else major)]
        return own[-1] if own else ""
    if not re.match(r"\d+\.\d+", os.libc):
        return ""
    fitting = [name for name in known if _GLIBC_OF[name] <= cuda_support.version(os.libc)]
    return fitting[-1] if fitting else ""


def _rpm_name(os: Os) -> str:
    """Fedora's releases have numbers from 41 on, RHEL's and those of its rebuilds 8 to 10, whatever else a system says
    that it is like."""
    major = _number(os.version.split(".")[0])
    newest = max(_number(name) for name in _RELEASES if name.startswith("fedora"))
    return f"fedora{min(major, newest)}" if major > newest - 10 else f"rhel{major}"


def _suse_name(os: Os, like: set[str]) -> str:
    major = os.version.split(".")[0]
    if major == "15":
        return "sles15" if like & {"sles", "sled"} and "opensuse" not in os.id else "opensuse15"
    return "suse16" if major == "16" or "tumbleweed" in os.id or "slowroll" in os.id else ""


def _number(text: str) -> int:
    digits = re.sub(r"\D", "", text)
    return int(digits) if digits else 0


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
