"""Asking the built llama-server on a host what it would allocate, and planning again with what it says."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from pyinfra import logger
from pyinfra.api.host import Host

from llamafleet.host.backends import TRAITS
from llamafleet.memory.ledger import NO_CORRECTION
from llamafleet.planner.reconcile import Answer, Settled, compare, limits, question, say, settle
from llamafleet.planner.result import Plan
from llamafleet.units import MIB
from tasks.lib import remote
from tasks.lib.decision import EXPECTED, Serving, Situation, command, remembered, replan, situation

# What a GPU must have free beside the running server, over what a context takes: the server's pools may be growing.
SPARE_BYTES = 256 * MIB


def agree(host: Host) -> bool:
    """Ask until plan and binary agree; the situation is then that of the plan they agree on. False if they cannot."""
    now = _now()
    try:
        settled = settle(
            lambda corrections: now.examined.choose(corrections).answers,
            lambda plan: _ask(host, now, plan),
            now.corrections,
            lambda plan: _is_known(now, plan),
        )
        _go_on(host, now, settled)
    except EXPECTED as error:
        return _refused(host, error)
    return True


def agree_with(host: Host, name: str, told: dict[str, int]) -> bool:
    """The same after the switch has asked, since the GPU had no room for the question beside the old server, and the
    binary wants more than there is: the next plan is asked about in the next switch."""
    now = _now()
    plan = _by_name(now)[name].plan
    try:
        corrections = dict(now.corrections)
        extra = corrections.get(name, NO_CORRECTION)
        corrections[name] = extra.plus(compare(plan, Answer(told), extra).differences)
        choice = now.examined.choose(corrections)
        unasked = {
            one.instance: compare(one, Answer(None, "asked in the switch", room=False), corrections[name], 2)
            for one in choice.answers
            if isinstance(one, Plan) and one.instance == name
        }
        again = _go_on(host, now, Settled(choice.answers, corrections, unasked))
    except EXPECTED as error:
        return _refused(host, error)
    if _by_name(again)[name].plan.argv == plan.argv:
        return _refused(
            host, f"models: {name}: llama-server asks for more than the plan gives, and no other plan is left"
        )
    return True


def _now() -> Situation:
    now = situation()
    assert now is not None, "a host that was refused has nothing to verify"
    return now


def _refused(host: Host, why: object) -> bool:
    host.log_styled(f"refused: {why}", fg="red", log_func=logger.error)
    return False


def _is_known(now: Situation, plan: Plan) -> bool:
    """Is there nothing to ask: was this plan asked about before, or is it not to be installed?"""
    if remembered(now.examined, now.build, plan) is not None:
        return True
    return _by_name(now)[plan.instance].plan.argv == plan.argv and plan.instance not in now.work.services


def _ask(host: Host, now: Situation, plan: Plan) -> Answer:
    """What llama-server says of a plan, asked on the host beside what runs there."""
    return Answer(**remote.run_json(host, remote.program("verify.py", "ask", json.dumps(spec(now, plan)))))


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


def files(serving: Serving) -> dict[str, str]:
    """What is staged of an instance; with the question where it could not be asked beside the running server."""
    staged = {serving.service.unit: serving.service.unit_text, "plan.json": serving.service.plan_json}
    staged |= serving.service.liveness
    now = _now()
    seen, old = serving.verified, now.survey.found.instances.get(serving.instance.name)
    if seen is not None and not seen.room and old is not None and old.active == "active":
        asked = {**spec(now, serving.plan), **limits(serving.plan)}
        staged["question.json"] = json.dumps(asked)
    return staged


def records() -> dict[str, str]:
    """The plan.json, by instance, of those whose service stays as it is; what the host itself noted there is kept."""
    now = situation()
    if now is None:
        return {}
    found = {one.instance.name: now.survey.found.instances[one.instance.name].record for one in now.to_note()}
    noted = {name: {**(found[name] or {}), **one.record} for name, one in _by_name(now).items() if name in found}
    return {name: json.dumps(record, indent=1) + "\n" for name, record in noted.items()}


def _by_name(now: Situation) -> dict[str, Serving]:
    return {one.instance.name: one for one in now.servings}


def _go_on(host: Host, before: Situation, settled: Settled) -> Situation:
    """The situation with the plans that were settled on, and what is said of them."""
    for name, seen in settled.verified.items():
        host.log(say(name, seen))
    choice = replace(before.examined.choose(settled.corrections), answers=settled.answers)
    after = replan(choice, settled.corrections, settled.verified)
    for old, new in zip(before.servings, after.servings, strict=True):
        if old.plan.argv != new.plan.argv:
            host.log(f"{new.instance.name}: planned again: {' '.join(_changed(old.plan, new.plan))}")
    return after


def _changed(old: Plan, new: Plan) -> list[str]:
    """The new plan's flags whose values are others, as words."""
    before = dict(zip(old.argv, old.argv[1:], strict=False))
    pairs = zip(new.argv, new.argv[1:], strict=False)
    return [word for flag, value in pairs if flag.startswith("--") and before.get(flag) != value
            for word in (flag, value)]  # fmt: skip
