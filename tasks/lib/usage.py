"""Saying at the end of a run how to use what it installed, and what the gate measured."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence

from pyinfra import logger
from pyinfra.api import operation
from pyinfra.api.host import Host
from pyinfra.context import ctx_host

from llamafleet.cli import usage
from llamafleet.host import answers
from llamafleet.service.desired import Serving
from tasks.lib import remote
from tasks.lib.operations import Commands, call


@operation()
def tell_usage(needed: bool, servings: Callable[[], Sequence[Serving]]) -> Commands:
    """Log address, request and measured speeds of the instances that this run installed; `servings` gives them as they
    are planned at the end."""
    if not needed:
        ctx_host.get().noop("no instance was installed or started again")
        return
    yield call(lambda state, host: _tell(host, servings()))


def reached_by(host: Host) -> str:
    """By which name or address this machine reaches the host."""
    return str(host.data.get("ssh_hostname") or host.name.removeprefix("@ssh/"))


def _tell(host: Host, servings: Sequence[Serving]) -> bool:
    try:
        live = remote.run_json(host, remote.program("status.py"), answers.status)
    except Exception as error:  # the instances serve, whatever cannot be read of them
        logger.debug(traceback.format_exc())
        host.log(f"what the gate measured cannot be read: {remote.said(error)}")
        live = {}
    for serving in servings:
        now = live.get(serving.name)
        predicted = serving.plan.predicted
        for line in usage.lines(serving.instance, reached_by(host), now.gate if now else None, predicted):
            host.log(line)
    return True
