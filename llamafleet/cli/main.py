"""`llamafleet`: what pyinfra cannot do. `llamafleet plan` shows a plan before anything is bought or built,
`llamafleet status` how the hosts of an inventory are.

Exit status: 0 a plan, or everything is fine; 1 something is not; 2 bad input; 3 a refusal.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from llamafleet.cli import compare
from llamafleet.cli import tables as show
from llamafleet.cli import what_if as outlook
from llamafleet.cli.arguments import UsageError, default_data, hub_token, parse_changes, read_machine, settings_for
from llamafleet.host.described import Described
from llamafleet.host.machine import MachineError
from llamafleet.host.speeds import Measurements
from llamafleet.hub import source as sources
from llamafleet.model.gguf import Header
from llamafleet.model.gguf_cursor import GgufError
from llamafleet.planner.plan import plan_host
from llamafleet.planner.result import Plan, Refusal
from llamafleet.settings.schema import Instance, Settings, SettingsError
from llamafleet.settings.secrets import SecretError

__all__ = ["default_data", "main", "parse_changes", "settings_for"]

PLANNED, BAD_INPUT, REFUSED = 0, 2, 3
READERS = 8  # headers read at the same time: politeness to the server more than the line
SIBLINGS_TRIED = 3  # of a refused model's repository, largest first
BAD = (UsageError, SettingsError, SecretError, MachineError, GgufError, sources.SourceError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except BAD as error:
        print(f"llamafleet: {error}", file=sys.stderr)
        return BAD_INPUT
    except BrokenPipeError:  # `| head`: who reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PLANNED
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llamafleet", description="Plan how llama-server uses a machine.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    plan = commands.add_parser("plan", help="show what a machine can carry", description=plan_command.__doc__)
    where = plan.add_mutually_exclusive_group(required=True)
    where.add_argument("--inventory", type=Path, help="read the hosts of a pyinfra inventory and plan their models")
    where.add_argument(
        "--machine",
        help="the machine file, JSON, - for standard input; or in words: rtx4090,ram=64GB,cores=10,"
        " 2xrtx3090,ram=128GB,cores=16, cpu,ram=32GB,cores=8; further words: swap=8GB, cpu=i5-13400F, pcie=4x8,"
        " memory-bandwidth=60GB/s",
    )
    plan.add_argument("--limit", help="with --inventory: one host or group of it")
    plan.add_argument(
        "--model", action="append", default=[],
        help="with --machine: a path, a URL or hf:OWNER/REPO/FILE.gguf[@REVISION]; several are compared",
    )  # fmt: skip
    plan.add_argument(
        "--compare", action="store_true",
        help="all quantisations in the model's repository, hf:OWNER/REPO: which is the best that fits",
    )  # fmt: skip
    plan.add_argument(
        "--min-speed", type=float, default=0.0, metavar="N",
        help="when comparing: only what is predicted to write N tokens/s and more",
    )  # fmt: skip
    plan.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="changes",
        help="override a setting, of the host or of the model, e.g. context_tokens=131072",
    )  # fmt: skip
    plan.add_argument("--json", action="store_true", help="print the plan as JSON, schema 1")
    plan.set_defaults(run=plan_command)
    status = commands.add_parser("status", help="show how the hosts are", description=status_command.__doc__)
    status.add_argument("--inventory", type=Path, required=True, help="a pyinfra inventory")
    status.add_argument("--limit", help="one host or group of it")
    status.add_argument("--json", action="store_true", help="print everything as JSON")
    status.set_defaults(run=status_command)
    return parser


def status_command(options: argparse.Namespace) -> int:
    """Show every host and instance: plan, memory, speed, restarts, last gate, drift. Reads only; exit status 0 where
    everything is as it should be, 1 where something is not."""
    return _on_inventory("tasks.status", options)


def plan_command(options: argparse.Namespace) -> int:
    """Show the plan of a model on a machine, of several compared, or of an inventory's models on its hosts."""
    if options.inventory:
        return plan_inventory(options)
    if not options.model:
        raise UsageError("--machine: name the model too, --model hf:OWNER/REPO/FILE.gguf")
    host = read_machine(options.machine)
    changes = parse_changes(options.changes)
    if options.compare or len(options.model) > 1:
        return _compare(options, host, changes)
    if options.min_speed:
        raise UsageError("--min-speed: is for comparing: add --compare, or name several models")
    settings = settings_for(options.model[0], default_data(), changes)
    header = _header(settings)
    answer = _plan(host, settings, settings.models[0], header)
    if isinstance(answer, Refusal):
        answer = replace(answer, suggestions=(*answer.suggestions, *_siblings_that_fit(host, settings, answer)))
    if options.json:
        print(json.dumps(answer.to_json(), indent=2))
    else:
        again = partial(_plan, host, settings)
        changed: tuple[str, ...] = ()
        if isinstance(answer, Plan):
            changed = tuple(outlook.outlook(again, settings.models[0], header, answer))
        title = f"{settings.models[0].source} on {host.machine.hostname}"
        print(show.table(answer, title, show.Look.of(sys.stdout), changed))
    return PLANNED if isinstance(answer, Plan) else REFUSED


