"""The units before a server that starts on demand: a socket, and the service that hands its connections on.

Decision 22: docs/decisions/0022-a-server-starts-when-it-is-asked.md.
"""

from __future__ import annotations

from llamafleet.host.installed import Installed
from llamafleet.remote.common import TLS_CERTIFICATE, TLS_KEY, demand_units, helper, server_socket
from llamafleet.service.command import unit_escape
from llamafleet.service.record import credentials
from llamafleet.service.refusals import Refused
from llamafleet.service.unit import Renderer, address_from_host, clients, families, path_of, systemd
from llamafleet.settings.schema import DEMAND, Instance, Settings

# systemd-socket-proxyd has --exit-idle-time since then.
SINCE = 246


def demand_texts(render: Renderer, instance: Instance, settings: Settings, helpers: str) -> dict[str, str]:
    """The units by name; empty for a server that starts with the host. `helpers` is the version of our programs that
    they call."""
    if instance.start != DEMAND:
        return {}
    words = (helper("forward.py", helpers), server_socket(instance.name), str(instance.idle_seconds))
    found = credentials(instance)
    values = {
        "instance": instance,
        "socket": demand_units(instance.name)[0],
        "address": listen_stream(instance).replace("%", "%%"),
        "clients": clients(instance),
        "python": path_of(settings.python),
        "command": [unit_escape(word) for word in words],
        "credentials": {name: found[name] for name in (TLS_CERTIFICATE, TLS_KEY) if name in found},
        "family": families(instance.listen, gpu=False)[0],
        "own_address": address_from_host(instance.listen),
    }
    templates = ("llamafleet-demand.socket.j2", "llamafleet-demand.service.j2")
    return {name: render(template, values)
            for name, template in zip(demand_units(instance.name), templates, strict=True)}  # fmt: skip


def listen_stream(instance: Instance) -> str:
    """The address as systemd.socket(5) has it: an interface stands behind the port."""
    address, _, interface = instance.listen.partition("%")
    host = f"[{address}]" if ":" in address else address
    return f"{host}:{instance.port}{f'%{interface}' if interface else ''}"


def too_old(instance: Instance, installed: Installed) -> Refused | None:
    """Whether the host's systemd cannot stop a server that nobody uses."""
    if instance.start != DEMAND or systemd(installed) >= SINCE:
        return None
    return Refused.because(
        f'models: {instance.name}: start = "{DEMAND}" needs systemd {SINCE} or later, the host has '
        f"{systemd(installed) or 'an unknown one'}: leave start out there, or set sleep_idle_seconds, which frees the "
        "model's memory too"
    )
