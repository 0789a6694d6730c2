"""What this machine must have before hosts run on it; every refusal says what is missing and what to do."""

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
INOTIFY_A_HOST = 12  # instances; a fresh host has 6, and to the kernel the root of all hosts is one user


def check() -> None:
    """Raises SandboxError when hosts cannot run here."""
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
            f"this machine lets root make no mounts and namespaces ({trial.stderr.strip()}), so "
            "systemd-nspawn cannot run; in a container this means --privileged"
        )


def check_root() -> None:
    if os.geteuid() != 0:
        raise SandboxError(f"hosts need root (mounts, namespaces), and this is user {os.geteuid()}: run it with sudo")


def missing() -> list[str]:
    """Debian packages that hold the tools not found here."""
    return sorted({package for tool, package in TOOLS.items() if not shutil.which(tool)})


def install_missing() -> list[str]:
    """Install them with apt-get. Raises SandboxError where that is not possible."""
    check_root()
    packages = missing()
    if packages:
        if not shutil.which("apt-get"):
            raise SandboxError(f"{' '.join(packages)} must be installed, and this machine has no apt-get")
        subprocess.run(["apt-get", "-qq", "update"], check=True)
        subprocess.run(
            ["apt-get", "-qqy", "install", "--no-install-recommends", *packages],
            check=True,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        )
    return packages


def check_binds(binds: Iterable[str]) -> None:
    """Raises SandboxError unless each is SRC:DST or SRC:DST:ro, with an existing SRC and an absolute DST."""
    for bind in binds:
        parts = bind.removesuffix(":ro").split(":")
        if len(parts) != 2 or not parts[1].startswith("/"):
            raise SandboxError(f"--bind {bind}: should be SRC:DST or SRC:DST:ro, DST an absolute path, no other colons")
        if not Path(parts[0]).is_absolute() or not Path(parts[0]).exists():
            raise SandboxError(f"--bind {bind}: {parts[0]} should be an existing absolute path on this machine")


def ssh_port() -> int:
    """22, or 2222 where this machine's own sshd listens on port 22 of all addresses."""
    return SSH_PORT_BESIDE_THE_MACHINES_OWN if SSH_PORT in _listening_everywhere() else SSH_PORT


def check_address(address: str, port: int) -> None:
    """Raises SandboxError when somebody listens there already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # closed connections of a host before do not count
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
    """Raise the limit on inotify instances: the usual 128 do for ten hosts. `before` keeps the old value."""
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
    """Detach mounts under a folder before it is deleted, lest what is mounted there be deleted with it.

    Hosts keep their mounts to themselves, so there are none unless somebody made one by hand.
    """
    mounted = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for place in reversed([m for m in mounted if Path(m.replace("\\040", " ")).is_relative_to(folder)]):
        subprocess.run(["umount", "--lazy", place.replace("\\040", " ")], check=True)


def _listening_everywhere() -> set[int]:
    """Ports with a listener on 0.0.0.0 or ::, see proc_net_tcp(5)."""
    ports = set()
    for file in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in file.read_text().splitlines()[1:] if file.exists() else ():
            _, local, _, state, *_ = line.split()
            address, port = local.split(":")
            if state == LISTENING and not address.strip("0"):
                ports.add(int(port, 16))
    return ports
