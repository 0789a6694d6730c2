"""One cgroup per host: what says that it runs, and what kills all of it at once.

A host's processes cannot leave its cgroup, and `cgroup.kill` (Linux 5.14) ends every one of them in one step,
so no process number is ever remembered, and none can be mistaken for another's.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

from sandbox.state import SandboxError, State

KILL_SECONDS = 20  # a killed process that waits for a disk needs a moment


@dataclass(frozen=True)
class Cgroup:
    """A cgroup v2 folder; it need not exist."""

    path: Path

    @property
    def populated(self) -> bool:
        """Does any live process belong to it or to a cgroup below?"""
        try:
            return "populated 1" in (self.path / "cgroup.events").read_text()
        except OSError:
            return False

    def pids(self) -> list[int]:
        """All processes, as numbers of this machine."""
        found: list[int] = []
        for folder, _, _ in os.walk(self.path):  # which, unlike rglob, passes over what goes away while we read
            with contextlib.suppress(OSError):
                found += [int(line) for line in Path(folder, "cgroup.procs").read_text().split()]
        return found

    def leader(self) -> int | None:
        """The host's own process 1, as a number of this machine."""
        return next((pid for pid in self.pids() if _number_inside(pid) == 1), None)

    def make(self) -> None:
        """Raises SandboxError where the machine does not let us."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SandboxError(
                f"{self.path} cannot be made ({error.strerror}): hosts need a writable cgroup v2; "
                "in a container this means --privileged"
            ) from error
        if not (self.path / "cgroup.kill").exists():
            raise SandboxError(f"{self.path} has no cgroup.kill: this kernel is older than Linux 5.14")
        for folder in (self.path.parent, self.path):
            _delegate(folder)

    def kill(self) -> None:
        """SIGKILL everything inside, wait until it is gone, and remove the cgroups.

        Raises SandboxError when something survives.
        """
        if not self.path.exists():
            return
        (self.path / "cgroup.kill").write_text("1")
        deadline = time.monotonic() + KILL_SECONDS
        while self.populated:
            if time.monotonic() > deadline:
                raise SandboxError(f"{self.path}: processes {self.pids()} still live {KILL_SECONDS} s after SIGKILL")
            time.sleep(0.01)
        self.remove()

    def remove(self) -> None:
        """Remove the folder and all below; empty ones only, the kernel sees to that."""
        for folder, _, _ in os.walk(self.path, topdown=False):
            with contextlib.suppress(FileNotFoundError):
                os.rmdir(folder)

    def enter(self, argv: list[str]) -> list[str]:
        """The command that runs `argv` inside; its children stay inside too."""
        return ["sh", "-c", 'echo 0 > "$1/cgroup.procs" && shift && exec "$@"', "sh", str(self.path), *argv]


def top(state: State) -> Cgroup:
    """The cgroup above all hosts of this state.

    Raises SandboxError where cgroup v2 is not mounted.
    """
    tag = hashlib.sha256(str(state.directory).encode()).hexdigest()[:10]
    return Cgroup(_mount() / f"disposable-hosts-{tag}")


def of_host(state: State, name: str) -> Cgroup:
    return Cgroup(top(state).path / name)


def of_build(state: State) -> Cgroup:
    """Where roots and layers are made; the dot keeps it apart from host names."""
    return Cgroup(top(state).path / ".build")


def _mount() -> Path:
    for line in Path("/proc/mounts").read_text().splitlines():
        _, folder, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(folder)
    raise SandboxError(
        "no cgroup v2 is mounted on this machine, so hosts could not be kept apart; "
        "mount one: mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified"
    )


def _number_inside(pid: int) -> int | None:
    """The process's number in its innermost pid namespace, if it has more than one number."""
    with contextlib.suppress(OSError):  # it ended
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("NSpid:"):
                numbers = line.split()[1:]
                return int(numbers[-1]) if len(numbers) > 1 else None
    return None


def _delegate(folder: Path) -> None:
    """Hand down what controllers there are; without them limits are accepted but not enforced."""
    with contextlib.suppress(OSError):
        for controller in (folder / "cgroup.controllers").read_text().split():
            with contextlib.suppress(OSError):
                (folder / "cgroup.subtree_control").write_text(f"+{controller}")
