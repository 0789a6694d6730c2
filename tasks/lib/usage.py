"""Saying at the end of a run how to use what it installed, what the gate measured, and what is left to do."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterator, Sequence

from pyinfra import logger
from pyinfra.api import operation
from pyinfra.api.host import Host
from pyinfra.context import ctx_host

from llamafleet.cli import usage
from llamafleet.host import answers
from llamafleet.host.left import Left
from llamafleet.service.desired import Desired, Serving
from llamafleet.service.left import sentences
from tasks.lib import certificates, remote
from tasks.lib.facts import asked_left
from tasks.lib.operations import Commands, call


@operation()
def tell_usage(needed: bool, servings: Callable[[], Sequence[Serving]], desired: Desired) -> Commands:
    """Log address, request and measured speeds of the instances that this run installed, and what is left to do;
    `servings` gives them as they are planned at the end."""
    if not needed:
        ctx_host.get().noop("nothing was changed")
        return
    yield call(lambda state, host: _tell(host, servings()) and _tell_left(host, desired))


def reached_by(host: Host) -> str:
    """By which name or address this machine reaches the host."""
    return str(host.data.get("ssh_hostname") or host.name.removeprefix("@ssh/"))


def left_to_do(desired: Desired, left: Left) -> Iterator[str]:
    """Lines for people: what the tool does not do itself."""
    certified = {}
    for one in desired.settings.models:
        if one.tls_certificate_file and (
            said := certificates.ends_soon(one.tls_certificate_file, f"models: {one.name}: ")
        ):
            certified[one.name] = said
    yield from (f"left to do: {sentence}" for sentence in sentences(desired, left, certified))


def _tell_left(host: Host, desired: Desired) -> bool:
    try:
        asked = json.dumps(asked_left(host, desired.settings))
        left = remote.run_json(host, remote.program("left.py", asked), answers.left)
        for line in left_to_do(desired, left):
            host.log(line)
    except Exception as error:  # the instances serve, whatever cannot be read
        logger.debug(traceback.format_exc())
        host.log(f"what is left to do cannot be read: {remote.said(error)}")
    return True


def _tell(host: Host, servings: Sequence[Serving]) -> bool:
    if not servings:
        return True
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
