"""What a new host gets of its own: its keys, and the job file that its supervisor reads."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from sandbox import machine, roots
from sandbox.host import SandboxHost
from sandbox.state import State
from sandbox.supervisor import Job


def create(host: SandboxHost, lower: list[Path]) -> None:
    """Give a new host its keys, its job file and the package files downloaded before."""
    job = host.disk / "job.json"
    if job.exists():
        return
    for leftover in ("debs", "upper", "work"):
        shutil.rmtree(host.disk / leftover, ignore_errors=True)
    (host.disk / "configured").unlink(missing_ok=True)
    private, public = _new_key(host.disk / "host_key", host.name)
    allowed = host.ssh_key.with_suffix(".pub").read_text()
    homes = {"root": (0, 0), **{f"home/{name}": (uid, uid) for name, uid in roots.USERS.items()}}
    roots.offer_debs(host.state, host.disk / "debs")
    Job(
        lower=[str(host.disk / "debs"), *map(str, lower)],
        disk=str(host.disk),
        hostname=host.name,
        binds=list(host.binds),
        isolated=host.isolated,
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
        owners={path: owner for h, owner in homes.items() for path in (f"{h}/.ssh", f"{h}/.ssh/authorized_keys")},
    ).save(job.with_suffix(".part"))
    job.with_suffix(".part").rename(job)


def make_key(state: State) -> None:
    """The operator's pair: one for all hosts, made once."""
    if not state.ssh_key.with_suffix(".pub").exists():
        state.ssh_key.unlink(missing_ok=True)
        _new_key(state.ssh_key, "sandbox")


def write_known_hosts(state: State, hosts: Iterable[SandboxHost]) -> None:
    """One line a host, see the format in sshd(8); a port other than 22 is written in brackets."""
    lines = []
    for host in hosts:
        key = host.disk / "host_key.pub"
        if key.exists():
            name = host.address if host.port == machine.SSH_PORT else f"[{host.address}]:{host.port}"
            lines.append(f"{name} {' '.join(key.read_text().split()[:2])}\n")
    part = state.known_hosts.with_suffix(".part")
    part.write_text("".join(lines))
    part.rename(state.known_hosts)


def _new_key(file: Path, comment: str) -> tuple[str, str]:
    """A new ed25519 pair in `file` and `file`.pub; gives both texts."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(file)], check=True)
    return file.read_text(), file.with_name(f"{file.name}.pub").read_text()
