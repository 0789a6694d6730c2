"""Stage: on hosts of the group `gateway`, one address for the models of all hosts: HAProxy."""

from __future__ import annotations

from functools import partial

from pyinfra.api.deploy import deploy
from pyinfra.api.host import Host
from pyinfra.context import ctx_host

from llamafleet.build.packages import GATEWAY
from llamafleet.host import answers
from llamafleet.service.refusals import Refused
from tasks.lib import decision, gateways, lookups, operations, to_do
from tasks.lib.gateways import Wanted
from tasks.lib.groups import is_gateway


@deploy("Gateway")
def gateway() -> None:
    """Let the gateway know the servers of this run; of hosts that are not in it, it keeps what it knows."""
    host = ctx_host.get()
    now = decision.for_stage("gateway") if is_gateway(host) else None
    if now is None:
        return
    machine = now.desired.machine
    manager, network = machine.package_manager or "", lookups.network(now.desired.settings)
    try:
        there = gateways.read(host)
        first = gateways.wanted(host, there)
    except gateways.ERRORS as error:
        problems = error.problems if isinstance(error, gateways.GatewayError) else (str(error),)
        return decision.refuse(host, Refused(tuple(problems)))
    different = list(gateways.differences(first, there))
    for text in first.notes:
        host.log(text)
    to_do.say(host, "gateway", different)
    operations.install_helpers(
        name="Install llamafleet's helpers for the gateway",
        needed=bool(different) and now.changes.helpers and not decision.makes(host, "helpers"),
        arch=machine.os.arch, network=network,
    )  # fmt: skip
    operations.install_packages(
        name="Install HAProxy", manager=manager,
        needs={} if there.version else {GATEWAY.name: GATEWAY.to_json(manager)}, network=network,
    )  # fmt: skip
    gateways.put_in_service(name="Put the gateway in service", gateway=partial(_needed, host, there))
    operations.release_lock(name="Release the lock of the gateway's host", needed=bool(different))


def _needed(host: Host, there: answers.Gateway) -> Wanted | None:
    """The gateway as it is to be; None if it is so. Called when operations execute: by then a host may have failed."""
    now = gateways.wanted(host, there)
    return now if list(gateways.differences(now, there)) else None
