"""What lies behind links of a host does not count: somebody else may have made them, and a run removes them.

The survey reads through links. Here their content is left out, as if it was missing, so that the run that removes a
link writes what belongs there, too. Folders that may lie on another disk are no links here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from llamafleet.host.installed import Installed, InstalledInstance
from llamafleet.remote.common import GOOD, HELPERS, INSTANCES, UNITS, plan_path, unit_of


def left_out(installed: Installed) -> Installed:
    """The same host without what lies behind links."""
    links = {path for path, place in installed.paths.items() if place.kind == "link"}

    def behind(path: str) -> bool:
        return any(one in links for one in _with_parents(path))

    helpers = f"{HELPERS}/{installed.helpers}"
    instances = {name: _without(one, name, behind) for name, one in installed.instances.items()}
    return replace(installed, helpers=None if behind(helpers) else installed.helpers, instances=instances)


def _with_parents(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition("/")[0]


def _without(instance: InstalledInstance, name: str, behind: Callable[[str], bool]) -> InstalledInstance:
    """An instance without the files that lie behind links. Of its unit the directives are left, as systemd has them."""
    folder, good, unit = f"{INSTANCES}/{name}", f"{GOOD}/{name}", unit_of(name)
    kept = (*instance.secrets, *instance.liveness_sha256, unit, "plan.json", "manifest.json")
    return replace(
        instance,
        plan_sha256=None if behind(plan_path(name)) else instance.plan_sha256,
        secrets={one: digest for one, digest in instance.secrets.items() if not behind(f"{folder}/{one}")},
        unit_sha256=None if behind(f"{UNITS}/{unit}") else instance.unit_sha256,
        liveness_sha256={
            one: digest for one, digest in instance.liveness_sha256.items() if not behind(f"{UNITS}/{one}")
        },
        good_is_whole=instance.good_is_whole and not any(behind(f"{good}/{one}") for one in kept),
    )
