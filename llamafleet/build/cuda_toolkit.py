"""Which CUDA toolkit llama.cpp is compiled with: one that the host has, or one to install.

`choose` gives a `Toolkit` to use, an `Install` to make, or `Unsuitable`: why not, and what would help.
A toolkit's identity is part of the build key. It is the same before the installation and after it,
when the toolkit is found, so that the second run builds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llamafleet.build import cuda_support as cuda
from llamafleet.build import nvidia_repository
from llamafleet.build.nvidia_repository import Repository
from llamafleet.host.machine import Gpu, Machine, Os

DISTRO_PACKAGE = "nvidia-cuda-toolkit"


@dataclass(frozen=True)
class FoundToolkit:
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

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FoundToolkit:
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
    # Package manager of the host, "apt" or "dnf".
    manager: str
    # Components of the distribution's archive that must be enabled; empty for NVIDIA's packages.
    components: tuple[str, ...]
    nvcc: str
    identity: str


@dataclass(frozen=True)
class Unsuitable:
    """No toolkit can be used: the reason, and what would help."""

    reason: str
    suggestions: tuple[str, ...]


def architectures(machine: Machine) -> tuple[str, ...]:
    """CMAKE_CUDA_ARCHITECTURES for exactly the host's usable GPUs, sorted; "native" never.

    "89" holds machine code and PTX. 12.x becomes "120a-real": llama.cpp's FP4 kernels need the
    architecture-specific target, and this spelling passes every CMake (ggml-cuda/CMakeLists.txt:43-53).
    """
    found = {gpu.compute_capability for gpu in _gpus(machine) if gpu.compute_capability}
    return tuple(_architecture(one) for one in sorted(found, key=cuda.version))


def _architecture(capability: str) -> str:
    number = capability.replace(".", "")
    return f"{number}a-real" if capability.startswith("12.") else number


def choose(asked: str, machine: Machine, found: Sequence[FoundToolkit]) -> Toolkit | Install | Unsuitable:
    """The toolkit for this host. `asked` is the setting `cuda_toolkit`: auto, nvidia, distro or a path."""
    refused = _without_driver(machine)
    if refused:
        return refused
    if asked.startswith("/"):
        return _at_path(asked, machine, found)
    eligible = [one for one in found if _eligible(one, asked)]
    fitting = [one for one in eligible if not _unfit(one, machine)]
    if fitting:
        return _toolkit(max(fitting, key=lambda one: (cuda.version(one.version), one.path)), machine.os)
    sources = {"auto": (_from_nvidia, _from_distro), "nvidia": (_from_nvidia,), "distro": (_from_distro,)}
    refusals = [_describe(one, machine) for one in eligible]
    for source in sources[asked]:
        install = source(machine)
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


def _eligible(one: FoundToolkit, asked: str) -> bool:
    if asked == "auto":
        return True
    # NVIDIA's packages and its installer both put toolkits here; anything else is the owner's own.
    return one.distro if asked == "distro" else one.path.startswith("/usr/local/cuda")


def _at_path(asked: str, machine: Machine, found: Sequence[FoundToolkit]) -> Toolkit | Unsuitable:
    wanted = asked.rstrip("/")
    for one in found:
        if wanted in (one.path, one.nvcc, *one.aliases):
            if _unfit(one, machine):
                return Unsuitable(_describe(one, machine), _suggestions(machine))
            return _toolkit(one, machine.os)
    there = ", ".join(f"{one.path} ({one.version})" for one in found) or "none"
    return Unsuitable(f"there is no CUDA toolkit at {asked}", (f"toolkits found on the host: {there}",))


def _toolkit(one: FoundToolkit, os: Os) -> Toolkit:
    identity = _distro_identity(os) if one.distro else _identity(cuda.version(one.version))
    return Toolkit(one.path, one.nvcc, one.version, identity, one.accepted_compiler)


def _identity(version: cuda.Version) -> str:
    return f"cuda-{cuda.text(version)}"


def _distro_identity(os: Os) -> str:
    """By release, not by version: which version a release's archive has is known after the installation."""
    return f"distro-{os.id}-{os.version or os.version_codename or 'rolling'}"


