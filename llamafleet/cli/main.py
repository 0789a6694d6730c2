"""The command `llamafleet`, for tasks that pyinfra does not have.

`llamafleet plan` shows a plan before a machine is bought or a host is changed; on_inventory.py has the commands about
the hosts of an inventory. Exit status: 0 a plan, a page, or everything is fine; 1 something is not fine; 2 bad input;
3 a refusal; 130 after Ctrl-C.

Decision 15: docs/decisions/0015-pyinfra-stays-visible.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from llamafleet.cli import beside, compare, on_inventory, tables, together
from llamafleet.cli.arguments import (
    default_data,
    hub_token,
    labels,
    network,
    parse_changes,
    read_machine,
    settings_for,
    settings_for_all,
)
from llamafleet.cli.errors import UsageError
from llamafleet.cli.what_if import what_if
from llamafleet.fleet import waves
from llamafleet.host.described import Described
from llamafleet.host.machine import MachineError
from llamafleet.host.speeds import Measurements
from llamafleet.hub import source
from llamafleet.hub.source import ModelFiles
from llamafleet.model.gguf import Header
from llamafleet.model.gguf_cursor import GgufError
from llamafleet.planner.copies import with_copies
from llamafleet.planner.plan import plan_host
from llamafleet.planner.result import Plan, Refusal
from llamafleet.printable import err, json_text, out, print_exception
from llamafleet.settings.schema import Instance, Settings, SettingsError
from llamafleet.settings.secrets import SecretError

__all__ = ["default_data", "main", "parse_changes", "settings_for"]

PLANNED, BAD_INPUT, REFUSED, INTERRUPTED = 0, 2, 3, 130
READERS = 8  # headers read at the same time; limited so as not to burden the server
SIBLINGS_TRIED = 3  # quantisations of a refused model's repository that are planned, largest first
BAD_INPUT_ERRORS = (
    UsageError,
    waves.WavesError,
    SettingsError,
    SecretError,
    MachineError,
    GgufError,
    source.SourceError,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    sys.excepthook = print_exception
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except BAD_INPUT_ERRORS as error:
        err(f"llamafleet: {error}")
        return BAD_INPUT
    except KeyboardInterrupt:
        err("llamafleet: interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader closed the pipe, such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PLANNED
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llamafleet", description="Plan how llama-server uses a machine.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    plan = commands.add_parser("plan", help="plan models for a machine or hosts", description=plan_command.__doc__)
    target = plan.add_mutually_exclusive_group(required=True)
    target.add_argument("--inventory", type=Path, help="probe the hosts of a pyinfra inventory and plan their models")
    target.add_argument(
        "--machine",
        help="a machine file (JSON), - for standard input, or a description: rtx4090,ram=64GB,cores=10 or"
        " 2xrtx3090+rtx3060,ram=128GB,cores=16 or cpu,ram=32GB,cores=8; it may add vram=48GB, arm64, swap=8GB,"
        " cpu=i5-13400F, pcie=4x8, memory-bandwidth=60GB/s",
    )
    plan.add_argument("--limit", help="with --inventory: plan only this host or group")
    plan.add_argument(
        "--model", action="append", default=[],
        help="with --machine: a path, a URL, hf:OWNER/REPO/FILE.gguf[@REVISION] or hf:OWNER/REPO[:QUANTISATION];"
        " several models are compared, or planned together with --together",
    )  # fmt: skip
    plan.add_argument(
        "--compare", action="store_true",
        help="compare all quantisations in the model's repository (hf:OWNER/REPO) and name the best that fits",
    )  # fmt: skip
    plan.add_argument(
        "--together", action="store_true",
        help="plan several models that the machine serves at the same time; --set 2.KEY=VALUE is of the second alone",
    )  # fmt: skip
    plan.add_argument(
        "--min-speed", type=float, default=0.0, metavar="N",
        help="in a comparison: only a model that is predicted to write at least N tokens/s can be the best",
    )  # fmt: skip
    plan.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="changes",
        help="override a setting of the host or of the model, e.g. context_tokens=131072",
    )  # fmt: skip
    beside.add_flags(plan)
    plan.add_argument("--json", action="store_true", help="print the plan as JSON, schema 1")
    plan.set_defaults(run=plan_command)
    on_inventory.add_commands(commands)
    return parser


def plan_command(options: argparse.Namespace) -> int:
    """Show the plan of a model on a machine, a comparison of several models, or the plans of an inventory's hosts."""
    if options.inventory:
        return plan_inventory(options)
    if not options.model:
        raise UsageError("--machine: give a model too, such as --model hf:OWNER/REPO/FILE.gguf")
    host = read_machine(options.machine)
    changes = parse_changes(options.changes)
    changes |= beside.changes(options, changes)
    if options.together or any(key.rpartition(".")[2] == "copies" for key in changes):
        return _together(options, host, changes)
    if options.compare or len(options.model) > 1:
        return _compare(options, host, changes)
    if options.min_speed:
        raise UsageError("--min-speed: needs a comparison: add --compare, or give several models")
    settings = settings_for(options.model[0], default_data(), changes)
    model = _read(settings)
    planner = partial(_plan, host, settings, model)
    result = planner(settings.models[0], model.header)
    if isinstance(result, Refusal):
        result = replace(result, suggestions=(*result.suggestions, *_siblings_that_fit(host, settings, result)))
    if options.json:
        out(json_text({**result.to_json(), **beside.to_json(settings.models[0], model)}))
    else:
        alternatives: tuple[str, ...] = ()
        if isinstance(result, Plan):
            alternatives = tuple(what_if(planner, settings.models[0], model.header, result))
        alternatives = (*host.notes, *alternatives)
        title = f"{settings.models[0].source} on {host.machine.hostname}"
        out(tables.table(result, title, tables.Look.of(sys.stdout), alternatives))
    return PLANNED if isinstance(result, Plan) else REFUSED


