"""`pyinfra INVENTORY tasks.uninstall.uninstall` removes what llamafleet installed and nothing else.

Packages and logs stay, and models unless the setting `uninstall_models` asks for them by name.
"""

from __future__ import annotations

import json
import traceback
from typing import Any

from pyinfra import logger
from pyinfra.api import operation
from pyinfra.api.deploy import deploy
from pyinfra.api.host import Host
from pyinfra.api.state import State
from pyinfra.context import ctx_host

from llamafleet import payload
from llamafleet.host import answers
from llamafleet.host.installed import Holder
from llamafleet.service.refusals import held_by
from llamafleet.settings.schema import Settings, SettingsError
from tasks.lib import remote, sending
from tasks.lib.operations import Commands, call
from tasks.lib.this_run import is_ours_or_dead, this_run

# Stopping every service, each for up to 30 s, and removing releases and models of hundreds of gigabytes.
REMOVE_SECONDS = 1800.0


@deploy("Uninstall llamafleet")
def uninstall() -> None:
    """Remove everything, unless another run is deploying to the host."""
    host = ctx_host.get()
    try:
        settings = Settings.from_data(host.data.dict())
        ok, lines = _program(host, "find", {})
        if not ok:
            raise remote.RemoteError(f"cannot read the host: {remote.explain(lines, [])}")
        installed = remote.last(lines, answers.removable)
        _check(installed)
    except (SettingsError, remote.RemoteError, payload.PayloadError) as error:
        return _refuse(host, str(error))
    except Exception as error:  # whatever it is, the other hosts' run must go on
        logger.debug(traceback.format_exc())
        return _refuse(host, f"the host cannot be read: {remote.said(error)}")
    models = settings.uninstall_models and bool(installed.models)
    there = [*installed.units, *installed.paths, *(["the user llamafleet"] if installed.user else [])]
    remove(
        name="Remove llamafleet, models too" if models else "Remove llamafleet", installed=tuple(there), models=models
    )  # fmt: skip


def _refuse(host: Host, reason: str) -> None:
    remote.fail(host, f"refused: {reason}")
    host.state.fail_hosts({host})


def _check(installed: answers.Removable) -> None:
    if installed.euid != 0:
        raise remote.RemoteError("commands run there as an ordinary user: connect as root, or pass --sudo")
    if installed.lock and not is_ours_or_dead(installed.lock):
        raise remote.RemoteError(held_by(installed.lock))


@operation()
def remove(installed: tuple[str, ...], models: bool) -> Commands:
    """Remove what is installed, and the models if `models`."""
    if not installed and not models:
        ctx_host.get().noop("nothing of llamafleet is there")
        return
    yield call(_remove, models)


def _remove(state: State, host: Host, models: bool) -> bool:
    asked = {"models": models, "holder": this_run(), "over": None}
    ok, lines = _program(host, "remove", asked)
    holder = _holder(lines) if not ok else None
    if holder and is_ours_or_dead(holder):
        ok, lines = _program(host, "remove", {**asked, "over": holder.run})
        holder = _holder(lines) if not ok else None
    if ok:
        for line in lines:
            host.log(line)
        return True
    return remote.fail(host, held_by(holder) if holder else remote.explain(lines[-15:], []))


def _holder(lines: list[str]) -> Holder | None:
    """Who holds the host's lock, if that is what the program printed."""
    if not lines or not lines[-1].startswith("{"):
        return None
    return remote.last(lines, answers.holder)


def _program(host: Host, verb: str, asked: dict[str, Any]) -> tuple[bool, list[str]]:
    """Run uninstall.py from a copy that leaves nothing behind: the installed one removes itself."""
    seconds = REMOVE_SECONDS if verb == "remove" else remote.COMMAND_SECONDS
    ok, out, err = sending.run_copy(
        host, "uninstall.py", verb, json.dumps(asked), purpose=f"uninstall.py {verb}", seconds=seconds
    )
    return ok, out if ok or out else err