def _describe(one: FoundToolkit, machine: Machine) -> str:
    return f"{one.path} does not fit: {', '.join(_unfit(one, machine))}"


def _unfit(one: FoundToolkit, machine: Machine) -> list[str]:
    """Why a found toolkit cannot be used, one text for each reason."""
    if one.missing:
        return [f"it lacks {what}" for what in one.missing]
    return [*one.problems, *_unfit_for_gpus(cuda.version(one.version), machine)]


def _unfit_for_gpus(version: cuda.Version, machine: Machine) -> list[str]:
    """Why code of this version would not run on the host's driver and all of its GPUs."""
    reasons = [cuda.unfit_for_driver(version, cuda.version(machine.driver.cuda or ""))]
    for gpu in _gpus(machine):
        if gpu.compute_capability:
            why = cuda.unfit_for_gpu(version, gpu.compute_capability)
            reasons.append(why and f"GPU{gpu.index} {gpu.name}: {why}")
    return [reason for reason in reasons if reason]


def _from_nvidia(machine: Machine) -> Install | str:
    """The toolkit to install from NVIDIA's repository, or why there is none."""
    os = machine.os
    repository = nvidia_repository.repository(os)
    if repository is None:
        return f"NVIDIA has no package repository for {_system(os)}"
    unfit = {one: _unfit_from(repository, one, machine) for one in repository.versions}
    version = _best([one for one in unfit if not unfit[one]], cuda.version(machine.driver.cuda or ""))
    if version is None:
        newest, oldest = repository.versions[-1], repository.versions[0]
        why = dict.fromkeys([*unfit[newest], *unfit[oldest]])
        return f"none of CUDA {cuda.text(oldest)} to {cuda.text(newest)} in NVIDIA's {repository.name} fits: " \
            + ", ".join(why)  # fmt: skip
    return Install(
        "nvidia", cuda.text(version), nvidia_repository.packages(repository.manager, version), repository,
        repository.manager, (), f"/usr/local/cuda-{cuda.text(version)}/bin/nvcc", _identity(version),
    )  # fmt: skip


def _unfit_from(repository: Repository, version: cuda.Version, machine: Machine) -> list[str]:
    own = (
        cuda.unfit_for_compiler(version, repository.gcc_major),
        cuda.unfit_for_glibc(version, machine.os.libc),
    )
    return [*_unfit_for_gpus(version, machine), *(reason for reason in own if reason)]


def _best(versions: Sequence[cuda.Version], driver: cuda.Version) -> cuda.Version | None:
    """The newest that the driver knows itself; else the oldest beyond, of the driver's major version."""
    known = [one for one in versions if one <= driver]
    return max(known) if known else min(versions, default=None)


def _from_distro(machine: Machine) -> Install | str:
    """The distribution's own toolkit, or why not. Its compiler and headers are the distribution's care."""
    os = machine.os
    version = nvidia_repository.distro_version(os)
    if version is None:
        return f"{_system(os)} has no CUDA toolkit of its own"
    unfit = _unfit_for_gpus(version, machine)
    if unfit:
        return f"{_system(os)}'s own CUDA {cuda.text(version)} does not fit: {', '.join(unfit)}"
    return Install(
        "distro", cuda.text(version), (DISTRO_PACKAGE,), None, "apt",
        nvidia_repository.DISTRO_COMPONENTS[os.id], "/usr/bin/nvcc", _distro_identity(os),
    )  # fmt: skip


def _system(os: Os) -> str:
    return " ".join(part for part in (os.id, os.version or os.version_codename, os.arch) if part)


def _suggestions(machine: Machine) -> tuple[str, ...]:
    return (
        'install a toolkit that fits and name its folder: cuda_toolkit = "/usr/local/cuda-X.Y"',
        f"or update the driver (it is {machine.driver.nvidia}, for CUDA {machine.driver.cuda})",
        'or set backend = "vulkan"',
    )
