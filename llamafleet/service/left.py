"""What a run leaves for people to do on a host, as sentences: the firewall, a reboot, a certificate that ends soon, and
a disk that will not hold the next model."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

from llamafleet.host.left import Left
from llamafleet.service import disks
from llamafleet.service.desired import Desired
from llamafleet.settings.schema import Instance, Settings


def open_ports(settings: Settings) -> set[int]:
    """The ports that other machines are to reach."""
    return {one.port for one in settings.models if is_open(one)}


def is_open(instance: Instance) -> bool:
    """Whether other machines are to reach the instance."""
    return not ipaddress.ip_address(instance.listen).is_loopback


def sentences(desired: Desired, left: Left, certificates: dict[str, str]) -> Iterator[str]:
    """What is left to do, by what the host says now. `certificates`: by instance name what is to be done about its TLS
    certificate."""
    if left.reboot:
        yield f"reboot the host: {left.reboot}"
    for instance in desired.settings.models:
        why = left.closed.get(str(instance.port)) if is_open(instance) else None
        if why:
            yield f"open the firewall for {instance.name}: {why}"
        if instance.name in certificates:
            yield certificates[instance.name]
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
