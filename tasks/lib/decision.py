"""What one host should be and what must change there, decided once per run and handed to the stages as values.

pyinfra does not cache facts and runs operations again when they execute. So everything is read in its prepare phase,
`llamafleet/service/desired.py` decides, and the decision is remembered here, one for each host, under its lock.

Decision 1: docs/decisions/0001-one-decision-for-each-host-and-run.md.
"""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from gevent.lock import RLock
from pyinfra import logger
from pyinfra.api.host import Host
from pyinfra.api.state import State
from pyinfra.context import ctx_host

from llamafleet import payload
from llamafleet.host.installed import Holder
from llamafleet.host.machine import MachineError
from llamafleet.hub.source import ModelFiles
from llamafleet.memory.ledger import Correction
from llamafleet.model.gguf_cursor import GgufError
from llamafleet.planner.copies import with_copies
from llamafleet.planner.reconcile import Verified
from llamafleet.planner.result import Refusal
from llamafleet.planner.stability import Choice
from llamafleet.remote.common import sha256
from llamafleet.service import disks, measured
from llamafleet.service.building import Run
from llamafleet.service.changes import Changes, changes_needed
from llamafleet.service.companions import with_companions
from llamafleet.service.desired import Desired, desire, to_ask, with_plans
from llamafleet.service.plan_inputs import PlanInputs, plan_inputs
from llamafleet.service.record import without_query
from llamafleet.service.refusals import Refused, diagnosed, is_path, no_plan
from llamafleet.service.tune import to_measure
from llamafleet.settings.prompt_files import PromptFileError
from llamafleet.settings.schema import Instance, Settings, SettingsError
from llamafleet.settings.secrets import SecretError
from llamafleet.sources import SourceError
from tasks.lib import builds, ends, facts, lookups, paths, records, remote, templates
from tasks.lib.certificates import CertificateError
from tasks.lib.this_run import is_ours_or_dead

# What reading may raise: each leaves the host out of the run, as a refusal does.
READ_ERRORS = (SettingsError, MachineError, SourceError, GgufError, lookups.LookupFailed, SecretError,
               CertificateError, PromptFileError, remote.RemoteError, payload.PayloadError)  # fmt: skip


@dataclass(frozen=True)
class Decision:
    """What one host should be, and what must change for it."""

    desired: Desired
    changes: Changes
    made: float = field(default_factory=time.monotonic, compare=False)

    @property
    def has_work(self) -> bool:
        """Whether a run of all stages does anything on the host. Where it does not, stages have no operations but those
        by which its site may draw on it: each costs this machine some milliseconds, and a fleet has thousands."""
        return self.changes.any or bool(self.changes.note) or bool(to_measure(self.desired, as_set=True))


# The parts of `Changes` that a stage makes, and those that must be made before it can do its own.
MAKES = {"bootstrap": ("helpers", "user", "packages"), "toolkit": ("toolkit",), "build": ("build",),
         "model": ("models",), "verify": ("verify",),
         "service": ("services", "refreshed", "liveness", "removed", "current"), "gateway": (),
         "monitoring": ()}  # fmt: skip
# Of these the very version is needed, not one that an earlier run left.
EXACT = {"tune": ("helpers",)}
NEEDS = {"toolkit": ("helpers",), "build": ("helpers", "packages", "toolkit"), "model": ("helpers",),
         "verify": ("helpers", "user", "build", "models"),
         "tune": ("helpers", "user", "build", "models"),
         "service": ("helpers", "user", "build", "models")}  # fmt: skip

_decisions: dict[Host, Decision | None] = {}
_made: dict[Host, set[str]] = {}  # parts of `Changes` that stages of this run make
_locks: dict[Host, RLock] = {}
_words_of: WeakKeyDictionary[State, Mapping[str, set[Host]]] = WeakKeyDictionary()


def decision() -> Decision | None:
    """The current host's decision; None where the host was refused, which then has been logged."""
    host = ctx_host.get()
    assert host is not None, "stages run inside pyinfra, which sets the host"
    with _locks.setdefault(host, RLock()):
        if host not in _decisions:
            decided = decide(host)
            _decisions[host] = decided if isinstance(decided, Decision) else None
            if isinstance(decided, Decision):
                _note_build(host, decided)
            if isinstance(decided, Refused):
                refuse(host, decided)
    return _decisions[host]


def of(host: Host) -> Decision | None:
    """The decision about a host of this run; None where there is none, as of a host that was refused."""
    return _decisions.get(host)


def of_other(host: Host) -> Decision | None:
    """As `decision`, of another host of this run."""
    with ctx_host.use(host):
        return decision()


def makes(host: Host, part: str) -> bool:
    """Whether a stage of this run makes that part of `Changes` on the host."""
    return part in _made.get(host, ())


def count_as_made(hosts: Iterable[Host]) -> None:
    """Let stages of this run take the hosts as they will be after a run of all stages, which is not this one."""
    for host in hosts:
        _made.setdefault(host, set()).update(part for parts in MAKES.values() for part in parts)


