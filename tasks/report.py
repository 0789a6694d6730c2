"""The report of the hosts of an inventory, one HTML page; `llamafleet report --inventory` runs this. Changes no host.

    python -m tasks.report INVENTORY [--limit NAME] [--output FILE]

Exit status: 0 the page is written; 1 it is, and has a host that could not be read; 2 it cannot be written, or the
inventory cannot be used or leaves no host; 130 after Ctrl-C.
"""

from __future__ import annotations

import pyinfra_cli  # isort: skip  # first: it makes sockets cooperative before anything uses them  # noqa: F401

import argparse
import sys
import time
from pathlib import Path

from pyinfra.api.host import Host

from llamafleet.cli import reported
from llamafleet.cli.report import Page, page
from llamafleet.cli.reported import HostFacts
from llamafleet.printable import err, one_line, out
from tasks.lib import page as drawing
from tasks.lib import records, state
from tasks.lib.over_hosts import over_hosts, status_of

MANY_CHARTS = 100  # that take some seconds


def look(host: Host) -> HostFacts | str:
    """What is known of the host, also where it cannot be what the inventory asks for."""
    found = state.read(host)
    if isinstance(found, str):
        return found
    return reported.host_facts(host.name, found.status, found.survey, found.desired, records.kept())


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Write a report of the hosts of an inventory.")
    parser.add_argument("inventory", type=Path)
    parser.add_argument("--limit")
    parser.add_argument("--output", type=Path, default=Path("report.html"))
    return status_of(write, parser.parse_args(arguments))


def write(options: argparse.Namespace) -> int:
    """Write the page. Raises PyinfraError."""
    try:
        drawing.check()
        if not options.output.parent.is_dir():
            raise FileNotFoundError(0, f"there is no folder {options.output.parent}")
        found = over_hosts(options.inventory, options.limit, look)
        kept = records.kept()
        hosts = {
            name: reported.not_read(name, one, kept) if isinstance(one, str) else one for name, one in found.items()
        }
        text = drawn(page(f"llamafleet: {options.inventory.name}", hosts, time.time()))
        records.replace_file(options.output, text)
    except drawing.CannotDrawError as error:
        err(f"llamafleet: {error}")
        return 2
    except OSError as error:
        err(f"llamafleet: --output: {options.output} cannot be written: {error.strerror or error}")
        return 2
    out(said(options.output, hosts))
    return 1 if any(one.machine is None for one in hosts.values()) else 0


def drawn(shown: Page) -> str:
    """The page as HTML; of many charts, which take a while, their number is said before."""
    charts = sum(len(one.figures) for host in shown.hosts for one in host.instances)
    if charts > MANY_CHARTS:
        err(f"llamafleet: {len(shown.hosts)} hosts are read; drawing {charts} charts")
    return drawing.html(shown)


def said(path: Path, hosts: dict[str, HostFacts]) -> str:
    """A line for each host that could not be read; then where the page is, and how many hosts are as they should be."""
    fine = sum(one.status.is_fine for one in hosts.values())
    away = [one_line(f"{name}: {one.status.problem}") for name, one in hosts.items() if one.machine is None]
    not_read = f", {len(away)} could not be read" if away else ""
    last = f"{path}: {len(hosts)} host{'s' if len(hosts) != 1 else ''}, {fine} as they should be{not_read}"
    return "\n".join([*away, last])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
