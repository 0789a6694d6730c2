"""What must change on a host: what it should be, against what is installed.

Decision 16: docs/decisions/0016-records-are-versioned.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llamafleet.host.installed import Installed, InstalledInstance
from llamafleet.remote.common import APART, core_of_unit, without_directives
from llamafleet.service.desired import Desired, Service, Serving

# The credentials of a unit by their names, and what they are in words.
SECRETS = {"api-keys": "API keys", "tls-certificate": "TLS certificate", "tls-key": "TLS key"}


@dataclass(frozen=True)
class Changes:
    """What to do on one host; empty where everything is as it should be."""

    helpers: bool
    user: bool
    packages: tuple[str, ...]
    toolkit: bool
    build: bool
    # Folders of models to fetch.
    models: tuple[str, ...]
    # Instances to install or restart, with the reasons.
    services: Mapping[str, tuple[str, ...]]
    # Instances whose servers run on while their unit, plan.json and liveness check are replaced, with the reasons.
    refreshed: Mapping[str, tuple[str, ...]]
    # Instances that stay as they are, but for their liveness check.
    liveness: tuple[str, ...]
    removed: tuple[str, ...]
    current: bool
    # Of the instances to install those whose plan llama-server was not asked about.
    verify: tuple[str, ...] = ()
    # Instances that stay as they are, but whose plan.json has other inputs or another answer of llama-server.
    note: tuple[str, ...] = ()

    @property
    def any(self) -> bool:
        """Whether anything is to be done to what runs or is installed: a plan.json alone does not count."""
        parts = (self.helpers, self.user, self.packages, self.toolkit, self.build, self.models, self.services,
                 self.refreshed, self.liveness, self.removed, self.current)  # fmt: skip
        return any(bool(part) for part in parts)


def changes_needed(desired: Desired, installed: Installed) -> Changes:
    """What makes the host what it should be."""
    services = {serving.name: serving.service for serving in desired.servings}
    alone = len(services) == 1
    reasons = {
        name: differences(service, installed.instances.get(name), installed.ground, alone)
        for name, service in services.items()
    }
    to_install = {name: why for name, why in reasons.items() if why}
    run_on = {name: installed.instances[name] for name, why in reasons.items() if not why}
    quiet = {name: quiet_differences(services[name], instance) for name, instance in run_on.items()}
    refreshed = {name: why for name, why in quiet.items() if why}
    stay = {name: instance for name, instance in run_on.items() if name not in refreshed}
    files = {
        serving.folder: {f"{serving.folder}/{file.name}": file.sha256 for file in serving.model.files}
        for serving in desired.servings
    }
    return Changes(
        helpers=installed.helpers != desired.run.helpers,
        user=not installed.user,
        packages=desired.packages,
        toolkit=desired.install_toolkit is not None,
        build=desired.build.key not in installed.releases,
        models=tuple(folder for folder, sums in files.items() if not _complete(sums, installed)),
        services=to_install,
        refreshed=refreshed,
        liveness=tuple(name for name, instance in stay.items() if liveness_differs(services[name], instance)),
        removed=tuple(name for name in installed.instances if name not in services),
        current=installed.current != desired.build.key,
        verify=tuple(
            serving.name for serving in desired.servings if serving.name in to_install and not serving.is_verified
        ),
        note=tuple(
            serving.name
            for serving in desired.servings
            if serving.name in stay
            and (
                serving.verified is not None
                or serving.name not in desired.inputs.same_inputs()
                or _has_another_source(stay[serving.name], serving)
                or _has_other_rates(stay[serving.name], serving)
            )
        ),
    )


def _has_another_source(installed: InstalledInstance, serving: Serving) -> bool:
    """Whether plan.json names the model's source otherwise: an earlier version wrote the query of an address, too."""
    return installed.record is not None and installed.record.raw.get("source") != serving.record.get("source")


def _has_other_rates(installed: InstalledInstance, serving: Serving) -> bool:
    """Whether plan.json lacks the rates that its plan was chosen with, or the probe's figure, which is kept there."""
    recorded = installed.record.raw.get("inputs") if installed.record else None
    wanted = serving.record.get("inputs")
    return wanted is not None and (not isinstance(recorded, dict) or recorded.get("rates") != wanted["rates"])