def plan_inventory(options: argparse.Namespace) -> int:
    """Show the plans of an inventory's hosts; returns the worst host's exit status."""
    if options.model or options.changes or options.compare or options.together or options.min_speed:
        raise UsageError(
            "--inventory: has its own models and settings: leave out --model, --set, --compare, --together and"
            " --min-speed"
        )
    if given := [flag for flag, (setting, *_) in beside.FLAGS.items() if getattr(options, setting)]:
        raise UsageError(f"--inventory: has its own settings: leave out {given[0]}")
    return on_inventory.run("tasks.lib.over_hosts", options)


def _together(options: argparse.Namespace, host: Described, changes: dict[str, Any]) -> int:
    if options.compare or options.min_speed:
        raise UsageError("--together: plans models that are served together: leave out --compare and --min-speed")
    settings = with_copies(settings_for_all(options.model, default_data(), changes), host.machine)
    if isinstance(settings, Refusal):
        raise UsageError(f"--set copies: {settings.reason}")
    models = labels(options.model, settings)
    # Copies have the same files, and are read once.
    one_each = {beside.sources(one): replace(settings, models=(one,)) for one in settings.models}
    with ThreadPoolExecutor(READERS) as pool:
        read = dict(zip(one_each, pool.map(_read, one_each.values()), strict=True))
    files = [read[beside.sources(one)] for one in settings.models]
    measured = Measurements(host_bytes_per_s=host.host_bytes_per_s)
    requests = [(one, model.header) for one, model in zip(settings.models, files, strict=True)]
    companions = {one.name: beside.headers(model) for one, model in zip(settings.models, files, strict=True)}
    results = plan_host(host.machine, requests, settings, measurements=measured, companions=companions)
    if options.json:
        told = [beside.to_json(one, model) for one, model in zip(settings.models, files, strict=True)]
        out(json_text(together.to_json(models, results, host.machine.hostname, told)))
    else:
        out(together.text(models, results, host.machine.hostname, tables.Look.of(sys.stdout)))
    return PLANNED if all(isinstance(result, Plan) for result in results) else REFUSED


