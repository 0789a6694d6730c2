"""What one host should be: decided once, from what was read before, by a pure function.

`desire` reads and changes nothing; the same inputs give the same result. `changes.changes_needed` compares it with
what is installed, and the stages in `tasks/` act on the difference.

Decision 1: docs/decisions/0001-one-decision-for-each-host-and-run.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llamafleet.build import cuda_toolkit
from llamafleet.build.packages import COMPILER, Need
from llamafleet.build.release import Build
from llamafleet.build.rocm import Hip
from llamafleet.host.installed import Installed
from llamafleet.host.machine import Machine
from llamafleet.hub.source import ModelFiles
from llamafleet.memory.ledger import Correction
from llamafleet.planner.reconcile import Verified
from llamafleet.planner.result import Plan
from llamafleet.planner.stability import Choice, RecordedMemory
from llamafleet.remote.common import demand_units, identity_of, unit_of
from llamafleet.service import command, refusals
from llamafleet.service.building import Run, building, is_cached
from llamafleet.service.demand import demand_texts, too_old
from llamafleet.service.measured import has_records, tuning_notes, with_records
from llamafleet.service.model_folders import companion_paths, model_folder, model_path, mount_of, stores
from llamafleet.service.plan_inputs import PlanInputs
from llamafleet.service.record import accepted, plan_record, record_text
from llamafleet.service.refusals import Refused
from llamafleet.service.unit import Renderer, liveness_texts, unit_text
from llamafleet.settings.schema import Instance, Settings


@dataclass(frozen=True)
class Service:
    """One instance as it should be installed: the whole unit, its plan, its credentials."""

    name: str
    unit_text: str
    plan_json: str
    # The credentials' texts, by their names in `instance_changes.CREDENTIALS`: secrets are never shown, so not
    # represented.
    secrets: Mapping[str, str] = field(repr=False)
    argv: tuple[str, ...]
    release: str
    # Units of its liveness check by name; empty where none is wanted.
    liveness: Mapping[str, str]
    # Units by name that start it on demand; empty where it starts with the host.
    demand: Mapping[str, str] = field(default_factory=dict)
    # Of the plan record: names one state of the service.
    identity: str = ""
    # The hashes that what plan.json has of it may have: earlier versions wrote the query of an address, too.
    identities: frozenset[str] = frozenset()
    # Names of drop-ins that the operator adds to the unit.
    allowed_drop_ins: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Service({self.name})"

    @property
    def unit(self) -> str:
        """The systemd unit's name."""
        return unit_of(self.name)


@dataclass(frozen=True)
class Serving:
    """One instance with everything that was decided about it."""

    instance: Instance
    model: ModelFiles
    plan: Plan
    service: Service
    record: Mapping[str, Any]  # plan.json
    verified: Verified | None  # llama-server's answer about the plan, where it was asked in this run

    @property
    def name(self) -> str:
        """The instance's name."""
        return self.instance.name

    @property
    def folder(self) -> str:
        """The folder of the model on the host."""
        return model_folder(self.model)

    @property
    def models(self) -> dict[str, ModelFiles]:
        """The model and its companions by their folders on the host."""
        return {model_folder(one): one for one in self.model.every}

    @property
    def is_verified(self) -> bool:
        """Whether llama-server was asked about exactly this plan, by this build."""
        return self.record["verified"] is not None


