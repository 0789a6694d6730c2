"""One disposable host: how it is reached, started, rebooted and killed."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from sandbox import cgroups, machine, relay, roots
from sandbox.state import SandboxError, State, tail

BOOT_SECONDS = 120  # thirty at once on two slow cores; one alone takes a second
POLL_SECONDS = 0.05
# The environment of root's sessions.
SESSION = ("HOME=/root", "USER=root", "LOGNAME=root", "SHELL=/bin/bash", "LANG=C.UTF-8",
           "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")  # fmt: skip


@dataclass(frozen=True)
class SandboxHost:
    """One disposable host, running or off."""

    name: str
    number: int  # of its address
    port: int  # of its sshd
    packages: tuple[str, ...]
    binds: tuple[str, ...]
    state: State
    suite: str = roots.SUITE  # the release of Debian
    isolated: bool = False  # without a network; its SSH is reached through this process

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
        """Run a command in it; exit code 255 where it is off. Arguments arrive as given, unread by a shell.

        For root without SSH, whose handshake and session take 0.16 CPU seconds; for another user by SSH.
        """
        command = [*self._enter(), *argv] if user == "root" else [*self.ssh(user), "--", shlex.join(argv)]
        return subprocess.run(command, input=input, capture_output=True, text=True, timeout=timeout, check=check)

    def _enter(self) -> list[str]:
        """Words before a command that run it in the namespaces of its process 1, as a session of root would be."""
        pid = self.pid
        if pid is None:
            return ["sh", "-c", 'echo "the host is off" >&2; exit 255']
        namespaces = [f"--{one}" for one in ("mount", "uts", "ipc", "net", "pid", "cgroup", "root")]
        session = ["env", "--chdir=/root", "-i", *SESSION]
        return self._loop.enter(["nsenter", f"--target={pid}", *namespaces, *session])

    @property
    def _loop(self) -> cgroups.Cgroup:
        """Of what runs in the host without its systemd: its supervisor, and commands from outside."""
        return cgroups.Cgroup(self.cgroup.path / "loop")

    def kill(self) -> None:
        """The power cut: SIGKILL to everything in it. The disk stays."""
        self.cgroup.kill()

    def start(self) -> None:
        """Boot it (again) and wait until systemd says that it is up; nothing happens if it is already.

        Raises SandboxError with the end of its console when it does not come up.
        """
        with self.state.locked():
            launch(self)
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
        """Wait until it has booted; gives systemd's word for it: `running`, or `degraded` (a unit failed)."""
        deadline = time.monotonic() + BOOT_SECONDS
        while True:
            with suppress(OSError), socket.create_connection((self.address, self.port), timeout=1) as probe:
                if probe.recv(4) == b"SSH-":
                    break
            _check(self, deadline, f"answer on {self.address} port {self.port}")
        up = [*self.ssh(), "--", "systemctl is-system-running --wait"]
        while not (result := subprocess.run(up, stdin=subprocess.DEVNULL, capture_output=True, text=True)).stdout:
            _check(self, deadline, f"let root in by SSH ({result.stderr.strip()})")
        return result.stdout.strip()


_relays: dict[str, relay.Relay] = {}  # by the host's name, of hosts without a network


def cut_off(name: str) -> None:
    """End the way to a host without a network."""
    if name in _relays:
        _relays.pop(name).close()


def _let_ssh_in(host: SandboxHost) -> None:
    """Carry connections to the host's address into its network, as soon as it has one."""
    deadline = time.monotonic() + BOOT_SECONDS
    while host.pid is None:
        _check(host, deadline, "start")
    inside = relay.End(host.address, host.port, f"/proc/{host.pid}/ns/net")
    _relays[host.name] = relay.Relay(relay.End(host.address, host.port), inside)


def launch(host: SandboxHost) -> None:
    """Start its supervisor, detached from this process and from its terminal.

    Raises SandboxError with what the machine said where it cannot be started.
    """
    if host.is_running:
        return
    cut_off(host.name)
    machine.check_address(host.address, host.port)
    host.cgroup.kill()
    host.cgroup.make()
    host._loop.make()
    with (host.disk / "log").open("w") as log:
        started = subprocess.run(
            host._loop.enter(["setsid", "--fork", *roots.supervise(host.disk / "job.json")]),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            check=False,
            env=roots.environment(),
            cwd="/",
        )
    if started.returncode:
        raise SandboxError(f"{host.name} cannot be started; {host.disk / 'log'} ends with:{tail(host.disk / 'log')}")
    if host.isolated:
        _let_ssh_in(host)


def load(state: State, file: Path) -> SandboxHost:
    """Read what `save` wrote."""
    spec = json.loads(file.read_text())
    return SandboxHost(spec["name"], spec["number"], spec["port"], tuple(spec["packages"]), tuple(spec["binds"]), state,
                       spec.get("suite", roots.SUITE), spec.get("isolated", False))  # fmt: skip


def save(host: SandboxHost) -> None:
    """Write the host down, in one step; from now on it is listed."""
    host.disk.mkdir(parents=True, mode=0o700, exist_ok=True)
    spec = {key: value for key, value in asdict(host).items() if key != "state"}
    (host.disk / "spec.part").write_text(json.dumps(spec))
    (host.disk / "spec.part").rename(host.disk / "spec.json")


def _check(host: SandboxHost, deadline: float, what: str) -> None:
    """One step of waiting. Raises SandboxError when the host has ended, or the time is over."""
    why = "it ended" if not host.is_running else "time is over" if time.monotonic() > deadline else ""
    if why:
        raise SandboxError(
            f"{host.name} did not {what}: {why}; {host.disk / 'log'} ends with:{tail(host.disk / 'log')}"
        )
    time.sleep(POLL_SECONDS)