def _compare(options: argparse.Namespace, host: Described, changes: dict[str, Any]) -> int:
    models = options.model
    if options.compare:
        settings = settings_for("hf:any/any/any.gguf", default_data(), changes)
        models = [quantisation for model in options.model for quantisation in _quantisations(model, settings)]
        if not models:
            raise UsageError(f"--compare: there is no GGUF model in {', '.join(options.model)}")
    compared = _options(host, list(dict.fromkeys(models)), changes, sys.stderr.isatty())
    hostname, min_speed = host.machine.hostname, options.min_speed
    if options.json:
        out(json_text(compare.to_json(compared, hostname, min_speed)))
    else:
        out(tables.comparison_table(compared, hostname, min_speed, tables.Look.of(sys.stdout)))
    return PLANNED if compare.best(compared, min_speed) else REFUSED


def _options(host: Described, models: Sequence[str], changes: dict[str, Any], progress: bool) -> list[compare.Option]:
    """All models with their plans: the headers are read concurrently, the plans are made one after another."""
    data = default_data()
    settings = [settings_for(model, data, changes) for model in models]
    compared = []
    with ThreadPoolExecutor(READERS) as pool:
        for number, read in enumerate(pool.map(_read_or_problem, settings), 1):
            compared.append(_option(host, settings[number - 1], models[number - 1], read))
            if progress:
                err(f"{number} of {len(models)} headers", end="\r" if number < len(models) else "\n")
    return compared


def _option(host: Described, settings: Settings, name: str, read: ModelFiles | str) -> compare.Option:
    if isinstance(read, str):  # the problem of reading it
        return compare.Option(name, problem=read)
    return compare.Option(name, read.header, _plan(host, settings, read, settings.models[0], read.header))


def _read_or_problem(settings: Settings) -> ModelFiles | str:
    try:
        return _read(settings)
    except (GgufError, source.SourceError) as error:
        return str(error)


def _read(settings: Settings) -> ModelFiles:
    return beside.read(settings.models[0], settings.hub_endpoint, hub_token(settings), network(settings))


def _plan(host: Described, settings: Settings, model: ModelFiles, instance: Instance, header: Header) -> Plan | Refusal:
    """The plan of an instance; `header` may be that of another quantisation than the model's."""
    measured, companions = Measurements(host_bytes_per_s=host.host_bytes_per_s), {instance.name: beside.headers(model)}
    return plan_host(host.machine, [(instance, header)], settings, measurements=measured, companions=companions)[0]


def _quantisations(model: str, settings: Settings) -> dict[str, int]:
    """Bytes by source of every quantisation in the model's repository."""
    return source.quantisations(
        model, endpoint=settings.hub_endpoint, token=hub_token(settings), network=network(settings)
    )


def _siblings_that_fit(host: Described, settings: Settings, refusal: Refusal) -> list[str]:
    """Suggestions for a refused model of the Hub: its repository's next smaller quantisations that fit this machine."""
    model = settings.models[0].source
    rows = refusal.ledger
    available = sum(row.used_bytes + row.free_bytes for row in rows)
    weights = sum(row.weights_bytes for row in rows)
    try:
        sizes = _quantisations(model, settings) if model.startswith("hf:") and rows else {}
    except source.SourceError:
        return []  # without the repository's list the refusal has no such suggestions
    smaller = [name for name in sorted(sizes, key=lambda name: -sizes[name]) if sizes[name] < min(available, weights)]
    settings_by_name = {name: replace(settings, models=(replace(settings.models[0], source=name, sha256=None),))
                        for name in smaller[:SIBLINGS_TRIED]}  # fmt: skip
    siblings = [_option(host, changed, name, _read_or_problem(changed)) for name, changed in settings_by_name.items()]
    return [
        f"take {option.source}: {option.weights_bytes / tables.GIB:.1f} GiB of weights, at about"
        f" {tables.rate(option.tokens_per_s)} tokens/s"
        for option in siblings
        if isinstance(option.result, Plan)
    ]
