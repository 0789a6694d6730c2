"""What one host should be: decided once, from what was read before, by a pure function.

`desire` reads and changes nothing; the same inputs give the same result. `changes.changes_needed` compares it with
what is installed, and the stages in `tasks/` act on the difference.

Decision 1: docs/decisions/0001-one-decision-for-each-host-and-run.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llamafleet.build import cuda_toolkit
from llamafleet.build.packages import COMPILER, Need, needs
from llamafleet.build.release import Build
from llamafleet.build.rocm import Hip, NoHip, choose_hip
from llamafleet.host.installed import Holder, Installed, Offer, Survey
from llamafleet.host.machine import Machine
from llamafleet.hub.source import ModelFiles
from llamafleet.memory.ledger import Correction
from llamafleet.planner.devices import only_used
from llamafleet.planner.reconcile import Verified
from llamafleet.planner.result import Plan
from llamafleet.planner.stability import Choice
from llamafleet.remote.common import MODELS, identity_of, unit_of
from llamafleet.service import command, refusals
from llamafleet.service.plan_inputs import PlanInputs
from llamafleet.service.record import plan_record, record_text
from llamafleet.service.refusals import Refused
from llamafleet.service.unit import Renderer, liveness_texts, unit_text
from llamafleet.settings.environment import gfx_targets
from llamafleet.settings.schema import Instance, Settings


@dataclass(frozen=True)
class Run:
    """What this run brings along and looked up, beside what the plans are made from."""

    helpers: str  # key of the helper programs that it installs
    oldest_python: tuple[int, ...]  # that those run with
    commit: str  # of llama.cpp, 40 digits
    # By instance name: the texts of the unit's credentials, by their names in `instance_changes.SECRETS`.
    secrets: Mapping[str, Mapping[str, str]] = field(repr=False)
    # Another run that holds the host's lock; None where the lock may be taken.
    holder: Holder | None
    # Of finished builds that a host may take from a cache, by key.
    digests: Mapping[str, Sequence[str]] = field(default_factory=dict)
    # Names and sources of the models that other hosts of the run are to serve; read for a host without models alone.
    elsewhere: frozenset[str] = frozenset()
    # What the host's repositories have for what it lacks, by `Need.name`; empty where they were not asked, or nobody
    # could tell.
    offers: Mapping[str, Offer] = field(default_factory=dict)


@dataclass(frozen=True)
class Service:
    """One instance as it should be installed: the whole unit, its plan, its secrets."""

    name: str
    unit_text: str
    plan_json: str
    # The secrets themselves, by their names in `instance_changes.SECRETS`: never shown, so not represented.
    secrets: Mapping[str, str] = field(repr=False)
    argv: tuple[str, ...]
    release: str
    # Units of its liveness check by name; empty where none is wanted.
    liveness: Mapping[str, str]
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
        return _is_cached(self.installed, self.build, self.run)

    def command(self, plan: Plan) -> list[str]:
        """The command line of the service with that plan, without the arguments that name its credentials."""
        instance = next(instance for instance in self.settings.models if instance.name == plan.instance)
        path = model_path(self.inputs.models[plan.instance])
        return [f"{self.build.release}/bin/llama-server", *command.argv(plan, instance, path)]

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


def model_folder(model: ModelFiles) -> str:
    """The model's folder on a host."""
    return f"{MODELS}/{model.folder}"


def stored_at(model: ModelFiles, settings: Settings, installed: Installed) -> str | None:
    """The folder on another disk to which the model's folder leads, or will; None where it lies there itself."""
    there = installed.paths.get(model_folder(model))
    if there is None or there.kind != "folder":
        return store_of(model, settings)
    return there.target if there.target and there.target.startswith("/") else None


def mount_of(store: str | None, installed: Installed) -> str | None:
    """Where the disk of that folder is mounted; None where that is the system's own disk, or not known."""
    mounts = {one.mount for one in installed.left.spaces.values() if store and store.startswith(f"{one.mount}/")}
    return max(mounts, key=len, default=None)


