"""Which CUDA toolkit llama.cpp is compiled with: one that the host has, or one to install.

`choose_toolkit` gives a `Toolkit` to use, an `Install` to make, or `Unsuitable`: why not, and what would help.
A toolkit's identity is part of the build key. It is the same before and after the installation, so that the
second run builds nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llamafleet.build import cuda_support, nvidia_repository
from llamafleet.build.nvidia_repository import Repository
from llamafleet.build.packages import COMPILER, Need
from llamafleet.host.installed import Offer
from llamafleet.host.machine import Gpu, Machine, Os

DISTRO_PACKAGE = "nvidia-cuda-toolkit"
# Arch's own toolkit, which follows NVIDIA's newest release, and where it lies.
ARCH_PACKAGE, ARCH_NVCC = "cuda", "/opt/cuda/bin/nvcc"
CUDA = Need("cuda", (ARCH_NVCC,), {"pacman": (ARCH_PACKAGE,)})


@dataclass(frozen=True)
class InstalledToolkit:
    """A toolkit on the host, as `llamafleet/remote/toolkits.py` reports it."""

    path: str
    nvcc: str
    version: str
    missing: tuple[str, ...]
    host_compiler: str | None
    # A g++ on the host that this nvcc accepts, where the default one is too new for it.
    accepted_compiler: str | None
    problems: tuple[str, ...]
    # Further paths, links among them, that lead to it.
    aliases: tuple[str, ...]
    distro: bool
    # The newest gcc that it accepts, where its header says so, and the version of its nvcc with the patch release.
    gcc_limit: int | None = None
    build: str | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> InstalledToolkit:
        """From one entry of the list that our own program printed."""
        return cls(
            path=data["path"],
            nvcc=data["nvcc"],
            version=data["version"] or "",
            missing=tuple(what for key, what in _PARTS.items() if not data[key]),
            host_compiler=data["host_compiler"],
            accepted_compiler=data["accepted_compiler"],
            problems=tuple(data["problems"]),
            aliases=tuple(data["aliases"]),
            distro=data["distro"],
            gcc_limit=data.get("gcc_limit"),
            build=data.get("build"),
        )


_PARTS = {
    "version": "a working nvcc",
    "headers": "the headers (cuda_runtime.h)",
    "cudart": "the runtime library (libcudart.so)",
    "cublas": "cuBLAS (cublas_v2.h, libcublas.so)",
    "driver_stub": "a libcuda.so to link with",
}


@dataclass(frozen=True)
class Toolkit:
    """A toolkit on the host to compile with."""

    path: str
    nvcc: str
    version: str
    identity: str
    # Path of the g++ to give nvcc (CMAKE_CUDA_HOST_COMPILER); None: the default one.
    host_compiler: str | None = None


@dataclass(frozen=True)
class Install:
    """A toolkit to install: `source` is "nvidia" or "distro", and only NVIDIA's has a repository."""

    source: str
    version: str
    packages: tuple[str, ...]
    repository: Repository | None
    # Package manager of the host.
    manager: str
    # Components of the distribution's archive that must be enabled; empty for NVIDIA's packages.
    components: tuple[str, ...]
    nvcc: str
    identity: str


@dataclass(frozen=True)
class Repositories:
    """What a host's own repositories and compiler come to: the version of its gcc (None: it has none), and what its
    repositories have, by `Need.name`."""

    compiler: str | None = None
    offers: Mapping[str, Offer] = field(default_factory=dict)

    @property
    def gcc_major(self) -> int | None:
        """Of the gcc that will compile: the one that is there, or the one that will be installed; None: not known."""
        offer = self.offers.get(COMPILER.name)
        numbers = re.match(r"(?:\d+:)?(\d+)", self.compiler or (offer.version if offer else ""))
        return int(numbers[1]) if numbers else None


@dataclass(frozen=True)
class Unsuitable:
    """No toolkit can be used: the reason, and what would help."""

    reason: str
    suggestions: tuple[str, ...]


def architectures(machine: Machine) -> tuple[str, ...]:
    """CMAKE_CUDA_ARCHITECTURES for exactly the host's usable GPUs, sorted; "native" never.

    "89" holds machine code and PTX. 12.x becomes "120a-real": llama.cpp's FP4 kernels need the
    architecture-specific target, and every CMake accepts this spelling (CMAKE_CUDA_ARCHITECTURES in
    ggml/src/ggml-cuda/CMakeLists.txt).
    """
    capabilities = {gpu.compute_capability for gpu in _gpus(machine) if gpu.compute_capability}
    return tuple(_architecture(capability) for capability in sorted(capabilities, key=cuda_support.version))


def _architecture(capability: str) -> str:
    number = capability.replace(".", "")
    return f"{number}a-real" if capability.startswith("12.") else number