def for_stage(stage: str, is_needed: Callable[[Decision], bool] | None = None) -> Decision | None:
    """As `decision`, for a stage that changes the host. Refuses a host on which an earlier stage has to come first, and
    is no part of this run. `is_needed`: whether the stage has anything to do, where `Changes` do not say it."""
    host, now = ctx_host.get(), decision()
    if now is None:
        return None
    made = _made.setdefault(host, set())
    missing = [part for part in NEEDS.get(stage, ()) if part not in made and _is_missing(part, now, stage)]
    works = is_needed(now) if is_needed else any(getattr(now.changes, part) for part in MAKES[stage])
    if missing and works:
        first = [f"tasks.{one}.{one}" for one, parts in MAKES.items() if set(parts) & set(missing)]
        refused = Refused.because(
            f"run deploy.py first, or {', '.join(first)}: the stage {stage} needs what is not there yet or no longer "
            f"as planned ({', '.join(missing)})"
        )  # fmt: skip
        _decisions[host] = None
        refuse(host, refused)
        return None
    made.update(MAKES.get(stage, ()))
    return now


def _is_missing(part: str, now: Decision, stage: str) -> bool:
    """Whether a part must be made before the stage; helpers of another version do as well for most of them."""
    other = part == "helpers" and now.desired.installed.helpers is not None and part not in EXACT.get(stage, ())
    return bool(getattr(now.changes, part)) and not other


def replan(
    choice: Choice, corrections: Mapping[str, Correction], verified: Mapping[str, Verified]
) -> Decision | Refused:
    """Go on with plans that llama-server itself was asked about."""
    host, now = ctx_host.get(), decision()
    assert host is not None and now is not None, "a host that was refused has nothing to verify"
    return go_on(host, with_plans(now.desired, choice, corrections, verified, templates.render))


def go_on(host: Host, desired: Desired | Refused) -> Decision | Refused:
    """Let later stages go on with this, unless it is a refusal."""
    with _locks[host]:
        decided = _decided(desired)
        if isinstance(decided, Decision):
            _decisions[host] = decided
    return decided


def decide(host: Host) -> Decision | Refused:
    """Read the host and all that its decision depends on, and decide; changes nothing."""
    try:
        inputs = read_inputs(host)
        if isinstance(inputs, Refused):
            return inputs
        return _decided(_desired(host, inputs))
    except READ_ERRORS as error:
        return refused_by(error)
    except Exception as error:  # whatever it is, the other hosts' run must go on
        logger.debug(traceback.format_exc())
        return Refused.because(f"what the host needs cannot be decided: {remote.said(error)}")


def _desired(host: Host, inputs: PlanInputs) -> Desired | Refused:
    """What the host should be. Where it lacks something, its repositories are asked what they have, so that what cannot
    be had is refused before anything is changed."""
    run = _run(host, inputs)
    outcome = desire(inputs, run, templates.render)
    manager, needs = inputs.survey.machine.package_manager, to_ask(inputs, outcome)
    if not needs or manager is None:
        return outcome
    return desire(inputs, replace(run, offers=facts.offers(host, manager, needs, inputs.settings)), templates.render)


def _note_build(host: Host, decided: Decision) -> None:
    """Let the host go first where its job, of a run that ended before it, makes the build."""
    desired, cache = decided.desired, decided.desired.settings.build_cache
    if decided.changes.build and cache and build_job(desired) in desired.installed.jobs:
        builds.makes(host, desired.build.key, cache)


def build_job(desired: Desired) -> str:
    """The name of the job that makes the wanted release."""
    return f"build-{desired.build.key}"


def check_unchanged(host: Host, last: Holder | None) -> None:
    """Read the host again, now under its lock: it still needs what was decided before. Raises `RemoteError` with what
    differs, and who may have done it: `last` is the run that had the lock before, with `age_seconds` since then."""
    now = _decisions.get(host)
    if now is None:  # a command without a decision
        return
    try:
        survey = facts.survey(host, now.desired.settings)
    except READ_ERRORS as error:
        raise remote.RemoteError(str(error)) from error
    differing = list(_differences(now.changes, changes_needed(now.desired, survey.installed)))
    if differing:
        since = time.monotonic() - now.made
        who = f"{last.who} deployed to it" if last and last.age_seconds < since else "somebody changed it"
        raise remote.RemoteError(
            f"{who} after this run had read it {since:.0f} s ago ({'; '.join(differing)}): run again, "
            "and it is planned as it is now"
        )


def _differences(before: Changes, after: Changes) -> Iterator[str]:
    """What is to be done on the host and was not, or the other way round, whatever the reasons."""
    for part in fields(Changes):
        old, new = _names(getattr(before, part.name)), _names(getattr(after, part.name))
        if new - old:
            yield f"{part.name}: now needed for {', '.join(sorted(new - old))}"
        if old - new:
            yield f"{part.name}: no longer needed for {', '.join(sorted(old - new))}"


def _names(part: Any) -> set[str]:
    return ({"the host"} if part else set()) if isinstance(part, bool) else set(part)


