"""Stage: what all other stages need. The host's lock, our helpers, folders, the system user, packages."""

from __future__ import annotations

from pyinfra.api.deploy import deploy

from tasks.lib import lookups, operations
from tasks.lib.decision import for_stage


@deploy("Prepare the host")
def bootstrap() -> None:
    """Prepare the host for the later stages. The lock comes first, and is held from here to the end of the run."""
    now = for_stage("bootstrap")
    if now is None or not now.has_work:
        return
    changes, machine = now.changes, now.desired.machine
    manager = machine.package_manager or ""
    network = lookups.network(now.desired.settings)
    operations.take_lock(name="Take the host's lock", needed=changes.any or bool(changes.note))
    operations.install_helpers(
        name="Install llamafleet's helpers", needed=changes.helpers, arch=machine.os.arch, network=network,
    )  # fmt: skip
    operations.restore_places(
        name="Give files and folders their place, mode and owner again",
        places=tuple(one.place for one in changes.paths.values()),
    )  # fmt: skip
    operations.create_user(name="Create the user llamafleet", needed=changes.user)
    operations.install_packages(
        name="Install packages", manager=manager,
        needs={need.name: need.to_json(manager) for need in now.desired.lacking},
        network=network,
    )  # fmt: skip
