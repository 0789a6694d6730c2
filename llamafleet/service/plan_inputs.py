"""Everything that the plans of one host are made from, and the plans that follow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from llamafleet.host import learned
from llamafleet.host.installed import Installed, Survey
from llamafleet.host.machine import Machine
from llamafleet.host.recorded import PlanRecord
from llamafleet.host.speeds import Measurements
from llamafleet.hub.source import ModelFiles
from llamafleet.memory.ledger import Correction
from llamafleet.model.gguf import Header
from llamafleet.planner import stability
from llamafleet.planner.backend import resolve_backend
from llamafleet.planner.plan import plan_host
from llamafleet.planner.result import Plan, Refusal
from llamafleet.remote.common import MODELS
from llamafleet.service.refusals import Refused, diagnosed, no_backend, unusable_file, unverified
from llamafleet.settings.companions import as_instances
from llamafleet.settings.schema import Instance, Settings
from llamafleet.tuning.rates import tuned_speeds
from llamafleet.tuning.records import Kept, Tuning, reason


@dataclass(frozen=True)
class PlanInputs:
    """What was read of one host and for it, as far as plans depend on it."""

    settings: Settings
    survey: Survey
    backend: str
    models: Mapping[str, ModelFiles]  # by instance name
    keys: Mapping[str, str]  # by instance name: a hash of what its plan is made from, see stability.inputs_key
    notes: tuple[str, ...] = field(default=())  # what the operator should know of host and models, a sentence each
    kept: Kept = field(default_factory=Kept)  # the operator's records of tunes
    # By instance name, the SHA-256 of the text that a tune of it has as its prompts.
    prompts: Mapping[str, str] = field(default_factory=dict)
    # By instance name, what measurements say; empty until the build is known, see `with_records` in measured.py. Then
    # `settings` have the settings of the records.
    tunings: Mapping[str, Tuning] = field(default_factory=dict)

    def keep_or_replan(self, corrections: Mapping[str, Correction]) -> stability.Choice:
        """A plan or refusal for each instance; installed plans are kept where they still hold.

        `corrections`: by instance name, what llama-server allocates beyond the ledger.
        """
        chosen, known, companions = self.rates().chosen.measurements(), self.measured(), self.companions()
        choice = stability.keep_or_replan(
            self.survey.machine, self.settings,
            lambda machine: plan_host(
                machine, self.requests(), self.settings, corrections, chosen, known, companions
            ),
            self._installed_plans(),
        )  # fmt: skip
        return replace(choice, results=tuple(map(self._with_reason, choice.results)))

    def requests(self) -> list[tuple[Instance, Header]]:
        """What is planned together: each instance with its model's header."""
        return [(instance, self.models[instance.name].header) for instance in self.settings.models]

    def companions(self) -> dict[str, dict[str, Header]]:
        """By instance name, the headers of what is loaded beside its model, by their parts."""
        return {name: {part: one.header for part, one in model.companions.items()}
                for name, model in self.models.items()}  # fmt: skip

    def _with_reason(self, result: Plan | Refusal) -> Plan | Refusal:
        """The plan with what was measured of it."""
        tuning = self.tunings.get(result.instance)
        return replace(result, why=(reason(tuning), *result.why)) if tuning and tuning.record else result

    def with_settings(self, settings: Settings) -> PlanInputs:
        """The same host and models with other settings of plans."""
        keys = _keys(self.survey.machine, self.backend, settings, self.models)
        return replace(self, settings=settings, keys=keys)

    def as_asked(self) -> PlanInputs:
        """Without what was measured: the instances as the operator wrote them."""
        models = tuple(self.tunings[one.name].asked if one.name in self.tunings else one
                       for one in self.settings.models)  # fmt: skip
        return replace(self, tunings={}).with_settings(replace(self.settings, models=models))

    def measured(self) -> Measurements:
        """What is known of the host's speed now, from the survey's probe, the gates and the trials of tunes."""
        installed = self.survey.installed
        tuned = tuned_speeds(self.survey.machine, installed.tuned, self.kept.records)
        return learned.measurements(installed.bandwidth, installed.gate_speeds, tuned)

    def measured_by_gate(self, plan: Plan) -> learned.GatedSpeed | None:
        """The speeds that gates measured of exactly this plan, which is installed; None where there are none."""
        record = self.same_inputs().get(plan.instance)
        if record is None or record.plan is None or record.plan.argv != plan.argv:
            return None
        return self.survey.installed.gated.get(plan.instance)

    def rates(self) -> learned.RecordedRates:
        """The rates to choose plans with: those of an installed plan as long as its inputs are the same, so that a
        measurement alone changes no plan; else what is known now. With the probe's figure, which is kept."""
        bandwidth = self.survey.installed.bandwidth
        probe = bandwidth if bandwidth and bandwidth.bytes_per_s else None
        for record in self.same_inputs().values():
            recorded = record.inputs.rates if record.inputs and record.inputs.rates else learned.RecordedRates()
            return learned.RecordedRates(recorded.chosen, probe)
        return learned.RecordedRates(learned.ChosenRates.of(self.measured()), probe)

    def corrections(self) -> dict[str, Correction]:
        """What llama-server allocates beyond the ledger, as it said about the installed plans."""
        answers = {name: record.verified for name, record in self.same_inputs().items()}
        return {name: Correction(answer.extra_bytes) for name, answer in answers.items() if answer}

    def same_inputs(self) -> dict[str, PlanRecord]:
        """The records of installed instances that were planned from the inputs of now."""
        records = {name: instance.record for name, instance in self.survey.installed.instances.items()}
        return {name: record for name in self._installed_plans() if (record := records[name]) is not None}

    def _installed_plans(self) -> dict[str, stability.InstalledPlan]:
        """Of the installed instances that were planned from the inputs of now."""
        instances = self.survey.installed.instances
        plans = {name: stability.InstalledPlan.of(instances[name].record, key) for name, key in self.keys.items()
                 if name in instances}  # fmt: skip
        return {name: plan for name, plan in plans.items() if plan is not None}


