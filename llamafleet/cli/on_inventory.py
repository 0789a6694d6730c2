"""Commands about the hosts of an inventory: `llamafleet status`, `tuned`, `workload`, `report` and `rollout`.

Each is a module of `tasks/`, run in a process of its own.

Decision 15: docs/decisions/0015-pyinfra-stays-visible.md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from llamafleet import stages
from llamafleet.cli.errors import UsageError
from llamafleet.fleet import waves

END_SECONDS = 5.0  # after Ctrl-C
WATCH_SECONDS, MOST_WATCH_SECONDS = 10, 86400


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    """Let a parser know these commands."""
    status = commands.add_parser("status", help="show the state of hosts", description=status_command.__doc__)
    status.add_argument("--inventory", type=Path, required=True, help="a pyinfra inventory")
    status.add_argument("--limit", help="show only this host or group")
    status.add_argument("--json", action="store_true", help="print all data as JSON; with --watch a line for each look")
    status.add_argument("--all", action="store_true", help="show each host, also those that are fine and alike")
    status.add_argument(
        "--watch", nargs="?", const=WATCH_SECONDS, type=_watch_seconds, metavar="SECONDS",
        help=f"look again and again, until Ctrl-C; without SECONDS every {WATCH_SECONDS} s. On a terminal the page is"
        " drawn anew, else what changes is printed, a line each",
    )  # fmt: skip
    status.set_defaults(run=status_command)
    tuned = commands.add_parser("tuned", help="show what was measured where", description=tuned_command.__doc__)
    tuned.add_argument("--inventory", type=Path, required=True, help="a pyinfra inventory")
    tuned.add_argument("--limit", help="show only this host or group")
    tuned.add_argument("--json", action="store_true", help="print all data as JSON")
    tuned.set_defaults(run=tuned_command)
    workload = commands.add_parser(
        "workload", help="show what servers were asked for", description=workload_command.__doc__
    )
    workload.add_argument("--inventory", type=Path, required=True, help="a pyinfra inventory")
    workload.add_argument("--limit", help="show only this host or group")
    workload.add_argument("--since", help="in journalctl's words, such as 2026-11-20 (default: 7 days ago)")
    workload.add_argument("--json", action="store_true", help="print all data as JSON")
    workload.set_defaults(run=workload_command)
    report = commands.add_parser("report", help="write a page about hosts", description=report_command.__doc__)
    report.add_argument("--inventory", type=Path, required=True, help="a pyinfra inventory")
    report.add_argument("--limit", help="write about this host or group alone")
    report.add_argument("--output", default="report.html", help="the file to write, report.html unless named")
    report.set_defaults(run=report_command, json=False)
    rollout = commands.add_parser("rollout", help="deploy to hosts wave by wave", description=rollout_command.__doc__)
    rollout.add_argument("--inventory", type=Path, required=True, help="a pyinfra inventory")
    rollout.add_argument(
        "--waves", default=waves.USUAL, metavar="SIZES",
        help="sizes of the waves, by commas: a number of further hosts, or the percent of all hosts that are done"
        f" afterwards; {waves.USUAL.replace('%', '%%')} without it",
    )  # fmt: skip
    for flag, what in (("--limit", "roll out only to"), ("--exclude", "leave out")):
        rollout.add_argument(flag, action="append", default=[], help=f"{what} this host or group; may be repeated")
    rollout.add_argument("--dry", action="store_true", help="print the waves with every change, and change nothing")
    rollout.add_argument("--json", action="store_true", help="print the waves and their end as JSON")
    rollout.set_defaults(run=rollout_command)


def tuned_command(options: argparse.Namespace) -> int:
    """Show for every instance of every host what a tune has measured: the winner with its gain over llama-server as it
    ships, when, and whether it still holds. Nothing is changed, nothing is measured."""
    return run("tasks.tuned", options)


def _watch_seconds(text: str) -> int:
    """Of `--watch`. Raises ArgumentTypeError."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= MOST_WATCH_SECONDS:
        raise argparse.ArgumentTypeError(f"should be whole seconds, 1 to {MOST_WATCH_SECONDS}, is {text!r}")
    return int(text)


def status_command(options: argparse.Namespace) -> int:
    """Show how many hosts are in which state, how many servers of each model are up, and what differs; then for every
    instance plan, memory, speed, restarts, last gate and drift, the worst hosts first. Hosts that are fine and alike
    share a line. Nothing is changed. Exit status 0 if every instance is fine, else 1."""
    words = ["--all"] if options.all else []
    return run("tasks.status", options, *words, *([f"--watch={options.watch}"] if options.watch else []))


def workload_command(options: argparse.Namespace) -> int:
    """Show for every instance of every host what its server was asked for, from the host's journal, and the settings of
    the workload that fit. Nothing is changed. Exit status 0 if every host could be read, else 1."""
    return run("tasks.workload", options, *([f"--since={options.since}"] if options.since else []))


def report_command(options: argparse.Namespace) -> int:
    """Write one HTML page about the hosts of an inventory: plans, memory, speed beside llama-server's own defaults, and
    what tunes measured. No host is changed. Exit status 0 if every host was read, else 1."""
    return run("tasks.report", options, "--output", options.output)


def rollout_command(options: argparse.Namespace) -> int:
    """Deploy to the hosts of an inventory wave by wave, so that no model goes away as a whole; the first failure ends
    it, and run again it goes on. Exit status 0 if all hosts are as planned, else 1."""
    waves.sizes(options.waves)
    words = ["--waves", options.waves, *(["--dry"] if options.dry else [])]
    words += [f"--exclude={name}" for name in options.exclude]
    return run("tasks.rollout", options, *words)


def run(module: str, options: argparse.Namespace, *words: str) -> int:
    """Run a module of `tasks`, with `words` as further options, in its own process, and return its exit status: pyinfra
    patches the standard library's sockets, and that must happen before they are used."""
    if not options.inventory.is_file():
        raise UsageError(f"--inventory: there is no such inventory file: {options.inventory} (looked in {Path.cwd()})")
    # -P: a module of the current folder, which may be a stranger's, is not taken for one of ours or of Python.
    command = [sys.executable, "-P", "-m", module, str(options.inventory)]
    limits = [options.limit] if isinstance(options.limit, str) else options.limit or []
    command += [f"--limit={limit}" for limit in limits]
    command += ["--json"] if options.json else []
    command += words
    path = os.pathsep.join([str(stages.FOLDER), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:  # it has come to the process as well, which releases the locks of hosts
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(END_SECONDS)
            process.send_signal(signal.SIGINT)
            raise
