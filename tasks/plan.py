"""Stage: print what each host will run and why, before anything is compiled or downloaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from pyinfra import host, logger
from pyinfra.api.deploy import deploy
from pyinfra.context import ctx_host

from llamafleet.cli import tables, usage
from llamafleet.planner import stability
from llamafleet.service.desired import Serving
from llamafleet.service.measured import chance, tuning_notes
from llamafleet.service.tune import in_lines, wishes
from tasks.lib import switching, text_diffs
from tasks.lib.decision import Decision, decision
from tasks.lib.usage import left_to_do, reached_by


@deploy("Plan")
def plan() -> None:
    """Print the plans of new and changed instances as tables, and what the run will do; a host without changes has one
    line. With `-v` all plans are printed, with `--diff` how prompt files differ. A host that cannot hold its models was
    refused by name; the other hosts go on."""
    now = decision()
    if now is None:
        return
    for text in lines(now, host.name, reached_by(host), everything=host.state.print_noop_info):
        host.log(text)
    at_once = now.desired.settings.switch_at_once
    for text in switching.not_a_rollout(ctx_host.get(), now.changes.services, at_once):
        host.log(text, logger.warning)
    if host.state.config.DIFF:
        for text in text_diffs.differences(now.desired, text_diffs.from_host(ctx_host.get())):
            host.log(text)


def lines(now: Decision, name: str, reached: str, *, everything: bool) -> Iterator[str]:
    """What is printed of a host of that name, which this machine reaches by `reached`; `everything`: with `-v`."""
    for serving in now.desired.servings:
        if everything or serving.name in now.changes.services:
            # What is wrong with the host is said once, by its notes.
            plain = replace(serving.plan, problems=())
            chances = [one] if (one := chance(now.desired.inputs, serving.plan)) else []
            title = f"{serving.name} on {name}"
            yield tables.table(plain, title, alternatives=chances, measured=_measured(now, serving))
    if not now.has_work:
        yield _in_one_line(now, reached)
    if not now.changes.any:  # else it is said at the end
        yield from left_to_do(now.desired, now.desired.installed.left)
    yield from _to_do(now, everything)


def _to_do(now: Decision, everything: bool) -> Iterator[str]:
    changes, desired = now.changes, now.desired
    yield from in_lines(wishes(desired, as_set=True))
    if everything or changes.any:
        yield from desired.inputs.notes
        yield from (desired.why,) if desired.why else ()
    else:
        yield from (f"the host: {problem}" for problem in desired.machine.problems)
        yield from tuning_notes(desired.inputs)
    yield from (f"to do: {phrase}" for phrase in changes.to_do())


def _in_one_line(now: Decision, reached: str) -> str:
    """Of a host on which everything is as planned: where its instances serve, and how fast, as their gates measured."""
    instances = ", ".join(_instance(now, serving, reached) for serving in now.desired.servings)
    why = f"; {now.desired.why}" if now.desired.why not in ("", stability.SAME_INPUTS) else ""
    return f"nothing to do: everything is as planned{': ' if instances else ''}{instances}{why}"


def _instance(now: Decision, serving: Serving, reached: str) -> str:
    measured = _measured(now, serving)
    return f"{serving.name} at {usage.url(serving.instance, reached)}{f' ({measured}, measured)' if measured else ''}"


def _measured(now: Decision, serving: Serving) -> str:
    return usage.speeds(now.desired.inputs.measured_by_gate(serving.plan))
