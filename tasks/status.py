"""The state of the hosts of an inventory; `llamafleet status --inventory` runs this. Reads only.

    python -m tasks.status INVENTORY [--limit NAME] [--json]

Exit status: 0 everything is as it should be, 1 something is not, 2 the inventory cannot be used or leaves no host,
130 after Ctrl-C.
"""

from __future__ import annotations

import pyinfra_cli  # isort: skip  # first: it makes sockets cooperative before anything uses them  # noqa: F401

import sys
from collections.abc import Mapping
from dataclasses import replace

from pyinfra.api.exceptions import PyinfraError
from pyinfra.api.host import Host

from llamafleet.cli.status import HostStatus, Wanted, of_host, table
from llamafleet.host import answers
from llamafleet.host.answers import LiveInstance
from llamafleet.host.installed import Installed
from llamafleet.host.machine import Machine
from llamafleet.printable import err, json_text, out
from llamafleet.service.changes import Changes
from llamafleet.service.desired import Desired
from llamafleet.service.measured import to_json
from llamafleet.service.refusals import Refused
from llamafleet.settings.schema import Settings, SettingsError
from tasks.lib import ends, facts, remote
from tasks.lib.decision import READ_ERRORS, decide
from tasks.lib.over_hosts import over_hosts, parse


def look(host: Host) -> HostStatus | str:
    """The host's state, also where it cannot be what the inventory asks for."""
    now = decide(host)
    if isinstance(now, Refused):
        return _without_plan(host, str(now))
    installed = now.desired.installed
    live, problem = _live(host, installed)
    status = of_host(installed, live, wanted(now.desired, now.changes), problem)
    return _with_machine(status, now.desired.machine)


def wanted(desired: Desired, changes: Changes) -> Wanted:
    """What a run would change, as `--dry` says it."""
    services = {serving.name: changes.of_instance(serving.name) for serving in desired.servings}
    tuned = {name: to_json(tuning) for name, tuning in desired.inputs.tunings.items()}
    return Wanted(services, changes.of_host(), tuned)


def _without_plan(host: Host, problem: str) -> HostStatus | str:
    """The state of what runs on a host to which the inventory cannot be deployed; a sentence if nothing can be read."""
    try:
        survey = facts.survey(host, Settings.from_data(host.data.dict()), packages=False)
    except SettingsError:
        return problem
    except READ_ERRORS as error:
        return str(error)
    live, _ = _live(host, survey.installed)
    status = of_host(survey.installed, live, None, f"cannot be compared with the inventory: {problem}")
    return _with_machine(status, survey.machine)


def _with_machine(status: HostStatus, machine: Machine) -> HostStatus:
    """The state with the free space of the disks of our folders, and what the probe found wrong with the host."""
    free_bytes = {disk.path: disk.free_bytes for disk in machine.disks}
    return replace(status, free_bytes=free_bytes, problems=machine.problems)


def _live(host: Host, installed: Installed) -> tuple[Mapping[str, LiveInstance], str]:
    """What `status.py` prints on the host, and the problem where it fails."""
    if installed.helpers is None or not installed.instances:
        return {}, ""
    try:
        return remote.run_json(host, remote.program("status.py"), answers.status), ""
    except remote.RemoteError as error:
        return {}, f"memory and gate are not known: {error}"


def main(arguments: list[str]) -> int:
    options = parse("Show the state of the hosts of an inventory.", arguments)
    ends.take_interrupts()
    try:
        states = over_hosts(options.inventory, options.limit, look)
    except PyinfraError as error:
        err(f"llamafleet: {options.inventory}: {error}")
        return 2
    hosts = {name: HostStatus(problem=state) if isinstance(state, str) else state for name, state in states.items()}
    if options.json:
        out(json_text({name: host.to_json() for name, host in hosts.items()}))
    else:
        out(table(hosts))
    return 0 if all(host.is_fine for host in hosts.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
