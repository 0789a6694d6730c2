"""Everything that the plans of one host are made from, and the plans that follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llamafleet.host.installed import Survey
from llamafleet.host.recorded import PlanRecord
from llamafleet.hub.source import ModelFiles
from llamafleet.memory.ledger import Correction
from llamafleet.planner import stability
from llamafleet.planner.backend import resolve_backend
from llamafleet.planner.plan import plan_host
from llamafleet.planner.result import Refusal
from llamafleet.service.refusals import Refused, no_backend, path_as_source
from llamafleet.settings.schema import Settings


@dataclass(frozen=True)
class PlanInputs:
    """What was read of one host and for it, as far as plans depend on it."""

    settings: Settings
    survey: Survey
    backend: str
    models: Mapping[str, ModelFiles]  # by instance name
    keys: Mapping[str, str]  # by instance name: a hash of what its plan is made from, see stability.inputs_key

    def keep_or_replan(self, corrections: Mapping[str, Correction]) -> stability.Choice:
        """A plan or refusal for each instance; installed plans are kept where they still hold.

        `corrections`: by instance name, what llama-server allocates beyond the ledger.
        """
        requests = [(instance, self.models[instance.name].header) for instance in self.settings.models]
        return stability.keep_or_replan(
            self.survey.machine, self.settings,
            lambda machine: plan_host(machine, requests, self.settings, corrections), self._installed_plans(),
        )  # fmt: skip

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


def plan_inputs(settings: Settings, survey: Survey, models: Mapping[str, ModelFiles]) -> PlanInputs | Refused:
    """From what was read; `models` may lack those whose source is a path, which are refused."""
    backend = resolve_backend(survey.machine, settings)
    if isinstance(backend, Refusal):
        return no_backend(backend)
    if refused := path_as_source(settings):
        return refused
    keys = {
        instance.name: stability.inputs_key(survey.machine, settings, instance, {
            "backend": backend,
            "files": [[file.name, file.size_bytes, file.sha256] for file in models[instance.name].files],
        })
        for instance in settings.models
    }  # fmt: skip
    return PlanInputs(settings, survey, backend, models, keys)
