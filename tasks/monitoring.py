"""Stage: where the inventory has a group `monitoring`, node-exporter on every host, and Prometheus on those of it."""

from __future__ import annotations

from pyinfra.api.deploy import deploy
from pyinfra.context import ctx_host

from llamafleet.build.packages import EXPORTER, PROMETHEUS
from llamafleet.service.refusals import Refused
from tasks.lib import decision, lookups, monitors, operations, to_do
from tasks.lib.groups import is_monitor
from tasks.lib.monitors import STARTED_BY_PACKAGES


@deploy("Monitoring")
def monitoring() -> None:
    """Let Prometheus see the host. Nothing where no host of the inventory monitors the others."""
    host = ctx_host.get()
    now = decision.for_stage("monitoring") if monitors.is_watched(host) else None
    if now is None:
        return
    machine = now.desired.machine
    manager, network = machine.package_manager or "", lookups.network(now.desired.settings)
    try:
        there = monitors.read(host)
        files = monitors.wanted(host, manager, there)
    except monitors.ERRORS as error:
        problems = error.problems if isinstance(error, monitors.MonitoringError) else (str(error),)
        return decision.refuse(host, Refused(tuple(problems)))
    needs = {} if there.exporter else {EXPORTER.name: EXPORTER.to_json(manager)}
    needs |= {PROMETHEUS.name: PROMETHEUS.to_json(manager)} if is_monitor(host) and not there.prometheus else {}
    different = [*(f"{name} is not installed" for name in needs), *monitors.differences(files, there)]
    to_do.say(host, "monitoring", different)
    operations.install_helpers(
        name="Install llamafleet's helpers for the monitoring",
        needed=bool(different) and now.changes.helpers and not decision.makes(host, "helpers"),
        arch=machine.os.arch, network=network,
    )  # fmt: skip
    monitors.mask_units(
        name="Keep packages from starting what everybody may read",
        units=tuple(STARTED_BY_PACKAGES[name] for name in needs) if manager == "apt" else (),
    )
    operations.install_packages(
        name="Install Prometheus and node-exporter", manager=manager, needs=needs, network=network
    )
    monitors.put_in_service(name="Put the monitoring in service", files=lambda: files if different else None)
    operations.release_lock(name="Release the lock of the monitored host", needed=bool(different))
