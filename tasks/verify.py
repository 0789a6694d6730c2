"""Stage: ask the built llama-server itself what it would allocate with the planned flags.

The plan is made from the model's header, before anything is built. Now the binary and the model are on the host: where
the binary disagrees with the ledger, the plan is made again with the binary's numbers, and later stages install that.

Decision 4: docs/decisions/0004-the-binary-is-asked-before-it-is-trusted.md.
"""

from __future__ import annotations

from pyinfra.api.deploy import deploy

from tasks.lib import memory_check, operations
from tasks.lib.decision import for_stage


@deploy("Verify the plan")
def verify() -> None:
    """Ask about every plan that is to be installed, unless this build was asked about it before."""
    now = for_stage("verify")
    if now is None or not now.has_work:
        return
    names = now.changes.verify
    operations.ask_server(
        name=f"Ask llama-server what it would allocate for {', '.join(names) or 'its plans'}",
        needed=bool(names), check=memory_check.check_plans,
    )  # fmt: skip
    operations.note_plans(name="Note the plans of services that stay as they are", records=memory_check.changed_records)
