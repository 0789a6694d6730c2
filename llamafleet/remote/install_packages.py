"""Install packages of the distribution.

Contract: `install_packages.py MANAGER PACKAGE...`, where MANAGER is a name in packages.py. The package manager's lines
on stdout; the last one of a failure begins with `error: `. Exit 0 all are installed, 1 failed. Root, apt or dnf,
standard library; install_toolkit.py and what it imports lie beside it.
"""

from __future__ import annotations

import sys

import packages
from install_toolkit import Failed, refresh, run, say


def install(name: str, wanted: list[str]) -> None:
    """Raises `Failed`."""
    manager = packages.by_name(name)
    if manager is None:
        raise Failed(f"the package manager {name!r} is unknown to packages.py")
    refresh(manager)
    run(manager.install(wanted), "the packages were not installed")
    missing = packages.missing(manager, wanted)
    if missing:
        raise Failed(f"{manager.name} installed everything it was asked for, but these are missing: {missing}")


def main(argv: list[str]) -> int:
    try:
        install(argv[0], argv[1:])
    except (Failed, OSError) as error:
        say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
