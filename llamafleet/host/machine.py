"""What the probe found on a host: the machine file, schema 1, as values.

`Machine.from_json` takes what `llamafleet/remote/probe.py` prints. Keys it does not know are
ignored, so that a newer probe can tell more; a required key that is missing or of another type is
refused with its path.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

SCHEMA = 1
_LIST = re.compile(r"(\d+(-\d+)?(,\d+(-\d+)?)*)?", re.ASCII)


class MachineError(ValueError):
    """A machine file is unusable; the text names the JSON path, what is there and what was expected."""

    def __init__(self, path: str, found: object, expected: str) -> None:
        there = "nothing" if found is dataclasses.MISSING else _shown(found)
        super().__init__(f"machine file: {path}: found {there}, expected {expected}")
        self.path = path


class _Part:
    """A part of the machine file: its dataclass fields are the JSON object's keys."""

    @classmethod
    def read(cls, data: object, path: str) -> Self:
        """From the JSON object at `path`; raises MachineError."""
        if not isinstance(data, Mapping):
            raise MachineError(path or "the file", data, "an object")
        hints = typing.get_type_hints(cls)
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]  # every subclass is a dataclass
            where = f"{path}.{field.name}" if path else field.name
            if field.name in data:
                values[field.name] = _read_value(data[field.name], hints[field.name], where)
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise MachineError(where, dataclasses.MISSING, _expected(hints[field.name]))
        return cls(**values)


@dataclass(frozen=True)
class Os(_Part):
    """The operating system; `version` is empty on rolling ones, `libc` where it is not glibc."""

    id: str
    version: str
    arch: str
    libc: str
    version_codename: str | None = None
    id_like: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cpu(_Part):
    """Processors; `performance_cores` leaves a hybrid's efficiency cores out, else all physical ones.

    Lists are in Linux' format, "0-3,8". They go into a unit's text, so nothing else is taken.
    """

    model: str
    sockets: int
    physical_cores: int
    logical_cores: int
    performance_cores: int
    numa_nodes: int
    flags: tuple[str, ...]
    performance_cpus: str = ""  # the logical CPUs of a hybrid's performance cores; empty where all cores are alike
    numa_node_list: str = ""  # the nodes with processors and memory; empty where the file does not tell


@dataclass(frozen=True)
class Memory(_Part):
    """RAM in bytes; the total is a container's limit where that is lower."""

    total_bytes: int
    available_bytes: int
    swap_total_bytes: int
    cgroup_limit_bytes: int | None = None
    hugepages_bytes: int = 0


@dataclass(frozen=True)
class Gpu(_Part):
    """One GPU, or one MIG instance; `index` counts in PCI bus order within the host."""

    index: int
    uuid: str
    name: str
    compute_capability: str | None  # "8.9"; None: not NVIDIA's, or not told
    memory_total_bytes: int
    memory_used_by_others_bytes: int
    pci_bus_id: str
    pcie_generation: int | None
    pcie_width: int | None
    unified_memory: bool
    vendor: str = "nvidia"
    problem: str | None = None  # why nothing may be planned on it
    gfx: str | None = None  # AMD's LLVM target, "gfx1100"
    mig: bool = False
    vulkan_index: int | None = None  # its number in Vulkan's own order; None: not asked

    @property
    def usable(self) -> bool:
        """May a plan use it?"""
        return self.problem is None

    @property
    def capacity_bytes(self) -> int:
        """What we can have: the total without what other processes and the driver hold; 0 if unusable."""
        return max(0, self.memory_total_bytes - self.memory_used_by_others_bytes) if self.usable else 0


@dataclass(frozen=True)
class Driver(_Part):
    """NVIDIA's driver and the newest CUDA version it can run; None where there is none."""

    nvidia: str | None
    cuda: str | None


@dataclass(frozen=True)
class Disk(_Part):
    """Free space where `path` is or would be made."""

    path: str
    free_bytes: int


@dataclass(frozen=True)
class PciGpu(_Part):
    """A display controller on the PCI bus, whether a driver lists it or not."""

    pci_bus_id: str
    vendor: str
    device_id: str


@dataclass(frozen=True)
class VulkanDevice(_Part):
    """A device as Vulkan's loader lists it; `kind` is discrete, integrated, virtual, cpu or other."""

    index: int
    name: str
    kind: str
    driver: str
    uuid: str
    pci_bus_id: str | None
    memory_total_bytes: int


@dataclass(frozen=True)
class Machine(_Part):
    """A host as the probe found it."""

    schema: int
    hostname: str
    os: Os
    cpu: Cpu
    memory: Memory
    gpus: tuple[Gpu, ...]
    driver: Driver
    disks: tuple[Disk, ...]
    pci_gpus: tuple[PciGpu, ...] = ()
    problems: tuple[str, ...] = ()
    package_manager: str | None = None
    python: str | None = None
    vulkan: tuple[VulkanDevice, ...] | None = None  # None: not asked, or no loader is installed

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Machine:
        """From the parsed machine file; raises MachineError."""
        if isinstance(data, Mapping) and data.get("schema") != SCHEMA:
            raise MachineError("schema", data.get("schema", dataclasses.MISSING), str(SCHEMA))
        machine = cls.read(data, "")
        for name in ("performance_cpus", "numa_node_list"):
            if not _LIST.fullmatch(getattr(machine.cpu, name)):
                raise MachineError(f"cpu.{name}", getattr(machine.cpu, name), 'a list like "0-3,8", or empty text')
        for position, gpu in enumerate(machine.gpus):
            if gpu.memory_used_by_others_bytes > gpu.memory_total_bytes:
                where = f"gpus[{position}].memory_used_by_others_bytes"
                expected = f"at most memory_total_bytes, {gpu.memory_total_bytes}"
                raise MachineError(where, gpu.memory_used_by_others_bytes, expected)
        return machine

    def to_json(self) -> dict[str, Any]:
        """The same as builtin types, for json.dump; from_json reads it back to an equal value."""
        return typing.cast("dict[str, Any]", _plain(dataclasses.asdict(self)))

    @property
    def usable_gpus(self) -> tuple[Gpu, ...]:
        """The GPUs a plan may use."""
        return tuple(gpu for gpu in self.gpus if gpu.usable)


def _read_value(value: object, hint: Any, path: str) -> Any:
    """`value`, if it is what the annotation says: a builtin, an optional one, a part, or a tuple of those."""
    if typing.get_origin(hint) is types.UnionType:
        if value is None:
            return None
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise MachineError(path, value, "a list")
        return tuple(_read_value(item, typing.get_args(hint)[0], f"{path}[{n}]") for n, item in enumerate(value))
    if issubclass(hint, _Part):
        return hint.read(value, path)
    # bool is an int in Python, but true is no number of bytes.
    if not isinstance(value, hint) or (hint is int and (isinstance(value, bool) or value < 0)):
        raise MachineError(path, value, _expected(hint))
    return value


def _expected(hint: Any) -> str:
    """A field's type in words."""
    if typing.get_origin(hint) is types.UnionType:
        return " or ".join(_expected(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return "a list"
    names = {int: "a whole number of 0 or more", str: "text", bool: "true or false", type(None): "null"}
    return names.get(hint, "an object")


def _shown(value: object) -> str:
    """A found value, shortened."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."  # about half a line


def _plain(value: Any) -> Any:
    """Tuples to lists, all the way down, as JSON has them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
