"""Stage: switch the services on the host and check each there; where it fails, the old one comes back."""

from __future__ import annotations

from collections.abc import Sequence

from pyinfra.api.deploy import deploy
from pyinfra.context import ctx_host

from llamafleet.remote.common import unit_of
from llamafleet.service import succession
from llamafleet.service.desired import Serving
from llamafleet.service.succession import Handover
from llamafleet.service.tune import to_measure
from tasks.lib import memory_check, moves, operations, switching, usage
from tasks.lib.decision import decision, for_stage


@deploy("Serve")
def service() -> None:
    """Install or restart what differs; then remove instances that the inventory no longer names."""
    now = for_stage("service")
    if now is None or not now.has_work:
        return
    moves.watch(ctx_host.get().state)
    options = switching.Options.of(now.desired.settings)
    handovers = succession.handovers(now.desired, now.changes)
    changes_any = now.changes.any or bool(to_measure(now.desired, as_set=True))  # a tune may lead to another plan
    for handover in operations.each(handovers, lambda one: one.names[0]):
        serve(handover, options)
    for serving in operations.each(now.desired.servings, lambda serving: serving.name):
        refresh(serving.name)
        watch(serving, needed=serving.name in now.changes.liveness)
    # Every host that changes has this operation, and pyinfra keeps each host's order: so no removal comes before any
    # host's switch.
    operations.note_switched(name="Let all hosts switch before anything is removed")
    for name in operations.each(now.changes.removed, str):
        handover = next((one for one in handovers if name in one.leaving), Handover(()))
        operations.remove_instance(
            name=f"Remove llama-server-{name}, no longer in models", instance=name, handover=handover,
            options=options,
        )  # fmt: skip
    operations.make_current(
        name=f"Make build {now.desired.build.key} the current release", needed=now.changes.current,
        key=now.desired.build.key, keep=now.desired.settings.keep_releases,
    )  # fmt: skip
    operations.release_lock(name="Release the host's lock", needed=True)
    usage.tell_usage(
        name="Say how to use what was installed", needed=changes_any, servings=installed_now, desired=now.desired
    )  # fmt: skip


def installed_now() -> list[Serving]:
    """The instances that this run installed or started again, with the plans that they run with."""
    now = decision()
    return [one for one in now.desired.servings if one.name in now.changes.services] if now else []


def serve(handover: Handover, options: switching.Options) -> None:
    """Stage files and switch to them: those of one instance, or of several that take over each other's ports or memory.
    The old ones come back if the gate fails."""
    for name in operations.each(handover.names, str):
        operations.stage_service(name=f"Prepare {unit_of(name)}", staging=lambda name=name: staging(name))
    units = ", ".join(map(unit_of, handover.names))
    place = f", in place of {', '.join(map(unit_of, handover.leaving))}" if handover.leaving else ""
    operations.switch_service(
        name=f"Start and check {units}{place}", staging=lambda: all_staging(handover.names),
        again=memory_check.replan_after_switch, handover=handover, options=options,
    )  # fmt: skip


def all_staging(names: Sequence[str]) -> tuple[operations.Staging, ...]:
    """As `staging`, of those of these instances that are not as planned."""
    return tuple(found for name in names if (found := staging(name)) is not None)


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


def refresh(name: str) -> None:
    """Replace the files on which the instance's running server does not depend."""
    operations.refresh_service(name=f"Set {name} right while its server runs on", staging=lambda: to_refresh(name))


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
