"""The way back: `pyinfra INVENTORY tasks.uninstall.uninstall` removes what was installed and nothing else.

Packages and logs stay, and models unless the setting `uninstall_models` asks for them by name.
"""

from __future__ import annotations

import json
import shlex
from typing import Any

from pyinfra import logger
from pyinfra.api import FunctionCommand, operation
from pyinfra.api.deploy import deploy
from pyinfra.api.host import Host
from pyinfra.api.state import State
from pyinfra.context import ctx_host

from llamafleet import payload
from llamafleet.settings.schema import Settings, SettingsError
from tasks.lib import lookups as sources
from tasks.lib import remote
from tasks.lib.operations import Commands


@deploy("Uninstall llamafleet")
def uninstall() -> None:
    """Everything, once the host is known not to be deployed to by another run."""
    host = ctx_host.get()
    try:
        settings = Settings.from_data(host.data.dict())
        ok, lines = _program(host, "find", {})
        if not ok:
            raise remote.RemoteError(f"cannot read the host: {remote.explain(lines, [])}")
        found = json.loads(lines[-1])
        _check(found)
    except (SettingsError, remote.RemoteError, payload.PayloadError) as error:
        host.log_styled(f"refused: {error}", fg="red", log_func=logger.error)
        host.state.fail_hosts({host})
        return
    models = settings.uninstall_models and bool(found["models"])
    there = [*found["units"], *found["paths"], *(["the user llamafleet"] if found["user"] else [])]
    remove(
        name="Remove llamafleet, models too" if models else "Remove llamafleet", found=tuple(there), models=models
    )  # fmt: skip


def _check(found: dict[str, Any]) -> None:
    if found["euid"] != 0:
        raise remote.RemoteError("commands run there as an ordinary user: connect as root, or pass --sudo")
    if found["lock"] and not remote.is_ours_or_dead(found["lock"]):
        raise remote.RemoteError(remote.held_by(found["lock"]))


@operation()
def remove(found: tuple[str, ...], models: bool) -> Commands:
    """Remove what was found, and the models where that is asked."""
    if not found and not models:
        ctx_host.get().noop("nothing of llamafleet is there")
        return
    yield FunctionCommand(_remove, (models,), {})


def _remove(state: State, host: Host, models: bool) -> bool:
    asked = {"models": models, "holder": remote.this_run(), "over": None}
    ok, lines = _program(host, "remove", asked)
    holder = _holder(lines) if not ok else None
    if holder and remote.is_ours_or_dead(holder):
        ok, lines = _program(host, "remove", {**asked, "over": holder["run"]})
        holder = _holder(lines) if not ok else None
    if ok:
        for line in lines:
            host.log(line)
        return True
    text = remote.held_by(holder) if holder else "\n".join(lines[-15:])
    host.log_styled(text, fg="red", log_func=logger.error)
    return False


def _holder(lines: list[str]) -> dict[str, Any] | None:
    """Who holds the host's lock, where that is what the program said."""
    if not lines or not lines[-1].startswith("{"):
        return None
    holder: dict[str, Any] = json.loads(lines[-1])
    return holder


def _program(host: Host, verb: str, asked: dict[str, Any]) -> tuple[bool, list[str]]:
    """Run uninstall.py from a copy that leaves nothing behind: the installed one removes itself."""
    ok, out, err = remote.run(host, "uname -m")
    if not ok:
        raise remote.RemoteError(f"cannot run commands on the host: {remote.explain(out, err)}")
    arch = out[-1].strip()
    path = remote.temporary(host, ".zip")
    remote.upload(host, sources.once(("probe", arch), lambda: payload.probe_zip(arch)), path)
    ok, out, err = remote.run(host, shlex.join(payload.probe_command(path, "uninstall.py", verb, json.dumps(asked))))
    return ok, out if ok or out else err
