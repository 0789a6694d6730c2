"""What is installed and running on a host, typed.

`Installed.from_json` takes what `llamafleet/remote/survey.py` prints. The host is not trusted, as in machine.py: every
text and list is bounded, and what goes into a unit or a command has the form that belongs there.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, NotRequired, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from llamafleet import validation
from llamafleet.host.learned import Bandwidth, GatedSpeed, MeasuredSpeeds
from llamafleet.host.left import Left
from llamafleet.host.machine import Label, Machine, MachineError, Message, Name, Names, Version, matching
from llamafleet.host.recorded import Arguments, PlanRecord, readable
from llamafleet.validation import Flag, Listed, Text, Whole, one_of

V = TypeVar("V")


class InstalledError(MachineError):
    """What a host says of its installation is unusable."""


# Names of files and programs, which may be any bytes on Linux.
Path = Annotated[Label, BeforeValidator(readable)]
# What goes into a unit: groups and device classes.
Word = Annotated[Text, Field(max_length=128), matching("be a word of letters, digits and . _ -", r"[\w.-]+")]
Unit = Annotated[Text, Field(max_length=255), matching("be the name of a systemd unit", r"[\w:.@\\-]+\.service")]
Sha256 = Annotated[Text, matching("be 64 lower-case hexadecimal digits", "[0-9a-f]{64}")]
Pid = Annotated[Whole, Field(ge=0, le=2**31 - 1, description="pid_t")]
UserId = Annotated[Whole, Field(ge=0, le=2**32 - 1, description="uid_t")]
Seconds = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
# More than any host has: they keep a broken or lying one from filling memory here.
Many = Annotated[Listed[V], Field(max_length=100_000)]
Table = Annotated[Mapping[Path, V], Field(max_length=10_000)]


def _sha256_only(models: object) -> object:
    """The survey prints a record for each file, of which the sha256 is used; anything else is refused afterwards."""
    if not isinstance(models, dict):
        return models
    return {path: one["sha256"] if isinstance(one, dict) and "sha256" in one else one for path, one in models.items()}


@dataclass(frozen=True)
class Holder:
    """The run that holds the host's lock, as `llamafleet/remote/lock.py` reads it. Only `run` is in every version's."""

    run: Label
    who: Label = "another run"
    machine: Label = ""
    pid: Pid = 0
    pid_started: Seconds = 0.0
    began: Label = "an unknown time"
    age_seconds: Seconds = 0.0
    # What tells containers of one host name apart, and the process's start on a clock that nobody sets; llamafleet
    # 0.1.0 says neither.
    pid_namespace: Label | None = None
    pid_began: Seconds | None = None


class Preflight(TypedDict, total=False):
    """The part of the preflight's result that decides whether the unit is as wanted; without it the unit differs."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]  # the host reads more of it

    rendered_sha256: Label | None
    unit_sha256: Label | None
    ground: Table[Name | None]


def _preflight(value: object) -> object:
    """The preflight's result, whole; None where it cannot be used: it stands in plan.json, which may be damaged."""
    try:
        _preflight_adapter().validate_python(value)
    except ValidationError:
        return None
    return value


@functools.cache
def _preflight_adapter() -> TypeAdapter[Preflight]:
    return TypeAdapter(Preflight)


class Toolkit(TypedDict):
    """A CUDA toolkit, as `llamafleet/remote/toolkits.py` describes it."""

    path: Label
    nvcc: Label
    version: Version | None
    headers: Flag
    cudart: Flag
    cublas: Flag
    driver_stub: Flag
    host_compiler: Label | None
    accepted_compiler: Label | None
    problems: Annotated[Listed[Message], Field(max_length=1024)]
    aliases: Annotated[Listed[Label], Field(max_length=1024)]
    distro: Flag
    # The newest gcc that it accepts, and the version of its compiler with the patch release.
    gcc_limit: NotRequired[Annotated[Whole, Field(ge=1, le=1000)] | None]
    build: NotRequired[Version | None]


