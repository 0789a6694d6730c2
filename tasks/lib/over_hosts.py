"""Run something on all hosts of an inventory, outside a deploy of pyinfra; `llamafleet plan --inventory` runs this.

    python -m tasks.lib.over_hosts INVENTORY [--limit NAME] [--json]

Exit status: 0 plans, 2 a host that could not be read or no host at all, 3 a refusal, 130 after Ctrl-C.
"""

from __future__ import annotations

import pyinfra_cli  # isort: skip  # first: it makes sockets cooperative before anything uses them  # noqa: F401

import argparse
import contextlib
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

import gevent
from paramiko import SSHException
from pyinfra import logger
from pyinfra.api.config import Config
from pyinfra.api.connect import connect_all, disconnect_all
from pyinfra.api.exceptions import PyinfraError
from pyinfra.api.host import Host
from pyinfra.api.inventory import Inventory
from pyinfra.api.state import State, StateStage
from pyinfra.context import ctx_config, ctx_host, ctx_inventory, ctx_state
from pyinfra_cli.inventory import make_inventory

from llamafleet import causes
from llamafleet.cli import beside, tables, usage
from llamafleet.host.learned import GatedSpeed
from llamafleet.planner.result import Plan, Refusal
from llamafleet.printable import err, json_text, one_line, out
from llamafleet.service.measured import chance, to_json
from llamafleet.service.refusals import Refused
from tasks.lib import ends, records, remote
from tasks.lib.decision import READ_ERRORS, read_inputs, with_measured

T = TypeVar("T")


@dataclass(frozen=True)
class Planned:
    """A plan or refusal for an instance, and what gates measured of that very plan."""

    result: Plan | Refusal
    measured: GatedSpeed | None
    companions: Mapping[str, Any] = field(default_factory=dict)  # the key of that name, where there are some
    tuned: Mapping[str, Any] = field(default_factory=dict)  # what measurements say of it, see `measured.to_json`
    chance: str = ""  # what measuring would try

    def to_json(self) -> dict[str, Any]:
        """The plan contract, with `measured`."""
        return {
            **self.result.to_json(),
            **self.companions,
            "measured": asdict(self.measured) if self.measured else None,
            **({"tuned": dict(self.tuned)} if self.tuned else {}),
        }


def plans(inventory: Path, limit: str | None = None) -> dict[str, dict[str, Planned] | str]:
    """Read every host of the inventory and plan its models; changes nothing.

    By host name: a plan or refusal for each instance, or a sentence that says why the host could not be read.
    """
    return over_hosts(inventory, limit, _plans_of)


def _plans_of(host: Host) -> dict[str, Planned] | str:
    try:
        inputs = read_inputs(host)
        if isinstance(inputs, Refused):
            return str(inputs)
        inputs, choice, unknown = with_measured(host, inputs)
    except READ_ERRORS as error:
        return str(error)
    return {
        one.name: Planned(
            result, inputs.measured_by_gate(result) if isinstance(result, Plan) else None,
            beside.to_json(one, inputs.models[one.name]), to_json(inputs.tunings.get(one.name), unknown),
            chance(inputs, result) if isinstance(result, Plan) else "",
        )
        for one, result in zip(inputs.settings.models, choice.results, strict=True)
    }  # fmt: skip


def over_hosts(
    inventory: Path, limit: str | Sequence[str] | None, action: Callable[[Host], T | str], exclude: Sequence[str] = ()
) -> dict[str, T | str]:
    """The action's result by host name, all hosts at once; a sentence for a host that cannot be reached. `limit` and
    `exclude` are groups, or hosts' names, which may have `*`, as pyinfra's. Raises PyinfraError, also where no host is
    left."""
    return over_all(inventory, limit, action, lambda _, problem: problem, exclude)


def over_all(
    inventory: Path, limit: str | Sequence[str] | None, action: Callable[[Host], T], lost: Callable[[Host, str], T],
    exclude: Sequence[str] = (),
) -> dict[str, T]:  # fmt: skip
    """As `over_hosts`; `lost` gives the result of a host that cannot be reached, by the host and a sentence. The
    connections are closed afterwards."""
    records.of_inventory(inventory)
    limits = (limit,) if isinstance(limit, str) else limit
    state = State(check_for_changes=False)
    with ctx_state.use(state), ctx_config.use(Config()):
        hosts = read(inventory)
        with ctx_inventory.use(hosts):
            wanted = [host for host in hosts if (not limits or _is_one(host, limits)) and not _is_one(host, exclude)]
            state.init(hosts, ctx_config.get(), initial_limit=wanted)
            state.set_stage(StateStage.Connect)
            # Raises where no host can be reached; the result names each of them.
            with contextlib.suppress(PyinfraError):
                connect_all(state)
            state.set_stage(StateStage.Prepare)
            try:
                jobs = {host.name: gevent.spawn(_in_context, host, action, lost) for host in wanted}
                gevent.joinall(jobs.values(), raise_error=True)
                return {name: job.value for name, job in jobs.items()}
            finally:
                disconnect_all(state)
                _close(wanted)


