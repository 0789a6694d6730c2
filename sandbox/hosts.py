"""Disposable hosts, for Python: `up`, `down`, `listed`, `get`, `prepare`; what one host can do is in host.py.

    hosts = up(2, packages=["nginx"], binds=["/srv/models:/srv/models:ro"])
    hosts[0].run(["systemctl", "is-system-running"]).stdout
    hosts[0].kill()     # the power cut
    hosts[0].start()    # the same disk again
    down([h.name for h in hosts])

Each host is Debian 13, or 12 where that is asked for, with its own systemd, disk, host name, SSH host key and
address 127.0.1.N. Network, clock, /proc/meminfo and kernel are the machine's own: a service in one host must
not bind 127.0.0.1 or 0.0.0.0, or it meets its neighbour's. A power cut loses no written data: the machine's
page cache lives on.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from sandbox import cgroups, machine, roots
from sandbox.create import create, make_key, write_known_hosts
from sandbox.host import SandboxHost, cut_off, launch, load, save
from sandbox.state import SandboxError, State, current, say

__all__ = ["SandboxError", "SandboxHost", "down", "get", "listed", "prepare", "up"]

PREFIX = "sandbox"
LAST_ADDRESS = 254


def prepare() -> None:
    """Install what this machine lacks (as root, with apt-get) and make the root. Raises SandboxError."""
    installed = machine.install_missing()
    say(f"installed: {', '.join(installed) or 'nothing was missing'}")
    machine.check()
    state = current()
    with state.locked():
        say(f"the root is {roots.base_root(state)}")


def up(
    n: int,
    *,
    packages: Iterable[str] = (),
    binds: Iterable[str] = (),
    prefix: str = PREFIX,
    first_address: int = 1,
    suite: str = roots.SUITE,
    isolated: bool = False,
) -> list[SandboxHost]:
    """Hosts PREFIX1 to PREFIXn, all booted; those that run already stay as they are.

    `packages` are installed beforehand, once for all hosts that want the same. `binds` are SRC:DST or
    SRC:DST:ro. Host I gets 127.0.1.I, counted from `first_address`, or the next one that no host here has. `suite` is
    the release of Debian by its code name. `isolated`: they have no network, and this process lets SSH in while it
    lives. Raises SandboxError.
    """
    machine.check()
    machine.check_binds(binds := tuple(binds))
    state = current()
    with state.locked():
        lower = roots.ensure(state, list(packages := tuple(sorted(set(packages)))), suite)
        make_key(state)
        wanted = {f"{prefix}{i}": first_address + i - 1 for i in range(1, n + 1)}
        hosts = _described(state, wanted, packages, binds, suite, isolated)
        for host in hosts:
            save(host)
            create(host, lower)
        machine.allow_hosts(len(listed()), state.inotify_before)
        write_known_hosts(state, listed())
        for host in hosts:
            launch(host)
    with ThreadPoolExecutor(max_workers=16) as pool:
        for host, word in zip(hosts, pool.map(SandboxHost.wait, hosts), strict=True):
            if word != "running":
                failed = host.run(["systemctl", "--failed", "--plain", "--no-legend"]).stdout
                say(f"{host.name} is {word}: {failed.strip() or 'no failed unit'}")
    return hosts


def down(names: Iterable[str] | None = None) -> list[str]:
    """Remove these hosts, or all and whatever a crash left: processes, cgroups, disks. Gives the names.

    Roots, layers and downloaded packages stay for the next `up`. Raises SandboxError for an unknown name.
    """
    machine.check_root()
    state = current()
    with state.locked():
        left = _left(state)
        wanted = left if names is None else list(names)
        if unknown := sorted(set(wanted) - set(left)):
            raise SandboxError(f"no host is named {', '.join(unknown)}; there are: {', '.join(left) or 'none'}")
        if names is None:
            cgroups.of_build(state).kill()
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda name: _remove(state, name), wanted))
        if not _left(state):
            _clean(state)
        else:
            write_known_hosts(state, listed())
    return wanted


def listed() -> list[SandboxHost]:
    """All hosts of this checkout, running or off, in the order of their addresses."""
    state = current()
    files = [folder / "spec.json" for folder in state.hosts.iterdir()] if state.hosts.exists() else []
    try:
        found = [load(state, file) for file in files if file.exists()]
    except PermissionError as error:
        raise SandboxError(f"{error.filename} belongs to root: only root sees sandbox hosts") from error
    return sorted(found, key=lambda host: host.number)


def get(name: str) -> SandboxHost:
    """Raises SandboxError for an unknown name."""
    hosts = {host.name: host for host in listed()}
    if name not in hosts:
        raise SandboxError(f"no host is named {name}; there are: {', '.join(hosts) or 'none'}")
    return hosts[name]


def _described(
    state: State,
    wanted: dict[str, int],
    packages: tuple[str, ...],
    binds: tuple[str, ...],
    suite: str,
    isolated: bool,
) -> list[SandboxHost]:
    """The hosts as they are, or as they will be, by name and preferred address; nothing is written yet.

    Raises SandboxError when one is there but lacks what is asked, or when an address is not to be had.
    """
    known = {host.name: host for host in listed()}
    taken = {host.number for host in known.values()}
    port = machine.ssh_port()
    found = []
    for name, first in wanted.items():
        if name in known:
            _check_same(known[name], packages, binds, suite)
            found.append(known[name])
            continue
        number = next((i for i in range(first, LAST_ADDRESS + 1) if i not in taken), None)
        if number is None:
            raise SandboxError(f"no address is left for {name} between 127.0.1.{first} and 127.0.1.{LAST_ADDRESS}")
        host = SandboxHost(name, number, port, packages, binds, state, suite, isolated)
        machine.check_address(host.address, host.port)
        taken.add(number)
        found.append(host)
    return found


def _check_same(host: SandboxHost, packages: tuple[str, ...], binds: tuple[str, ...], suite: str) -> None:
    lacks = sorted({*packages, *binds, suite} - {*host.packages, *host.binds, host.suite})
    if lacks:
        raise SandboxError(
            f"{host.name} is there already, without {', '.join(lacks)}; "
            f"remove it first: python -m sandbox down {host.name}"
        )


def _left(state: State) -> list[str]:
    """Names of all hosts of which anything is left: a folder, or a cgroup."""
    group = cgroups.top(state).path
    folders = [p for parent in (state.hosts, group) if parent.exists() for p in parent.iterdir() if p.is_dir()]
    return sorted({p.name for p in folders if not p.name.startswith(".")})


def _remove(state: State, name: str) -> None:
    cgroups.of_host(state, name).kill()
    cut_off(name)
    disk = state.hosts / name
    machine.unmount_below(disk)
    if (disk / "upper").exists():
        roots.keep_debs(state, disk / "upper")
    if disk.exists():
        shutil.rmtree(disk)


def _clean(state: State) -> None:
    """After the last host: half-made roots, known hosts, the common cgroup, the raised limit."""
    cgroups.of_build(state).kill()
    for part in state.directory.glob("*.part"):
        machine.unmount_below(part)
        shutil.rmtree(part)
    state.known_hosts.unlink(missing_ok=True)
    cgroups.top(state).remove()
    machine.restore(state.inotify_before)
