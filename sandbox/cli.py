"""`python -m sandbox`: up, down, list, exec, kill, start, reboot, prepare."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time

from sandbox import hosts, roots
from sandbox.state import SandboxError, say

FAILED = 2


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.do(arguments) or 0)
    except (SandboxError, subprocess.CalledProcessError) as error:
        print(f"sandbox: {error}", file=sys.stderr)
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sandbox", description="disposable Debian hosts with a real systemd"
    )
    commands = parser.add_subparsers(required=True)
    up = commands.add_parser("up", help="start further hosts")
    up.add_argument("--hosts", type=int, default=1, metavar="N")
    up.add_argument("--bind", action="append", default=[], metavar="SRC:DST[:ro]", help="mount a path of this machine")
    up.add_argument("--packages", default="", metavar="A,B", help="packages to install before, once for all hosts")
    up.add_argument("--name-prefix", default=hosts.PREFIX)
    up.add_argument("--first-address", type=int, default=1, metavar="N", help="address of the first host: 127.0.1.N")
    up.add_argument("--suite", default=roots.SUITE, help=f"release of Debian: {roots.SUITE} or {roots.OLDER_SUITE}")
    up.set_defaults(do=_up)
    down = commands.add_parser("down", help="remove hosts (without names: all hosts, and leftovers of a crash)")
    down.add_argument("names", nargs="*", metavar="HOST")
    down.set_defaults(do=_down)
    listing = commands.add_parser("list", help="show hosts")
    listing.add_argument("--json", action="store_true")
    listing.set_defaults(do=_list)
    for name, text in (
        ("start", "start a host that is off"),
        ("reboot", "reboot a host"),
        ("kill", "stop a host at once, as a power cut does"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("host")
        command.set_defaults(do=lambda a, name=name: getattr(hosts.get(a.host), name)())
    execute = commands.add_parser("exec", help="run a command in a host: exec HOST -- COMMAND...")
    execute.add_argument("--user", default="root")
    execute.add_argument("host")
    execute.add_argument("command", nargs="+")
    execute.set_defaults(do=_exec)
    prepare = commands.add_parser("prepare", help="install missing packages on this machine and build the hosts' root")
    prepare.set_defaults(do=_prepare)
    return parser


def _up(arguments: argparse.Namespace) -> None:
    started = time.monotonic()
    packages = [name for name in arguments.packages.split(",") if name]
    started_hosts = hosts.up(
        arguments.hosts,
        packages=packages,
        binds=arguments.bind,
        prefix=arguments.name_prefix,
        first_address=arguments.first_address,
        suite=arguments.suite,
    )
    say(
        f"{len(started_hosts)} hosts are up after {time.monotonic() - started:.1f} s: "
        + ", ".join(f"{host.name} {host.address}" for host in started_hosts)
    )


def _down(arguments: argparse.Namespace) -> None:
    removed = hosts.down(arguments.names or None)
    say(f"removed: {', '.join(removed) or 'nothing was there'}")


def _list(arguments: argparse.Namespace) -> None:
    rows = [
        {
            "name": host.name,
            "address": host.address,
            "port": host.port,
            "running": host.is_running,
            "pid": host.pid,
            "packages": list(host.packages),
            "binds": list(host.binds),
            "ssh_key": str(host.ssh_key),
            "known_hosts": str(host.known_hosts),
            "root": str(host.root),
        }
        for host in hosts.listed()
    ]
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        does = f"running, pid {row['pid']}" if row["running"] else "off"
        print(f"{row['name']:<16} {row['address']:<12} port {row['port']:<5} {does}")


def _exec(arguments: argparse.Namespace) -> int:
    host = hosts.get(arguments.host)
    return subprocess.run([*host.ssh(arguments.user), "--", shlex.join(arguments.command)], check=False).returncode


def _prepare(_: argparse.Namespace) -> None:
    hosts.prepare()
