"""Disposable hosts, for Python: `up`, `down`, `running`, and what one host can do.

    hosts = up(2, packages=["nginx"], binds=["/srv/models:/srv/models:ro"])
    hosts[0].run(["systemctl", "is-system-running"]).stdout
    hosts[0].kill()     # the power cut
    hosts[0].start()    # the same disk again
    down([h.name for h in hosts])

Each host is Debian 13 with its own systemd, disk, host name, SSH host key and address 127.0.1.N. Network, clock,
/proc/meminfo and kernel are the machine's own: a service in one host must not bind 127.0.0.1 or 0.0.0.0, or it meets its
neighbour's. A power cut loses no written data, since the machine's page cache lives on.
"""

from __future__ import annotations

import json
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from sandbox import cgroups, machine, roots
from sandbox.state import SandboxError, State, current, say, tail
from sandbox.supervisor import Job

PREFIX = "sandbox"
LAST_ADDRESS = 254
BOOT_SECONDS = 120  # thirty at once on two slow cores; one alone takes two seconds
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class SandboxHost:
    """One disposable host, running or off."""

    name: str
    number: int  # of its address
    port: int  # of its sshd
    packages: tuple[str, ...]
    binds: tuple[str, ...]
    state: State

    @property
    def address(self) -> str:
        return f"127.0.1.{self.number}"

    @property
    def ssh_key(self) -> Path:
        return self.state.ssh_key

    @property
    def known_hosts(self) -> Path:
        return self.state.known_hosts

    @property
    def disk(self) -> Path:
        """Its folder: spec.json, upper/ (all that was ever written in the host), log (its console)."""
        return self.state.hosts / self.name

    @property
    def root(self) -> Path:
        """The host's file system as it sees it, while it runs; what it wrote, while it is off."""
        pid = self.pid
        return Path(f"/proc/{pid}/root") if pid else self.disk / "upper"

    @property
    def pid(self) -> int | None:
        """Of the host's process 1, in the machine's numbers; None while it is off."""
        return self.cgroup.leader()

    @property
    def cgroup(self) -> cgroups.Cgroup:
        return cgroups.of_host(self.state, self.name)

    @property
    def is_running(self) -> bool:
        return self.cgroup.populated

    def ssh(self, user: str = "root") -> list[str]:
        """The ssh command that reaches it, without a command to run there."""
        options = (
            "IdentitiesOnly=yes",
            "BatchMode=yes",
            "StrictHostKeyChecking=yes",
            "LogLevel=ERROR",
            f"UserKnownHostsFile={self.known_hosts}",
            "GlobalKnownHostsFile=none",
            "ConnectTimeout=10",
        )
        return [
            "ssh",
            "-F",
            "none",
            "-i",
            str(self.ssh_key),
            *(f"-o{o}" for o in options),
            "-p",
            str(self.port),
            f"{user}@{self.address}",
        ]

    def run(
        self,
        argv: list[str],
        *,
        user: str = "root",
        input: str = "",
        timeout: float | None = None,
        check: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command over SSH; 255 is ssh's own failure. Arguments arrive as given, no shell reads them."""
        command = [*self.ssh(user), "--", shlex.join(argv)]
        return subprocess.run(
            command, input=input, capture_output=True, text=True, timeout=timeout, check=check
        )

    def kill(self) -> None:
        """The power cut: SIGKILL to everything in it. The disk stays."""
        self.cgroup.kill()

    def start(self) -> None:
        """Boot it (again) and wait until systemd says that it is up; nothing happens if it is already.

        Raises SandboxError with the end of its console when it does not come up.
        """
        with self.state.locked():
            _launch(self)
        self.wait()

    def reboot(self) -> None:
        """`systemctl reboot` inside; returns when it is up again."""
        before = self.pid
        self.run(["systemctl", "reboot"])
        deadline = time.monotonic() + BOOT_SECONDS
        while self.pid in (before, None):
            _check(self, deadline, "come back from a reboot")
        self.wait()

    def wait(self) -> str:
        """Wait until it has booted; gives systemd's word for it: `running`, or `degraded` when a unit failed."""
        deadline = time.monotonic() + BOOT_SECONDS
        while True:
            with suppress(OSError), socket.create_connection((self.address, self.port), timeout=1) as probe:
                if probe.recv(4) == b"SSH-":
                    break
            _check(self, deadline, f"answer on {self.address} port {self.port}")
        while not (result := self.run(["systemctl", "is-system-running", "--wait"])).stdout:
            _check(self, deadline, f"let root in by SSH ({result.stderr.strip()})")
        return result.stdout.strip()


def up(
    n: int,
    *,
    packages: Iterable[str] = (),
    binds: Iterable[str] = (),
    prefix: str = PREFIX,
    first_address: int = 1,
) -> list[SandboxHost]:
    """Hosts PREFIX1 to PREFIXn, all booted; those that run already stay as they are.

    `packages` are installed beforehand, once for all hosts that want the same. `binds` are SRC:DST or SRC:DST:ro. Host I
    gets 127.0.1.I counted from `first_address`, or the next address that no host of this sandbox has.
    Raises SandboxError.
    """
    machine.check()
    machine.check_binds(binds := tuple(binds))
    state = current()
    with state.locked():
        lower = roots.ensure(state, list(packages := tuple(sorted(set(packages)))))
        _make_key(state)
        hosts = [
            _described(state, f"{prefix}{i}", first_address + i - 1, packages, binds) for i in range(1, n + 1)
        ]
        for host in hosts:
            _create(host, lower)
        _write_known_hosts(state)
        machine.allow_hosts(len(listed()), state.inotify_before)
        for host in hosts:
            _launch(host)
    with ThreadPoolExecutor(max_workers=16) as pool:
        for host, word in zip(hosts, pool.map(SandboxHost.wait, hosts), strict=True):
            if word != "running":
                failed = host.run(["systemctl", "--failed", "--plain", "--no-legend"]).stdout
                say(f"{host.name} is {word}: {failed.strip() or 'no failed unit'}")
    return hosts


def down(names: Iterable[str] | None = None) -> list[str]:
    """Remove these hosts, or all and whatever a crash left: processes, cgroups, disks. Gives the names removed.

    Roots, layers and downloaded packages stay for the next `up`. Raises SandboxError for an unknown name.
    """
    machine.check_root()
    state = current()
    with state.locked():
        left = _left(state)
        wanted = left if names is None else list(names)
        if unknown := sorted(set(wanted) - set(left)):
            raise SandboxError(
                f"no host is named {', '.join(unknown)}; there are: {', '.join(left) or 'none'}"
            )
        if names is None:
            cgroups.of_build(state).kill()
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda name: _remove(state, name), wanted))
        if not _left(state):
            _clean(state)
        else:
            _write_known_hosts(state)
    return wanted


