"""Taking a host's servers out of the fleet's gateways while they are replaced.

The gateways are the hosts of the inventory's group `gateway`, whether a run has them or not, and are asked by
gateway_admin.py there. A drain is lent for LEASE_SECONDS and lengthened while the switch goes on, so that it ends by
itself where this run is killed; the next rollout ends what is left of it. A drain that somebody else lent for longer
is left alone. Without a gateway nothing is done here: the switch itself waits for running replies.

Decision 12: docs/decisions/0012-a-fleet-moves-in-waves.md.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import gevent
from gevent.lock import RLock
from pyinfra import logger
from pyinfra.api.exceptions import ConnectError
from pyinfra.api.host import Host
from pyinfra.api.state import State

from llamafleet.host import answers
from llamafleet.host.answers import GatewayServer
from tasks.lib import remote
from tasks.lib.groups import is_gateway

LEASE_SECONDS, REFRESH_SECONDS = 120, 40
# For another server of the model to be up before one is taken out, and for a server to be up after its switch.
LAST_SECONDS, UP_SECONDS, LOOK_SECONDS = 120.0, 90.0, 1.0
# What gateway_admin.py says where no other server of a model would be up, and where HAProxy does not run.
LAST, SILENT = "is the last server of", "the gateway does not answer"

_connecting: dict[Host, RLock] = {}


class _SilentError(remote.RemoteError):
    """The host has no gateway that runs: nothing comes through it."""


class _LastError(remote.RemoteError):
    """No other server of the model is up."""


def of(state: State) -> list[Host]:
    """The hosts of the inventory that have a gateway."""
    return [host for host in state.inventory if is_gateway(host)]


@contextlib.contextmanager
def drained(host: Host, names: Iterable[str], strict: bool, even_last: bool, back: bool = True) -> Iterator[None]:
    """A block in which no gateway sends requests to these instances of the host, and, without `back`, some time after
    it. `even_last`: also where no other server of a model is up. `strict`: raises `RemoteError` where a gateway cannot
    be asked, or has no other server up in time; else that is logged."""
    servers, lent = [f"{host.name}/{name}" for name in names], dict[Host, list[str]]()
    gateways = of(host.state) if servers else []
    keeping = gevent.spawn(_keep, lent)
    try:
        for gateway in gateways:
            with _told_or_raised(host, gateway, strict):
                known = _ours(servers, _show(gateway))
                if known:
                    _drain(host, gateway, known, strict, even_last)
                    lent[gateway] = known
        yield
    finally:
        keeping.kill()
        for gateway, known in lent.items() if back else ():
            with _told_or_raised(host, gateway, strict=False):
                _ask(gateway, "undrain", *known)


def _ours(servers: Iterable[str], there: Mapping[str, GatewayServer]) -> list[str]:
    """Of these servers those that the gateway has, and that nobody else has taken out for longer."""
    return [name for name in servers if name in there and not _is_others(there[name])]


def _is_others(server: GatewayServer) -> bool:
    return (
        server.drained and not 0 <= (-1 if server.drained_seconds is None else server.drained_seconds) <= LEASE_SECONDS
    )


@contextlib.contextmanager
def _told_or_raised(host: Host, gateway: Host, strict: bool) -> Iterator[None]:
    try:
        yield
    except _SilentError as error:
        host.log(f"nothing is drained at {gateway.name}: {error}")
    except (remote.RemoteError, ConnectError) as error:
        if strict:
            raise remote.RemoteError(f"the gateway of {gateway.name}: {error}") from error
        host.log(f"the gateway of {gateway.name} does not know of this switch: {error}", logger.warning)


def _drain(host: Host, gateway: Host, servers: Sequence[str], strict: bool, even_last: bool) -> None:
    """Raises `RemoteError`."""
    deadline, said = time.monotonic() + LAST_SECONDS, False
    while not even_last:
        try:
            _lend(gateway, servers)
            return
        except _LastError:
            if time.monotonic() > deadline:
                if strict:
                    raise
                even_last = True
        if not said:
            host.log(f"waiting until the gateway of {gateway.name} has another server up")
            said = True
        gevent.sleep(LOOK_SECONDS)
    _lend(gateway, servers, "--even-last")


def _lend(gateway: Host, servers: Sequence[str], *options: str) -> None:
    """Raises `RemoteError` and ConnectError."""
    _ask(gateway, "drain", "--seconds", str(LEASE_SECONDS), *options, *servers)


def _keep(lent: Mapping[Host, Sequence[str]]) -> None:
    """Lengthen what is lent, until this greenlet is ended."""
    while True:
        gevent.sleep(REFRESH_SECONDS)
        for gateway, servers in list(lent.items()):
            try:
                _lend(gateway, servers, "--even-last")
            except (remote.RemoteError, ConnectError) as error:  # the gateway's own checks tell that a server is away
                logger.debug(f"{gateway.print_prefix}the drain was not lengthened: {error}")


# --- before and after a wave ------------------------------------------------------------------------


def put_back(state: State, hosts: Collection[str]) -> None:
    """End the drains of these hosts' servers that a rollout which was killed has left."""
    for gateway in of(state):
        try:
            there = _show(gateway)
            left = [name for name in _ours(there, there) if _host_of(name) in hosts and there[name].drained]
            if left:
                _ask(gateway, "undrain", *left)
                gateway.log(f"put back what an earlier run has drained: {', '.join(left)}")
        except (remote.RemoteError, ConnectError) as error:
            logger.debug(f"{gateway.print_prefix}{error}")


