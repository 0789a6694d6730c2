"""One cgroup for each host: it shows whether the host runs, and kills all of its processes at once.

A host's processes cannot leave its cgroup, and `cgroup.kill` (Linux 5.14) ends all of them in one step. So no process
id is stored, and a reused id can do no harm.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

from sandbox.state import SandboxError, State

KILL_SECONDS = 20  # a killed process may still wait for a disk


@dataclass(frozen=True)
class Cgroup:
    """A cgroup v2 folder, which may not exist yet."""

    path: Path

    @property
    def populated(self) -> bool:
        """Is there a live process in this cgroup or in a cgroup below it?"""
        try:
            return "populated 1" in (self.path / "cgroup.events").read_text()
        except OSError:
            return False

    def pids(self) -> list[int]:
        """The process ids of all processes, in this machine's numbering."""
        pids: list[int] = []
        for folder, _, _ in os.walk(self.path):  # unlike rglob, it ignores folders that vanish meanwhile
            with contextlib.suppress(OSError):
                pids += [int(line) for line in Path(folder, "cgroup.procs").read_text().split()]
        return pids

    def leader(self) -> int | None:
        """The process id, in this machine's numbering, of the host's process 1; None if it does not run."""
        return next((pid for pid in self.pids() if _number_inside(pid) == 1), None)

    def make(self) -> None:
        """Create the cgroup, with all controllers that its parent has.

        It enables none for cgroups below it: the kernel would then admit no process to it. Raises SandboxError if the
        machine does not allow it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SandboxError(
                f"{self.path} cannot be made ({error.strerror}): hosts need a writable cgroup v2; "
                "in a container this means --privileged"
            ) from error
        if not (self.path / "cgroup.kill").exists():
            raise SandboxError(f"{self.path} has no cgroup.kill: this kernel is older than Linux 5.14")
        _delegate(self.path.parent)

    def kill(self) -> None:
        """Send SIGKILL to all processes, wait until they have ended, and remove the cgroups.

        Raises SandboxError if a process still lives after KILL_SECONDS.
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
        """Remove this cgroup and all below it; the kernel refuses to remove a cgroup that has processes."""
        for folder, _, _ in os.walk(self.path, topdown=False):
            with contextlib.suppress(FileNotFoundError):
                os.rmdir(folder)

    def enter(self, argv: list[str]) -> list[str]:
        """The command that runs `argv` in this cgroup; child processes stay in it too."""
        return ["sh", "-c", 'echo 0 > "$1/cgroup.procs" && shift && exec "$@"', "sh", str(self.path), *argv]


def top(state: State) -> Cgroup:
    """The parent cgroup of all hosts of this state.

    Raises SandboxError if cgroup v2 is not mounted.
    """
    tag = hashlib.sha256(str(state.directory).encode()).hexdigest()[:10]
    return Cgroup(_mount() / f"disposable-hosts-{tag}")


def of_host(state: State, name: str) -> Cgroup:
    return Cgroup(top(state).path / name)


def of_build(state: State) -> Cgroup:
    """The cgroup in which roots and layers are built; no host name begins with a dot."""
    return Cgroup(top(state).path / ".build")


def mounted(kind: str, controller: str = "") -> Path | None:
    """Where cgroups of this kind are mounted, of version 1 those of a controller; None where they are not."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, folder, its_kind, options, *_ = line.split()
        if its_kind == kind and (not controller or controller in options.split(",")):
            return Path(folder)
    return None


def _mount() -> Path:
    if folder := mounted("cgroup2"):
        return folder
    raise SandboxError(
        "cgroup v2 is not mounted on this machine, and hosts cannot be separated without it; "
        "mount it: mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified"
    )


def _number_inside(pid: int) -> int | None:
    """The process's id in its innermost pid namespace; None if it is in no other pid namespace."""
    with contextlib.suppress(OSError):  # the process has ended
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("NSpid:"):
                numbers = line.split()[1:]
                return int(numbers[-1]) if len(numbers) > 1 else None
    return None


def _delegate(folder: Path) -> None:
    """Enable all available controllers for child cgroups; without them limits are accepted but not enforced."""
    with contextlib.suppress(OSError):
        for controller in (folder / "cgroup.controllers").read_text().split():
            with contextlib.suppress(OSError):
                (folder / "cgroup.subtree_control").write_text(f"+{controller}")
