"""The supervisor of a host: it mounts the host's disk and starts its systemd, again after each reboot.

Run as `unshare --mount ... python -m sandbox.supervisor JOB.json`, inside the host's cgroup. It has a private mount
namespace: no other process sees its mounts, and they vanish with the host's last process, also after SIGKILL. Job file:
see `Job`. Exit code: systemd-nspawn's, 0 after a power-off.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sandbox.cgroups import Cgroup

REBOOT = 133  # systemd-nspawn --keep-unit: the host asked to be started again
RUNTIME = Path("/run/systemd")
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Job:
    """A disk, and the program to run on it: its systemd (`command` is empty) or one command."""

    lower: list[str]  # read-only layers, topmost first
    disk: str  # folder of upper/, work/ and merged/
    hostname: str
    command: list[str] = field(default_factory=list)
    binds: list[str] = field(default_factory=list)  # SRC:DST or SRC:DST:ro
    files: dict[str, str] = field(default_factory=dict)  # written once, before the first start
    private_files: dict[str, str] = field(default_factory=dict)  # as `files`, with mode 0600
    always: dict[str, str] = field(default_factory=dict)  # written before every start
    owners: dict[str, tuple[int, int]] = field(default_factory=dict)  # of files and folders written above
    isolated: bool = False  # it has a loopback of its own and no other network

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self), indent=1))


def load(file: Path) -> Job:
    return Job(**json.loads(file.read_text()))


def mount(job: Job) -> Path:
    """Mount the overlay disk, the cgroup v2 tree, and a folder for nspawn's runtime files; returns the root."""
    disk = Path(job.disk)
    for name in ("upper", "work", "merged"):
        (disk / name).mkdir(parents=True, exist_ok=True)
    options = f"lowerdir={':'.join(job.lower)},upperdir={disk / 'upper'},workdir={disk / 'work'}"
    _run("mount", "-t", "overlay", "overlay", "-o", options, str(disk / "merged"))
    _run("mount", "-t", "cgroup2", "cgroup2", str(CGROUPS))
    RUNTIME.mkdir(exist_ok=True)
    _run("mount", "-t", "tmpfs", "tmpfs", str(RUNTIME))
    return disk / "merged"


def own_cgroup() -> Path:
    """This process's cgroup, in the tree that `mount` mounted."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    return CGROUPS / next(line.removeprefix("0::/") for line in lines if line.startswith("0::/"))


def write_files(job: Job, root: Path) -> None:
    """Write the host's own files to the merged disk, where folders keep the modes of the layers below."""
    first = not (Path(job.disk) / "configured").exists()
    for name, text in job.always.items() if not first else {**job.files, **job.always}.items():
        _write(root / name, text, 0o644)
    for name, text in job.private_files.items() if first else ():
        _write(root / name, text, 0o600)
    for name, (user, group) in job.owners.items() if first else ():
        _run("chown", "--no-dereference", f"{user}:{group}", str(root / name))
    (Path(job.disk) / "configured").touch()


def nspawn(job: Job, root: Path) -> list[str]:
    """The command line. Hosts share the machine's network unless they are isolated; --register=no, since this machine
    may have no systemd."""
    binds = [f"--bind-ro={b[:-3]}" if b.endswith(":ro") else f"--bind={b}" for b in job.binds]
    run = ["--boot"] if not job.command else ["--as-pid2", "--setenv=DEBIAN_FRONTEND=noninteractive"]
    return [
        "systemd-nspawn",
        *run,
        "--register=no",
        "--keep-unit",
        "--link-journal=no",
        "--resolv-conf=off",
        "--timezone=off",
        f"--machine={job.hostname}",
        *(["--private-network"] if job.isolated else []),
        *binds,
        f"--directory={root}",
        *job.command,
    ]


def main(file: str) -> int:
    job = load(Path(file))
    root = mount(job)
    write_files(job, root)
    machine = Cgroup(own_cgroup().parent / "machine")  # beside this process's cgroup: only leaf cgroups have processes
    while True:
        machine.remove()  # after a reboot: a cgroup with enabled controllers accepts no processes
        machine.make()
        code = subprocess.run(machine.enter(nspawn(job, root)), check=False).returncode
        if code != REBOOT:
            return code


def _write(file: Path, text: str, mode: int) -> None:
    if not file.parent.exists():
        file.parent.mkdir(parents=True, mode=0o755 if mode & 0o044 else 0o700)
    if file.is_symlink():
        file.unlink()  # /etc/resolv.conf may point outside the host
    file.write_text(text)
    file.chmod(mode)


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
