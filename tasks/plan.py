"""Stage: say what each host will run and why, before anything is compiled or downloaded."""

from __future__ import annotations

from pyinfra import host
from pyinfra.api.deploy import deploy

from llamafleet.cli import tables as show
from tasks.lib.decision import situation


@deploy("Plan")
def plan() -> None:
    """The plan of every instance as a table, and what the run will do because of it. A host that
    cannot hold its models has been refused by name; the others go on."""
    now = situation()
    if now is None:
        return
    for serving in now.servings:
        host.log(show.table(serving.plan, f"{serving.instance.name} on {host.name}"))
    if now.why:
        host.log(now.why)
    for name, reasons in now.work.services.items():
        host.log(f"to do: serve {name}: {', '.join(reasons)}")
    for serving in now.to_note():
        host.log(f"to do: note the plan of {serving.instance.name}, whose inputs changed; it runs on as it is")
    if not now.work.any and not now.to_note():
        host.log("nothing to do: everything is as planned")