def choose_toolkit(
    asked: str, machine: Machine, installed: Sequence[InstalledToolkit], own: Repositories = Repositories()
) -> Toolkit | Install | Unsuitable:
    """The toolkit for this host. `asked` is the setting `cuda_toolkit`: auto, nvidia, distro or a path."""
    refused = _without_driver(machine)
    if refused:
        return refused
    if asked.startswith("/"):
        return _at_path(asked, machine, installed, own)
    eligible = [toolkit for toolkit in installed if _eligible(toolkit, asked)]
    fitting = [toolkit for toolkit in eligible if not _unfit(toolkit, machine, own)]
    if fitting:
        newest = max(fitting, key=lambda toolkit: (cuda_support.version(toolkit.version), toolkit.path))
        return _use(newest, machine.os)
    sources = {"auto": (_from_nvidia, _from_distro), "nvidia": (_from_nvidia,), "distro": (_from_distro,)}
    refusals = [_describe(toolkit, machine, own) for toolkit in eligible]
    for source in sources[asked]:
        install = source(machine, own)
        if isinstance(install, Install):
            return install
        refusals.append(install)
    return Unsuitable("no CUDA toolkit fits this host: " + "; ".join(refusals), _suggestions(machine))


def _without_driver(machine: Machine) -> Unsuitable | None:
    if machine.driver.nvidia is None or machine.driver.cuda is None:
        return Unsuitable(
            "no NVIDIA driver answers on this host",
            ("install NVIDIA's driver and restart the host", 'or set backend = "vulkan" or "cpu"'),
        )
    if not any(gpu.compute_capability for gpu in _gpus(machine)):
        return Unsuitable(
            f"the driver {machine.driver.nvidia} lists no usable GPU with a compute capability",
            ("look at nvidia-smi -L on the host",),
        )
    return None


def _gpus(machine: Machine) -> tuple[Gpu, ...]:
    return tuple(gpu for gpu in machine.usable_gpus if gpu.vendor == "nvidia")


def _eligible(toolkit: InstalledToolkit, asked: str) -> bool:
    if asked == "auto":
        return True
    # NVIDIA's packages and its installer both put toolkits here; anything else is the owner's own.
    return toolkit.distro if asked == "distro" else toolkit.path.startswith("/usr/local/cuda")


def _at_path(
    asked: str, machine: Machine, installed: Sequence[InstalledToolkit], own: Repositories
) -> Toolkit | Unsuitable:
    wanted = asked.rstrip("/")
    for toolkit in installed:
        if wanted in (toolkit.path, toolkit.nvcc, *toolkit.aliases):
            if _unfit(toolkit, machine, own):
                return Unsuitable(_describe(toolkit, machine, own), _suggestions(machine))
            return _use(toolkit, machine.os)
    there = ", ".join(f"{toolkit.path} ({toolkit.version})" for toolkit in installed) or "none"
    return Unsuitable(f"there is no CUDA toolkit at {asked}", (f"toolkits found on the host: {there}",))


def _use(toolkit: InstalledToolkit, os: Os) -> Toolkit:
    identity = _distro_identity(os) if toolkit.distro else _identity(cuda_support.version(toolkit.version))
    return Toolkit(toolkit.path, toolkit.nvcc, toolkit.version, identity, toolkit.accepted_compiler)


def _identity(version: cuda_support.Version) -> str:
    return f"cuda-{cuda_support.text(version)}"


def _distro_identity(os: Os) -> str:
    """By release, not by version: which version a release's archive has is known after the installation."""
    return f"distro-{os.id}-{os.version or os.version_codename or 'rolling'}"


def _describe(toolkit: InstalledToolkit, machine: Machine, own: Repositories) -> str:
    return f"{toolkit.path} does not fit: {', '.join(_unfit(toolkit, machine, own))}"


def _unfit(toolkit: InstalledToolkit, machine: Machine, own: Repositories) -> list[str]:
    """Why an installed toolkit cannot be used, a text for each reason."""
    if toolkit.missing:
        return [f"it lacks {what}" for what in toolkit.missing]
    version = cuda_support.version(toolkit.version)
    reasons = [cuda_support.known_wrong(version, toolkit.build), _unfit_for_coming(toolkit, machine, own)]
    return [*toolkit.problems, *(one for one in reasons if one), *_unfit_for_gpus(version, machine)]


def _unfit_for_coming(toolkit: InstalledToolkit, machine: Machine, own: Repositories) -> str | None:
    """Why the compiler that this run will install is too new for it. Where there is one, the host has compared them."""
    if toolkit.host_compiler or toolkit.distro or own.compiler or toolkit.gcc_limit is None:
        return None
    coming = _gcc_major(machine, own)
    if coming is None or coming <= toolkit.gcc_limit:
        return None
    limit = toolkit.gcc_limit
    return f"it accepts gcc up to {limit}, the one to be installed is {coming}: install g++-{limit} on the host"


def _gcc_major(machine: Machine, own: Repositories) -> int | None:
    """Of the gcc that will compile; of a host whose repositories were not asked, the release's own."""
    repository = nvidia_repository.repository(machine.os)
    return own.gcc_major or (repository.gcc_major if repository else None)