class Rocm(TypedDict):
    """An installation of HIP, as `llamafleet/remote/rocm.py` describes it."""

    path: Label
    version: Version | None
    compiler: Label | None
    hipblas: Flag
    rocblas: Flag


@dataclass(frozen=True)
class Offer:
    """What a host's repositories have of something that it lacks, as `llamafleet/remote/packages.py` says: the packages
    that bring it (None: no enabled repository has them), the version of the first, and the repositories that have some
    and are switched off."""

    package: Name | None
    version: Name = ""
    off: Names = ()


@dataclass(frozen=True)
class Place:
    """What lies at a path, as `llamafleet/remote/places.py` describes it."""

    kind: Annotated[Text, one_of(("file", "folder", "link", "other"))]
    mode: Annotated[Whole, Field(ge=0, le=0o7777, description="mode_t")]
    uid: UserId
    gid: UserId
    target: Path | None = None


@dataclass(frozen=True)
class InstalledInstance:
    """An installed unit `llama-server-NAME.service`, its files' hashes and what runs of it."""

    unit_sha256: Sha256 | None
    plan_sha256: Sha256 | None
    # Of the unit's credentials, by their names.
    secrets: Table[Sha256]
    # The preflight's result, as plan.json has it; None where the unit was not tried.
    preflight: Annotated[Preflight | None, BeforeValidator(_preflight)]
    # Of the unit that last passed the gate.
    good_sha256: Sha256 | None
    active: Name | None
    enabled: Name | None
    restarts: Annotated[Whole, Field(ge=0, le=2**32 - 1, description="systemd counts them in 32 bits")]
    drop_ins: Many[Path]
    stale: Flag
    pid: Pid
    argv: Arguments
    exe: Path | None
    # Of its liveness check: hashes of the installed units by name, and the timer's state.
    liveness_sha256: Table[Sha256]
    liveness: Name | None
    # plan.json; None where it cannot be used.
    record: Annotated[PlanRecord | None, BeforeValidator(PlanRecord.of)] = None
    # Of the installed unit and of the one that last passed the gate: the directives that a running server depends on.
    unit_core_sha256: Sha256 | None = None
    good_core_sha256: Sha256 | None = None
    # Of the plan.json that lies with the unit that last passed the gate, and whether those files can be gone back to.
    good_plan_sha256: Sha256 | None = None
    good_is_whole: Flag = True
    good_liveness_sha256: Table[Sha256] = field(default_factory=dict)
    # Drop-ins of this unit that are on the disk, whether systemd has read them (`drop_ins`) or not.
    unread_drop_ins: Many[Path] = ()
    liveness_enabled: Name | None = "enabled"
    liveness_drop_ins: Many[Path] = ()
    # The credentials that the running server was given.
    loaded: Table[Sha256] = field(default_factory=dict)
    # Files of its release that the server runs from although they were removed or replaced.
    deleted: Many[Path] = ()
    # Variables and presets of the host that the running server may have taken over.
    inherited: Many[Name] = ()
    # Of an instance that starts on demand: hashes of its further units by name, installed and last good ones, their
    # drop-ins, and the state of its socket.
    demand_sha256: Table[Sha256] = field(default_factory=dict)
    good_demand_sha256: Table[Sha256] = field(default_factory=dict)
    demand_drop_ins: Many[Path] = ()
    socket: Name | None = None
    socket_enabled: Name | None = None

    @property
    def is_on_demand(self) -> bool:
        """Whether it starts when it is asked, and stops when nobody uses it."""
        return bool(self.demand_sha256)

    @property
    def serves(self) -> bool:
        """Whether clients are answered, if need be after a start."""
        return (self.socket if self.is_on_demand else self.active) == "active"


@dataclass(frozen=True)
class Listener:
    """A TCP port in use; `process` and `unit` are None where another namespace holds it."""

    address: Name
    port: Annotated[Whole, Field(ge=0, le=65535)]
    pid: Pid
    process: Path | None
    unit: Path | None


