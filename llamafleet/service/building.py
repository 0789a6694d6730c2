"""What a host compiles, with which toolkit, and which packages it lacks for that: decided once, by a pure function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llamafleet.build import cuda_toolkit
from llamafleet.build.packages import Need, needs
from llamafleet.build.release import Build
from llamafleet.build.rocm import Hip, NoHip, choose_hip
from llamafleet.host.installed import Holder, Installed, Offer, Survey
from llamafleet.host.machine import Machine
from llamafleet.planner.devices import only_used
from llamafleet.service import refusals
from llamafleet.service.plan_inputs import PlanInputs
from llamafleet.service.refusals import Refused
from llamafleet.settings.environment import gfx_targets


@dataclass(frozen=True)
class Run:
    """What this run brings along and looked up, beside what the plans are made from."""

    helpers: str  # key of the helper programs that it installs
    oldest_python: tuple[int, ...]  # that those run with
    commit: str  # of llama.cpp, 40 digits
    # By instance name: the texts of the unit's credentials, by their names in `instance_changes.CREDENTIALS`.
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
class Building:
    """What is compiled, and what the host lacks for it."""

    build: Build
    install_toolkit: cuda_toolkit.Install | None
    lacking: tuple[Need, ...]  # what is needed and missing, to be installed from packages of the distribution
    hip: Hip | None  # to compile with; None for other backends, and where nothing is compiled


def building(inputs: PlanInputs, run: Run) -> Building | Refused:
    """What the host is to compile, or why it cannot. A host without models compiles nothing and lacks nothing."""
    if not inputs.settings.models:
        return Building(_build(inputs, run.commit, None, ()), None, (), None)
    outcome = wanted_build(inputs, run)
    if isinstance(outcome, Refused):
        return outcome
    build, toolkit = outcome
    install = toolkit if isinstance(toolkit, cuda_toolkit.Install) else None
    hip, lacking = _hip(inputs, build, run), _lacking(inputs.survey, build, run)
    if isinstance(hip, NoHip):
        return refusals.no_hip(hip)
    refused = refusals.no_packages(lacking, run.offers, inputs.survey.machine) or _old_tools(inputs, build, run)
    return refused or Building(build, install, lacking, hip)


Toolkit = cuda_toolkit.Toolkit | cuda_toolkit.Install | None


def wanted_build(inputs: PlanInputs, run: Run) -> tuple[Build, Toolkit] | Refused:
    """The build that the host is to have, and the CUDA toolkit to compile it with, whether or not it can."""
    toolkit = _toolkit(inputs, run)
    if isinstance(toolkit, cuda_toolkit.Unsuitable):
        return refusals.no_toolkit(toolkit)
    architectures = _architectures(inputs, only_used(inputs.survey.machine, inputs.backend, inputs.settings))
    if inputs.backend == "hip" and not architectures:
        return refusals.no_hip_target()
    return _build(inputs, run.commit, toolkit, architectures), toolkit


def _old_tools(inputs: PlanInputs, build: Build, run: Run) -> Refused | None:
    installed = inputs.survey.installed
    if not _compiles(installed, build, run):
        return None
    coming = {word: offer.version for word, offer in run.offers.items() if offer.package}
    there = {word: version for word, version in installed.tools.items() if version}
    return refusals.old_tools(build.backend, {**coming, **there})


def _toolkit(inputs: PlanInputs, run: Run) -> Toolkit | cuda_toolkit.Unsuitable:
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
    inputs: PlanInputs, commit: str, toolkit: Toolkit, architectures: tuple[str, ...]
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


def is_cached(installed: Installed, build: Build, run: Run) -> bool:
    """Whether the build cache seems to have the build, so that nothing is compiled."""
    return not set(run.digests.get(build.key, ())).isdisjoint(installed.cached_builds.get(build.key, ()))


def _compiles(installed: Installed, build: Build, run: Run) -> bool:
    """Whether this host compiles: it neither has the release nor can take it from the cache."""
    return build.key not in installed.releases and not is_cached(installed, build, run)


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
