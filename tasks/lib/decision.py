"""One host's situation: what is wanted, what was found, what is to be done.

Decided once for each host, in pyinfra's prepare phase, and handed to the stages as values: facts
are not cached by pyinfra and operations run again when they execute.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gevent.lock import RLock
from pyinfra import logger
from pyinfra.api.host import Host
from pyinfra.context import ctx_host

from llamafleet import payload
from llamafleet.build import cuda_toolkit as toolkit
from llamafleet.build import release as builds
from llamafleet.build.release import Build
from llamafleet.host.machine import Machine, MachineError
from llamafleet.hub.http import SourceError
from llamafleet.memory.ledger import Correction
from llamafleet.model.gguf_cursor import GgufError
from llamafleet.planner import stability as keep
from llamafleet.planner.reconcile import Verified
from llamafleet.planner.result import Plan, Refusal
from llamafleet.service import command as flags
from llamafleet.service.changes import Service, Work, compare, port_conflict
from llamafleet.settings.schema import Instance, Settings, SettingsError, unit_of
from llamafleet.settings.secrets import SecretError
from tasks.lib import facts, remote
from tasks.lib import lookups as sources
from tasks.lib import templates as render
from tasks.lib.certificates import CertificateError
from tasks.lib.examined import Examined, Refused, examine, refusal_text

MODELS = "/var/lib/llamafleet/models"


@dataclass(frozen=True)
class Serving:
    """One instance with everything decided about it."""

    instance: Instance
    model: sources.Model
    folder: str
    plan: Plan
    service: Service
    record: Mapping[str, Any]  # plan.json
    verified: Verified | None  # in this run

    @property
    def is_verified(self) -> bool:
        """Was llama-server asked about exactly this plan, by this build?"""
        return self.record["verified"] is not None


@dataclass(frozen=True)
class Situation:
    """Everything the stages need to know of one host."""

    examined: Examined
    settings: Settings
    survey: facts.Survey
    build: Build
    install_toolkit: toolkit.Install | None
    servings: tuple[Serving, ...]
    work: Work
    corrections: Mapping[str, Correction]  # what llama-server said, by instance
    why: str  # the installed plans were kept or changed; empty where there were none

    def to_verify(self) -> tuple[Serving, ...]:
        """Those that are to be installed and were not asked about."""
        return tuple(one for one in self.servings if one.instance.name in self.work.services and not one.is_verified)

    def to_note(self) -> tuple[Serving, ...]:
        """Those that run as they should, but whose record tells other inputs or another answer of llama-server."""
        return tuple(
            one for one in self.servings
            if one.instance.name not in self.work.services
            and (one.verified is not None or one.instance.name not in self.examined.same_inputs())
        )  # fmt: skip


_situations: dict[Host, Situation | None] = {}
_guard: dict[Host, RLock] = {}


def situation() -> Situation | None:
    """The current host's situation; None where the host was refused, which has then been said."""
    host = ctx_host.get()
    assert host is not None, "stages run inside pyinfra, which sets the host"
    with _guard.setdefault(host, RLock()):
        if host not in _situations:
            _situations[host] = _decide_or_refuse(host)
    return _situations[host]


def replan(plans: keep.Choice, corrections: Mapping[str, Correction], verified: Mapping[str, Verified]) -> Situation:
    """Go on with plans that llama-server itself was asked about. Raises one of `EXPECTED`."""
    host, now = ctx_host.get(), situation()
    assert host is not None and now is not None, "a host that was refused has nothing to verify"
    with _guard[host]:
        _situations[host] = found = _situation(
            now.examined, plans, now.build, now.install_toolkit, corrections, verified
        )
    return found


EXPECTED = (Refused, SettingsError, flags.FlagError, MachineError, SourceError, GgufError, sources.LookupFailed,
            SecretError, CertificateError, remote.RemoteError, payload.PayloadError)  # fmt: skip


def _decide_or_refuse(host: Host) -> Situation | None:
    try:
        return decide(host)
    except EXPECTED as error:
        problems = error.problems if isinstance(error, SettingsError) else [str(error)]
        for problem in problems:
            host.log_styled(f"refused: {problem}", fg="red", log_func=logger.error)
        host.state.fail_hosts({host})
        return None