@dataclass(frozen=True)
class Installed:
    """State of a host as `llamafleet/remote/survey.py` reports it."""

    euid: UserId
    user: Flag
    missing_packages: Names  # what the host lacks, by the words of `llamafleet/build/packages.py`
    helpers: Path | None
    lock: Holder | None
    releases: Table[Mapping[str, Any]]
    current: Path | None
    # Digests of the builds in the cache, by key, as the names of its archives say.
    cached_builds: Table[Annotated[Listed[Sha256], Field(max_length=1024)]]
    # Verified model files: path to sha256.
    models: Annotated[Table[Sha256], BeforeValidator(_sha256_only)]
    instances: Table[InstalledInstance]
    listeners: Many[Listener]
    device_classes: Annotated[Listed[Word], Field(max_length=256)]
    # What the hardening depends on: versions of systemd, kernel and driver.
    ground: Table[Name | None]
    # Groups of this host that may open GPU devices other than NVIDIA's.
    gpu_groups: Annotated[Listed[Word], Field(max_length=256)]
    # Units named like ours that we did not make.
    foreign_units: Many[Path]
    toolkits: Annotated[Listed[Toolkit], Field(max_length=256)]
    # Installations of HIP, AMD's own first.
    rocm: Annotated[Listed[Rocm], Field(max_length=256)] = ()
    # The default gcc's version; None where there is none.
    compiler: Name | None = None
    # The versions of what compiles llama.cpp's C++, by the words of `llamafleet/build/packages.py`; None: it is not
    # there, or not GNU's.
    tools: Table[Name | None] = field(default_factory=dict)
    # Names of running jobs, as `job.py start` was given them.
    jobs: Annotated[Listed[Label], Field(max_length=1024)] = ()
    # SHA-256 of each release's release.json, by key.
    release_digests: Table[Sha256] = field(default_factory=dict)
    # What the processors read together; None where it was not asked for.
    bandwidth: Bandwidth | None = None
    # What gates measured on this host, as far as their plans say what was expected.
    gate_speeds: Annotated[Listed[MeasuredSpeeds], Field(max_length=1024)] = ()
    # Addresses at which instances are to listen and no server of the host can, with the reason.
    unbindable: Table[Name] = field(default_factory=dict)
    # Groups of this host that may open NVIDIA's device nodes, where not everybody may.
    nvidia_groups: Annotated[Listed[Word], Field(max_length=256)] = ()
    # What lies at the places of ours, by path.
    paths: Table[Place] = field(default_factory=dict)
    # Units that a boot starts and a server may have to wait for: of GPU drivers ("gpu") and of networks ("network").
    boot_units: Table[Annotated[Listed[Unit], Field(max_length=256)]] = field(default_factory=dict)
    # What is left for people to do there, and the disks that a run may fill.
    left: Left = field(default_factory=Left)
    # What the gates measured of each instance with the model and flags that it has now.
    gated: Table[GatedSpeed] = field(default_factory=dict)
    # The number of each NVIDIA GPU's device node, by bus id.
    nvidia_minors: Table[Annotated[Whole, Field(ge=0, le=255)]] = field(default_factory=dict)
    # The records of tunes by instance, as the host has them; `llamafleet/tuning/record.py` reads one.
    tuned: Table[Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def from_json(cls, data: object) -> Installed:
        """From the survey's `found` object; raises InstalledError."""
        try:
            return _adapter().validate_python(data)
        except ValidationError as error:
            raise InstalledError(list(validation.problems(error, cls, validation.JSON, "installed"))) from None


@functools.cache
def _adapter() -> TypeAdapter[Installed]:
    return TypeAdapter(Installed)


@dataclass(frozen=True)
class Survey:
    """One reading of a host: what machine it is, and what is installed on it."""

    machine: Machine
    installed: Installed
