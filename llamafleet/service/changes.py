"""What has to be done on a host: what is wanted against what was found."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from llamafleet.host.installed import Found, FoundInstance, Listener
from llamafleet.settings.schema import unit_of

# The credentials of a unit by their names, and what they are in words.
SECRETS = {"api-keys": "API keys", "tls-certificate": "TLS certificate", "tls-key": "TLS key"}
WILDCARDS = ("0.0.0.0", "::", "")  # noqa: S104 -- compared with, never bound


@dataclass(frozen=True)
class Service:
    """One instance as it should be installed: the whole unit, its plan, its secrets."""

    name: str
    address: str
    port: int
    unit_text: str
    plan_json: str
    # The secrets themselves, by their names in `SECRETS`: never shown, hence no part of the representation.
    secrets: Mapping[str, str] = field(repr=False)
    argv: tuple[str, ...]
    release: str
    # Units of its liveness check by name; empty where none is wanted.
    liveness: Mapping[str, str]
    # Of the plan record: names one state of the service.
    identity: str = ""

    def __repr__(self) -> str:
        return f"Service({self.name})"

    @property
    def unit(self) -> str:
        return unit_of(self.name)


def differences(service: Service, found: FoundInstance | None, ground: Mapping[str, str | None]) -> tuple[str, ...]:
    """Why this instance must be installed or started again; empty where it is as it should be.

    `ground` is what a sandbox stands on at that host now: systemd, kernel and driver.
    """
    if found is None:
        return ("it is not installed",)
    reasons = list(_unit_differs(sha256(service.unit_text), found, ground))
    if not reasons and found.good_sha256 != found.unit_sha256:
        reasons.append("it has not passed the gate")
    if found.plan_sha256 is None:
        reasons.append("its plan.json is missing")
    for name, what in SECRETS.items():
        wanted = service.secrets.get(name)
        if found.secrets.get(name) != (sha256(wanted) if wanted is not None else None):
            reasons.append(f"its {what} {'differ' if what.endswith('s') else 'differs'}")
    if found.drop_ins:
        reasons.append(f"drop-ins change its unit: {', '.join(found.drop_ins)}")
    if found.enabled != "enabled":
        reasons.append(f"it is {found.enabled or 'not enabled'}")
    if found.active != "active":
        reasons.append(f"it is {found.active or 'not active'}")
    elif found.argv != service.argv:
        reasons.append("it runs with other arguments")
    elif found.exe is not None and not found.exe.startswith(service.release + "/"):
        reasons.append(f"it runs {found.exe}")
    return tuple(reasons)


def _unit_differs(wanted: str, found: FoundInstance, ground: Mapping[str, str | None]) -> Iterator[str]:
    """The installed unit is the wanted one, or that without what the preflight had to drop on this ground."""
    if found.unit_sha256 == wanted:
        return
    tried = found.preflight or {}
    if (tried.get("rendered_sha256"), tried.get("unit_sha256")) != (wanted, found.unit_sha256):
        yield "its unit differs"
    elif tried.get("ground") != ground:
        changed = ", ".join(name for name in ground if tried.get("ground", {}).get(name) != ground[name])
        yield f"its sandbox was loosened under another {changed}: the whole one is tried again"


def liveness_differs(service: Service, found: FoundInstance) -> bool:
    """Must the liveness check be installed anew? The server itself need not be touched for that."""
    wanted = {name: sha256(text) for name, text in service.liveness.items()}
    return found.liveness_sha256 != wanted or bool(wanted and found.liveness != "active")


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def port_conflict(service: Service, listeners: Sequence[Listener], leaving: Collection[str]) -> Listener | None:
    """Who else listens where this instance should, our own unit and those that this run removes apart."""
    for one in listeners:
        overlaps = one.address == service.address or {one.address, service.address} & set(WILDCARDS)
        if one.port == service.port and overlaps and one.unit != service.unit and one.unit not in leaving:
            return one
    return None


@dataclass(frozen=True)
class Work:
    """What to do on one host, empty where everything is as it should be."""

    helpers: bool
    user: bool
    packages: tuple[str, ...]
    toolkit: bool
    build: bool
    # Folders of models to fetch.
    models: tuple[str, ...]
    # Instances to install or restart, with the reasons.
    services: Mapping[str, tuple[str, ...]]
    # Instances that stay as they are, but for their liveness check.
    liveness: tuple[str, ...]
    removed: tuple[str, ...]
    current: bool

    @property
    def any(self) -> bool:
        """Is there anything to do?"""
        parts = (self.helpers, self.user, self.packages, self.toolkit, self.build, self.models, self.services,
                 self.liveness, self.removed, self.current)  # fmt: skip
        return any(bool(part) for part in parts)


def compare(
    found: Found,
    *,
    helpers: str,
    key: str,
    toolkit: bool,
    packages: tuple[str, ...],
    model_files: Mapping[str, Mapping[str, str | None]],
    services: Sequence[Service],
) -> Work:
    """Compare what is wanted with what was found.

    `key` is the wanted build; `toolkit` says whether one must be installed to make it; `packages` are
    the missing distribution packages;
    `model_files` maps a model folder to its files' paths and their sha256 (None: any verified).
    """
    reasons = {
        service.name: differences(service, found.instances.get(service.name), found.ground) for service in services
    }
    build = key not in found.releases
    return Work(
        helpers=found.helpers != helpers,
        user=not found.user,
        packages=packages,
        toolkit=toolkit,
        build=build,
        models=tuple(folder for folder, files in model_files.items() if not _complete(files, found)),
        services={name: why for name, why in reasons.items() if why},
        liveness=tuple(
            service.name
            for service in services
            if not reasons[service.name] and liveness_differs(service, found.instances[service.name])
        ),
        removed=tuple(name for name in found.instances if name not in reasons),
        current=found.current != key,
    )


def _complete(files: Mapping[str, str | None], found: Found) -> bool:
    return all(path in found.models and sha256 in (None, found.models[path]) for path, sha256 in files.items())