def decide(host: Host) -> Situation:
    """What is wanted on the host, against what was found. Raises one of `EXPECTED`."""
    examined = examine(host)
    _check_access(examined.survey)
    plans_or_refuse(examined.settings, examined.answers)
    kit = _toolkit(examined.backend, examined.settings, examined.survey)
    build = _build(examined, kit)
    install = kit if isinstance(kit, toolkit.Install) else None
    return _situation(examined, examined.choice, build, install, examined.corrections(), {})


def plans_or_refuse(settings: Settings, answers: tuple[Plan | Refusal, ...]) -> list[Plan]:
    """The answers, if all are plans; raises `Refused` with the first that is none."""
    plans = []
    for instance, answer in zip(settings.models, answers, strict=True):
        if isinstance(answer, Refusal):
            raise Refused(refusal_text(f"models: {instance.name}", answer))
        plans.append(answer)
    return plans


def _situation(
    examined: Examined, choice: keep.Choice, build: Build, install: toolkit.Install | None,
    corrections: Mapping[str, Correction], verified: Mapping[str, Verified],
) -> Situation:  # fmt: skip
    settings, survey = examined.settings, examined.survey
    plans = plans_or_refuse(settings, choice.answers)
    servings = tuple(
        _serving(examined, choice, build, instance, model, plan, verified.get(instance.name))
        for instance, model, plan in zip(settings.models, examined.models, plans, strict=True)
    )
    work = compare(
        survey.found, helpers=payload.helpers_key(), key=build.key, toolkit=install is not None,
        packages=_missing(survey, build), model_files=_model_files(servings),
        services=[serving.service for serving in servings],
    )  # fmt: skip
    return Situation(examined, settings, survey, build, install, servings, work, corrections, choice.why)


def _build(examined: Examined, kit: toolkit.Toolkit | toolkit.Install | None) -> Build:
    settings, machine = examined.settings, examined.survey.machine
    return Build(
        commit=sources.commit(settings),
        backend=examined.backend,
        toolkit=kit.identity if kit else None,
        architectures=_architectures(examined.backend, machine),
        machine_arch=machine.os.arch,
        libc=machine.os.libc,
        cpu_flags=machine.cpu.flags,
        kv_types=tuple(sorted({kv for instance in settings.models for kv in instance.kv_types})),
        ui=settings.build_ui,
        tls=any(instance.tls_certificate_file for instance in settings.models),
        nvcc=kit.nvcc if kit else None,
        host_compiler=kit.host_compiler if isinstance(kit, toolkit.Toolkit) else None,
    )


def _architectures(backend: str, machine: Machine) -> tuple[str, ...]:
    """GPU architectures to compile for: those of this host's GPUs, never a compiler's guess."""
    if backend == "cuda":
        return toolkit.architectures(machine)
    if backend == "hip":
        found = tuple(sorted({gpu.gfx for gpu in machine.usable_gpus if gpu.gfx}))
        if not found:
            raise Refused(
                "backend: hip: the driver does not tell the GPU's LLVM target (gfx...): is amdgpu's KFD loaded?"
            )
        return found
    return ()


def _check_access(survey: facts.Survey) -> None:
    """Raise `Refused` where we are not root there, or another run is at work."""
    if survey.found.euid != 0:
        raise Refused(
            "commands run there as an ordinary user: connect as root (ssh_user), or set `_sudo = True` "
            "for the host in the inventory, or pass --sudo"
        )
    python = survey.machine.python or ""
    if tuple(int(part) for part in re.findall(r"\d+", python)[:2]) < payload.HELPERS_PYTHON:
        needed = ".".join(map(str, payload.HELPERS_PYTHON))
        raise Refused(
            f"its python3 is {python or 'of unknown version'}, {needed} or later is needed: install a newer one"
        )
    if survey.machine.package_manager is None:
        raise Refused(f"{survey.machine.os.id} {survey.machine.os.version} has neither apt nor dnf")
    holder = survey.found.lock
    if holder and not remote.is_ours_or_dead(holder):
        raise Refused(remote.held_by(holder))