def listed() -> list[SandboxHost]:
    """All hosts of this checkout, running or off, in the order of their addresses."""
    state = current()
    try:
        found = [_load(state, file) for file in state.hosts.glob("*/spec.json")]
    except PermissionError as error:
        raise SandboxError(f"{error.filename} belongs to root: sandbox hosts are root's") from error
    return sorted(found, key=lambda host: host.number)


def get(name: str) -> SandboxHost:
    """Raises SandboxError for an unknown name."""
    hosts = {host.name: host for host in listed()}
    if name not in hosts:
        raise SandboxError(f"no host is named {name}; there are: {', '.join(hosts) or 'none'}")
    return hosts[name]


def _described(
    state: State,
    name: str,
    number: int,
    packages: tuple[str, ...],
    binds: tuple[str, ...],
) -> SandboxHost:
    """The host as it is, or as it will be. Raises SandboxError when it is there but differs from what is asked."""
    hosts = listed()
    for host in hosts:
        if host.name == name:
            if (lacks := set(packages) - set(host.packages)) or (lacks := set(binds) - set(host.binds)):
                raise SandboxError(
                    f"{name} is there already, without {', '.join(sorted(lacks))}; "
                    f"remove it first: python -m sandbox down {name}"
                )
            return host
    taken = {host.number for host in hosts}
    free = next((i for i in range(number, LAST_ADDRESS + 1) if i not in taken), None)
    if free is None:
        raise SandboxError(
            f"no address is left for {name} between 127.0.1.{number} and 127.0.1.{LAST_ADDRESS}"
        )
    host = SandboxHost(name, free, machine.ssh_port(), packages, binds, state)
    machine.check_address(host.address, host.port)
    host.disk.mkdir(parents=True, mode=0o700)
    spec = {key: value for key, value in asdict(host).items() if key != "state"}
    (host.disk / "spec.part").write_text(json.dumps(spec))
    (host.disk / "spec.part").rename(host.disk / "spec.json")
    return host


def _load(state: State, file: Path) -> SandboxHost:
    spec = json.loads(file.read_text())
    return SandboxHost(
        spec["name"], spec["number"], spec["port"], tuple(spec["packages"]), tuple(spec["binds"]), state
    )