def not_up(state: State, hosts: Collection[str]) -> dict[str, str]:
    """Wait until the gateways find all servers of these hosts up. By host, a sentence for one that is not in time."""
    deadline, found = time.monotonic() + UP_SECONDS, dict[str, str]()
    for gateway in of(state):
        while missing := _missing(gateway, hosts):
            if time.monotonic() > deadline:
                found |= missing
                break
            gevent.sleep(LOOK_SECONDS)
    return found


def _missing(gateway: Host, hosts: Collection[str]) -> dict[str, str]:
    try:
        there = _show(gateway)
    except (remote.RemoteError, ConnectError) as error:
        logger.debug(f"{gateway.print_prefix}{error}")
        return {}
    waits = (name for name, one in there.items()
             if _host_of(name) in hosts and not one.up and name in _ours([name], there))  # fmt: skip
    return {_host_of(name): f"the gateway of {gateway.name} does not find {name} up: "
                            f"{there[name].check or 'it was not checked yet'}" for name in waits}  # fmt: skip


def _host_of(server: str) -> str:
    return server.rpartition("/")[0]


# --- asking a gateway -------------------------------------------------------------------------------


def _show(gateway: Host) -> Mapping[str, GatewayServer]:
    return _ask(gateway, "show")


def _ask(gateway: Host, *words: str) -> Mapping[str, GatewayServer]:
    """The servers that gateway_admin.py tells of. Raises `RemoteError` and ConnectError."""
    _connect(gateway)
    ok, out, err = remote.run(gateway, remote.program("gateway_admin.py", *words))
    if ok and out:
        return remote.last(out, answers.gateway_servers)
    text = remote.explain(out, err)
    missing = "can't open file" in text  # no gateway was deployed there yet
    kind = _SilentError if missing or SILENT in text else _LastError if LAST in text else remote.RemoteError
    raise kind("it has no gateway yet" if missing else text.removeprefix("error: "))


def _connect(gateway: Host) -> None:
    """A gateway may be outside of the run."""
    with _connecting.setdefault(gateway, RLock()):
        if not gateway.connected:
            gateway.connect(reason="to drain", show_errors=False, raise_exceptions=True)


def disconnect(state: State) -> None:
    """End the connections to gateways outside of the run; pyinfra ends the others."""
    for gateway in of(state):
        if gateway.connected and gateway not in state.activated_hosts:
            with contextlib.suppress(*remote.BROKEN):
                gateway.disconnect()
