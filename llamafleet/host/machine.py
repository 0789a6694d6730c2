"""What the probe found on a host: the machine file, schema 1, as values.

`Machine.from_json` takes what `llamafleet/remote/probe.py` prints. A host is not trusted: every number and every text
is bounded, and what is missing or of another type is refused with its path. Keys that the schema does not know are
ignored, so that a newer probe can say more.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from llamafleet import validation
from llamafleet.validation import Flag, Listed, Problem, Should, Text, Whole

SCHEMA = 1

# The bounds are far above what any host has: they keep a broken or lying one from filling memory and terminal here.
Count = Annotated[Whole, Field(ge=0, le=10**6, description="of processors, nodes, devices, lanes")]
Bytes = Annotated[Whole, Field(ge=0, le=2**64, description="what 64 bits of a kernel or driver can say")]
Label = Annotated[Text, Field(max_length=4096, description="for people: names of hardware; and paths, PATH_MAX")]
Message = Annotated[Text, Field(max_length=65536, description="for people: a driver's complaint, with its lines")]


def matching(what: str, pattern: str) -> Should:
    """The whole text matches the pattern, whose digits are ASCII's."""
    return Should(what, re.compile(pattern, re.ASCII).fullmatch)


# What goes into units, environments and commands.
Name = Annotated[Text, Field(max_length=128), matching("be text without control characters", r"[^\x00-\x1f\x7f-\x9f]*")]
Version = Annotated[Text, Field(max_length=128), matching('be a version like "12.8"', r"\d{1,9}\.\d{1,9}[\w.+-]*")]
Names = Annotated[Listed[Name], Field(max_length=1024)]
# Linux' format of lists; a unit has it as CPUAffinity= and NUMAMask=.
NumberList = Annotated[
    Text, Field(max_length=4096), matching('be a list like "0-3,8", or empty text', r"(\d+(-\d+)?(,\d+(-\d+)?)*)?")
]
Devices = Field(max_length=256, description="16 GPUs with 7 MIG instances each are 112")


class MachineError(ValueError):
    """A host's answer is unusable; the text gives the first problem: path, what should be there and what is there."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        more = len(problems) - 1
        plural = "s" if more > 1 else ""
        super().__init__(f"{problems[0]}{f' (and {more} more problem{plural})' if more else ''}")
        self.path = problems[0].path


@dataclass(frozen=True)
class Os:
    """The operating system; `version` is empty on rolling ones, `libc` where it is not glibc."""

    id: Name
    version: Name
    arch: Name
    libc: Name
    version_codename: Name | None = None
    id_like: Names = ()
    base_codename: Name | None = None  # the release of Ubuntu or Debian that a derivative is made from
    kernel: Name = ""

    @property
    def is_wsl(self) -> bool:
        """Whether this is Windows' own Linux, whose GPU driver is Windows' and comes with it."""
        return "microsoft" in self.kernel.lower()


@dataclass(frozen=True)
class Cpu:
    """Processors; `performance_cores` leaves a hybrid's efficiency cores out, else all physical ones."""

    model: Label
    sockets: Count
    physical_cores: Count
    logical_cores: Count
    performance_cores: Count
    numa_nodes: Count
    flags: Names
    # The logical CPUs of a hybrid's performance cores; empty where all cores are alike.
    performance_cpus: NumberList = ""
    numa_node_list: NumberList = ""  # the nodes with processors and memory; empty where the file does not tell


@dataclass(frozen=True)
class Memory:
    """RAM in bytes; the total is a container's limit where that is lower."""

    total_bytes: Bytes
    available_bytes: Bytes
    swap_total_bytes: Bytes
    cgroup_limit_bytes: Bytes | None = None
    hugepages_bytes: Bytes = 0


