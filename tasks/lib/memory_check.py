"""Ask the built llama-server on a host what it would allocate, and plan again where the ledger was wrong.

Decision 4: docs/decisions/0004-the-binary-is-asked-before-it-is-trusted.md.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from pyinfra.api.host import Host

from llamafleet.host import answers
from llamafleet.host.backends import TRAITS
from llamafleet.host.installed import InstalledInstance
from llamafleet.memory.ledger import NO_CORRECTION
from llamafleet.memory.placement import HOST
from llamafleet.planner import reconcile
from llamafleet.planner.result import Plan
from llamafleet.service import succession, unit
from llamafleet.service.desired import Serving
from llamafleet.service.record import record_text
from llamafleet.service.refusals import Refused
from llamafleet.settings.companions import PROJECTOR
from llamafleet.units import MIB
from tasks.lib import remote
from tasks.lib.decision import READ_ERRORS, Decision, decision, log_refused, refused_by, replan

# What a GPU must have free beside the running server, over what a context takes: the server's pools may be growing.
SPARE_BYTES = 256 * MIB
# verify.py gives llama-server 120 s, and systemd some more to start and stop it.
VERIFY_SECONDS = 240.0


def check_plans(host: Host) -> bool:
    """Ask and plan again until plan and binary agree, and go on with that plan. False if they cannot agree."""
    now = _now()
    try:
        reconciled = reconcile.reconcile(
            lambda corrections: now.desired.inputs.keep_or_replan(corrections).results,
            lambda plan: _ask(host, now, plan),
            now.desired.corrections,
            lambda plan: _is_known(now, plan),
        )
        decided = _go_on(host, now, reconciled)
    except READ_ERRORS as error:
        decided = refused_by(error)
    return _is_decided(host, decided)


def replan_after_switch(host: Host, name: str, binary_bytes: dict[str, int]) -> bool:
    """Re-plan after the in-switch memory check failed; the new plan is checked in the next switch.

    The check was made in the switch because the GPU had no room for it beside the old server; `binary_bytes`
    are the sizes by llama.cpp's names of devices. False if no other plan is left.
    """
    now = _now()
    plan = _by_name(now)[name].plan
    try:
        corrections = dict(now.desired.corrections)
        extra = corrections.get(name, NO_CORRECTION)
        corrections[name] = extra.plus(reconcile.compare(plan, reconcile.MemoryReport(binary_bytes), extra).differences)
        choice = now.desired.inputs.keep_or_replan(corrections)
        unasked = {
            new.instance: reconcile.compare(
                new, reconcile.MemoryReport(None, "asked in the switch", room=False), corrections[name], 2
            )
            for new in choice.results
            if isinstance(new, Plan) and new.instance == name
        }
        decided = _go_on(host, now, reconcile.Reconciled(choice.results, corrections, unasked))
    except READ_ERRORS as error:
        decided = refused_by(error)
    if isinstance(decided, Decision) and _by_name(decided)[name].plan.argv == plan.argv:
        decided = Refused.because(
            f"models: {name}: llama-server needs more memory than its plan has, and no other plan is left"
        )
    return _is_decided(host, decided)


def _now() -> Decision:
    now = decision()
    assert now is not None, "a host that was refused has nothing to verify"
    return now


def _is_decided(host: Host, decided: Decision | Refused) -> bool:
    if isinstance(decided, Refused):
        log_refused(host, decided)
    return isinstance(decided, Decision)


def _is_known(now: Decision, plan: Plan) -> bool:
    """Whether there is nothing to ask: the plan was asked about before, or it runs already."""
    if now.desired.remembered(plan) is not None:
        return True
    return _by_name(now)[plan.instance].plan.argv == plan.argv and plan.instance not in now.changes.services


def _ask(host: Host, now: Decision, plan: Plan) -> reconcile.MemoryReport:
    """llama-server's answer about a plan, asked on the host beside what runs there."""
    asked = json.dumps(spec(now, plan))
    command = remote.program("verify.py", "ask", asked, seconds=VERIFY_SECONDS)
    told = remote.run_json(host, command, answers.memory)
    if told.rejected:
        raise remote.RemoteError(
            f"models: {plan.instance}: llama-server would not start with these arguments and this model: "
            f"{told.rejected}: {way_out(told.rejected)}; nothing was stopped"
        )
    return reconcile.MemoryReport(told.told, told.why, told.room)


