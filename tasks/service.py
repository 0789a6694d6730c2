"""Stage: the services. Each is switched on the host, checked there, and put back where it fails."""

from __future__ import annotations

from pyinfra.api.deploy import deploy

from tasks import operations
from tasks.situation import Serving, situation

STAGED = "/var/lib/llamafleet/staged"


@deploy("Serve")
def service() -> None:
    """Remove instances that the inventory no longer names, then install or restart what differs."""
    now = situation()
    if now is None:
        return
    for name in operations.each(now.work.removed, str):
        operations.remove_instance(name=f"Remove llama-server-{name}, no longer in models", instance=name)
    for serving in operations.each(now.servings, lambda one: one.instance.name):
        serve(serving, needed=serving.instance.name in now.work.services)
    operations.make_current(
        name=f"Make build {now.build.key} the current release", needed=now.work.current,
        key=now.build.key, keep=now.settings.keep_releases,
    )  # fmt: skip
    operations.release_lock(name="Release the host's lock", needed=now.work.any)


def serve(serving: Serving, needed: bool) -> None:
    """Stage one instance's files and switch to them; the old one comes back if the gate fails."""
    wanted = serving.service
    operations.stage_files(
        name=f"Prepare {wanted.unit}", needed=needed, folder=f"{STAGED}/{wanted.name}",
        files={wanted.unit: wanted.unit_text, "plan.json": wanted.plan_json}, secrets=wanted.secrets,
    )  # fmt: skip
    operations.run_job(
        name=f"Start and check {wanted.unit}", needed=needed, job=f"switch-{wanted.name}-{wanted.identity}",
        program="switch.py",
        arguments=("install", wanted.name),
    )  # fmt: skip