@dataclass(frozen=True)
class Desired:
    """One host as it should be, and what that was decided from."""

    inputs: PlanInputs
    run: Run
    build: Build
    install_toolkit: cuda_toolkit.Install | None
    lacking: tuple[Need, ...]  # what is needed and missing, to be installed from packages of the distribution
    servings: tuple[Serving, ...] = ()
    corrections: Mapping[str, Correction] = field(default_factory=dict)  # what llama-server said, by instance
    why: str = ""  # why the installed plans are kept or changed; empty where there were none
    hip: Hip | None = None  # to compile with; None for other backends, and where nothing is compiled

    @property
    def settings(self) -> Settings:
        """What was asked for."""
        return self.inputs.settings

    @property
    def machine(self) -> Machine:
        """The host's hardware and system."""
        return self.inputs.survey.machine

    @property
    def installed(self) -> Installed:
        """What is installed now."""
        return self.inputs.survey.installed

    @property
    def is_cached(self) -> bool:
        """Whether the build cache seems to have the build, so that nothing is compiled."""
        return is_cached(self.installed, self.build, self.run)

    def command(self, plan: Plan) -> list[str]:
        """The command line of the service with that plan, without the arguments that name its credentials."""
        instance = next(instance for instance in self.settings.models if instance.name == plan.instance)
        model = self.inputs.models[plan.instance]
        words = command.argv(plan, instance, model_path(model), companion_paths(model))
        return [f"{self.build.release}/bin/llama-server", *words]

    def remembered(self, plan: Plan) -> Mapping[str, Any] | None:
        """llama-server's answer to the very command line of the plan, from the installed record; None without one.

        It holds under other inputs too if the plan needed no correction: then it is the same without the answer.
        """
        installed = self.installed.instances.get(plan.instance)
        record = installed.record if installed else None
        if record is None or record.verified is None or record.gate is None:
            return None
        if record.verified.extra_bytes and plan.instance not in self.inputs.same_inputs():
            return None
        wanted = tuple(self.command(plan))
        answer: Mapping[str, Any] = record.raw["verified"]
        return answer if record.gate.argv[: len(wanted)] == wanted else None


def desire(inputs: PlanInputs, run: Run, render: Renderer) -> Desired | Refused:
    """What the host should be, or why it is left out of the run, with what the probe found wrong with it.

    `render` makes a text from a template's name and values: reading a template is no part of deciding.
    """
    desired = _desire(inputs, run, render)
    return refusals.diagnosed(desired, inputs.survey.machine) if isinstance(desired, Refused) else desired


def _desire(inputs: PlanInputs, run: Run, render: Renderer) -> Desired | Refused:
    settings, survey = inputs.settings, inputs.survey
    refused = refusals.not_accessible(survey, run.holder, run.oldest_python)
    if refused := refused or refusals.nothing_to_serve(settings, survey.installed, run.elsewhere):
        return refused
    corrections = inputs.corrections()
    choice = inputs.keep_or_replan(corrections)
    refused = next(_unplanned(choice), None)
    if refused and not has_records(inputs):  # what was measured may need less
        return refused
    made = building(inputs, run)
    if isinstance(made, Refused):
        return refused or made
    inputs, choice, known = with_records(inputs, made.build.key, choice, corrections)
    bare = Desired(inputs, run, made.build, made.install_toolkit, made.lacking, hip=made.hip)
    return with_plans(bare, choice, known, {}, render)


def with_plans(
    desired: Desired, choice: Choice, corrections: Mapping[str, Correction], verified: Mapping[str, Verified],
    render: Renderer,
) -> Desired | Refused:  # fmt: skip
    """The same host with these plans; `verified` has llama-server's answers of this run, by instance name."""
    if refused := next(_unplanned(choice), None) or next(_in_the_way(desired.inputs), None):
        return refusals.diagnosed(refused, desired.machine)
    plans = [plan for plan in choice.results if isinstance(plan, Plan)]
    try:
        servings = tuple(
            _serving(desired, choice, instance, plan, verified.get(instance.name), render)
            for instance, plan in zip(desired.settings.models, plans, strict=True)
        )
    except command.FlagError as error:
        return Refused.because(str(error))
    return replace(desired, servings=servings, corrections=corrections, why=choice.why)


def _unplanned(choice: Choice) -> Iterator[Refused]:
    return (refusals.no_plan(answer) for answer in choice.results if not isinstance(answer, Plan))


def _in_the_way(inputs: PlanInputs) -> Iterator[Refused]:
    """Units and programs of others that the host has where an instance should be."""
    installed, instances = inputs.survey.installed, inputs.settings.models
    # No two of our instances are to have one port: what another one of ours holds, it gives up in this run.
    ours = {unit for name in installed.instances for unit in (unit_of(name), demand_units(name)[1])}
    for instance in instances:
        refused = refusals.foreign_unit(instance, installed.foreign_units)
        there = installed.instances.get(instance.name)
        folders = [model_folder(one) for one in inputs.models[instance.name].every]
        for folder in folders:
            refused = refused or refusals.no_disk(instance, folder, installed.paths.get(folder))
        refused = refused or (refusals.foreign_drop_in(instance, there.drop_ins) if there else None)
        refused = refused or refusals.no_address(instance, installed.unbindable)
        refused = refused or refusals.port_taken(instance, installed.listeners, ours, _opened(installed))
        refused = refused or too_old(instance, installed)
        if refused:
            yield refused