def store_of(model: ModelFiles, settings: Settings) -> str | None:
    """The folder for a model that is to be downloaded, where the settings name another one than the usual."""
    return f"{settings.models_dir}/{model.folder}" if settings.models_dir not in (None, MODELS) else None


def model_path(model: ModelFiles) -> str:
    """The model's first file on a host, which llama-server is given."""
    return f"{model_folder(model)}/{model.files[0].name}"


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
    if refused := next(_unplanned(choice), None):
        return refused
    bare = _with_build(inputs, run)
    return bare if isinstance(bare, Refused) else with_plans(bare, choice, corrections, {}, render)


def _with_build(inputs: PlanInputs, run: Run) -> Desired | Refused:
    """What is compiled, and what the host lacks for it; without the plans."""
    toolkit = _toolkit(inputs, run)
    if isinstance(toolkit, cuda_toolkit.Unsuitable):
        return refusals.no_toolkit(toolkit)
    architectures = _architectures(inputs, only_used(inputs.survey.machine, inputs.backend, inputs.settings))
    if inputs.backend == "hip" and not architectures:
        return refusals.no_hip_target()
    build = _build(inputs, run.commit, toolkit, architectures)
    install = toolkit if isinstance(toolkit, cuda_toolkit.Install) else None
    hip, lacking = _hip(inputs, build, run), _lacking(inputs.survey, build, run)
    if isinstance(hip, NoHip):
        return refusals.no_hip(hip)
    refused = refusals.no_packages(lacking, run.offers, inputs.survey.machine) or _old_tools(inputs, build, run)
    return refused or Desired(inputs, run, build, install, lacking, hip=hip)


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
    ours = {unit_of(name) for name in installed.instances}
    for instance in instances:
        refused = refusals.foreign_unit(instance, installed.foreign_units)
        there = installed.instances.get(instance.name)
        folder = model_folder(inputs.models[instance.name])
        refused = refused or refusals.no_disk(instance, folder, installed.paths.get(folder))
        refused = refused or (refusals.foreign_drop_in(instance, there.drop_ins) if there else None)
        refused = refused or refusals.no_address(instance, installed.unbindable)
        refused = refused or refusals.port_taken(instance, installed.listeners, ours)
        if refused:
            yield refused


def _old_tools(inputs: PlanInputs, build: Build, run: Run) -> Refused | None:
    installed = inputs.survey.installed
    if not _compiles(installed, build, run):
        return None
    coming = {word: offer.version for word, offer in run.offers.items() if offer.package}
    there = {word: version for word, version in installed.tools.items() if version}
    return refusals.old_tools(build.backend, {**coming, **there})


def to_ask(inputs: PlanInputs, outcome: Desired | Refused) -> tuple[Need, ...]:
    """What the host's repositories are to be asked about, before the host is decided again with the answer: what it
    lacks, and Arch's own CUDA toolkit, whose version only they know."""
    if isinstance(outcome, Desired):
        return outcome.lacking
    survey = inputs.survey
    if inputs.backend == "cuda" and survey.machine.package_manager == "pacman" and not survey.installed.toolkits:
        return (cuda_toolkit.CUDA, COMPILER)
    return ()


def _toolkit(
    inputs: PlanInputs, run: Run
) -> cuda_toolkit.Toolkit | cuda_toolkit.Install | cuda_toolkit.Unsuitable | None:
    """The CUDA toolkit to compile with; None for other backends."""
    if inputs.backend != "cuda":
        return None
    toolkits = [cuda_toolkit.InstalledToolkit.from_json(data) for data in inputs.survey.installed.toolkits]
    machine = only_used(inputs.survey.machine, inputs.backend, inputs.settings)
    own = cuda_toolkit.Repositories(inputs.survey.installed.compiler, run.offers)
    return cuda_toolkit.choose_toolkit(inputs.settings.cuda_toolkit, machine, toolkits, own)


