"""Stage: print what each host will run and why, before anything is compiled or downloaded."""

from __future__ import annotations

from dataclasses import replace

from pyinfra import host
from pyinfra.api.deploy import deploy

from llamafleet.cli import tables, usage
from tasks.lib.decision import decision
from tasks.lib.usage import reached_by


@deploy("Plan")
def plan() -> None:
    """Print the plan of every instance as a table, and what the run will do. A host that cannot hold its models
    was refused by name; the other hosts go on."""
    now = decision()
    if now is None:
        return
    for serving in now.desired.servings:
        # What is wrong with the host is said once, by its notes.
        host.log(tables.table(replace(serving.plan, problems=()), f"{serving.name} on {host.name}"))
    for note in now.desired.inputs.notes:
        host.log(note)
    if now.desired.why:
        host.log(now.desired.why)
    for name, reasons in now.changes.services.items():
        host.log(f"to do: serve {name}: {', '.join(reasons)}")
    for name, reasons in now.changes.refreshed.items():
        host.log(f"to do: set {name} right while its server runs on: {', '.join(reasons)}")
    for name, reasons in now.changes.liveness.items():
        host.log(f"to do: install the liveness check of {name}: {', '.join(reasons)}")
    for reason in (*now.changes.of_host(), *(one.phrase for one in now.changes.paths.values() if one.place.instance)):
        host.log(f"to do: {reason}")
    for name in now.changes.note:
        host.log(f"to do: write the plan.json of {name} again, since its inputs changed; its service stays as it is")
    if not now.changes.any and not now.changes.note:
        urls = [f"{one.name} at {usage.url(one.instance, reached_by(host))}" for one in now.desired.servings]
        host.log(f"nothing to do: everything is as planned{': ' if urls else ''}{', '.join(urls)}")
