"""A host with the time of fewer processors than it shows, as containers and rented machines often are.

By the host's own cgroup where the machine has the controller in cgroup v2, else by one of version 1, which the host
cannot see.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from sandbox.cgroups import Cgroup, mounted
from sandbox.state import SandboxError

PERIOD_US = 100_000


@contextlib.contextmanager
def of_processors(group: Cgroup, processors: float) -> Iterator[None]:
    """All processes of a running host's cgroup together have the time of so many processors, until the end.

    Raises SandboxError if the machine has no such controller.
    """
    quota = int(processors * PERIOD_US)
    own = group.path / "cpu.max"
    if own.exists():
        own.write_text(f"{quota} {PERIOD_US}")
        try:
            yield
        finally:
            own.write_text(f"max {PERIOD_US}")
        return
    outside = mounted("cgroup", "cpu")
    if outside is None:
        raise SandboxError("this machine has no cgroup controller for processor time (cpu)")
    folder = outside / group.path.name
    folder.mkdir(exist_ok=True)
    (folder / "cpu.cfs_period_us").write_text(str(PERIOD_US))
    (folder / "cpu.cfs_quota_us").write_text(str(quota))
    try:
        _move(group, folder)
        yield
    finally:
        _move(group, outside)
        folder.rmdir()


def _move(group: Cgroup, folder: Path) -> None:
    """Until none is left: one that is moved may have had children meanwhile."""
    procs = folder / "cgroup.procs"
    while outside := set(group.pids()) - {int(line) for line in procs.read_text().split()}:
        for pid in outside:
            with contextlib.suppress(ProcessLookupError):
                procs.write_text(str(pid))