def _hip(inputs: PlanInputs, build: Build, run: Run) -> Hip | NoHip | None:
    """HIP to compile with; None where none is needed."""
    if inputs.backend != "hip" or not _compiles(inputs.survey.installed, build, run):
        return None
    return choose_hip(inputs.survey.installed.rocm, run.offers)


def _architectures(inputs: PlanInputs, machine: Machine) -> tuple[str, ...]:
    """GPU architectures to compile for: those of this machine's GPUs, never a compiler's guess. With AMD's those that
    the operator's variables give them."""
    if inputs.backend == "cuda":
        return cuda_toolkit.architectures(machine)
    if inputs.backend == "hip":
        found = {gpu.gfx for gpu in machine.usable_gpus if gpu.gfx}
        return gfx_targets(inputs.settings.environment) or tuple(sorted(found))
    return ()


def _build(
    inputs: PlanInputs, commit: str, toolkit: cuda_toolkit.Toolkit | cuda_toolkit.Install | None,
    architectures: tuple[str, ...],
) -> Build:  # fmt: skip
    settings, machine = inputs.settings, inputs.survey.machine
    return Build(
        commit=commit,
        backend=inputs.backend,
        toolkit=toolkit.identity if toolkit else None,
        architectures=architectures,
        machine_arch=machine.os.arch,
        libc=machine.os.libc,
        cpu_flags=machine.cpu.flags,
        kv_types=tuple(sorted({kv_type for instance in settings.models for kv_type in instance.kv_types})),
        ui=settings.build_ui,
        tls=any(instance.tls_certificate_file for instance in settings.models),
        nvcc=toolkit.nvcc if toolkit else None,
        host_compiler=toolkit.host_compiler if isinstance(toolkit, cuda_toolkit.Toolkit) else None,
    )


def _is_cached(installed: Installed, build: Build, run: Run) -> bool:
    return not set(run.digests.get(build.key, ())).isdisjoint(installed.cached_builds.get(build.key, ()))


def _compiles(installed: Installed, build: Build, run: Run) -> bool:
    """Whether this host compiles: it neither has the release nor can take it from the cache."""
    return build.key not in installed.releases and not _is_cached(installed, build, run)


def _lacking(survey: Survey, build: Build, run: Run) -> tuple[Need, ...]:
    """What is needed and missing: what compiles only where something is compiled, and no optional need that no
    repository has."""
    installed = survey.installed
    wanted = needs(build.backend, _compiles(installed, build, run), build.tls)
    missing = (one for one in wanted if one.name in installed.missing_packages)
    return tuple(one for one in missing if not (one.optional and _is_not_offered(one, run.offers)))


def _is_not_offered(need: Need, offers: Mapping[str, Offer]) -> bool:
    offer = offers.get(need.name)
    return offer is not None and offer.package is None


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
        ),
        "inputs": {
            "key": inputs.keys[instance.name],
            "memory": choice.memory.to_json(),
            "rates": inputs.rates().to_json(),
        },
        "verified": verified.to_json() if verified else desired.remembered(plan),
    }
    service = Service(
        name=instance.name,
        unit_text=unit_text(
            render, instance, plan, build, desired.installed, record, desired.run.helpers,
            allow_swap=settings.allow_swap, python=settings.python, environment=settings.environment,
            store=(store := stored_at(model, settings, desired.installed)), mount=mount_of(store, desired.installed),
        ),
        plan_json=record_text(record), secrets=desired.run.secrets.get(instance.name, {}), argv=argv,
        release=build.release, liveness=liveness_texts(render, instance, settings, desired.run.helpers),
        identity=record["identity"], identities=frozenset((record["identity"], identity_of(record))),
        allowed_drop_ins=instance.allowed_drop_ins,
    )  # fmt: skip
    return Serving(instance, model, plan, service, record, verified)