def plan_inputs(
    settings: Settings, survey: Survey, models: Mapping[str, ModelFiles], kept: Kept | None = None,
    prompts: Mapping[str, str] = MappingProxyType({}),
) -> PlanInputs | Refused:  # fmt: skip
    """From what was read. A refusal has what the probe found wrong with the host."""
    inputs = _plan_inputs(settings, survey, models)
    if isinstance(inputs, Refused):
        return diagnosed(inputs, survey.machine)
    return replace(inputs, kept=kept or Kept(), prompts=prompts)


def _plan_inputs(settings: Settings, survey: Survey, models: Mapping[str, ModelFiles]) -> PlanInputs | Refused:
    backend = resolve_backend(survey.machine, settings)
    if isinstance(backend, Refusal):
        return no_backend(backend)
    models, notes = dict(models), []
    for instance in settings.models:
        outcome = _checked(instance, models[instance.name], survey.installed)
        if isinstance(outcome, Refused):
            return outcome
        models[instance.name], found = outcome
        notes += found
    keys = _keys(survey.machine, backend, settings, models)
    problems = [f"the host: {text}" for text in survey.machine.problems]
    return PlanInputs(settings, survey, backend, models, keys, (*problems, *notes))


def _keys(
    machine: Machine, backend: str, settings: Settings, models: Mapping[str, ModelFiles]
) -> dict[str, str]:  # fmt: skip
    """By instance name, a hash of what its plan is made from."""
    return {
        instance.name: stability.inputs_key(machine, settings, instance, {
            "backend": backend,
            "files": [list(file) for file in models[instance.name].recorded],
            **{part: [list(file) for file in one.recorded] for part, one in models[instance.name].companions.items()},
        })
        for instance in settings.models
    }  # fmt: skip


def _checked(instance: Instance, model: ModelFiles, installed: Installed) -> tuple[ModelFiles, list[str]] | Refused:
    """The model and its companions as the host is to have them, with notes."""
    parts = {"": (instance, model)}
    parts |= {part: (one, model.companions[part]) for part, one in as_instances(instance).items()}
    checked, notes = {}, []
    for part, (named, files) in parts.items():
        outcome = _verifiable(named, files, installed)
        if isinstance(outcome, Refused):
            return outcome
        checked[part], note = outcome
        notes += [note] if note else []
        notes += _of_source(named, checked[part])
    return replace(checked.pop(""), companions=checked), notes


def _of_source(instance: Instance, model: ModelFiles) -> Iterator[str]:
    """Which file a source means, where it leaves that open."""
    first = model.files[0]
    if first.chosen:
        yield f"models: {instance.name}: source: {first.chosen} is taken, as llama-server -hf would"
    if first.place:
        how = "your machine's file is sent" if first.place == "operator" else "the host's own file is used"
        yield f"models: {instance.name}: source: {instance.source}: {how}"


def _verifiable(instance: Instance, model: ModelFiles, installed: Installed) -> tuple[ModelFiles, str] | Refused:
    """The model with a note, where each of its files has a known sha256, or may or need not have one.

    What a host has need not be downloaded: files that were verified before sums were asked for are served on.
    """
    if refused := unusable_file(instance, model):
        return refused
    unknown = model.without_sum
    if not unknown:
        earlier = replace(model, kept_folder=model.folder_without_sum)
        model = earlier if _has(installed, earlier) and not _has(installed, model) else model
        return replace(model, noted_without_sum=frozenset(_noted_without_sum(instance, model, installed))), ""
    if instance.allow_unverified or model.files[0].place == "host":
        return model, ""
    sums = [installed.models.get(f"{MODELS}/{model.folder}/{file.name}") for file in unknown]
    if None in sums:
        return unverified(instance, model)
    return model, (
        f"models: {instance.name}: sha256 is not known of {', '.join(file.name for file in unknown[:3])}"
        f"{', ...' if len(unknown) > 3 else ''}: served on as the host verified it earlier, and not to be downloaded "
        f"again; set sha256 ({sums[0]} by the host itself{', ...' if len(sums) > 1 else ''})"
    )


def _has(installed: Installed, model: ModelFiles) -> bool:
    """Whether the host has every file of the model in its folder, with the known sha256."""
    return all(installed.models.get(f"{MODELS}/{model.folder}/{file.name}") == file.sha256 for file in model.files)


def _noted_without_sum(instance: Instance, model: ModelFiles, installed: Installed) -> Iterator[str]:
    """Names of the files that the installed instance's plan.json has without their sha256, and that have this one."""
    there = installed.instances.get(instance.name)
    noted = there.record.raw.get("files") if there and there.record else None
    for file in model.files:
        path = f"{MODELS}/{model.folder}/{file.name}"
        bare = {"path": path, "size_bytes": file.size_bytes, "sha256": None}
        if isinstance(noted, list) and bare in noted and installed.models.get(path) == file.sha256:
            yield file.name
