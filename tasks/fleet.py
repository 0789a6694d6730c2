"""The hosts of an inventory, outside a run of pyinfra: for `llamafleet plan --inventory`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import gevent
from pyinfra.api.config import Config
from pyinfra.api.connect import connect_all, disconnect_all
from pyinfra.api.host import Host
from pyinfra.api.state import State, StateStage
from pyinfra.context import ctx_config, ctx_host, ctx_inventory, ctx_state
from pyinfra_cli.inventory import make_inventory

from llamafleet.plan import Plan, Refusal
from tasks.situation import EXPECTED, examine

T = TypeVar("T")


def plans(inventory: Path, limit: str | None = None) -> dict[str, dict[str, Plan | Refusal] | str]:
    """Reads every host of the inventory and plans its models: by host name the answers by instance,
    or the sentence why the host could not be read. Changes nothing.
    """
    return over_hosts(inventory, limit, _answers)


def _answers(host: Host) -> dict[str, Plan | Refusal] | str:
    try:
        examined = examine(host)
    except EXPECTED as error:
        return str(error)
    names = [instance.name for instance in examined.settings.models]
    return dict(zip(names, examined.answers, strict=True))


def over_hosts(inventory: Path, limit: str | None, action: Callable[[Host], T | str]) -> dict[str, T | str]:
    """The action's result for every host, all at once; a text for one that cannot be reached."""
    state = State(check_for_changes=False)
    with ctx_state.use(state), ctx_config.use(Config()):
        hosts = make_inventory(str(inventory), cwd=str(Path.cwd()))
        with ctx_inventory.use(hosts):
            state.init(hosts, ctx_config.get())
            wanted = [host for host in hosts if limit is None or limit in (host.name, *host.groups)]
            state.set_stage(StateStage.Connect)
            connect_all(state)
            state.set_stage(StateStage.Prepare)
            try:
                jobs = {host.name: gevent.spawn(_in_context, host, action) for host in wanted}
                gevent.joinall(jobs.values(), raise_error=True)
                return {name: job.value for name, job in jobs.items()}
            finally:
                disconnect_all(state)


def _in_context(host: Host, action: Callable[[Host], T | str]) -> T | str:
    if not host.connected:
        return "cannot be reached: see the connection's error above"
    with ctx_host.use(host):
        return action(host)
