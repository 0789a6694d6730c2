"""The state of the hosts of an inventory; `llamafleet status --inventory` runs this. Reads only.

    python -m tasks.status INVENTORY [--limit NAME] [--json] [--all] [--watch SECONDS]

Exit status: 0 everything is as it should be, 1 something is not, 2 the inventory cannot be used or leaves no host,
130 after Ctrl-C, which also ends `--watch`. What the inventory and the models' sources say is read once.
"""

from __future__ import annotations

import pyinfra_cli  # isort: skip  # first: it makes sockets cooperative before anything uses them  # noqa: F401

import argparse
import json
import os
import sys
import time

import gevent
from pyinfra.api.host import Host

from llamafleet.cli import fleet_status
from llamafleet.cli.fleet_status import Hosts
from llamafleet.cli.status import HostStatus
from llamafleet.cli.tables import Look
from llamafleet.printable import json_text, out, redraw
from tasks.lib import ends, lookups, state
from tasks.lib.decision import wanted_models
from tasks.lib.over_hosts import over_all, parse, status_of


def look(host: Host) -> HostStatus:
    """The host's state, also where it cannot be what the inventory asks for."""
    found = state.read(host)
    return lost(host, found) if isinstance(found, str) else found.status


def lost(host: Host, problem: str) -> HostStatus:
    """Of a host that cannot be read, with what the inventory wants there."""
    return HostStatus(problem=problem, expected=dict(wanted_models(host)))


def main(arguments: list[str]) -> int:
    options = parse("Show the state of the hosts of an inventory.", arguments, flags=("all",), watch=None)
    try:
        return status_of(run, options)
    except BrokenPipeError:  # the reader closed the pipe, such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def run(options: argparse.Namespace) -> int:
    """Show the state of the hosts, once or again and again. Raises PyinfraError."""
    before: Hosts | None = None
    while True:
        hosts = over_all(options.inventory, options.limit, look, lost)
        show(hosts, before, options)
        if options.watch is None:
            return 0 if all(host.is_fine for host in hosts.values()) else 1
        before = hosts
        gevent.sleep(float(options.watch))
        ends.forget()
        lookups.forget_failures()


def show(hosts: Hosts, before: Hosts | None, options: argparse.Namespace) -> None:
    """Print the hosts' state, or, where it was printed before and this is no terminal, what changed since then."""
    if options.json:
        data = {name: host.to_json() for name, host in hosts.items()}
        out(json_text(data) if options.watch is None else json.dumps(data))
    elif options.watch is not None and sys.stdout.isatty():
        heading = f"{time.strftime('%Y-%m-%d %H:%M:%S')}, every {options.watch} s; Ctrl-C ends it\n\n"
        redraw(heading + fleet_status.page(hosts, Look.of(sys.stdout), options.all))
    elif before is None:
        out(fleet_status.page(hosts, Look.of(sys.stdout), options.all))
    else:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        for line in fleet_status.changes(before, hosts):
            out(f"{now} {line}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
