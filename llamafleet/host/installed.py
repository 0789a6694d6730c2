"""What is installed and running on a host, typed, as `llamafleet/remote/survey.py` reports it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llamafleet.host.machine import Machine


@dataclass(frozen=True)
class InstalledInstance:
    """An installed unit `llama-server-NAME.service`, its files' hashes and what runs of it."""

    unit_sha256: str | None
    plan_sha256: str | None
    # Of the unit's credentials, by their names.
    secrets: Mapping[str, str]
    # The preflight's result, as plan.json has it; None where the unit was not tried.
    preflight: Mapping[str, Any] | None
    # Of the unit that last passed the gate.
    good_sha256: str | None
    active: str | None
    enabled: str | None
    restarts: int
    drop_ins: tuple[str, ...]
    stale: bool
    pid: int
    argv: tuple[str, ...]
    exe: str | None
    # Of its liveness check: hashes of the installed units by name, and the timer's state.
    liveness_sha256: Mapping[str, str]
    liveness: str | None
    # plan.json, where it can be read.
    record: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Listener:
    """A TCP port in use; `process` and `unit` are None where another namespace holds it."""

    address: str
    port: int
    pid: int
    process: str | None
    unit: str | None


@dataclass(frozen=True)
class Installed:
    """What of llamafleet's is installed on a host, and what else there matters for installing it."""

    euid: int
    user: bool
    missing_packages: tuple[str, ...]
    helpers: str | None
    lock: Mapping[str, Any] | None
    releases: Mapping[str, Mapping[str, Any]]
    current: str | None
    cached_builds: tuple[str, ...]
    # Verified model files: path to sha256.
    models: Mapping[str, str]
    instances: Mapping[str, InstalledInstance]
    listeners: tuple[Listener, ...]
    device_classes: tuple[str, ...]
    # What a unit's hardening depends on: versions of systemd, kernel and driver.
    ground: Mapping[str, str | None]
    # Groups of this host that may open GPU devices other than NVIDIA's.
    gpu_groups: tuple[str, ...]
    # Units named like ours that we did not make.
    foreign_units: tuple[str, ...]
    toolkits: tuple[Mapping[str, Any], ...]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Installed:
        """From the survey's `found` object, written by our own program of the same version."""
        return cls(
            euid=data["euid"],
            user=data["user"],
            missing_packages=tuple(data["missing_packages"]),
            helpers=data["helpers"],
            lock=data["lock"],
            releases=data["releases"],
            current=data["current"],
            cached_builds=tuple(data["cached_builds"]),
            models={path: record["sha256"] for path, record in data["models"].items()},
            instances={name: _instance(one) for name, one in data["instances"].items()},
            listeners=tuple(Listener(**one) for one in data["listeners"]),
            device_classes=tuple(data["device_classes"]),
            ground=data["ground"],
            gpu_groups=tuple(data["gpu_groups"]),
            foreign_units=tuple(data["foreign_units"]),
            toolkits=tuple(data["toolkits"]),
        )


def _instance(data: Mapping[str, Any]) -> InstalledInstance:
    names = InstalledInstance.__dataclass_fields__
    values: dict[str, Any] = {name: data[name] for name in names}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return InstalledInstance(**values)


@dataclass(frozen=True)
class Survey:
    """One reading of a host: what machine it is, and what is installed on it."""

    machine: Machine
    installed: Installed