def _opened(installed: Installed) -> set[int]:
    """The ports at which systemd listens for our instances that start on demand."""
    return {one.record.gate.port for one in installed.instances.values()
            if one.socket == "active" and one.record and one.record.gate and one.record.gate.port}  # fmt: skip


def to_ask(inputs: PlanInputs, outcome: Desired | Refused) -> tuple[Need, ...]:
    """What the host's repositories are to be asked about, before the host is decided again with the answer: what it
    lacks, and Arch's own CUDA toolkit, whose version only they know."""
    if isinstance(outcome, Desired):
        return outcome.lacking
    survey = inputs.survey
    if inputs.backend == "cuda" and survey.machine.package_manager == "pacman" and not survey.installed.toolkits:
        return (cuda_toolkit.CUDA, COMPILER)
    return ()


def service_of(desired: Desired, instance: Instance, plan: Plan, render: Renderer) -> Service:
    """The service of the host's instance of that name with other settings and another plan, installed or not."""
    models = tuple(instance if one.name == instance.name else one for one in desired.settings.models)
    other = replace(desired, inputs=desired.inputs.with_settings(replace(desired.settings, models=models)))
    choice = Choice((plan,), RecordedMemory.of(desired.machine))
    return _serving(other, choice, instance, plan, None, render).service


def with_record(desired: Desired, name: str, record: Mapping[str, Any], render: Renderer) -> Desired | Refused:
    """The same host with a new record of an instance, and the plans that follow."""
    installed = replace(desired.installed, tuned={**desired.installed.tuned, name: record})
    inputs = replace(desired.inputs.as_asked(), survey=replace(desired.inputs.survey, installed=installed))
    notes = tuple(note for note in inputs.notes if note not in tuning_notes(desired.inputs))
    inputs = replace(inputs, notes=notes)
    choice = inputs.keep_or_replan(desired.corrections)
    inputs, choice, corrections = with_records(inputs, desired.build.key, choice, desired.corrections)
    return with_plans(replace(desired, inputs=inputs), choice, corrections, {}, render)


def _serving(
    desired: Desired, choice: Choice, instance: Instance, plan: Plan, verified: Verified | None, render: Renderer
) -> Serving:  # fmt: skip
    settings, inputs, build = desired.settings, desired.inputs, desired.build
    model = inputs.models[instance.name]
    argv = (*desired.command(plan), *command.credential_flags(instance))
    record = {
        **plan_record(
            instance,
            plan,
            build,
            model,
            model_path(model),
            argv,
            speed_floor_percent=settings.speed_floor_percent,
            alone=len(settings.models) == 1,
            environment=settings.environment,
            texts=desired.run.secrets.get(instance.name, {}),
        ),
        "inputs": {
            "key": inputs.keys[instance.name],
            "memory": choice.memory.to_json(),
            "rates": inputs.rates().to_json(),
        },
        "verified": verified.to_json() if verified else desired.remembered(plan),
        **accepted(instance.accept_slower, settings.llama_cpp_ref, build.commit),
    }
    service = Service(
        name=instance.name,
        unit_text=unit_text(
            render, instance, plan, build, desired.installed, record, desired.run.helpers,
            allow_swap=settings.allow_swap, python=settings.python, environment=settings.environment,
            stores=(there := tuple(dict.fromkeys(stores(model, settings, desired.installed)))),
            mount=next((mount for one in there if (mount := mount_of(one, desired.installed))), None),
        ),
        plan_json=record_text(record), secrets=desired.run.secrets.get(instance.name, {}), argv=argv,
        release=build.release, liveness=liveness_texts(render, instance, settings, desired.run.helpers),
        demand=demand_texts(render, instance, settings, desired.run.helpers),
        identity=record["identity"], identities=frozenset((record["identity"], identity_of(record))),
        allowed_drop_ins=instance.allowed_drop_ins,
    )  # fmt: skip
    return Serving(instance, model, plan, service, record, verified)
