"""One host as it was read, with the plan or refusal of each of its models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pyinfra.api.host import Host

from llamafleet.build import release as builds
from llamafleet.memory.ledger import Correction
from llamafleet.planner import stability as keep
from llamafleet.planner.backend import resolve_backend
from llamafleet.planner.plan import plan_host
from llamafleet.planner.result import Plan, Refusal
from llamafleet.settings.schema import Settings
from tasks.lib import facts
from tasks.lib import lookups as sources


class Refused(Exception):
    """This host is left out of the run; the text gives the reason and the way out."""


@dataclass(frozen=True)
class Examined:
    """A host as it was read, and the plan or refusal for each of its models."""

    settings: Settings
    survey: facts.Survey
    backend: str
    models: tuple[sources.Model, ...]
    # By instance name: what each plan is made of, see keep.inputs_key.
    keys: Mapping[str, str]
    choice: keep.Choice = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "choice", self.choose(self.corrections()))

    @property
    def answers(self) -> tuple[Plan | Refusal, ...]:
        """One for each of the settings' models."""
        return self.choice.answers

    def choose(self, corrections: Mapping[str, Correction]) -> keep.Choice:
        """The plans, those that are installed kept where they still hold."""
        requests = [(one, model.header) for one, model in zip(self.settings.models, self.models, strict=True)]
        installed = {name: keep.Installed.of(record) for name, record in self.same_inputs().items()}
        return keep.choose(
            self.survey.machine, self.settings,
            lambda machine: plan_host(machine, requests, self.settings, corrections), installed,
        )  # fmt: skip

    def corrections(self) -> dict[str, Correction]:
        """What llama-server said of the installed plans."""
        said = {name: record["verified"] for name, record in self.same_inputs().items()}
        return {name: Correction(one["extra_bytes"]) for name, one in said.items() if one}

    def same_inputs(self) -> dict[str, Mapping[str, Any]]:
        """The records of installed instances that were planned from the same inputs."""
        found = {name: one.record for name, one in self.survey.found.instances.items()}
        return {
            name: record for name, key in self.keys.items()
            if (record := found.get(name)) is not None and keep.is_of_inputs(record, key)
        }  # fmt: skip


def examine(host: Host) -> Examined:
    """Read the host and plan its instances; changes nothing. Raises one of `EXPECTED`."""
    settings = Settings.from_data(host.data.dict())
    sources.take_secrets(settings)
    survey = facts.survey(host, all_packages(), settings)
    backend = resolve_backend(survey.machine, settings)
    if isinstance(backend, Refusal):
        raise Refused(refusal_text("the host", backend))
    for instance in settings.models:
        if instance.source.startswith("/"):
            raise Refused(
                f"models: {instance.name}: source: {instance.source} is a path, which can be planned but not "
                "deployed: give its http(s) address or hf:OWNER/REPO/FILE.gguf"
            )
    models = tuple(sources.model(instance, settings) for instance in settings.models)
    keys = {
        instance.name: keep.inputs_key(survey.machine, settings, instance, {
            "backend": backend, "files": [[file.name, file.size_bytes, file.sha256] for file in model.files],
        })
        for instance, model in zip(settings.models, models, strict=True)
    }  # fmt: skip
    return Examined(settings, survey, backend, models, keys)


def all_packages() -> dict[str, tuple[str, ...]]:
    """Every package that any backend could need: the survey tells which are missing."""
    return {
        manager: tuple(sorted({name for backend in builds.JOB_BYTES
                               for name in builds.packages(manager, backend, compiling=True, tls=True)}))
        for manager in builds.RUN_PACKAGES
    }  # fmt: skip


def refusal_text(what: str, refusal: Refusal) -> str:
    return "; ".join([f"{what}: {refusal.reason}", *refusal.suggestions])
