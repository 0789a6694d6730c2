"""Plans with what tunes measured: each instance gets the settings of its record, where that holds on this host now.

Decision 23: docs/decisions/0023-tuned-by-measurement.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llamafleet.memory.ledger import Correction
from llamafleet.model.shape import Shape
from llamafleet.planner.pools import slot_tokens
from llamafleet.planner.result import Plan, Refusal
from llamafleet.planner.stability import Choice
from llamafleet.service.building import Run, wanted_build
from llamafleet.service.plan_inputs import PlanInputs
from llamafleet.service.refusals import Refused
from llamafleet.settings.schema import NEVER, Instance
from llamafleet.settings.workload import Workload
from llamafleet.tuning.candidates import DEFAULTS, SPECULATION, changes
from llamafleet.tuning.record import Fingerprint
from llamafleet.tuning.records import Tuning, in_words, tuning_of, without

# Names of what a tune changes, as many.
PLURALS = {
    "ubatch": "ubatches",
    "order of weights": "orders of weights",
    "cache": "types of the cache",
    "split": "splits between GPUs",
    "numa": "NUMA policies",
}

Planned = tuple[PlanInputs, Choice, Mapping[str, Correction]]


def with_records(inputs: PlanInputs, build: str, choice: Choice, corrections: Mapping[str, Correction]) -> Planned:
    """The inputs with the records that hold for this build key, their plans, and what llama-server allocates beyond the
    ledger; `choice` and `corrections` are those of the inputs without records. A record that cannot be planned with now
    is left out, and named."""
    tunings = {one.name: _tuning(inputs, one, build) for one in inputs.settings.models}
    while used := {name for name, tuning in tunings.items() if tuning.record}:
        made = _with(inputs, tunings)
        extra = made.corrections()
        again = made.keep_or_replan(extra)
        refused = {one.instance: one.reason for one in again.results if isinstance(one, Refusal)}
        if not refused:
            return made, again, extra
        # Those that are refused themselves first: the memory of others may then be enough.
        why = next(iter(refused.values()))
        tunings |= {name: without(tunings[name], refused.get(name, why)) for name in (used & refused.keys()) or used}
    return _with(inputs, tunings), choice, corrections


def with_commit(inputs: PlanInputs, commit: str) -> tuple[Planned, str]:
    """As `with_records`, outside a deploy, where nothing was asked about what the host's repositories offer; and why
    the records cannot be compared, empty where they are."""
    corrections = inputs.corrections()
    planned = inputs, inputs.keep_or_replan(corrections), corrections
    outcome = wanted_build(inputs, Run("", (), commit, {}, None))
    if isinstance(outcome, Refused):
        return planned, f"what was measured is not compared: {outcome}"
    return with_records(inputs, outcome[0].key, *planned[1:]), ""


def has_records(inputs: PlanInputs) -> bool:
    """Whether there is any record that may be of one of the instances."""
    return bool(inputs.survey.installed.tuned or inputs.kept.records or inputs.kept.problems)


def _with(inputs: PlanInputs, tunings: Mapping[str, Tuning]) -> PlanInputs:
    models = tuple(tunings[one.name].instance for one in inputs.settings.models)
    made = replace(inputs, tunings=tunings)
    made = replace(made, notes=(*inputs.notes, *tuning_notes(made)))
    same = all(tuning.instance == tuning.asked for tuning in tunings.values())
    return made if same else made.with_settings(replace(inputs.settings, models=models))


def _tuning(inputs: PlanInputs, instance: Instance, build: str) -> Tuning:
    return tuning_of(instance, fingerprint(inputs, instance, build), inputs.survey.installed.tuned, inputs.kept)


def fingerprint(inputs: PlanInputs, instance: Instance, build: str) -> Fingerprint:
    """What a measurement of the instance, as the operator wrote it, depends on."""
    files = inputs.models[instance.name]
    return Fingerprint.of(
        inputs.survey.machine, inputs.settings, instance, build=build,
        model={"": files.recorded, **{part: one.recorded for part, one in files.companions.items()}},
        work=workload(inputs, instance), text_sha256=inputs.prompts.get(instance.name),
    )  # fmt: skip


def workload(inputs: PlanInputs, instance: Instance) -> Workload:
    """The instance's typical request, in the context that a slot has."""
    trained = Shape.of(inputs.models[instance.name].header).context_tokens
    return Workload.of(instance, slot_tokens(instance, trained))


def tuning_notes(inputs: PlanInputs) -> list[str]:
    """What an operator should know of records that are not used."""
    return [f"models: {name}: tuned: {sentence}"
            for name, tuning in inputs.tunings.items() for sentence in tuning.sentences()]  # fmt: skip


def chance(inputs: PlanInputs, plan: Plan) -> str:
    """What a tune of an instance without a record would try, a sentence; empty where nothing is open, or a tune is to
    come anyway."""
    tuning = inputs.tunings.get(plan.instance)
    instance = tuning.asked if tuning else next(one for one in inputs.settings.models if one.name == plan.instance)
    if inputs.settings.tune != NEVER or (tuning and tuning.state != "none"):
        return ""
    headers = inputs.companions().get(plan.instance, {})
    found = changes(instance, plan, inputs.survey.machine, headers)
    without = (DEFAULTS,) if instance.tune_prompt_file else (DEFAULTS, SPECULATION)  # guesses need a text
    tried = dict.fromkeys(PLURALS.get(one.dimension, one.dimension) for one in found if one.dimension not in without)
    if not tried:
        return ""
    return (
        f"not measured: `pyinfra INVENTORY tasks.tune.tune` would try other {_listed(list(tried))} than the plan's, "
        f"for {inputs.settings.tune_minutes} minutes at most; whether any serves faster here, only measuring tells"
    )


def to_json(tuning: Tuning | None, unknown: str = "") -> dict[str, Any]:
    """What measurements say of an instance, for `--json`; empty where nothing was ever measured. `unknown`: why that is
    not known."""
    if unknown:
        return {"state": "unknown", "notes": [unknown]}
    if tuning is None or tuning.state == "none":
        return {}
    record = tuning.record
    return {
        "state": tuning.state,
        "where": tuning.where,
        "winner": in_words(record) if record else "",
        "gain": record.winner.gain if record else None,
        "stale": list(tuning.stale),
        "notes": list(tuning.sentences()),
    }


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
