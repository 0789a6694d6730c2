"""Stage: the ground. System user, folders, our helpers, the host's lock, packages."""

from __future__ import annotations

from pyinfra.api.deploy import deploy
from pyinfra.operations import apt, dnf

from tasks.lib import operations
from tasks.lib.decision import situation


@deploy("Prepare the host")
def bootstrap() -> None:
    """Everything the later stages stand on; the lock is held from here to the end of the run."""
    now = situation()
    if now is None:
        return
    work, machine = now.work, now.survey.machine
    operations.install_helpers(
        name="Install llamafleet's helpers", needed=work.helpers, arch=machine.os.arch,
    )  # fmt: skip
    operations.take_lock(name="Take the host's lock", needed=work.any)
    operations.create_user(name="Create the user llamafleet", needed=work.user)
    if work.packages and machine.package_manager == "apt":
        apt.packages(
            name="Install packages", packages=list(work.packages), update=True, no_recommends=True,
            extra_install_args="-o DPkg::Lock::Timeout=300",
        )  # fmt: skip
    elif work.packages:
        dnf.packages(name="Install packages", packages=list(work.packages))
