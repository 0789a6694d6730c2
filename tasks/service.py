"""Stage: the services. Each is switched on the host, checked there, and put back where it fails."""

from __future__ import annotations

from pyinfra.api.deploy import deploy

from llamafleet.settings.schema import unit_of
from tasks.lib import memory_check as asking
from tasks.lib import operations
from tasks.lib.decision import Serving, situation


@deploy("Serve")
def service() -> None:
    """Remove instances that the inventory no longer names, then install or restart what differs."""
    now = situation()
    if now is None:
        return
    for name in operations.each(now.work.removed, str):
        operations.remove_instance(name=f"Remove llama-server-{name}, no longer in models", instance=name)
    for serving in operations.each(now.servings, lambda one: one.instance.name):
        serve(serving.instance.name)
        watch(serving, needed=serving.instance.name in now.work.liveness)
    operations.make_current(
        name=f"Make build {now.build.key} the current release", needed=now.work.current,
        key=now.build.key, keep=now.settings.keep_releases,
    )  # fmt: skip
    operations.release_lock(name="Release the host's lock", needed=now.work.any)


def serve(name: str) -> None:
    """Stage one instance's files and switch to them; the old one comes back if the gate fails."""
    unit = unit_of(name)
    operations.stage_service(name=f"Prepare {unit}", staging=lambda: staging(name))
    operations.switch_service(
        name=f"Start and check {unit}", staging=lambda: staging(name),
        again=lambda host, told: asking.agree_with(host, name, told),
    )  # fmt: skip


def staging(name: str) -> operations.Staging | None:
    """The instance as it is to be installed; None where it is as planned. Asked anew when the operations
    execute: until then llama-server may have asked for another plan."""
    now = situation()
    if now is None or name not in now.work.services:
        return None
    serving = next(one for one in now.servings if one.instance.name == name)
    return operations.Staging(name, serving.service.identity, asking.files(serving), serving.service.secrets)


def watch(serving: Serving, needed: bool) -> None:
    """Install the liveness check alone, where it is all that differs: the server runs on."""
    wanted = serving.service
    operations.stage_files(
        name=f"Prepare the liveness check of {wanted.unit}", needed=needed, folder=operations.staged(wanted.name),
        files=dict(wanted.liveness), secrets={},
    )  # fmt: skip
    operations.run_job(
        name=f"Install the liveness check of {wanted.unit}", needed=needed, job=f"watch-{wanted.name}",
        program="switch.py", arguments=("watch", wanted.name),
    )  # fmt: skip