def _is_one(host: Host, patterns: Sequence[str]) -> bool:
    return any(one in host.groups or fnmatch(host.name, one) for one in patterns)


def read(inventory: Path) -> Inventory:
    """The hosts of the inventory, which is Python and is run. Raises PyinfraError with the line that fails."""
    try:
        return make_inventory(str(inventory), cwd=str(project_of(inventory)))
    except PyinfraError:
        raise
    except Exception as error:  # whatever an inventory does
        logger.debug(traceback.format_exc())
        raise PyinfraError(causes.of_inventory(error, str(inventory))) from error


def project_of(inventory: Path) -> Path:
    """Where pyinfra looks for `group_data`, which it runs, beside the inventory's own folder: the current folder if the
    inventory lies in it. Another folder may be a stranger's."""
    folder = inventory.resolve().parent
    return Path.cwd() if folder.is_relative_to(Path.cwd()) else folder


def _in_context(host: Host, action: Callable[[Host], T], lost: Callable[[Host, str], T]) -> T:
    if not host.connected:
        return lost(host, ends.reason(host.name) or "cannot be reached")
    with ctx_host.use(host):
        try:
            return action(host)
        except Exception as error:  # whatever it is, the other hosts are shown
            logger.debug(traceback.format_exc())
            return lost(host, f"cannot be read: {remote.said(error)}")


def _close(hosts: Sequence[Host]) -> None:
    """pyinfra leaves SSH connections open until its process ends."""
    for host in hosts:
        with contextlib.suppress(OSError, EOFError, SSHException):
            if client := getattr(host.connector, "client", None):
                client.close()


def parse(description: str, arguments: list[str], flags: Sequence[str] = (), **more: Any) -> argparse.Namespace:
    """The options of a command over an inventory: inventory, limit, json; `flags`: others without a value; `more`:
    others by name, with defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("inventory", type=Path)
    parser.add_argument("--limit")
    parser.add_argument("--json", action="store_true")
    for name in flags:
        parser.add_argument(f"--{name}", action="store_true")
    for name, default in more.items():
        parser.add_argument(f"--{name}", default=default)
    return parser.parse_args(arguments)


def status_of(run: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """The exit status of a command over an inventory: 2, with a line, where that cannot be used."""
    ends.take_interrupts()
    try:
        return run(options)
    except PyinfraError as error:
        err(f"llamafleet: {options.inventory}: {error}")
        return 2


def main(arguments: list[str]) -> int:
    return status_of(show, parse("Plan the models of an inventory on its hosts.", arguments))


def show(options: argparse.Namespace) -> int:
    """Print the plans. Raises PyinfraError."""
    hosts = plans(options.inventory, options.limit)
    if options.json:
        out(json_text({name: _as_json(answers) for name, answers in hosts.items()}))
    else:
        out("\n".join(_as_text(name, answers) for name, answers in hosts.items()))
    return _status(hosts)


def _status(hosts: Mapping[str, Mapping[str, Planned] | str]) -> int:
    if not hosts or any(isinstance(answers, str) for answers in hosts.values()):
        return 2
    all_answers = [answer for answers in hosts.values() if not isinstance(answers, str) for answer in answers.values()]
    return 0 if all(isinstance(answer.result, Plan) for answer in all_answers) else 3


def _as_json(answers: Mapping[str, Planned] | str) -> dict[str, Any]:
    if isinstance(answers, str):
        return {"error": answers}
    return {"models": {name: answer.to_json() for name, answer in answers.items()}}


def _as_text(host: str, answers: Mapping[str, Planned] | str) -> str:
    if isinstance(answers, str):
        return one_line(f"{host}: {answers}")
    return "\n".join(
        tables.table(
            answer.result, f"{name} on {host}", measured=usage.speeds(answer.measured),
            alternatives=[*answer.tuned.get("notes", ()), *([answer.chance] if answer.chance else [])],
        )
        for name, answer in answers.items()
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