def _unfit_for_gpus(version: cuda_support.Version, machine: Machine) -> list[str]:
    """Why code of this version would not run on the host's driver and all of its GPUs."""
    reasons = [cuda_support.unfit_for_driver(version, cuda_support.version(machine.driver.cuda or ""))]
    for gpu in _gpus(machine):
        if gpu.compute_capability:
            why = cuda_support.unfit_for_gpu(version, gpu.compute_capability)
            reasons.append(why and f"GPU{gpu.index} {gpu.name}: {why}")
    return [reason for reason in reasons if reason]


def _from_nvidia(machine: Machine, own: Repositories) -> Install | str:
    """The toolkit to install from NVIDIA's repository, or why there is none."""
    os = machine.os
    repository = nvidia_repository.repository(os)
    if repository is None:
        return f"NVIDIA has no package repository for {_system(os)}"
    if repository.manager != machine.package_manager and machine.package_manager is not None:
        return f"NVIDIA's {repository.name} is for {repository.manager}, the host has {machine.package_manager}"
    unfit = {version: _unfit_from(repository, version, machine, own) for version in repository.versions}
    version = _best(
        [version for version in unfit if not unfit[version]], cuda_support.version(machine.driver.cuda or "")
    )
    if version is None:
        newest, oldest = repository.versions[-1], repository.versions[0]
        why = dict.fromkeys([*unfit[newest], *unfit[oldest]])
        versions = f"CUDA {cuda_support.text(oldest)} to {cuda_support.text(newest)}"
        return f"none of {versions} in NVIDIA's {repository.name} fits: {', '.join(why)}"
    return Install(
        "nvidia", cuda_support.text(version), nvidia_repository.packages(repository.manager, version), repository,
        repository.manager, (), f"/usr/local/cuda-{cuda_support.text(version)}/bin/nvcc", _identity(version),
    )  # fmt: skip


def _unfit_from(
    repository: Repository, version: cuda_support.Version, machine: Machine, own: Repositories
) -> list[str]:  # fmt: skip
    reasons = (
        cuda_support.known_wrong(version),
        cuda_support.unfit_for_compiler(version, own.gcc_major or repository.gcc_major),
        cuda_support.unfit_for_glibc(version, machine.os.libc),
    )
    return [*_unfit_for_gpus(version, machine), *(reason for reason in reasons if reason)]


def _best(versions: Sequence[cuda_support.Version], driver: cuda_support.Version) -> cuda_support.Version | None:
    """The newest that the driver knows itself; else the oldest beyond, of the driver's major version."""
    known = [version for version in versions if version <= driver]
    return max(known) if known else min(versions, default=None)


def _from_distro(machine: Machine, own: Repositories) -> Install | str:
    """The distribution's own toolkit, or why not. Its compiler and headers are the distribution's care."""
    os = machine.os
    if os.is_wsl:
        return f"{_system(os)} runs under WSL, whose driver the distribution's own toolkit would replace"
    if machine.package_manager == "pacman":
        return _from_arch(machine, own)
    version = nvidia_repository.distro_version(os) if machine.package_manager in ("apt", None) else None
    if version is None:
        return f"{_system(os)} has no CUDA toolkit of its own"
    unfit = _unfit_for_gpus(version, machine)
    if unfit:
        return f"{_system(os)}'s own CUDA {cuda_support.text(version)} does not fit: {', '.join(unfit)}"
    return Install(
        "distro", cuda_support.text(version), (DISTRO_PACKAGE,), None, "apt",
        nvidia_repository.DISTRO_COMPONENTS[os.id], "/usr/bin/nvcc", _distro_identity(os),
    )  # fmt: skip


def _from_arch(machine: Machine, own: Repositories) -> Install | str:
    """Arch's own toolkit, of the version that its repositories have: it brings a gcc that it accepts."""
    offer = own.offers.get(CUDA.name)
    if offer is None or offer.package is None:
        return f"{_system(machine.os)}'s repositories have no package {ARCH_PACKAGE}"
    version = cuda_support.version(offer.version)
    wrong = cuda_support.known_wrong(version, offer.version)
    unfit = [*([wrong] if wrong else []), *_unfit_for_gpus(version, machine)]
    if unfit:
        return f"{_system(machine.os)}'s own CUDA {cuda_support.text(version)} does not fit: {', '.join(unfit)}"
    return Install(
        "distro", cuda_support.text(version), (ARCH_PACKAGE,), None, "pacman", (), ARCH_NVCC, _identity(version)
    )


def _system(os: Os) -> str:
    return " ".join(part for part in (os.id, os.version or os.version_codename, os.arch) if part)


def _suggestions(machine: Machine) -> tuple[str, ...]:
    return (
        'install a toolkit that fits and name its folder: cuda_toolkit = "/usr/local/cuda-X.Y"',
        f"or update the driver (it is {machine.driver.nvidia}, for CUDA {machine.driver.cuda})",
        'or set backend = "vulkan"',
    )
