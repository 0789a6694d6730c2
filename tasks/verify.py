"""Stage: ask the built llama-server itself what it would allocate with the planned flags.

The plan is made from the model's header, before anything is built. Here the binary and the model are there: where
they disagree with the ledger, the plan is made again with the binary's numbers, and what follows installs that one.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from pyinfra import logger
from pyinfra.api.deploy import deploy
from pyinfra.api.host import Host

from llamafleet.ledger import MIB, TRAITS
from llamafleet.plan import Plan
from llamafleet.verified import Answer, question, say, settle
from tasks import operations, remote
from tasks.situation import EXPECTED, Situation, command, remembered, replan, situation

# What a GPU must have free beside the running server, over what a context takes: the server's pools may be growing.
SPARE_BYTES = 256 * MIB


@deploy("Verify the plan")
def verify() -> None:
    """Ask about every plan that is to be installed and was not asked about with this build."""
    now = situation()
    if now is None:
        return
    names = [one.instance.name for one in now.to_verify()]
    operations.ask_server(
        name=f"Ask llama-server what it would allocate for {', '.join(names) or 'its plans'}",
        needed=bool(names), settle=agree,
    )  # fmt: skip


def agree(host: Host) -> bool:
    """Plan and binary agree afterwards, and the situation is that of the plan they agree on; False if they cannot."""
    now = situation()
    assert now is not None, "a host that was refused has nothing to verify"
    try:
        settled = settle(
            lambda adjustments: now.examined.choose(adjustments).answers,
            lambda plan: ask(host, now, plan),
            now.examined.adjustments(),
            lambda plan: is_known(now, plan),
        )
        for name, seen in settled.verified.items():
            host.log(say(name, seen))
        again = replan(replace(now.examined.choose(settled.adjustments), answers=settled.answers), settled.verified)
    except EXPECTED as error:
        host.log_styled(f"refused: {error}", fg="red", log_func=logger.error)
        return False
    _say_what_changed(host, now, again)
    return True


def is_known(now: Situation, plan: Plan) -> bool:
    """Is there nothing to ask: was this plan asked about before, or is it not to be installed?"""
    if remembered(now.examined, now.build, plan) is not None:
        return True
    planned = next(one for one in now.servings if one.instance.name == plan.instance)
    return planned.plan.argv == plan.argv and plan.instance not in now.work.services


def ask(host: Host, now: Situation, plan: Plan) -> Answer:
    """What llama-server says of a plan, asked on the host beside what runs there."""
    return Answer(**remote.run_json(host, remote.program("verify.py", json.dumps(spec(now, plan)))))


def spec(now: Situation, plan: Plan) -> dict[str, Any]:
    """What `llamafleet/remote/verify.py` needs to know."""
    models = zip(now.settings.models, now.examined.models, strict=True)
    instance, model = next(pair for pair in models if pair[0].name == plan.instance)
    return {
        "name": plan.instance,
        "command": question(command(now.build, instance, model, plan)),
        "environment": dict(plan.environment),
        "groups": now.survey.found.gpu_groups if plan.backend in ("hip", "vulkan") else (),
        "gpus": [gpu.uuid for gpu in plan.gpus] if plan.backend == "cuda" else [],
        "room_bytes": TRAITS[plan.backend].overhead_bytes + SPARE_BYTES,
    }


def _say_what_changed(host: Host, before: Situation, after: Situation) -> None:
    """The instances whose plan is another one than the run began with."""
    for old, new in zip(before.servings, after.servings, strict=True):
        if old.plan.argv != new.plan.argv:
            host.log(f"{new.instance.name}: planned again: {' '.join(_changed(old.plan, new.plan))}")


def _changed(old: Plan, new: Plan) -> list[str]:
    """The new plan's flags whose values are others, as words."""
    before = dict(zip(old.argv, old.argv[1:], strict=False))
    pairs = zip(new.argv, new.argv[1:], strict=False)
    return [word for flag, value in pairs if flag.startswith("--") and before.get(flag) != value
            for word in (flag, value)]  # fmt: skip
