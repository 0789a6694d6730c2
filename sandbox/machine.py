"""Requirements of the machine on which hosts run; each error says what is missing and what to do."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterable
from pathlib import Path

from sandbox.state import SandboxError

SSH_PORT = 22
SSH_PORT_BESIDE_THE_MACHINES_OWN = 2222
TOOLS = {
    "mmdebstrap": "mmdebstrap",
    "systemd-nspawn": "systemd-container",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "unshare": "util-linux",
    "setsid": "util-linux",
    "mount": "mount",
}
LISTENING = "0A"  # state column of /proc/net/tcp
INOTIFY = Path("/proc/sys/fs/inotify/max_user_instances")
INOTIFY_A_HOST = 12  # instances; a new host uses 6, and the kernel counts root of all hosts as one user


def check() -> None:
    """Check that hosts can run on this machine. Raises SandboxError."""
    check_root()
    if packages := missing():
        raise SandboxError(
            f"{', '.join(sorted(t for t, p in TOOLS.items() if p in packages and not shutil.which(t)))} "
            f"not found. Install: apt-get install {' '.join(packages)} (or: python -m sandbox prepare)"
        )
    trial = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "mount", "-t", "tmpfs", "tmpfs", "/mnt"],
        capture_output=True,
        text=True,
        check=False,
    )
    if trial.returncode:
        raise SandboxError(
            f"root cannot create mounts and namespaces on this machine ({trial.stderr.strip()}), so "
            "systemd-nspawn cannot run; in a container this means --privileged"
        )


def check_root() -> None:
    if os.geteuid() != 0:
        raise SandboxError(f"hosts need root (for mounts and namespaces), but this is user {os.geteuid()}: use sudo")


def missing() -> list[str]:
    """The Debian packages of the tools that are missing on this machine."""
    return sorted({package for tool, package in TOOLS.items() if not shutil.which(tool)})


def install_missing() -> list[str]:
    """Install the missing packages with apt-get and return them. Raises SandboxError if there is no apt-get."""
    check_root()
    packages = missing()
    if packages:
        if not shutil.which("apt-get"):
            raise SandboxError(f"{' '.join(packages)} must be installed, but this machine has no apt-get")
        subprocess.run(["apt-get", "-qq", "update"], check=True)
        subprocess.run(
            ["apt-get", "-qqy", "install", "--no-install-recommends", *packages],
            check=True,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        )
    return packages


def check_binds(binds: Iterable[str]) -> None:
    """Check that each is SRC:DST or SRC:DST:ro, with an existing SRC and an absolute DST. Raises SandboxError."""
    for bind in binds:
        parts = bind.removesuffix(":ro").split(":")
        if len(parts) != 2 or not parts[1].startswith("/"):
            raise SandboxError(f"--bind {bind}: should be SRC:DST or SRC:DST:ro, DST an absolute path, no other colons")
        if not Path(parts[0]).is_absolute() or not Path(parts[0]).exists():
            raise SandboxError(f"--bind {bind}: {parts[0]} should be an existing absolute path on this machine")


def ssh_port() -> int:
    """The hosts' SSH port: 22, or 2222 if this machine's sshd listens on port 22 of all addresses."""
    return SSH_PORT_BESIDE_THE_MACHINES_OWN if SSH_PORT in _listening_everywhere() else SSH_PORT


def check_address(address: str, port: int) -> None:
    """Check that no process listens on this address and port. Raises SandboxError."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignore closed connections of an earlier host
        try:
            probe.bind((address, port))
            probe.listen(1)
        except OSError as error:
            raise SandboxError(
                f"{address} port {port} is taken ({error.strerror}), perhaps by the sandbox of another "
                "checkout: remove that (python -m sandbox down, run there), or choose other addresses "
                "with --first-address"
            ) from error


def allow_hosts(count: int, before: Path) -> None:
    """Raise the limit on inotify instances (the usual 128 are enough for ten hosts); `before` stores the old value."""
    limit = int(INOTIFY.read_text())
    wanted = 128 + count * INOTIFY_A_HOST
    if limit < wanted:
        if not before.exists():
            before.write_text(str(limit))
        INOTIFY.write_text(str(wanted))


def restore(before: Path) -> None:
    """Undo `allow_hosts`."""
    if before.exists():
        INOTIFY.write_text(before.read_text())
        before.unlink()


def unmount_below(folder: Path) -> None:
    """Detach all mounts under a folder, so that deleting the folder deletes no mounted files.

    Hosts have private mount namespaces: a mount here was made by hand.
    """
    mounted = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for place in reversed([m for m in mounted if Path(m.replace("\\040", " ")).is_relative_to(folder)]):
        subprocess.run(["umount", "--lazy", place.replace("\\040", " ")], check=True)


def _listening_everywhere() -> set[int]:
    """TCP ports with a listener on 0.0.0.0 or ::, see proc_net_tcp(5)."""
    ports = set()
    for file in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in file.read_text().splitlines()[1:] if file.exists() else ():
            _, local, _, state, *_ = line.split()
            address, port = local.split(":")
            if state == LISTENING and not address.strip("0"):
                ports.add(int(port, 16))
    return ports
