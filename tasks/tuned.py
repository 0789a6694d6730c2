"""What was measured on the hosts of an inventory; `llamafleet tuned --inventory` runs this. Reads only.

    python -m tasks.tuned INVENTORY [--limit NAME] [--json]

Exit status: 0 all hosts were read, 1 one was not, 2 the inventory cannot be used or leaves no host, 130 after Ctrl-C.
"""

from __future__ import annotations

import pyinfra_cli  # isort: skip  # first: it makes sockets cooperative before anything uses them  # noqa: F401

import argparse
import sys

from pyinfra.api.host import Host

from llamafleet.cli.tuned import HostRows, Row, table, with_kept
from llamafleet.printable import json_text, out
from llamafleet.service.refusals import Refused
from tasks.lib import records
from tasks.lib.decision import READ_ERRORS, read_inputs, with_measured
from tasks.lib.over_hosts import over_hosts, parse, status_of


def look(host: Host) -> HostRows:
    """What was measured of the host's instances; a sentence where it cannot be read."""
    try:
        inputs = read_inputs(host)
        if isinstance(inputs, Refused):
            return HostRows({}, str(inputs))
        found, _, unknown = with_measured(host, inputs)
    except READ_ERRORS as error:
        return HostRows({}, str(error))
    rows = {one.name: Row("not measured") for one in found.settings.models if not unknown}
    return HostRows({**rows, **{name: Row.of(tuning) for name, tuning in found.tunings.items()}}, unknown)


def main(arguments: list[str]) -> int:
    return status_of(show, parse("Show what was measured on the hosts of an inventory.", arguments))


def show(options: argparse.Namespace) -> int:
    """Print what was measured. Raises PyinfraError."""
    found = over_hosts(options.inventory, options.limit, look)
    hosts = {name: HostRows({}, rows) if isinstance(rows, str) else rows for name, rows in found.items()}
    kept = records.kept()
    hosts = with_kept(hosts, kept, whole=options.limit is None)
    if options.json:
        out(json_text({name: host.to_json() for name, host in hosts.items()}))
    else:
        out("\n".join([table(hosts), *(problem for problems in kept.problems.values() for problem in problems)]))
    return 1 if any(host.problem for host in hosts.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
