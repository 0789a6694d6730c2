"""What a run leaves for people to do on a host, as sentences: the firewall, a reboot, a certificate that ends soon, and
a disk that will not hold the next model."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

from llamafleet.host.left import Left
from llamafleet.service import disks
from llamafleet.service.desired import Desired
from llamafleet.settings.schema import Settings


def open_ports(settings: Settings, *, is_gateway: bool, is_watched: bool) -> dict[int, str]:
    """The ports of this host that other machines are to reach, and what is there. `is_gateway`: it is one;
    `is_watched`: another host monitors it."""
    found = {}
    if is_gateway and is_open(settings.gateway_listen):
        found[settings.gateway_port] = "the gateway"
    if is_watched and is_open(settings.metrics_listen):
        found[settings.metrics_port] = "the monitoring"
    return found | {one.port: one.name for one in settings.models if is_open(one.listen)}


def is_open(listen: str | None) -> bool:
    """Whether other machines are to reach who listens there; None is an address of the host."""
    return listen is None or not ipaddress.ip_address(listen).is_loopback


def sentences(desired: Desired, left: Left, certificates: dict[str, str]) -> Iterator[str]:
    """What is left to do, by what the host says now. `certificates`: by instance name what is to be done about its TLS
    certificate."""
    if left.reboot:
        yield f"reboot the host: {left.reboot}"
    for port, name in open_ports(desired.settings, is_gateway=True, is_watched=True).items():
        if why := left.closed.get(str(port)):  # of what the host has: no other port is asked about
            yield f"open the firewall for {name}: {why}"
    yield from (certificates[one.name] for one in desired.settings.models if one.name in certificates)
    yield from _next_model(desired, left)


def _next_model(desired: Desired, left: Left) -> Iterator[str]:
    """Where the disk of the models does not hold another one like the largest of this host: at an update both are there
    for a time."""
    space = left.spaces.get(disks.models_path(desired.settings))
    sizes = {folder: sum(file.size_bytes or 0 for file in one.files) for folder, one in disks.models(desired).items()}
    largest = max(sizes.values(), default=0)
    if space is None or not largest or space.free_bytes >= largest + disks.MODEL_RESERVE_BYTES:
        return
    old = ", ".join(f"{path} ({disks.gib(size)})" for path, size in disks.unused(desired))
    way_out = f"remove what no instance uses: {old}" if old else "name a larger disk in models_dir"
    free = f"{disks.gib(space.free_bytes)} are free at {disks.models_path(desired.settings)}"
    yield f"make room for the next model: {free}, the largest model of this host has {disks.gib(largest)}: {way_out}"
