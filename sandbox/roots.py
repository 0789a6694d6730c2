"""The disks that hosts start from: one bare Debian root, and layers with packages on top of it.

Both are made once and kept, under a key that is the hash of everything that went into them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from sandbox import aptconf, cgroups
from sandbox.state import CHECKOUT, SandboxError, State, say, tail
from sandbox.supervisor import Job

SUITE, OLDER_SUITE = "trixie", "bookworm"  # Debian 13, whose hosts are made unless another is asked for, and 12
# As bare as a fresh server install with Python: no compilers, curl, git. libpam-systemd makes real sessions.
PACKAGES = (
    "systemd",
    "systemd-sysv",
    "libpam-systemd",
    "dbus",
    "openssh-server",
    "python3",
    "sudo",
    "ca-certificates",
    "iproute2",
)
ADMIN, NOSUDO = "admin", "nosudo"
USERS = {ADMIN: 1000, NOSUDO: 1001}
# apt's own timers would hold apt's lock in the middle of a test; nobody sits at the console.
MASKED = ("apt-daily.timer", "apt-daily-upgrade.timer", "console-getty.service")
# Each daemon-reload starts all generators, and a deploy reloads many times; these make nothing in a host of ours.
GENERATORS = tuple(
    f"systemd-{name}-generator"
    for name in ("debug", "getty", "gpt-auto", "hibernate-resume", "rc-local", "run", "ssh", "system-update", "tpm2")
)
OWN_CERTIFICATES = Path("/usr/local/share/ca-certificates")
# A host's `apt-get update` then fetches what has changed: nothing, as a rule.
LISTS = ("--skip=cleanup/apt/lists", '--aptopt=Acquire::Languages "none"')
# dpkg syncs each file of a package otherwise, for which hosts wait longer than for all else of an installation.
UNSYNCED = ("--dpkgopt=force-unsafe-io",)
ARCHIVES = Path("var/cache/apt/archives")
UNSHARE = ["unshare", "--mount", "--propagation", "slave", "--"]


def ensure(state: State, packages: list[str], suite: str = SUITE) -> list[Path]:
    """The read-only layers for a host of that release with these packages, topmost first; made where missing."""
    base = base_root(state, suite)
    return [layer(state, base, sorted(set(packages))), base] if packages else [base]


def base_root(state: State, suite: str = SUITE) -> Path:
    """A bare root of that release of Debian with the users `admin` (may sudo) and `nosudo`.

    Raises SandboxError with the end of mmdebstrap's log when it cannot be made.
    """
    found = aptconf.debian_sources(aptconf.machine_sources(), aptconf.codename(), suite)
    settings = aptconf.carried_settings(aptconf.config_dump())
    files = [*aptconf.carried_files(settings), *sorted(OWN_CERTIFICATES.rglob("*.crt"))]
    recipe = [
        suite,
        PACKAGES,
        MASKED,
        USERS,
        aptconf.lines(found),
        settings,
        LISTS,
        UNSYNCED,
        [[str(f), f.read_bytes().hex()] for f in files],
        _hooks(),
    ]
    home = state.directory / f"root-{_key(recipe)}"
    options = [
        f"--include={','.join(PACKAGES)}",
        *LISTS,
        *UNSYNCED,
        *(f"--aptopt={line.rstrip(';')}" for line in settings),
        *(f'--customize-hook=mkdir -p "$1{f.parent}" && cp "{f}" "$1{f}"' for f in files),
        *(f"--customize-hook={hook}" for hook in _hooks()),
    ]
    # Where the machine has no Debian archive (Ubuntu, say), mmdebstrap uses the mirror it was built with.
    mirror = ["-"] if found else []

    def make(part: Path) -> None:
        command = ["mmdebstrap", "--variant=minbase", *options, suite, str(part / "tree"), *mirror]
        _build(state, command, part / "log", "\n".join(aptconf.lines(found)))
        if found:
            sources = "\n".join(aptconf.lines(found, aptconf.KEYRING))
            (part / "tree/etc/apt/sources.list").write_text(sources + "\n")
        _mark_updated(part / "tree")

    return _once(home, make, f"making a bare Debian {suite} root") / "tree"


def layer(state: State, base: Path, packages: list[str]) -> Path:
    """What installing `packages` adds to the root.

    Raises SandboxError with the end of apt's output when that fails.
    """
    home = state.directory / f"layer-{_key([base.parent.name, packages])}"

    def make(part: Path) -> None:
        offer_debs(state, part / "debs")
        install = 'apt-get -q update && apt-get -qy --no-install-recommends install "$@"'
        job = Job(
            lower=[str(part / "debs"), str(base)],
            disk=str(part),
            hostname="layer",
            command=["sh", "-c", install, "sh", *packages],
            always={"etc/resolv.conf": Path("/etc/resolv.conf").read_text()},
        )
        job.save(part / "job.json")
        _build(state, supervise(part / "job.json"), part / "log", "")
        keep_debs(state, part / "upper")
        _mark_updated(part / "upper")

    return _once(home, make, f"installing {' '.join(packages)} on top of the root") / "upper"


def supervise(job: Path) -> list[str]:
    """The command that runs a job file in a mount namespace of its own."""
    return [*UNSHARE, sys.executable, "-m", "sandbox.supervisor", str(job)]


def environment() -> dict[str, str]:
    """For supervisors: `import sandbox` must work from any working directory."""
    return {**os.environ, "PYTHONPATH": str(CHECKOUT), "LC_ALL": "C.UTF-8"}


def offer_debs(state: State, folder: Path) -> None:
    """A layer of hard links to all package files downloaded before: apt checks a hash, downloads nothing.

    Each host has its own folder, so hosts share no lock; it is a lower layer, so none can change the files.
    """
    archives = folder / ARCHIVES
    archives.mkdir(parents=True)
    for file in state.debs.glob("*.deb"):
        (archives / file.name).hardlink_to(file)


def keep_debs(state: State, upper: Path) -> None:
    """Move the package files that a host downloaded to the common pool."""
    state.debs.mkdir(exist_ok=True)
    for file in (upper / ARCHIVES).glob("*.deb"):
        if file.is_file() and not file.is_symlink():
            file.replace(state.debs / file.name)


def _hooks() -> list[str]:
    """Shell lines that mmdebstrap runs at the end, $1 being the root."""
    users = [f'chroot "$1" useradd --create-home --shell /bin/bash --uid {uid} {name}' for name, uid in USERS.items()]
    return [
        *users,
        f'echo "{ADMIN} ALL=(ALL) NOPASSWD: ALL" > "$1/etc/sudoers.d/{ADMIN}"',
        f'chmod 0440 "$1/etc/sudoers.d/{ADMIN}"',
        'rm -f "$1"/etc/ssh/ssh_host_*',
        ': > "$1/etc/machine-id"',
        f'chroot "$1" systemctl mask {" ".join(MASKED)}',
        'mkdir -p "$1/etc/systemd/system-generators"',
        f'cd "$1/etc/systemd/system-generators" && for one in {" ".join(GENERATORS)}; do ln -s /dev/null "$one"; done',
        'chroot "$1" update-ca-certificates',
    ]


def _build(state: State, command: list[str], log: Path, stdin: str) -> None:
    """Run inside the build cgroup, so that whatever a crash leaves can be found and ended."""
    cgroup = cgroups.of_build(state)
    cgroup.kill()
    work = cgroups.Cgroup(cgroup.path / "work")
    work.make()
    with log.open("w") as out:
        result = subprocess.run(
            work.enter([*UNSHARE, *command]),
            input=stdin,
            text=True,
            stdout=out,
            stderr=out,
            check=False,
            env=environment(),
        )
    cgroup.kill()
    with suppress(OSError):  # hosts are in it
        cgroups.top(state).path.rmdir()
    if result.returncode:
        raise SandboxError(f"{command[0]} ended with code {result.returncode}; {log} ends with:{tail(log)}")


def _once(home: Path, make: Callable[[Path], None], doing: str) -> Path:
    """Make beside, then rename: a folder with the final name is complete."""
    if not home.exists():
        started = time.monotonic()
        say(f"{doing} (once, kept in {home})")
        part = home.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True, mode=0o700)  # no user of this machine can reach the set-uid programs inside
        make(part)
        part.rename(home)
        say(f"done in {time.monotonic() - started:.0f} s")
    return home


def _mark_updated(tree: Path) -> None:
    """Spare each host systemd's first-boot work (linker cache, journal catalogue): systemd-update-done(8)."""
    for folder in ("etc", "var"):
        (tree / folder).mkdir(exist_ok=True)
        (tree / folder / ".updated").touch()


def _key(recipe: object) -> str:
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]
