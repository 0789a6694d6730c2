"""Stage: switch the services on the host and check each there; where it fails, the old one comes back."""

from __future__ import annotations

from pyinfra.api.deploy import deploy

from llamafleet.remote.common import unit_of
from llamafleet.service.desired import Serving
from tasks.lib import memory_check, operations, usage
from tasks.lib.decision import decision, for_stage


@deploy("Serve")
def service() -> None:
    """Remove instances that the inventory no longer names, then install or restart what differs."""
    now = for_stage("service")
    if now is None:
        return
    for name in operations.each(now.changes.removed, str):
        operations.remove_instance(name=f"Remove llama-server-{name}, no longer in models", instance=name)
    for serving in operations.each(now.desired.servings, lambda serving: serving.name):
        serve(serving.name)
        watch(serving, needed=serving.name in now.changes.liveness)
    operations.make_current(
        name=f"Make build {now.desired.build.key} the current release", needed=now.changes.current,
        key=now.desired.build.key, keep=now.desired.settings.keep_releases,
    )  # fmt: skip
    operations.release_lock(name="Release the host's lock", needed=now.changes.any or bool(now.changes.note))
    usage.tell_usage(
        name="Say how to use what was installed", needed=bool(now.changes.services), servings=installed_now
    )  # fmt: skip


def installed_now() -> list[Serving]:
    """The instances that this run installed or started again, with the plans that they run with."""
    now = decision()
    return [one for one in now.desired.servings if one.name in now.changes.services] if now else []


def serve(name: str) -> None:
    """Stage one instance's files and switch to them; the old one comes back if the gate fails."""
    unit = unit_of(name)
    operations.stage_service(name=f"Prepare {unit}", staging=lambda: staging(name))
    operations.switch_service(
        name=f"Start and check {unit}", staging=lambda: staging(name),
        again=lambda host, binary_bytes: memory_check.replan_after_switch(host, name, binary_bytes),
    )  # fmt: skip
    operations.refresh_service(name=f"Set {name} right while its server runs on", staging=lambda: to_refresh(name))


def staging(name: str) -> operations.Staging | None:
    """The instance's files as they are to be installed; None if it is as planned.

    Operations call this when they execute: until then the memory check may have led to another plan.
    """
    now = decision()
    if now is None or name not in now.changes.services:
        return None
    serving = next(serving for serving in now.desired.servings if serving.name == name)
    files = memory_check.staged_files(serving)
    return operations.Staging(name, serving.service.identity, files, serving.service.secrets)


def to_refresh(name: str) -> operations.Staging | None:
    """The files of an instance that are replaced while its server runs on; None if it is as planned, or switched."""
    now = decision()
    if now is None or name not in now.changes.refreshed:
        return None
    serving = next(serving for serving in now.desired.servings if serving.name == name)
    files = memory_check.refreshed_files(serving)
    return operations.Staging(name, serving.service.identity, files, serving.service.secrets)


def watch(serving: Serving, needed: bool) -> None:
    """Install the liveness check alone, if nothing else differs: the server runs on."""
    wanted = serving.service
    operations.stage_files(
        name=f"Prepare the liveness check of {wanted.unit}", needed=needed, folder=operations.staged(wanted.name),
        files=dict(wanted.liveness), secrets={},
    )  # fmt: skip
    operations.run_job(
        name=f"Install the liveness check of {wanted.unit}", needed=needed, job=f"watch-{wanted.name}",
        program="switch.py", arguments=("watch", wanted.name),
    )  # fmt: skip
