"""Stage: ask the built llama-server itself what it would allocate with the planned flags.

The plan is made from the model's header, before anything is built. Here the binary and the model are there: where
they disagree with the ledger, the plan is made again with the binary's numbers, and what follows installs that one.
"""

from __future__ import annotations

from pyinfra.api.deploy import deploy

from tasks.lib import memory_check as asking
from tasks.lib import operations
from tasks.lib.decision import situation


@deploy("Verify the plan")
def verify() -> None:
    """Ask about every plan that is to be installed and was not asked about with this build."""
    now = situation()
    if now is None:
        return
    names = [one.instance.name for one in now.to_verify()]
    operations.ask_server(
        name=f"Ask llama-server what it would allocate for {', '.join(names) or 'its plans'}",
        needed=bool(names), settle=asking.agree,
    )  # fmt: skip
    operations.note_plans(name="Note the plans of services that stay as they are", records=asking.records)
