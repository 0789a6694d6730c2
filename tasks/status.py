"""The state of the hosts of an inventory; `llamafleet status --inventory` runs this. Reads only.

    python -m tasks.status INVENTORY [--limit NAME] [--json]

Exit status: 0 everything is as it should be, 1 something is not, 2 the inventory cannot be used or leaves no host,
130 after Ctrl-C.
"""

from __future__ import annotations

import pyinfra_cli  # isort: skip  # first: it makes sockets cooperative before anything uses them  # noqa: F401

import sys

from pyinfra.api.exceptions import PyinfraError
from pyinfra.api.host import Host

from llamafleet.cli.status import HostStatus, table
from llamafleet.printable import err, json_text, out
from tasks.lib import ends, state
from tasks.lib.over_hosts import over_hosts, parse


def look(host: Host) -> HostStatus | str:
    """The host's state, also where it cannot be what the inventory asks for."""
    found = state.read(host)
    return found if isinstance(found, str) else found.status


def main(arguments: list[str]) -> int:
    options = parse("Show the state of the hosts of an inventory.", arguments)
    ends.take_interrupts()
    try:
        states = over_hosts(options.inventory, options.limit, look)
    except PyinfraError as error:
        err(f"llamafleet: {options.inventory}: {error}")
        return 2
    hosts = {name: HostStatus(problem=one) if isinstance(one, str) else one for name, one in states.items()}
    if options.json:
        out(json_text({name: host.to_json() for name, host in hosts.items()}))
    else:
        out(table(hosts))
    return 0 if all(host.is_fine for host in hosts.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
