"""The groups of an inventory that have a meaning here."""

from pyinfra.api.host import Host

GATEWAY = "gateway"  # these have one address for the models of all hosts
MONITORING = "monitoring"  # these have Prometheus, which sees all hosts


def is_gateway(host: Host) -> bool:
    """Whether the host is a gateway."""
    return GATEWAY in host.groups


def is_monitor(host: Host) -> bool:
    """Whether the host monitors the others."""
    return MONITORING in host.groups
