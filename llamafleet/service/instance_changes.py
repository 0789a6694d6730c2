"""How an installed instance differs from what it should be: what needs a restart, what is set right while its server
runs, and what concerns its liveness check alone.

Decision 16: docs/decisions/0016-records-are-versioned.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from llamafleet.host.installed import InstalledInstance
from llamafleet.remote.common import (
    APART,
    core_of_unit,
    drop_in_folders,
    identity_of,
    is_as_written,
    without_directives,
)
from llamafleet.service.desired import Service

# The credentials of a unit by their names, and what they are in words.
CREDENTIALS = {
    "api-keys": "API keys", "tls-certificate": "TLS certificate", "tls-key": "TLS key",
    "chat-template": "chat template", "grammar": "grammar", "json-schema": "JSON schema",
}  # fmt: skip


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
    if not reasons and not _has_passed(installed) and not _good_is_damaged(installed):
        reasons.append("it has not passed the gate")
    reasons += _credentials_differ(service, installed, loaded=False)
    if drop_ins := _not_allowed(service, installed.drop_ins):
        reasons.append(f"drop-ins change its unit: {', '.join(drop_ins)}")
    reasons += _socket_differs(service, installed)
    if installed.active != "active":
        # One that starts on demand may be stopped; where a start has failed, the next connection is the next try.
        reasons += [] if service.demand and installed.is_on_demand else [f"it is {installed.active or 'not active'}"]
    elif installed.argv != service.argv:
        reasons.append("it runs with other arguments")
    elif installed.exe is not None and not installed.exe.startswith(service.release + "/"):
        reasons.append(f"it runs {installed.exe}")
    if installed.inherited:
        reasons.append(f"it runs with presets of the host: {', '.join(installed.inherited)}")
    return tuple(reasons)


def _socket_differs(service: Service, installed: InstalledInstance) -> Iterator[str]:
    """Whether clients reach it in another way than they should: by its own port, or by a socket that starts it."""
    if installed.is_on_demand and not service.demand:
        yield "it starts on demand"
    elif service.demand:
        socket, text = next(iter(service.demand.items()))
        if installed.demand_sha256.get(socket) != sha256(text):
            yield "the socket that starts it is missing or differs"


def _credentials_differ(service: Service, installed: InstalledInstance, loaded: bool) -> list[str]:
    """The credentials that are not as they should be; `loaded`: of those that the running server has nevertheless, so
    that their files alone are written again, else of the others."""
    found = []
    for name, what in CREDENTIALS.items():
        text = service.secrets.get(name)
        digest = sha256(text) if text is not None else None
        runs_with_it = installed.loaded.get(name) == digest
        verb = "differ" if what.endswith("s") else "differs"
        if installed.secrets.get(name) != digest and runs_with_it is loaded:
            found.append(f"its {what} {verb}")
        elif installed.secrets.get(name) == digest and installed.loaded and not runs_with_it and not loaded:
            found.append(f"its {what} {verb} from what it runs with")
    return found


def _not_allowed(service: Service, drop_ins: Iterable[str]) -> list[str]:
    """Of these drop-ins those of this unit that the settings do not name. Those of all services are the host's."""
    folders = drop_in_folders(service.unit)
    own = (path.rpartition("/") for path in drop_ins)
    return ["".join(parts) for parts in own if parts[0] in folders and parts[2] not in service.allowed_drop_ins]


def _unit_differs(
    wanted: str, installed: InstalledInstance, ground: Mapping[str, str | None], alone: bool
) -> Iterator[str]:
    """Why the installed unit is wrong: nothing where it has the directives of the wanted unit, but for quiet ones and
    for those that the preflight dropped on this ground."""
    dropped = _dropped(installed)
    if installed.unit_sha256 == sha256(wanted) or installed.unit_core_sha256 == sha256(core_of_unit(wanted)):
        return
    if not dropped or installed.unit_core_sha256 != sha256(core_of_unit(wanted, dropped)):
        yield "its unit is missing" if installed.unit_sha256 is None else "its unit differs"
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


def _good_is_damaged(installed: InstalledInstance) -> bool:
    """Whether the files that last passed the gate say nothing of the installed ones."""
    return installed.good_sha256 is None or not installed.good_is_whole