def _complete(files: Mapping[str, str | None], installed: Installed) -> bool:
    """Whether all files of a model are there and verified: by these sums, or where one is unknown by any."""
    return all(path in installed.models and sha256 in (None, installed.models[path]) for path, sha256 in files.items())


def differences(
    service: Service, installed: InstalledInstance | None, ground: Mapping[str, str | None], alone: bool = True
) -> tuple[str, ...]:
    """Why this instance must be installed or started again; empty where it is as it should be, or where it differs in
    what its server runs on with.

    `ground` is what the unit's hardening depends on, as the host has it now: systemd, kernel and driver. `alone`: the
    host is to have no other instance.
    """
    if installed is None:
        return ("it is not installed",)
    reasons = list(_unit_differs(service.unit_text, installed, ground, alone))
    if not reasons and not _has_passed(installed):
        reasons.append("it has not passed the gate")
    if installed.plan_sha256 is None:
        reasons.append("its plan.json is missing")
    for name, what in SECRETS.items():
        wanted = service.secrets.get(name)
        if installed.secrets.get(name) != (sha256(wanted) if wanted is not None else None):
            reasons.append(f"its {what} {'differ' if what.endswith('s') else 'differs'}")
    if installed.drop_ins:
        reasons.append(f"drop-ins change its unit: {', '.join(installed.drop_ins)}")
    if installed.enabled != "enabled":
        reasons.append(f"it is {installed.enabled or 'not enabled'}")
    if installed.active != "active":
        reasons.append(f"it is {installed.active or 'not active'}")
    elif installed.argv != service.argv:
        reasons.append("it runs with other arguments")
    elif installed.exe is not None and not installed.exe.startswith(service.release + "/"):
        reasons.append(f"it runs {installed.exe}")
    return tuple(reasons)


def _unit_differs(
    wanted: str, installed: InstalledInstance, ground: Mapping[str, str | None], alone: bool
) -> Iterator[str]:
    """Why the installed unit is wrong: nothing where it has the directives of the wanted unit, but for quiet ones and
    for those that the preflight dropped on this ground."""
    dropped = _dropped(installed)
    if installed.unit_sha256 == sha256(wanted) or installed.unit_core_sha256 == sha256(core_of_unit(wanted)):
        return
    if not dropped or installed.unit_core_sha256 != sha256(core_of_unit(wanted, dropped)):
        yield "its unit differs"
        return
    found = (installed.preflight or {}).get("ground") or {}
    if found != ground:
        changed = ", ".join(name for name in ground if found.get(name) != ground[name])
        yield f"its hardening was loosened under another {changed}: the whole hardening is tried again"
    elif not alone and (open_ := sorted({line.partition("=")[0] for line in dropped} & APART)):
        yield f"its hardening lacks {', '.join(open_)}, which keeps it apart from the host's other instances"


def _has_passed(installed: InstalledInstance) -> bool:
    """Whether the installed unit is the one that last passed the gate, but for quiet directives."""
    if installed.good_sha256 is not None and installed.good_sha256 == installed.unit_sha256:
        return True
    return installed.good_core_sha256 is not None and installed.good_core_sha256 == installed.unit_core_sha256


def _dropped(installed: InstalledInstance) -> tuple[str, ...]:
    """The directives that the preflight dropped, as plan.json has them; none where it has another form."""
    found: Mapping[str, Any] = installed.preflight or {}
    try:
        lines = [line for one in found["dropped"] for line in one["directives"]]
    except (KeyError, TypeError):
        return ()
    return tuple(line for line in lines if isinstance(line, str))


def quiet_differences(service: Service, installed: InstalledInstance) -> tuple[str, ...]:
    """Why the unit is to be replaced while its server runs on; empty where it is as it should be."""
    wanted = (service.unit_text, without_directives(service.unit_text, _dropped(installed)))
    if installed.unit_sha256 in [sha256(text) for text in wanted]:
        return ()
    return ("its unit differs in lines that need no restart",)


def liveness_differs(service: Service, installed: InstalledInstance) -> bool:
    """Whether the liveness check must be installed again; the server itself is not touched for that."""
    wanted = {name: sha256(text) for name, text in service.liveness.items()}
    return installed.liveness_sha256 != wanted or bool(wanted and installed.liveness != "active")


def sha256(text: str) -> str:
    """As the survey reports it for files."""
    return hashlib.sha256(text.encode()).hexdigest()
