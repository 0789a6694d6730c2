"""What the servers of an inventory's hosts were asked for; `llamafleet workload --inventory` runs this. Reads only.

    python -m tasks.workload INVENTORY [--limit NAME] [--since TIME] [--json]

Exit status: 0 every host could be read, 1 one could not, 2 the inventory cannot be used or leaves no host, 130 after
Ctrl-C.
"""

from __future__ import annotations

import pyinfra_cli  # isort: skip  # first: it makes sockets cooperative before anything uses them  # noqa: F401

import argparse
import sys
from collections.abc import Mapping
from functools import partial

from pyinfra.api.host import Host

from llamafleet.cli.workload import KEYS, HostWorkload, InstanceWorkload, table
from llamafleet.host import answers
from llamafleet.host.answers import Observed
from llamafleet.host.installed import Installed
from llamafleet.printable import json_text, out
from llamafleet.settings.schema import Settings, SettingsError
from llamafleet.tuning.observed import fitting
from tasks.lib import facts, lookups, remote, sending
from tasks.lib.decision import READ_ERRORS
from tasks.lib.over_hosts import over_hosts, parse, status_of

WEEK = "7 days ago"
# The journal of a week has some hundred megabytes where a server is always busy.
JOURNAL_SECONDS = 600.0


def look(since: str, host: Host) -> HostWorkload | str:
    """What the host's servers were asked for since then; a sentence if it cannot be read."""
    try:
        settings = Settings.from_data(host.data.dict())
        installed = facts.survey(host, settings, packages=False).installed
        found = _observed(host, settings, since, list(installed.instances)) if installed.instances else {}
    except (SettingsError, *READ_ERRORS) as error:
        return str(error)
    return HostWorkload(_instances(found, installed, settings), "" if found else "has no instance")


def _observed(host: Host, settings: Settings, since: str, names: list[str]) -> Mapping[str, Observed]:
    """What `workload.py` prints on the host. Raises `remote.RemoteError`."""
    ok, out, err = sending.run_helper(host, "workload.py", since, *names, purpose="reading the journal",
                                      seconds=JOURNAL_SECONDS, network=lookups.network(settings))  # fmt: skip
    if not ok:
        raise remote.RemoteError(remote.explain(out, err))
    return remote.last(out, answers.observed)


def _instances(found: Mapping[str, Observed], installed: Installed, settings: Settings) -> dict[str, InstanceWorkload]:
    """What fits, beside what the inventory has."""
    named = {one.name: {key: getattr(one, key) for key in KEYS} for one in settings.models}
    workloads = {}
    for name, one in found.items():
        record = installed.instances[name].record if name in installed.instances else None
        slots = record.gate.slots if record and record.gate else None
        workloads[name] = InstanceWorkload(one, fitting(one, slots), named.get(name, {}))
    return workloads


def main(arguments: list[str]) -> int:
    options = parse("Show what the servers of an inventory's hosts were asked for.", arguments, since=WEEK)
    return status_of(show, options)


def show(options: argparse.Namespace) -> int:
    """Print what the servers were asked for. Raises PyinfraError."""
    states = over_hosts(options.inventory, options.limit, partial(look, options.since))
    hosts = {name: HostWorkload(problem=state) if isinstance(state, str) else state for name, state in states.items()}
    out(json_text({name: host.to_json() for name, host in hosts.items()}) if options.json else table(hosts))
    return 1 if any(isinstance(state, str) for state in states.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