def _missing(survey: facts.Survey, build: Build) -> tuple[str, ...]:
    """Missing packages that are needed: those to compile with only where something is compiled."""
    found = survey.found
    compiling = build.key not in found.releases and build.key not in found.cached_builds
    wanted = builds.packages(survey.machine.package_manager or "apt", build.backend, compiling, build.tls)
    return tuple(name for name in wanted if name in found.missing_packages)


def _toolkit(backend: str, settings: Settings, survey: facts.Survey) -> toolkit.Toolkit | toolkit.Install | None:
    if backend != "cuda":
        return None
    found = [toolkit.FoundToolkit.from_json(one) for one in survey.found.toolkits]
    chosen = toolkit.choose(settings.cuda_toolkit, survey.machine, found)
    if isinstance(chosen, toolkit.Unsuitable):
        raise Refused("; ".join([f"cuda_toolkit: {chosen.reason}", *chosen.suggestions]))
    return chosen


def command(build: Build, instance: Instance, model: sources.Model, plan: Plan) -> list[str]:
    """The service's command line, without its keys."""
    path = f"{MODELS}/{model.folder}/{model.files[0].name}"
    return [f"{build.release}/bin/llama-server", *flags.argv(plan, instance, path)]


def remembered(examined: Examined, build: Build, plan: Plan) -> Mapping[str, Any] | None:
    """What llama-server said when it was asked about this very command line.

    Under other inputs too, as long as the plan needed no correction: it then is the same without.
    """
    found = examined.survey.found.instances.get(plan.instance)
    record = found.record if found else None
    if not isinstance(record, Mapping) or not record.get("verified"):
        return None
    said: Mapping[str, Any] = record["verified"]
    if said["extra_bytes"] and plan.instance not in examined.same_inputs():
        return None
    pairs = zip(examined.settings.models, examined.models, strict=True)
    instance, model = next(pair for pair in pairs if pair[0].name == plan.instance)
    asked = command(build, instance, model, plan)
    return said if record["gate"]["argv"][: len(asked)] == asked else None


def _serving(
    examined: Examined, choice: keep.Choice, build: Build, instance: Instance, model: sources.Model, plan: Plan,
    verified: Verified | None,
) -> Serving:  # fmt: skip
    settings, survey = examined.settings, examined.survey
    folder = f"{MODELS}/{model.folder}"
    path = f"{folder}/{model.files[0].name}"
    secrets = sources.secrets(instance)
    argv = [*command(build, instance, model, plan), *flags.credentials(instance)]
    record = {
        **render.plan_record(
            instance, plan, build, model, path, tuple(argv), speed_floor_percent=settings.speed_floor_percent
        ),
        "inputs": {"key": examined.keys[instance.name], "memory": choice.memory.to_json()},
        "verified": verified.to_json() if verified else remembered(examined, build, plan),
    }
    service = Service(
        name=instance.name, address=instance.listen, port=instance.port,
        unit_text=render.unit(instance, plan, build, survey, record, allow_swap=settings.allow_swap),
        plan_json=json.dumps(record, indent=1) + "\n", secrets=secrets, argv=tuple(argv),
        identity=record["identity"], release=build.release, liveness=render.liveness(instance, settings),
    )  # fmt: skip
    names = {one.unit for one in settings.models}
    leaving = {unit_of(name) for name in survey.found.instances} - names
    if instance.unit in survey.found.foreign_units:
        raise Refused(
            f"models: {instance.name}: {instance.unit} is there and llamafleet did not make it: "
            "give the model another name, or remove the unit"
        )
    conflict = port_conflict(service, survey.found.listeners, leaving)
    if conflict:
        who = conflict.unit or conflict.process or "another program"
        raise Refused(
            f"models: {instance.name}: port {instance.port} on {instance.listen} is taken by {who}"
            f"{f' (pid {conflict.pid})' if conflict.pid else ''}: stop it, or give the model another port"
        )
    return Serving(instance, model, folder, plan, service, record, verified)


def _model_files(servings: tuple[Serving, ...]) -> dict[str, dict[str, str | None]]:
    return {one.folder: {f"{one.folder}/{file.name}": file.sha256 for file in one.model.files} for one in servings}
