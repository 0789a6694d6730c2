"""Install what this host lacks of what llama.cpp needs.

Contract: `install_packages.py MANAGER NEEDS`, where MANAGER is a name in packages.py and NEEDS a JSON object as
packages.py describes it, some with "unit": a service that comes with the package and is not to run. The package
manager's lines on stdout, `note: ` before what the host does without; the last one of a failure begins with `error: `.
Exit 0 all that is not optional is there, 1 failed. Root, one of the package managers, systemd, standard library;
common.py, packages.py and running.py lie beside it.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from typing import Iterator, Sequence  # the contract is Python 3.8, whose own are typing's

import packages
from common import show, systemctl
from running import Failed, refresh, run, say


def install(name: str, needs: packages.Needs) -> None:
    """Raises `Failed`."""
    manager = packages.by_name(name)
    if manager is None:
        raise Failed(f"the package manager {name!r} is unknown to packages.py")
    unread = refresh(manager)
    wanted = chosen(manager, needs)
    if wanted:
        try:
            with kept_off([need["unit"] for need in needs.values() if need.get("unit")]):
                run(manager.install(wanted), "the packages were not installed", manager)
        except Failed as failed:
            raise Failed(f"{failed}; before that, {unread}") if unread else failed from None
    needed = {word: need for word, need in needs.items() if not need["optional"]}
    missing = packages.missing(manager, needed)
    if missing:
        raise Failed(f"{manager.name} installed {' '.join(wanted)}, but these are missing: {', '.join(missing)}")


@contextlib.contextmanager
def kept_off(units: Sequence[str]) -> Iterator[None]:
    """Let packages that are installed meanwhile start none of these services, neither now nor with the host, as
    Debian's do. A service that the host's owner runs or has enabled stays as it is."""
    ours = [unit for unit in units if not is_used(unit)]
    for unit in ours:
        systemctl("mask", "--runtime", "--quiet", unit)  # in /run: a restart of the host would end it too
    try:
        yield
    finally:
        for unit in ours:
            systemctl("unmask", "--runtime", "--quiet", unit, check=False)
            systemctl("disable", "--quiet", unit, check=False)  # where it did not come, there is no such unit


def is_used(unit: str) -> bool:
    state = show(unit, "ActiveState", "UnitFileState")
    return state.get("ActiveState") not in ("inactive", "failed") or state.get("UnitFileState") == "enabled"


def chosen(manager: type[packages.Manager], needs: packages.Needs) -> list[str]:
    """The packages to install, each once. Raises `Failed` where no enabled repository has what is needed."""
    found = packages.offers(manager, needs)
    names: dict[str, None] = {}
    for word, need in needs.items():
        entry = found[word]["package"] if word in found else packages.choose(need, None)
        if entry is None and not need["optional"]:
            off = ", ".join(found[word]["off"]) if word in found else ""
            raise Failed(f"no repository that is enabled on the host has {' or '.join(need['packages']) or word}"
                         + (f"; switched off there: {off}" if off else ""))  # fmt: skip
        if entry is None:
            say(f"note: without {word}, which no enabled repository has")
        names.update(dict.fromkeys((entry or "").split()))
    return list(names)


def main(argv: list[str]) -> int:
    try:
        install(argv[0], json.loads(argv[1]))
    except (Failed, OSError, subprocess.SubprocessError) as error:
        say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
