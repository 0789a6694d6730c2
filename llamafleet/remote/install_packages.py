"""Install what this host lacks of what llama.cpp needs.

Contract: `install_packages.py MANAGER NEEDS`, where MANAGER is a name in packages.py and NEEDS a JSON object as
packages.py describes it. The package manager's lines on stdout, `note: ` before what the host does without; the last
one of a failure begins with `error: `. Exit 0 all that is not optional is there, 1 failed. Root, one of the package
managers, standard library; packages.py and running.py lie beside it.
"""

from __future__ import annotations

import json
import sys

import packages
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
            run(manager.install(wanted), "the packages were not installed", manager)
        except Failed as failed:
            raise Failed(f"{failed}; before that, {unread}") if unread else failed from None
    needed = {word: need for word, need in needs.items() if not need["optional"]}
    missing = packages.missing(manager, needed)
    if missing:
        raise Failed(f"{manager.name} installed {' '.join(wanted)}, but these are missing: {', '.join(missing)}")


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
    except (Failed, OSError) as error:
        say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
