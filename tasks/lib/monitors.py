"""What a host of a fleet that is monitored should have, from the inventory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pyinfra.api.host import Host
from pyinfra.context import ctx_host

from llamafleet.fleet import monitoring
from llamafleet.fleet.monitoring import Files, Watched
from llamafleet.host import answers
from llamafleet.remote.common import METRICS_UNIT, sha256
from llamafleet.settings import secrets
from tasks.lib import decision, gateways, jobs, lookups, operations, remote, sending, templates
from tasks.lib.groups import is_gateway, is_monitor
from tasks.lib.usage import reached_by

DASHBOARD = "grafana-dashboard.json"
# Debian's packages start these when they are installed, open to everybody who reaches the host.
STARTED_BY_PACKAGES = {"prometheus": "prometheus.service", "node-exporter": "prometheus-node-exporter.service"}


class MonitoringError(Exception):
    """A host cannot be monitored as the inventory asks for; `problems` has a sentence for each reason."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


# What reading may raise: each leaves the host out of the run.
ERRORS = (MonitoringError, *decision.READ_ERRORS)


def is_watched(host: Host) -> bool:
    """Whether the inventory has a host that monitors the others."""
    return any(is_monitor(one) for one in host.state.inventory)


def read(host: Host) -> answers.Monitoring:
    """The monitoring that the host has. Raises as `sending.run_helper` does, and `RemoteError`."""
    ok, out, err = sending.run_helper(host, "monitoring_apply.py", "show", purpose="the host's monitoring")
    if not ok or not out:
        raise remote.RemoteError(f"the host's monitoring cannot be read: {remote.explain(out, err)}")
    return remote.last(out, answers.monitoring)


def wanted(host: Host, manager: str, there: answers.Monitoring) -> Files:
    """What the host should have. Raises one of `ERRORS`."""
    fleet = list(_fleet(host))
    own = next((one for one in fleet if one.name == host.name), None)
    if own is None:
        raise MonitoringError((f"{host.name}: its settings cannot be used",))
    problems = tuple(monitoring.problems(own, fleet))
    if problems:
        raise MonitoringError(problems)
    keys = dict(_keys(fleet)) if own.monitors else {}
    dashboard = (templates.TEMPLATES / DASHBOARD).read_text(encoding="utf-8")
    exporter = there.exporter or monitoring.EXPORTERS.get(manager, monitoring.EXPORTER)
    program = there.prometheus or monitoring.PROMETHEUS
    return monitoring.files(templates.render, own, fleet, keys, dashboard, exporter, program)


def differences(files: Files, there: answers.Monitoring) -> Iterator[str]:
    """How the host's monitoring differs from what it should be, a phrase each; nothing where it is so."""
    if there.digest != files.digest:
        yield "its settings, keys or servers have changed" if there.digest else "it is new"
    for unit, text in files.units.items():
        found = there.units.get(unit)
        if found is None or found.sha256 != sha256(text.encode()):
            if there.digest == files.digest:
                yield f"{unit} differs"
        elif unit != METRICS_UNIT and not (found.active and found.enabled):
            yield f"{unit} does not run, or does not start with the host"
    yield from (f"{unit} is no longer needed" for unit in there.units if unit not in files.units)


@operations.change
def mask_units(units: tuple[str, ...]) -> operations.Commands:
    """Keep packages from starting these units of theirs."""
    if units:
        yield remote.HostCommand(["systemctl", "mask", "--quiet", *units], purpose="systemctl mask")


@operations.change
def put_in_service(files: Callable[[], Files | None]) -> operations.Commands:
    """Stage the files, let promtool check them, and start what has changed; nothing where `files` gives None."""
    now = files()
    if now is None:
        ctx_host.get().noop("the monitoring is as it should be")
        return
    folder = operations.staged(".monitoring")
    yield sending.received({f"{folder}/{name}": one for name, one in sent(now).items()}, "--fresh", folder)
    words = remote.words("monitoring_apply.py", "apply", folder, now.digest)
    yield operations.call(jobs.follow, jobs.name_of("monitoring", now.digest), words)


def sent(files: Files) -> dict[str, tuple[int, bytes]]:
    """Mode and content of each file by name: the keys are for root alone."""
    return sending.with_modes({**files.units, **files.texts}, files.secrets)


def _fleet(host: Host) -> Iterator[Watched]:
    """The hosts of the inventory; one whose settings are unusable is refused by its own run."""
    everybody = gateways.settings_of_all(host)
    for one in host.state.inventory:
        settings = everybody.get(one.name)
        if settings is None:
            continue
        reached = settings.reached_at or reached_by(one)
        yield Watched(one.name, reached, settings, is_monitor(one), is_gateway(one))


def _keys(fleet: list[Watched]) -> Iterator[tuple[tuple[str, str], str]]:
    """The first API key of each server that Prometheus asks itself."""
    for one in fleet:
        for instance in monitoring.scraped(one, fleet):
            if instance.api_key_file:
                yield (
                    (one.name, instance.name),
                    _first_key(instance.api_key_file, f"{one.name}: models: {instance.name}"),
                )


def _first_key(place: str, of: str) -> str:
    text = lookups.once(("keys", place), lambda: secrets.api_keys(place, f"{of}: api_key_file"))
    return text.splitlines()[0]
