"""The package managers of the hosts: which one this host has, which packages are missing, how they are installed.

Contract: a module, no program. A manager's methods return command lines and read outputs; only `detect` and `missing`
look at the host, and nothing here changes it. One more package manager is one more class in `MANAGERS`; the names of
the packages are the operator's side's (`llamafleet/build/`). Python 3.8, standard library, common.py beside it.
"""

from __future__ import annotations

import shutil
from typing import List, Optional, Sequence, Type  # the contract is Python 3.8, whose own are typing's

from common import output_of

PLACES = "/usr/sbin:/usr/bin:/sbin:/bin"


class Manager:
    """What is asked of a package manager. `name` is the word in the machine file and in what a program is asked."""

    name: str
    program: str  # what a host with this manager has

    @staticmethod
    def query(packages: Sequence[str]) -> List[str]:
        """Prints "PACKAGE installed" for each package that is fully installed, something else for others."""
        raise NotImplementedError

    @staticmethod
    def refresh() -> Optional[List[str]]:
        """Reads the lists of packages anew; None where `install` does that by itself."""
        raise NotImplementedError

    @staticmethod
    def install(packages: Sequence[str]) -> List[str]:
        """Installs the packages with what they need and nothing that is merely recommended; asks no questions."""
        raise NotImplementedError

    @staticmethod
    def would_change(packages: Sequence[str]) -> List[str]:
        """The names of all packages that `install` would install, change or remove; empty where nobody tells."""
        raise NotImplementedError


class Apt(Manager):
    name, program = "apt", "apt-get"
    COMMAND = ("apt-get", "-q", "-y", "-o", "DPkg::Lock::Timeout=300", "-o", "Acquire::Retries=3")

    @staticmethod
    def query(packages: Sequence[str]) -> List[str]:
        return ["dpkg-query", "--show", "--showformat=${Package} ${db:Status-Status}\n", *packages]

    @staticmethod
    def refresh() -> List[str]:
        return [*Apt.COMMAND, "update"]

    @staticmethod
    def install(packages: Sequence[str]) -> List[str]:
        return [*Apt.COMMAND, "--no-install-recommends", "install", *packages]

    @staticmethod
    def would_change(packages: Sequence[str]) -> List[str]:
        simulated = output_of([*Apt.COMMAND, "--simulate", "--no-install-recommends", "install", *packages], None)
        return [line.split()[1] for line in simulated.splitlines() if line.startswith(("Inst ", "Remv "))]


class Dnf(Manager):
    name, program = "dnf", "dnf"

    @staticmethod
    def query(packages: Sequence[str]) -> List[str]:
        return ["rpm", "-q", "--qf", "%{NAME} installed\n", *packages]

    @staticmethod
    def refresh() -> None:
        return None

    @staticmethod
    def install(packages: Sequence[str]) -> List[str]:
        return ["dnf", "-y", "--setopt=install_weak_deps=False", "install", *packages]

    @staticmethod
    def would_change(packages: Sequence[str]) -> List[str]:
        return []  # NVIDIA's drivers are left out of its repository (install_toolkit.py), so that none can come


MANAGERS: Sequence[Type[Manager]] = (Apt, Dnf)  # in the order in which they are looked for


def detect() -> Optional[Type[Manager]]:
    """The package manager of this host."""
    return next((manager for manager in MANAGERS if shutil.which(manager.program, path=PLACES)), None)


def by_name(name: Optional[str]) -> Optional[Type[Manager]]:
    return next((manager for manager in MANAGERS if manager.name == name), None)


def missing(manager: Optional[Type[Manager]], names: Sequence[str]) -> List[str]:
    """Those of the packages that are not fully installed; all of them where nobody can be asked."""
    if not names or manager is None:
        return list(names)
    lines = output_of(manager.query(names)).splitlines()
    installed = {line.split()[0] for line in lines if line.endswith(" installed")}
    return [name for name in names if name not in installed]