def way_out(rejected: str) -> str:
    """What to look at where llama-server rejects what it is given, by its own line."""
    if "invalid device" in rejected:
        return (
            "the build of llama.cpp has no such device on this host, because the build is without that backend, the "
            "driver is not ready, or the device is gone: see what llama-server --list-devices shows there"
        )
    return "see extra_flags and source"


def spec(now: Decision, plan: Plan) -> dict[str, Any]:
    """What `llamafleet/remote/verify.py` needs to know."""
    command = now.desired.command(plan)
    return {
        "name": plan.instance,
        "command": reconcile.question(command),
        "environment": {**now.desired.settings.environment, **plan.environment},
        "groups": unit.groups(plan.backend, now.desired.installed),
        "gpus": [gpu.uuid for gpu in plan.gpus] if plan.backend == "cuda" else [],
        "beside": reconcile.beside(command),
        "room_bytes": TRAITS[plan.backend].overhead_bytes + SPARE_BYTES + _made_beside(plan),
    }


def _made_beside(plan: Plan) -> int:
    """Bytes of a GPU that llama-server takes while it only measures: it makes a projector's buffers for that."""
    device, size = plan.reported_beside.get(PROJECTOR, (HOST, 0))
    return size if device != HOST else 0


def staged_files(serving: Serving) -> dict[str, str]:
    """The files that are staged for an instance, by name; question.json among them where llama-server must be asked
    in the switch, since it could not be asked beside the running server."""
    staged = {serving.service.unit: serving.service.unit_text, "plan.json": serving.service.plan_json}
    staged |= {**serving.service.liveness, **serving.service.demand}
    now = _now()
    verified = serving.verified
    if verified is not None and not verified.room and _makes_room(now, serving.name):
        staged["question.json"] = json.dumps({**spec(now, serving.plan), **reconcile.memory_limits(serving.plan)})
    return staged


def _makes_room(now: Decision, name: str) -> bool:
    """Whether a server of ours runs that is stopped in the instance's switch, as all are that started on demand."""
    instances = now.desired.installed.instances
    handovers = succession.handovers(now.desired, now.changes)
    stopped = next(({*one.names, *one.leaving} for one in handovers if name in one.names), {name})
    return any(one.active == "active" and (one.is_on_demand or other in stopped) for other, one in instances.items())


def refreshed_files(serving: Serving) -> dict[str, str]:
    """The files that replace those of an instance whose server runs on, by name."""
    service = serving.service
    record = {**kept_keys(_now().desired.installed.instances[serving.name]), **serving.record}
    return {service.unit: service.unit_text, "plan.json": record_text(record), **service.liveness,
            **service.demand}  # fmt: skip


def changed_records() -> dict[str, str]:
    """By instance, the new plan.json of those whose service stays as it is. Keys that the host itself added stay."""
    now = decision()
    if now is None:
        return {}
    servings, installed = _by_name(now), now.desired.installed.instances
    return {name: record_text({**kept_keys(installed[name]), **servings[name].record}) for name in now.changes.note}


def kept_keys(instance: InstalledInstance) -> dict[str, Any]:
    """What the host itself added to the installed plan.json: the preflight's result."""
    return {"preflight": dict(instance.preflight)} if instance.preflight is not None else {}


def _by_name(now: Decision) -> dict[str, Serving]:
    return {serving.name: serving for serving in now.desired.servings}


def _go_on(host: Host, before: Decision, reconciled: reconcile.Reconciled) -> Decision | Refused:
    """The decision with the plans that binary and ledger agree on; log what the binary said and what changes."""
    for name, verified in reconciled.verified.items():
        host.log(reconcile.summary(name, verified))
    choice = replace(before.desired.inputs.keep_or_replan(reconciled.corrections), results=reconciled.results)
    after = replan(choice, reconciled.corrections, reconciled.verified)
    if isinstance(after, Decision):
        for old, new in zip(before.desired.servings, after.desired.servings, strict=True):
            if old.plan.argv != new.plan.argv:
                host.log(f"{new.name}: planned again: {' '.join(changed_flags(old.plan, new.plan))}")
    return after


def changed_flags(old: Plan, new: Plan) -> list[str]:
    """The new plan's flags with other values than the old plan's, as words."""
    before = dict(zip(old.argv, old.argv[1:], strict=False))
    pairs = zip(new.argv, new.argv[1:], strict=False)
    return [word for flag, value in pairs if flag.startswith("--") and before.get(flag) != value
            for word in (flag, value)]  # fmt: skip
