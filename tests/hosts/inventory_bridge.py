"""Read the hosts to check from the pyinfra inventory that was deployed.

`make_inventory` is what pyinfra's command line uses. It is not a public API, so only this module calls it.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import gevent.monkey
from pyinfra.api.host import Host
from pyinfra.api.inventory import Inventory
from pyinfra.api.state import State
from pyinfra.context import ctx_state

from llamafleet import causes
from llamafleet.settings.copies import PER_GPU
from llamafleet.settings.schema import Settings, SettingsError


class BridgeError(Exception):
    """The inventory cannot be used; the message names the file or host and what to do."""


@dataclass(frozen=True)
class Target:
    """A host of the inventory: testinfra's name for it, `spec`, and its settings."""

    name: str
    spec: str
    settings: Settings


def targets(inventory: str, limit: Sequence[str], folder: Path) -> list[Target]:
    """The hosts of an inventory file in its order; with `limit` only the hosts with these names or of these groups.

    Writes SSH configuration files for testinfra into `folder`. Raises `BridgeError`.
    """
    if not Path(inventory).is_file():
        raise BridgeError(f"--inventory {inventory}: there is no such file (looked in {Path.cwd()})")
    hosts = list(_limited(_read(inventory), limit))
    if not hosts:
        raise BridgeError(f"--inventory {inventory}: it names no host")
    return [Target(host.name, spec(host, folder), _settings(host)) for host in hosts]


def _read(inventory: str) -> Inventory:
    # Importing pyinfra's command line replaces sockets and threads of the whole process with gevent's: prevent it,
    # because the process runs other tests too.
    patch_all = gevent.monkey.patch_all
    gevent.monkey.patch_all = lambda: None
    try:
        from pyinfra_cli.inventory import make_inventory
    finally:
        gevent.monkey.patch_all = patch_all
    # `group_data` of the current folder, which is run, counts only if the inventory lies in that folder.
    folder = Path(inventory).resolve().parent
    try:
        with ctx_state.use(State()):
            return make_inventory(inventory, cwd="." if folder.is_relative_to(Path.cwd()) else str(folder))
    except Exception as error:  # an inventory is Python, and is run
        raise BridgeError(f"--inventory {inventory}: {causes.of_inventory(error, inventory)}") from error


def _limited(inventory: Inventory, limit: Sequence[str]) -> Iterator[Host]:
    """The hosts that pyinfra's --limit selects: a pattern is a group's name, else a host's name, which may have `*`."""
    groups = {group for host in inventory for group in host.groups}
    for pattern in limit:
        if pattern not in groups and not any(fnmatch(host.name, pattern) for host in inventory):
            known = ", ".join(sorted(groups | {host.name for host in inventory}))
            raise BridgeError(f"--limit {pattern}: no such group or host; known are {known}")
    for host in inventory:
        if not limit or any(_matches(host, pattern, pattern in groups) for pattern in limit):
            yield host


def _matches(host: Host, pattern: str, is_group: bool) -> bool:
    return pattern in host.groups if is_group else fnmatch(host.name, pattern)


def _settings(host: Host) -> Settings:
    try:
        return Settings.from_data(host.data.dict())
    except SettingsError as error:
        raise BridgeError(f"{host.name}: {error}") from error


def with_copies(settings: Settings, installed: Collection[str]) -> Settings:
    """The settings with an instance for each copy that is one for each GPU: as many as are installed, which its deploy
    knew; one where none is. `installed`: names of instances."""
    counts = {}
    for one in settings.models:
        if one.copies == PER_GPU:
            numbers = itertools.takewhile(lambda n: f"{one.name}-{n}" in installed, itertools.count(1))  # noqa: B023
            counts[one.name] = max(numbers, default=1)
    return settings.with_copies(counts)


def spec(host: Host, folder: Path) -> str:
    """testinfra's name for the host: `ssh://user@address:port?...` or `local://`. Raises BridgeError."""
    connector = host.connector_cls.__name__
    query = {}
    if host.data.get("_sudo"):
        query["sudo"] = "true"
    if host.data.get("_sudo_user"):
        query["sudo_user"] = host.data.get("_sudo_user")
    if connector == "LocalConnector":
        return f"local://{_query(query)}"
    if connector != "SSHConnector":
        raise BridgeError(f"{host.name}: {connector} has no systemd: only hosts by SSH and @local can be checked")
    if host.data.get("ssh_password"):
        raise BridgeError(
            f"{host.name}: ssh_password would be visible in the process list: use a key (ssh_key) or an agent"
        )
    # One SSH session a host needs no master process, which would stay in the background.
    query |= {"controlpersist": "0", "ssh_config": str(_ssh_config(host, folder))}
    if host.data.get("ssh_key"):
        query["ssh_identity_file"] = str(Path(host.data.get("ssh_key")).expanduser())
    return f"ssh://{_address(host)}{_query(query)}"


def _query(values: dict[str, str]) -> str:
    return "?" + urlencode(values) if values else ""


def _address(host: Host) -> str:
    address = str(host.data.get("ssh_hostname") or host.name.removeprefix("@ssh/"))
    if address.startswith("-"):
        raise BridgeError(f"{host.name}: an address cannot begin with a dash: {address}")
    address = f"[{address}]" if ":" in address else quote(address)
    user, port = host.data.get("ssh_user"), host.data.get("ssh_port")
    return (f"{quote(str(user))}@" if user else "") + address + (f":{port}" if port else "")


def _ssh_config(host: Host, folder: Path) -> Path:
    """The inventory's SSH settings as a configuration file. ssh takes the first value, so the user's own file comes last."""
    data: Any = host.data
    lines = ["Host *", "BatchMode yes", f"StrictHostKeyChecking {_strict(host)}"]
    # A host that is silent for a minute has failed.
    lines += ["ConnectTimeout 30", "ServerAliveInterval 15", "ServerAliveCountMax 4"]
    if data.get("ssh_known_hosts_file"):
        lines.append(f'UserKnownHostsFile "{Path(data.get("ssh_known_hosts_file")).expanduser()}"')
    if data.get("ssh_key"):
        lines.append("IdentitiesOnly yes")
    own = Path(data.get("ssh_config_file") or "~/.ssh/config").expanduser()
    lines.append(f'Include "{own.absolute()}"')
    path = folder / f"{quote(host.name, safe='')}.ssh_config"
    path.write_text("\n".join(lines) + "\n")
    return path


def _strict(host: Host) -> str:
    """The value of StrictHostKeyChecking: pyinfra also takes True and False, and its default is accept-new."""
    value = host.data.get("ssh_strict_host_key_checking")
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value or "accept-new")