@dataclass(frozen=True)
class Gpu:
    """One GPU, or one MIG instance; `index` counts in PCI bus order within the host."""

    index: Count
    uuid: Name
    name: Label
    compute_capability: Version | None  # "8.9"; None: not NVIDIA's, or not told
    memory_total_bytes: Bytes
    memory_used_by_others_bytes: Bytes
    pci_bus_id: Name
    pcie_generation: Count | None
    pcie_width: Count | None
    unified_memory: Flag
    vendor: Name = "nvidia"
    problem: Message | None = None  # why nothing may be planned on it
    gfx: Name | None = None  # AMD's LLVM target, "gfx1100"
    compute_units: Count | None = None  # AMD's; None: not told
    mig: Flag = False
    vulkan_index: Count | None = None  # its number in Vulkan's own order; None: not asked

    @model_validator(mode="after")
    def _others_fit_in(self) -> Self:
        """A GPU whose others hold more than it has would give the plan memory that is not there."""
        if self.memory_used_by_others_bytes > self.memory_total_bytes:
            what = f"should be at most memory_total_bytes ({self.memory_total_bytes})"
            validation.refuse([("memory_used_by_others_bytes", f"{what}, is {self.memory_used_by_others_bytes}")])
        return self

    @property
    def usable(self) -> bool:
        """May a plan use it?"""
        return self.problem is None

    @property
    def capacity_bytes(self) -> int:
        """What we can have: the total without what other processes and the driver hold; 0 if unusable."""
        return max(0, self.memory_total_bytes - self.memory_used_by_others_bytes) if self.usable else 0


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver and the newest CUDA version it can run; None where there is none."""

    nvidia: Name | None
    cuda: Version | None


@dataclass(frozen=True)
class Disk:
    """Free space where `path` is or would be made."""

    path: Label
    free_bytes: Bytes


@dataclass(frozen=True)
class PciGpu:
    """A display controller or an accelerator on the PCI bus, whether a driver lists it or not.

    `kind`: gpu, integrated (Intel's), display (of a vendor without a backend), npu, accelerator, or virtual (a function
    for virtual machines). A probe of an earlier version lists GPUs alone.
    """

    pci_bus_id: Name
    vendor: Name
    device_id: Name
    kind: Name = "gpu"
    name: Label = ""  # what is known of vendor and model, for people
    problem: Message | None = None  # why no driver lists it, with the way out
    withheld: Message | None = None  # why it is not for this host, such as a virtual machine's, with the way out


@dataclass(frozen=True)
class VulkanDevice:
    """A device as Vulkan's loader lists it; `kind` is discrete, integrated, virtual, cpu or other."""

    index: Count
    name: Label
    kind: Name
    driver: Label
    uuid: Name
    pci_bus_id: Name | None
    memory_total_bytes: Bytes


@dataclass(frozen=True)
class Machine:
    """A host as the probe found it."""

    schema: Annotated[Whole, Field(ge=SCHEMA, le=SCHEMA)]
    hostname: Label
    os: Os
    cpu: Cpu
    memory: Memory
    gpus: Annotated[Listed[Gpu], Devices]
    driver: Driver
    disks: Annotated[Listed[Disk], Devices]
    pci_gpus: Annotated[Listed[PciGpu], Devices] = ()
    problems: Annotated[Listed[Message], Field(max_length=1024)] = ()
    notes: Annotated[Listed[Message], Field(max_length=1024)] = ()  # what limits it, and is as it should be
    package_manager: Name | None = None
    python: Version | None = None
    # None: not asked, or no loader is installed.
    vulkan: Annotated[Listed[VulkanDevice], Devices] | None = None
    container: Name | None = None  # its kind, such as "lxc"; None: no container

    @classmethod
    def from_json(cls, data: object) -> Machine:
        """From the parsed machine file; raises MachineError."""
        try:
            return _adapter().validate_python(data)
        except ValidationError as error:
            raise MachineError(list(validation.problems(error, cls, validation.JSON, "machine"))) from None

    def to_json(self) -> dict[str, Any]:
        """The same as builtin types, for json.dump; from_json reads it back to an equal value."""
        return typing.cast("dict[str, Any]", _plain(dataclasses.asdict(self)))

    @property
    def usable_gpus(self) -> tuple[Gpu, ...]:
        """The GPUs a plan may use."""
        return tuple(gpu for gpu in self.gpus if gpu.usable)


@functools.cache
def _adapter() -> TypeAdapter[Machine]:
    """Made at the first use: it takes some milliseconds, and a program that reads no machine needs none."""
    return TypeAdapter(Machine)


def _plain(value: Any) -> Any:
    """Tuples to lists, all the way down, as JSON has them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
