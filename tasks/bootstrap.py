"""Stage: what all other stages need. Our helpers, folders, the host's lock, the system user, packages."""

from __future__ import annotations

from pyinfra.api.deploy import deploy
from pyinfra.operations import apt, dnf

from tasks.lib import operations
from tasks.lib.decision import decision


@deploy("Prepare the host")
def bootstrap() -> None:
    """Prepare the host for the later stages; the lock is held from here to the end of the run."""
    now = decision()
    if now is None:
        return
    changes, machine = now.changes, now.desired.machine
    operations.install_helpers(
        name="Install llamafleet's helpers", needed=changes.helpers, arch=machine.os.arch,
    )  # fmt: skip
    operations.take_lock(name="Take the host's lock", needed=changes.any)
    operations.create_user(name="Create the user llamafleet", needed=changes.user)
    if changes.packages and machine.package_manager == "apt":
        apt.packages(
            name="Install packages", packages=list(changes.packages), update=True, no_recommends=True,
            extra_install_args="-o DPkg::Lock::Timeout=300",
        )  # fmt: skip
    elif changes.packages:
        dnf.packages(name="Install packages", packages=list(changes.packages))
