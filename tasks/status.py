"""How the hosts of an inventory are: what `llamafleet status --inventory` runs. Reads only.

    python -m tasks.status INVENTORY [--limit NAME] [--json]

Exit status: 0 everything is as it should be, 1 something is not, 2 the inventory cannot be used.
"""

from __future__ import annotations

import pyinfra_cli  # isort: skip  # first: it makes sockets cooperative before anything uses them  # noqa: F401

import json
import sys
from typing import Any

from pyinfra.api.exceptions import PyinfraError
from pyinfra.api.host import Host

from llamafleet.cli.status import HostStatus, Wanted, of_host, table
from llamafleet.host.installed import Found
from llamafleet.service.changes import Work
from llamafleet.settings.schema import Settings, SettingsError
from tasks.lib import facts, remote
from tasks.lib.decision import EXPECTED, decide
from tasks.lib.over_hosts import over_hosts, parse


def look(host: Host) -> HostStatus | str:
    """The host as it is, also where the inventory asks of it what cannot be."""
    try:
        now = decide(host)
    except EXPECTED as error:
        return _without_plan(host, str(error))
    live, said = _live(host, now.survey.found)
    names = [one.instance.name for one in now.servings]
    services = {name: now.work.services.get(name, ()) for name in names}
    return of_host(now.survey.found, live, Wanted(services, tuple(to_do(now.work))), said)


def _without_plan(host: Host, problem: str) -> HostStatus | str:
    """What runs there still counts where the inventory cannot be deployed; a text where nothing can be read."""
    try:
        survey = facts.survey(host, {}, Settings.from_data(host.data.dict()))
    except SettingsError:
        return problem
    except EXPECTED as error:
        return str(error)
    live, _ = _live(host, survey.found)
    return of_host(survey.found, live, None, f"cannot be compared with the inventory: {problem}")


def _live(host: Host, found: Found) -> tuple[dict[str, Any], str]:
    """What `status.py` prints, and why it does not."""
    if found.helpers is None or not found.instances:
        return {}, ""
    try:
        live: dict[str, Any] = remote.run_json(host, remote.program("status.py"))
    except remote.RemoteError as error:
        return {}, f"memory and gate are not known: {error}"
    return live, ""


def to_do(work: Work) -> list[str]:
    """What a run would do on the host beside its services."""
    parts = {
        "helpers": work.helpers, "user": work.user, "packages": bool(work.packages), "toolkit": work.toolkit,
        "build": work.build, "models": bool(work.models), "current release": work.current,
    }  # fmt: skip
    return [name for name, needed in parts.items() if needed]


def main(arguments: list[str]) -> int:
    options = parse("How the hosts of an inventory are.", arguments)
    try:
        found = over_hosts(options.inventory, options.limit, look)
    except PyinfraError as error:
        print(f"llamafleet: {options.inventory}: {error}", file=sys.stderr)
        return 2
    hosts = {name: HostStatus(problem=one) if isinstance(one, str) else one for name, one in found.items()}
    if options.json:
        print(json.dumps({name: host.to_json() for name, host in hosts.items()}, indent=2))
    else:
        print(table(hosts))
    if not hosts:
        print(f"llamafleet: {options.inventory}: no such host or group: {options.limit}", file=sys.stderr)
        return 2
    return 0 if all(host.is_fine for host in hosts.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