def _create(host: SandboxHost, lower: list[Path]) -> None:
    """Give a new host its keys, its job file and the package files downloaded before."""
    job = host.disk / "job.json"
    if job.exists():
        return
    for leftover in ("debs", "upper", "work"):
        shutil.rmtree(host.disk / leftover, ignore_errors=True)
    private, public = _new_key(host.disk / "host_key", host.name)
    allowed = host.ssh_key.with_suffix(".pub").read_text()
    homes = {"root": (0, 0), **{f"home/{name}": (uid, uid) for name, uid in roots.USERS.items()}}
    roots.offer_debs(host.state, host.disk / "debs")
    Job(
        lower=[str(host.disk / "debs"), *map(str, lower)],
        disk=str(host.disk),
        hostname=host.name,
        binds=list(host.binds),
        files={
            "etc/hostname": f"{host.name}\n",
            "etc/hosts": f"127.0.0.1 localhost\n::1 localhost ip6-localhost\n{host.address} {host.name}\n",
            "etc/ssh/sshd_config.d/address.conf": f"ListenAddress {host.address}\nPort {host.port}\n",
            "etc/ssh/ssh_host_ed25519_key.pub": public,
        },
        private_files={
            "etc/ssh/ssh_host_ed25519_key": private,
            **{f"{h}/.ssh/authorized_keys": allowed for h in homes},
        },
        always={"etc/resolv.conf": Path("/etc/resolv.conf").read_text()},
        owners={
            path: owner for h, owner in homes.items() for path in (f"{h}/.ssh", f"{h}/.ssh/authorized_keys")
        },
    ).save(job.with_suffix(".part"))
    job.with_suffix(".part").rename(job)


def _launch(host: SandboxHost) -> None:
    """Start its supervisor, detached from this process and from its terminal."""
    if host.is_running:
        return
    machine.check_address(host.address, host.port)
    host.cgroup.kill()
    loop = cgroups.Cgroup(host.cgroup.path / "loop")
    host.cgroup.make()
    loop.make()
    with (host.disk / "log").open("w") as log:
        subprocess.run(
            loop.enter(["setsid", "--fork", *roots.supervise(host.disk / "job.json")]),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            check=True,
            env=roots.environment(),
            cwd="/",
        )


def _check(host: SandboxHost, deadline: float, what: str) -> None:
    """One step of waiting. Raises SandboxError when the host has ended, or the time is over."""
    why = "it ended" if not host.is_running else "time is over" if time.monotonic() > deadline else ""
    if why:
        raise SandboxError(
            f"{host.name} did not {what}: {why}; {host.disk / 'log'} ends with:{tail(host.disk / 'log')}"
        )
    time.sleep(POLL_SECONDS)


def _left(state: State) -> list[str]:
    """Names of all hosts of which anything is left: a folder, or a cgroup."""
    group = cgroups.top(state).path
    folders = [
        p for parent in (state.hosts, group) if parent.exists() for p in parent.iterdir() if p.is_dir()
    ]
    return sorted({p.name for p in folders if not p.name.startswith(".")})


def _remove(state: State, name: str) -> None:
    cgroups.of_host(state, name).kill()
    disk = state.hosts / name
    machine.unmount_below(disk)
    if (disk / "upper").exists():
        roots.keep_debs(state, disk / "upper")
    if disk.exists():
        shutil.rmtree(disk)


def _clean(state: State) -> None:
    """After the last host: half-made roots, known hosts, the cgroup above all hosts, the machine's raised limits."""
    cgroups.of_build(state).kill()
    for part in state.directory.glob("*.part"):
        machine.unmount_below(part)
        shutil.rmtree(part)
    state.known_hosts.unlink(missing_ok=True)
    cgroups.top(state).remove()
    machine.restore(state.inotify_before)


def _make_key(state: State) -> None:
    if not state.ssh_key.with_suffix(".pub").exists():
        state.ssh_key.unlink(missing_ok=True)
        _new_key(state.ssh_key, "sandbox")


def _new_key(file: Path, comment: str) -> tuple[str, str]:
    """A new ed25519 pair in `file` and `file`.pub; gives both texts."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(file)], check=True
    )
    return file.read_text(), file.with_name(f"{file.name}.pub").read_text()


def _write_known_hosts(state: State) -> None:
    """One line a host, see the format in sshd(8); a port other than 22 is written in brackets."""
    lines = []
    for host in listed():
        key = host.disk / "host_key.pub"
        if key.exists():
            name = host.address if host.port == machine.SSH_PORT else f"[{host.address}]:{host.port}"
            lines.append(f"{name} {' '.join(key.read_text().split()[:2])}\n")
    part = state.known_hosts.with_suffix(".part")
    part.write_text("".join(lines))
    part.rename(state.known_hosts)
