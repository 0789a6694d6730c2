"""`llamafleet`: what pyinfra cannot do. `llamafleet plan` shows a plan before anything is bought or built,
`llamafleet status` how the hosts of an inventory are.

Exit status: 0 a plan, or everything is fine; 1 something is not; 2 bad input; 3 a refusal.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import show, sources
from .gguf import GgufError
from .machine import Machine, MachineError
from .plan import Plan, Refusal, plan_host
from .settings import Instance, Settings, SettingsError

PLANNED, BAD_INPUT, REFUSED = 0, 2, 3
DEFAULTS = Path("inventory/group_data/all.py")
NAME, PORT = "model", 8080  # of the instance that is planned here; nothing is ever served under them


class UsageError(Exception):
    """The command line cannot be used; the message says what it should be."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
    except (UsageError, SettingsError, MachineError, GgufError, sources.SourceError) as error:
        print(f"llamafleet: {error}", file=sys.stderr)
        return BAD_INPUT
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llamafleet", description="Plan how llama-server uses a machine.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    plan = commands.add_parser("plan", help="show what a machine can carry", description=plan_command.__doc__)
    where = plan.add_mutually_exclusive_group(required=True)
    where.add_argument("--inventory", type=Path, help="read the hosts of a pyinfra inventory and plan their models")
    where.add_argument("--machine", type=Path, help="the machine file, JSON, - for standard input")
    plan.add_argument("--limit", help="with --inventory: one host or group of it")
    plan.add_argument("--model", help="with --machine: a path, a URL or hf:OWNER/REPO/FILE.gguf[@REVISION]")
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
    """Show the plan of one model on one machine, or of an inventory's models on its hosts, as a table or as JSON."""
    if options.inventory:
        return plan_inventory(options)
    if not options.model:
        raise UsageError("--machine: name the model too, --model hf:OWNER/REPO/FILE.gguf")
    machine = read_machine(options.machine)
    settings = settings_for(options.model, default_data(), parse_changes(options.changes))
    answer = _answer(machine, settings)
    if options.json:
        print(json.dumps(answer.to_json(), indent=2))
    else:
        print(show.table(answer, f"{settings.models[0].source} on {machine.hostname}"))
    return PLANNED if isinstance(answer, Plan) else REFUSED


def plan_inventory(options: argparse.Namespace) -> int:
    """Plans of every host of an inventory; the worst outcome is the exit status."""
    if options.model or options.changes:
        raise UsageError("--inventory: its models and settings are the inventory's own; no --model or --set")
    return _on_inventory("tasks.fleet", options)


def _on_inventory(module: str, options: argparse.Namespace) -> int:
    """Run a module of `tasks` in a process of its own: pyinfra replaces the standard library's sockets, which
    must happen before anything uses them."""
    if not options.inventory.is_file():
        raise UsageError(f"{options.inventory}: there is no such inventory file")
    command = [sys.executable, "-m", module, str(options.inventory)]
    command += ["--limit", options.limit] if options.limit else []
    command += ["--json"] if options.json else []
    root = str(Path(__file__).resolve().parent.parent)  # `tasks` lies beside the package
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode


def _answer(machine: Machine, settings: Settings) -> Plan | Refusal:
    instance = settings.models[0]
    token = os.environ.get("HF_TOKEN") or None
    if settings.hub_token_file:
        token = _text(Path(settings.hub_token_file).expanduser()).strip()
    files = sources.resolve(
        instance.source,
        endpoint=settings.hub_endpoint,
        token=token,
        mirrors=instance.mirrors,
        sha256=instance.sha256,
    )
    header = sources.read_header(files, token=token)
    return plan_host(machine, [(instance, header)], settings)[0]


def read_machine(path: Path) -> Machine:
    """The machine file. Raises `UsageError` or `MachineError`."""
    text = sys.stdin.read() if str(path) == "-" else _text(path)
    try:
        return Machine.from_json(json.loads(text))
    except ValueError as error:
        if isinstance(error, MachineError):
            raise
        raise UsageError(f"{path}: is not JSON: {error}") from error


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error


def default_data() -> dict[str, Any]:
    """The defaults, from `inventory/group_data/all.py` of this folder's checkout or of the package's."""
    package = Path(__file__).resolve().parent
    for root in (Path.cwd(), package.parent, package):
        if (root / DEFAULTS).is_file():
            values: dict[str, Any] = {}
            code = compile(_text(root / DEFAULTS), str(root / DEFAULTS), "exec")
            exec(code, values)  # noqa: S102 -- group data is Python, and the operator's own
            return {key: value for key, value in values.items() if not key.startswith("_")}
    raise UsageError(f"{DEFAULTS}: not found here or beside the package: run this in a checkout of llamafleet")


def parse_changes(changes: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE pairs; a value is a Python literal (131072, None, True, ["f16"]) or else a string."""
    parsed = {}
    for change in changes:
        key, mark, text = change.partition("=")
        if not mark or not key.isidentifier():
            raise UsageError(f"--set {change}: should be KEY=VALUE")
        try:
            parsed[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            parsed[key] = text
    return parsed


def settings_for(model: str, data: Mapping[str, Any], changes: Mapping[str, Any]) -> Settings:
    """Settings with one instance, the model; each change goes where its key belongs."""
    of_instance = {key: value for key, value in changes.items() if _is_of_instance(key)}
    if clash := of_instance.keys() & {"source"}:
        raise UsageError(f"--set {clash.pop()}: is given by --model")
    of_host = {key: value for key, value in changes.items() if key not in of_instance}
    source = model if ":" in model else str(Path(model).absolute())
    entry = {"name": NAME, "port": PORT, **of_instance, "source": source}
    return Settings.from_data({**data, **of_host, "models": [entry]})


def _is_of_instance(key: str) -> bool:
    """Does the key, or the known one that it resembles most, belong to the model?"""
    host, instance = set(Settings.__dataclass_fields__), set(Instance.__dataclass_fields__)
    near = difflib.get_close_matches(key, host | instance, n=1)
    return key in instance or (key not in host and bool(near) and near[0] in instance)


if __name__ == "__main__":
    sys.exit(main())