def _decided(desired: Desired | Refused) -> Decision | Refused:
    if isinstance(desired, Refused):
        return desired
    changes = changes_needed(desired, desired.installed)
    return disks.refusal(desired, changes) or Decision(desired, changes)


def read_inputs(host: Host) -> PlanInputs | Refused:
    """What the host's plans are made from. Raises one of `READ_ERRORS`."""
    settings = Settings.from_data(host.data.dict())
    lookups.take_secrets(settings)
    survey = facts.survey(host, settings, bandwidth=True)
    for key, digest in survey.installed.release_digests.items():
        builds.tell(key, digest)
    expanded = with_copies(settings, survey.machine)
    if isinstance(expanded, Refusal):
        return diagnosed(no_plan(expanded), survey.machine)
    models = {
        instance.name: with_companions(
            instance, partial(_files, host, settings), partial(lookups.projector, settings=settings)
        )
        for instance in expanded.models
    }
    prompts = {one.name: sha256(lookups.tune_prompt(one).encode()) for one in expanded.models if one.tune_prompt_file}
    kept = records.kept()
    inputs = plan_inputs(expanded, survey, models, kept, prompts)
    problems = kept.problems.get(host.name, ())
    return inputs if isinstance(inputs, Refused) else replace(inputs, notes=(*inputs.notes, *problems))


def _files(host: Host, settings: Settings, instance: Instance) -> ModelFiles:
    return paths.model(host, instance) if is_path(instance) else lookups.model(instance, settings)


def with_measured(host: Host, inputs: PlanInputs) -> tuple[PlanInputs, Choice, str]:
    """The inputs with the records of tunes that hold, their plans, and why records cannot be compared, empty where they
    are. The commit is looked up only where there are records."""
    if not measured.has_records(inputs):
        return inputs, inputs.keep_or_replan(inputs.corrections()), ""
    try:
        commit = _commit(host, inputs.settings)
    except (lookups.LookupFailed, SourceError, remote.RemoteError) as error:
        unknown = f"what was measured is not compared: {error}"
        return inputs, inputs.keep_or_replan(inputs.corrections()), unknown
    (inputs, choice, _), unknown = measured.with_commit(inputs, commit)
    return inputs, choice, unknown


def read_run(host: Host, inputs: PlanInputs) -> Run:
    """What only a deployment needs: the commit, the secrets, and who else is at work. Raises one of `READ_ERRORS`."""
    holder = inputs.survey.installed.lock
    return Run(
        helpers=lookups.helpers_key(),
        oldest_python=payload.HELPERS_PYTHON,
        commit=_commit(host, inputs.settings),
        secrets={instance.name: lookups.instance_secrets(instance) for instance in inputs.settings.models},
        holder=None if holder is None or is_ours_or_dead(holder) else holder,
        digests={key: builds.known(key) for key in inputs.survey.installed.cached_builds},
    )


def _commit(host: Host, settings: Settings) -> str:
    repository, ref = settings.llama_cpp_repository, settings.llama_cpp_ref
    if repository.startswith("/") and not re.fullmatch(r"[0-9a-f]{40}", ref):
        return paths.commit(host, repository, ref)
    return lookups.commit(settings)


def _run(host: Host, inputs: PlanInputs) -> Run:
    run = read_run(host, inputs)
    if inputs.settings.models:
        return run
    return replace(run, elsewhere=frozenset(word for word, hosts in _words(host.state).items() if hosts - {host}))


def _words(state: State) -> Mapping[str, set[Host]]:
    """The hosts of the run by names and sources of the models that they are to serve: collected once, since many hosts
    may have none."""
    if state not in _words_of:
        words: dict[str, set[Host]] = {}
        for host in hosts_of_run(state):
            for word in (word for model in wanted_models(host) for word in model):
                words.setdefault(word, set()).add(host)
        _words_of[state] = words
    return _words_of[state]


def hosts_of_run(state: State) -> list[Host]:
    """The hosts of the inventory that --limit leaves, also those that were not reached."""
    return [host for host in state.inventory if state.is_host_in_limit(host)]


def wanted_models(host: Host) -> Iterator[tuple[str, str]]:
    """Name and source of the models in the host's data, also of a host that was refused or not reached."""
    models: Any = host.data.dict().get("models")
    for model in models if isinstance(models, (list, tuple)) else ():
        if isinstance(model, Mapping) and isinstance(model.get("name"), str):
            yield model["name"], without_query(str(model.get("source")))


def refused_by(error: Exception) -> Refused:
    """What could not be read, as a refusal."""
    return Refused(tuple(error.problems) if isinstance(error, SettingsError) else (str(error),))


def refuse(host: Host, refused: Refused) -> None:
    """Say why, and leave the host out of the run. Raises PyinfraError where no host is left."""
    log_refused(host, refused)
    host.state.fail_hosts({host})


def log_refused(host: Host, refused: Refused) -> None:
    """A line for each reason."""
    ends.note(host.name, f"refused: {refused}")
    for reason in refused.reasons:
        host.log_styled(f"refused: {reason}", fg="red", log_func=logger.error)
