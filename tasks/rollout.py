"""Deploy to the hosts of an inventory wave by wave; `llamafleet rollout --inventory` runs this.

    python -m tasks.rollout INVENTORY [--waves 1,25%,100%] [--limit NAME]... [--exclude NAME]... [--dry] [--json]

Each wave is a run of `deploy.py` over its hosts, as `pyinfra INVENTORY llamafleet.deploy --limit HOST` is one, in this
process: what was looked up and built for one wave is known to the next. The first wave with a host that fails is the
last. What is left to do is read from the hosts each time, so that a rollout goes on where another one ended, however
that was.

Exit status: 0 all hosts are as planned, 1 a host failed, was refused or cannot be read, 2 the inventory or an option
cannot be used or leaves no host, 130 after Ctrl-C.

Decision 12: docs/decisions/0012-a-fleet-moves-in-waves.md.
"""

from __future__ import annotations

import pyinfra_cli  # isort: skip  # first: it makes sockets cooperative before anything uses them  # noqa: F401

import argparse
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import gevent
import pyinfra
from pyinfra import logger
from pyinfra.api.config import Config
from pyinfra.api.connect import connect_all, disconnect_all
from pyinfra.api.exceptions import PyinfraError
from pyinfra.api.host import Host
from pyinfra.api.operations import run_ops
from pyinfra.api.output import set_echo, set_formatter
from pyinfra.api.state import State, StateStage
from pyinfra.context import ctx_config, ctx_inventory, ctx_state
from pyinfra_cli.log import setup_logging
from pyinfra_cli.util import load_func

from llamafleet import stages
from llamafleet.fleet.rollout import End, HostState, Rollout
from llamafleet.fleet.waves import USUAL, WavesError, sizes
from llamafleet.printable import err, json_text, one_line, out
from llamafleet.service.refusals import Refused
from tasks.lib import decision, ends, gateway_drains, output, switching, to_do
from tasks.lib.groups import is_gateway, is_monitor
from tasks.lib.over_hosts import over_hosts, read

DONE, FAILED, BAD_INPUT = 0, 1, 2
SWITCH_SECONDS, LOOK_SECONDS = 600.0, 5.0  # to wait for a switch that another run began, and between two looks


def look(host: Host) -> HostState | str:
    """What the host serves, and what a run would do there, once no switch is under way there: one of a run that was
    killed goes on, and would change what was read."""
    deadline = time.monotonic() + SWITCH_SECONDS
    while True:
        now = decision.decide(host)
        if isinstance(now, Refused):
            return f"refused: {now}"
        under_way = [job for job in now.desired.installed.jobs if job.startswith("switch-")]
        if not under_way or time.monotonic() > deadline:
            return HostState.of(host.name, now.desired, now.changes, switching.wanted(host))
        host.log(f"waiting for {under_way[0]}, which another run began")
        gevent.sleep(LOOK_SECONDS)


@dataclass(frozen=True)
class Wave:
    """What became of a wave: why hosts failed, by name, and whether anything was changed on any host."""

    failed: Mapping[str, str]
    was_executed: bool


def _run(
    inventory: Path, choose: Callable[[Sequence[Host]], list[Host]], act: Callable[[State], None]
) -> State | None:  # fmt: skip
    """Connect to the chosen hosts, and act on them in pyinfra's prepare phase; None where none is chosen. The result
    has the hosts that failed. Raises PyinfraError where the inventory cannot be read."""
    state = State(check_for_changes=False)
    state.cwd = os.getcwd()
    with ctx_state.use(state), ctx_config.use(Config()):
        hosts = read(inventory)
        with ctx_inventory.use(hosts):
            if not (chosen := choose(list(hosts))):
                return None
            state.init(hosts, ctx_config.get(), initial_limit=chosen)
            try:
                state.set_stage(StateStage.Connect)
                connect_all(state)
                state.set_stage(StateStage.Prepare)
                act(state)
            except PyinfraError as error:
                if not state.failed_hosts:  # else it says that no host is left
                    raise
                logger.debug(str(error))
            finally:
                state.set_stage(StateStage.Disconnect)
                disconnect_all(state)
                gateway_drains.disconnect(state)
    return state


def _execute(state: State) -> None:
    state.set_stage(StateStage.Execute)
    run_ops(state)


def _failed(state: State | None) -> dict[str, str]:
    hosts = state.failed_hosts if state else ()
    return {host.name: ends.reason(host.name) or "see above" for host in hosts}


def deploy(inventory: Path, names: Collection[str], rollout: Collection[str]) -> Wave:
    """Run the whole `deploy.py` on these hosts of the rollout. Where one cannot be reached or is refused, nothing is
    changed on any. Raises PyinfraError where the inventory cannot be read."""
    was_executed = False

    def act(state: State) -> None:
        nonlocal was_executed
        gateway_drains.put_back(state, rollout)
        if not state.failed_hosts:
            load_func(state, stages.deploy)
        if not state.failed_hosts:
            was_executed = True
            _execute(state)

    state = _run(inventory, lambda hosts: [host for host in hosts if host.name in names], act)
    return Wave(_failed(state), was_executed)