def plan_inventory(options: argparse.Namespace) -> int:
    """Plans of every host of an inventory; the worst outcome is the exit status."""
    if options.model or options.changes or options.compare or options.min_speed:
        raise UsageError(
            "--inventory: its models and settings are the inventory's own; no --model, --set, --compare or --min-speed"
        )
    return _on_inventory("tasks.lib.over_hosts", options)


def _on_inventory(module: str, options: argparse.Namespace) -> int:
    """Run a module of `tasks` in a process of its own: pyinfra replaces the standard library's sockets, which
    must happen before anything uses them."""
    if not options.inventory.is_file():
        raise UsageError(f"{options.inventory}: there is no such inventory file")
    command = [sys.executable, "-m", module, str(options.inventory)]
    command += ["--limit", options.limit] if options.limit else []
    command += ["--json"] if options.json else []
    root = str(Path(__file__).resolve().parent.parent.parent)  # `tasks` lies beside the package
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode


def _compare(options: argparse.Namespace, host: Described, changes: dict[str, Any]) -> int:
    named = options.model
    if options.compare:
        settings = settings_for("hf:any/any/any", default_data(), changes)
        named = [found for model in named for found in _beside(model, settings)]
        if not named:
            raise UsageError(f"--compare: no model is in {', '.join(options.model)}")
    found = _options(host, list(dict.fromkeys(named)), changes, sys.stderr.isatty())
    if options.json:
        print(json.dumps(compare.to_json(found, host.machine.hostname, options.min_speed), indent=2))
    else:
        print(show.comparison_table(found, host.machine.hostname, options.min_speed, show.Look.of(sys.stdout)))
    return PLANNED if compare.best(found, options.min_speed) else REFUSED


def _options(host: Described, models: Sequence[str], changes: dict[str, Any], progress: bool) -> list[compare.Option]:
    """All models: their headers are read at the same time, and planned one after another."""
    data = default_data()
    settings = [settings_for(model, data, changes) for model in models]
    found = []
    with ThreadPoolExecutor(READERS) as pool:
        for number, read in enumerate(pool.map(_header_or_problem, settings), 1):
            found.append(_option(host, settings[number - 1], models[number - 1], read))
            if progress:
                print(f"\r{number} of {len(models)} headers", end="" if number < len(models) else "\n", file=sys.stderr)
    return found


def _option(host: Described, settings: Settings, model: str, read: Header | str) -> compare.Option:
    if isinstance(read, str):
        return compare.Option(model, problem=read)
    return compare.Option(model, read, _plan(host, settings, settings.models[0], read))


def _header_or_problem(settings: Settings) -> Header | str:
    try:
        return _header(settings)
    except (GgufError, sources.SourceError) as error:
        return str(error)


def _header(settings: Settings) -> Header:
    instance, token = settings.models[0], hub_token(settings)
    files = sources.resolve(
        instance.source,
        endpoint=settings.hub_endpoint,
        token=token,
        mirrors=instance.mirrors,
        sha256=instance.sha256,
    )
    return sources.read_header(files, token=token)


def _plan(host: Described, settings: Settings, instance: Instance, header: Header) -> Plan | Refusal:
    measured = Measurements(host_bytes_per_s=host.host_bytes_per_s)
    return plan_host(host.machine, [(instance, header)], settings, measurements=measured)[0]


def _beside(source: str, settings: Settings) -> dict[str, int]:
    return sources.quantisations(source, endpoint=settings.hub_endpoint, token=hub_token(settings))


def _siblings_that_fit(host: Described, settings: Settings, refusal: Refusal) -> list[str]:
    """Of a model of the Hub: its repository's next smaller quantisations that this machine can serve."""
    source = settings.models[0].source
    rows = refusal.ledger
    room = sum(row.used_bytes + row.free_bytes for row in rows)
    needed = sum(row.weights_bytes for row in rows)
    try:
        beside = _beside(source, settings) if source.startswith("hf:") and rows else {}
    except sources.SourceError:
        return []  # what would help is asked in vain; the refusal itself stands
    smaller = [name for name in sorted(beside, key=lambda one: -beside[one]) if beside[name] < min(room, needed)]
    again = {name: replace(settings, models=(replace(settings.models[0], source=name, sha256=None),))
             for name in smaller[:SIBLINGS_TRIED]}  # fmt: skip
    tried = [_option(host, changed, name, _header_or_problem(changed)) for name, changed in again.items()]
    return [
        f"take {option.source}: {option.weights_bytes / show.GIB:.1f} GiB of weights, at about"
        f" {show.rate(option.decode_tokens_per_s)} tokens/s"
        for option in tried
        if isinstance(option.answer, Plan)
    ]