def _dropped(installed: InstalledInstance) -> tuple[str, ...]:
    """The directives that the preflight dropped, as plan.json has them; none where it has another form."""
    found: Mapping[str, Any] = installed.preflight or {}
    try:
        lines = [line for one in found["dropped"] for line in one["directives"]]
    except (KeyError, TypeError):
        return ()
    return tuple(line for line in lines if isinstance(line, str))


def quiet_differences(service: Service, installed: InstalledInstance) -> tuple[str, ...]:
    """Why files of the instance, or its state in systemd, are to be set right while its server runs on; empty where all
    is as it should be."""
    return tuple(_quiet_differences(service, installed))


def _quiet_differences(service: Service, installed: InstalledInstance) -> Iterator[str]:
    dropped = _dropped(installed)
    texts = (service.unit_text, without_directives(service.unit_text, dropped))
    cores = (core_of_unit(service.unit_text), core_of_unit(service.unit_text, dropped))
    has_core = installed.unit_core_sha256 in [sha256(core) for core in cores]
    if has_core and installed.unit_sha256 not in [sha256(text) for text in texts]:
        yield "its unit differs in lines that need no restart"
    yield from _plan_differs(service, installed)
    yield from _credentials_differ(service, installed, loaded=True)
    unread = [path for path in installed.unread_drop_ins if path not in installed.drop_ins]
    if drop_ins := _not_allowed(service, unread):
        yield f"drop-ins would change its unit at its next start: {', '.join(drop_ins)}"
    elif installed.stale:
        yield "systemd has not read its unit again since a file of it changed"
    if service.demand:
        yield from _demand_differs(service, installed)
    elif installed.enabled != "enabled":
        yield f"it is {installed.enabled or 'not enabled'}"
    sums = {name: sha256(text) for name, text in service.liveness.items()}
    good = installed.good_liveness_sha256
    if _good_is_damaged(installed) or any(
        installed.liveness_sha256.get(name) == digest != good.get(name) for name, digest in sums.items()
    ):
        yield "the files to go back to are damaged or missing"


def _demand_differs(service: Service, installed: InstalledInstance) -> Iterator[str]:
    """What is wrong with the units that start it, but for a socket that clients would notice."""
    if installed.enabled == "enabled":
        yield "it starts with the host"
    sums, good = {name: sha256(text) for name, text in service.demand.items()}, installed.good_demand_sha256
    there = installed.demand_sha256
    if [there.get(name) for name in list(sums)[1:]] != list(sums.values())[1:]:
        yield "what hands its connections on differs"
    elif any(there[name] == digest != good.get(name) for name, digest in sums.items() if name in there):
        yield "the files to go back to are damaged or missing"
    if installed.demand_drop_ins:
        yield f"drop-ins change how it starts: {', '.join(installed.demand_drop_ins)}"
    if installed.socket != "active":
        yield f"its socket is {installed.socket or 'not active'}"
    elif installed.socket_enabled != "enabled":
        yield f"its socket is {installed.socket_enabled or 'not enabled'}"


def _plan_differs(service: Service, installed: InstalledInstance) -> Iterator[str]:
    """How plan.json is not what was written with the unit."""
    if installed.plan_sha256 is None:
        yield "its plan.json is missing"
    elif installed.good_plan_sha256 not in (None, installed.plan_sha256):
        yield "its plan.json was edited or damaged"
    elif installed.record is None:
        yield "its plan.json cannot be read"
    elif not is_as_written(record := installed.record.raw) or identity_of(record) not in service.identities:
        yield "its plan.json was edited"


def liveness_differences(service: Service, installed: InstalledInstance) -> tuple[str, ...]:
    """Why the liveness check must be installed again; the server itself is not touched for that."""
    wanted = {name: sha256(text) for name, text in service.liveness.items()}
    reasons = []
    if installed.liveness_sha256 != wanted:
        reasons.append("its liveness check differs")
    if installed.liveness_drop_ins:
        reasons.append(f"drop-ins change its liveness check: {', '.join(installed.liveness_drop_ins)}")
    runs = not installed.is_on_demand or installed.active == "active"  # the timer stops with it
    if wanted and runs and installed.liveness != "active":
        reasons.append(f"its liveness timer is {installed.liveness or 'not active'}")
    elif wanted and installed.liveness_enabled != "enabled":
        reasons.append(f"its liveness timer is {installed.liveness_enabled or 'not enabled'}")
    return tuple(reasons)


def sha256(text: str) -> str:
    """As the survey reports it for files."""
    return hashlib.sha256(text.encode()).hexdigest()