def tell_gateways(
    inventory: Path, names: Collection[str], rollout: Collection[str], dry: bool = False
) -> dict[str, str]:
    """Let the gateways among the rollout's hosts learn of these hosts as they are now, and wait until every gateway of
    the inventory finds their servers up. With `dry` only `to_do` learns what would change there after the waves. By
    host, why that failed. Raises PyinfraError where the inventory cannot be read."""
    missing: dict[str, str] = {}

    def choose(hosts: Sequence[Host]) -> list[Host]:
        gateways = [host for host in hosts if is_gateway(host)]
        mine = [host for host in gateways if host.name in rollout]
        return [host for host in hosts if host.name in names or host in mine] if gateways else []

    def act(state: State) -> None:
        if dry:
            decision.count_as_made(state.active_hosts)
        load_func(state, stages.gateway)
        if not dry and not state.failed_hosts:
            gateway_drains.put_back(state, rollout)
            _execute(state)
            missing.update(gateway_drains.not_up(state, names))

    state = _run(inventory, choose, act)
    return {**missing, **_failed(state)}


def tell_monitors(inventory: Path, rollout: Collection[str], dry: bool = False) -> dict[str, str]:
    """Let the rollout's hosts, also those that are as planned, watch and be watched as the inventory says by now. With
    `dry`, result and exceptions as of `tell_gateways`."""

    def choose(hosts: Sequence[Host]) -> list[Host]:
        are_watched = any(is_monitor(host) for host in hosts)
        return [host for host in hosts if host.name in rollout] if are_watched else []

    def act(state: State) -> None:
        if dry:
            decision.count_as_made(state.active_hosts)
        load_func(state, stages.monitoring)
        if not dry and not state.failed_hosts:
            _execute(state)

    return _failed(_run(inventory, choose, act))


def roll_out(inventory: Path, rollout: Rollout) -> End:
    """Deploy wave by wave, until one fails. Raises PyinfraError where the inventory cannot be read any more."""
    switching.begin_rollout()
    for number, names in enumerate(rollout.waves, 1):
        logger.info(f"--> {rollout.title(number).capitalize()}")
        wave = deploy(inventory, names, rollout.hosts)
        failed = dict(wave.failed)
        if wave.was_executed:
            # At the end of all hosts: an earlier rollout may have ended before its gateways were told.
            told = rollout.hosts if number == len(rollout.waves) else names
            failed |= tell_gateways(inventory, set(told) - set(failed), rollout.hosts)
        if not failed and number == len(rollout.waves):
            failed = tell_monitors(inventory, rollout.hosts)
        if failed:
            return End(rollout, number, failed, wave.was_executed)
    return End(rollout, len(rollout.waves))


def main(arguments: list[str]) -> int:
    options = _parsed(arguments)
    ends.take_interrupts()
    try:
        wanted = sizes(options.waves)
        hosts = over_hosts(options.inventory, options.limit, look, options.exclude)
        problems = {name: state for name, state in hosts.items() if isinstance(state, str)}
        if problems:
            return _unread(problems)
        return _act(options, Rollout.of({n: s for n, s in hosts.items() if isinstance(s, HostState)}, wanted))
    except WavesError as error:
        err(f"llamafleet: {error}")
    except PyinfraError as error:
        err(f"llamafleet: {options.inventory}: {error}")
    return BAD_INPUT


def _unread(problems: Mapping[str, str]) -> int:
    for name, problem in problems.items():
        err(one_line(f"{name}: {problem}"))
    err(
        "the rollout has not begun: each of its hosts has to be reached, and to accept what the inventory asks for. "
        f"Mend these, or leave them out: {' '.join(f'--exclude {shlex.quote(name)}' for name in problems)}"
    )
    return FAILED


def _act(options: argparse.Namespace, rollout: Rollout) -> int:
    _speak_as_pyinfra()
    if options.dry:
        failed = _tell_all(options.inventory, rollout, dry=True)
        _print(options, replace(rollout, afterwards=to_do.said()))
        return FAILED if failed else DONE
    if not rollout.waves:
        _print(options, rollout)
        return FAILED if _tell_all(options.inventory, rollout) else DONE
    if not options.json:
        _print(options, rollout)
    end = roll_out(options.inventory, rollout)
    out(json_text(end.to_json()) if options.json else "\n".join(["", *end.lines(_again(options))]))
    return FAILED if end.failed else DONE


def _tell_all(inventory: Path, rollout: Rollout, dry: bool = False) -> dict[str, str]:
    failed = tell_gateways(inventory, rollout.hosts, rollout.hosts, dry)
    return failed or tell_monitors(inventory, rollout.hosts, dry)


def _print(options: argparse.Namespace, rollout: Rollout) -> None:
    out(json_text(rollout.to_json()) if options.json else "\n".join(rollout.lines()))


def _again(options: argparse.Namespace) -> str:
    words = ["llamafleet", "rollout", "--inventory", str(options.inventory)]
    words += ["--waves", options.waves] if options.waves != USUAL else []
    for flag in ("limit", "exclude"):
        words += [word for name in getattr(options, flag) for word in (f"--{flag}", name)]
    return shlex.join(words)


def _speak_as_pyinfra() -> None:
    """Print and order operations as pyinfra's own command does."""
    pyinfra.is_cli = True
    set_formatter(output.style)
    set_echo(output.echo)
    setup_logging(logging.INFO)


def _parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Deploy to the hosts of an inventory wave by wave.")
    parser.add_argument("inventory", type=Path)
    parser.add_argument("--waves", default=USUAL)
    parser.add_argument("--limit", action="append", default=[])
    parser.add_argument("--exclude", action="append", default=[])
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
