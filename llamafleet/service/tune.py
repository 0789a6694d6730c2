"""A tune of one instance on one host: which instances are measured and why, what the host is asked, and the record.

Pure. `llamafleet/tuning/` decides what comes next, `llamafleet/remote/tune.py` measures; its contract is the form of a
spec and of a trial.

Decision 23: docs/decisions/0023-tuned-by-measurement.md.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from statistics import median
from typing import Any

from llamafleet.host import answers
from llamafleet.planner.result import Refusal
from llamafleet.remote.common import TEXTS, VAR
from llamafleet.service import trial
from llamafleet.service.desired import Desired, service_of
from llamafleet.service.measured import workload
from llamafleet.service.record import credentials
from llamafleet.service.unit import Renderer
from llamafleet.settings.schema import ALWAYS, NEVER, Instance
from llamafleet.settings.workload import Workload
from llamafleet.tuning.candidates import PLANNED_NUMBER, Candidate, Lost, Planner, candidates, planner_of
from llamafleet.tuning.race import BASELINE, Batch, Trial, Verdict
from llamafleet.tuning.record import SCHEMA, Tuned
from llamafleet.tuning.records import Tuning
from llamafleet.tuning.search import MOST_CANDIDATES, Course, Measured, affordable, course, installed, over, seconds_for

# Trials that tell how long one takes, before it is decided how many candidates the budget has time for.
FIRST = 2
LEAST_TRIAL, TIMES_LONGER = 20.0, 4.0  # seconds; a trial may take so many times what the slowest of the first ones took
FIRST_SHARE = 0.3  # of the budget that one of the first trials may take
BATCH_SECONDS = 60.0  # so that it is said now and then how far the tune is
SPARE_TOKENS = 16  # of a slot's context: a chat template and its marks
# Between two batches the host hears nothing for some seconds; then the service that was stopped comes back.
STAYS_STOPPED_SECONDS = 120


# --- which instances are measured -------------------------------------------------------------------


@dataclass(frozen=True)
class Wish:
    """Whether an instance is measured, and why or why not, for people."""

    name: str
    is_measured: bool
    why: str


def wishes(desired: Desired, *, as_set: bool) -> tuple[Wish, ...]:
    """What is to be measured on the host. `as_set`: as the setting `tune` says, as in a deploy; else whatever it says,
    unless that was measured already."""
    if as_set and desired.settings.tune == NEVER:
        return ()
    return tuple(_wish(desired, one.name, as_set=as_set) for one in desired.servings)


def to_measure(desired: Desired, *, as_set: bool) -> tuple[str, ...]:
    """The names of the instances that are measured."""
    return tuple(one.name for one in wishes(desired, as_set=as_set) if one.is_measured)


def _wish(desired: Desired, name: str, *, as_set: bool) -> Wish:
    tuning, settings = desired.inputs.tunings[name], desired.settings
    again = settings.tune == ALWAYS
    if tuning.record and not again:
        way = "" if as_set else ': set tune = "always" to measure it again, or remove the record'
        return Wish(name, False, f"it was measured already{f', {tuning.where}' if tuning.where else ''}{way}")
    there = desired.installed.instances.get(name)
    runs = there is not None and "active" in (there.active, there.socket)
    if runs and not settings.tune_stops_service:
        return Wish(name, False, "its service runs, and is not stopped for it: set tune_stops_service = True")
    why = "; ".join(tuning.stale) or ('tune is "always"' if again else "it was not measured yet")
    stop = f", its service stopped{_within(settings.tune_window)}" if runs else ""
    return Wish(name, True, f"{why}; for {settings.tune_minutes} minutes at most{stop}")


def _within(window: str | None) -> str:
    return f" within {window}" if window else ""


# --- what is measured -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """An instance as it is measured: its candidates, and all that their command lines need."""

    desired: Desired  # with the instance as the operator wrote it
    tuning: Tuning
    work: Workload
    planner: Planner
    found: tuple[Candidate, ...]
    lost: tuple[Lost, ...]

    @property
    def name(self) -> str:
        return self.tuning.asked.name

    @property
    def depth(self) -> int:
        """Tokens in a slot's cache before the request, such that half of the reply is written at `live_tokens`, and all
        of it has room."""
        work, plan = self.work, self.found[PLANNED_NUMBER].plan
        room = plan.context_tokens
        if self.tuning.asked.kv_unified:
            room = min(room, int(trial.value_of(plan.argv, "--ctx-size") or room) // work.concurrency)
        usual = work.live_tokens - work.prompt_tokens - work.reply_tokens // 2
        return max(0, min(usual, room - work.prompt_tokens - work.reply_tokens - SPARE_TOKENS))

    @property
    def budget_seconds(self) -> float:
        return self.desired.settings.tune_minutes * 60.0

    @cached_property
    def key(self) -> str:
        """16 hexadecimal digits, by which the host knows the trials of this tune: what is measured on, what may be
        measured, and, where it was measured before, when."""
        lines = [[one.label, one.plan.argv, one.plan.cpus, one.plan.numa_nodes] for one in self.found]
        before = self.tuning.record.ended if self.tuning.record else None
        text = json.dumps([self.tuning.fingerprint.key, lines, before])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def course(self, measured: Sequence[Measured]) -> Course:
        """What comes next. The first trials, of the baseline and the planner's best, tell how many candidates there is
        time for."""
        took = [one.took_seconds for one in measured]
        if len(measured) < FIRST:
            spent = bool(took) and sum(took) + median(took) > self.budget_seconds
            first = Batch(tuple(range(len(measured), FIRST)), 1)
            return Course(self.found, over([one.trial for one in measured]) if spent else first, FIRST)
        some = affordable(self.found, self.budget_seconds, max(took[:FIRST]))
        return course(self.tuning.asked, self.planner, some, measured, self.budget_seconds)

    def trial_seconds(self, measured: Sequence[Measured]) -> float:
        """The longest that one trial may take."""
        if len(measured) < FIRST:
            return max(LEAST_TRIAL, FIRST_SHARE * self.budget_seconds)
        return max(LEAST_TRIAL, TIMES_LONGER * max(one.took_seconds for one in measured[:FIRST]))

    def batch(self, step: Batch, measured: Sequence[Measured]) -> tuple[int, ...]:
        """The first candidates of a batch, as many as take about BATCH_SECONDS."""
        if not measured:
            return step.candidates
        typical = max(0.1, median(one.took_seconds for one in measured))
        return step.candidates[: max(2, int(BATCH_SECONDS / typical))]


def subject(desired: Desired, name: str) -> Subject | Refusal:
    """The instance's candidates, planned beside the others as they are served."""
    inputs, tuning = desired.inputs, desired.inputs.tunings[name]
    models = tuple(tuning.asked if one.name == name else one for one in inputs.settings.models)
    asked = replace(desired, inputs=inputs.with_settings(replace(inputs.settings, models=models)))
    companions, rates = inputs.companions(), inputs.rates().chosen.measurements()
    planner = planner_of(
        inputs.survey.machine, asked.inputs.requests(), asked.settings, name, companions,
        corrections=desired.corrections, measurements=rates, known=inputs.measured(),
    )  # fmt: skip
    outcome = candidates(tuning.asked, inputs.survey.machine, planner, companions.get(name, {}))
    if isinstance(outcome, Refusal):
        return outcome
    found, lost = outcome
    return Subject(asked, tuning, workload(inputs, tuning.asked), planner, found, lost)


# --- what the host is asked -------------------------------------------------------------------------


def folder(name: str) -> str:
    """What a host keeps of a tune of the instance while it is under way."""
    return f"{VAR}/tune/{name}"


def spec(
    one: Subject, now: Course, numbers: Sequence[int], measured: Sequence[Measured], render: Renderer,
    *, run: str, text: str | None,
) -> dict[str, Any]:  # fmt: skip
    """What `llamafleet/remote/tune.py` needs to know: the trials of these candidates, behind those that are measured.
    `text`: the path on the host of the text that prompts are made of."""
    assert isinstance(now.step, Batch), "nothing is measured after the verdict"
    asked, settings = one.tuning.asked, one.desired.settings
    made = {number: _trial(one, now.candidates[number], number, render, text is not None) for number in {*numbers}}
    trials = [
        {"id": len(measured) + position, "candidate": number, "label": now.candidates[number].label,
         "stage": now.step.stage, "environment": {}, **made[number]}
        for position, number in enumerate(numbers)
    ]  # fmt: skip
    return {
        "schema": 1, "instance": one.name, "key": one.key, "run": run, "host": made[numbers[0]]["host"],
        "serves": "text" if asked.serves == "chat" else asked.serves,
        "trials": [{key: value for key, value in each.items() if key != "host"} for each in trials],
        "directives": made[numbers[0]]["directives"],
        "workload": {"prompt": one.work.prompt_tokens, "reply": one.work.reply_tokens, "depth": one.depth,
                     "concurrency": one.work.concurrency},
        "text": text, "trial_seconds": one.trial_seconds(measured), "budget_seconds": one.budget_seconds,
        "stops": settings.tune_stops_service, "window": settings.tune_window, "drain_seconds": settings.drain_seconds,
        "stays_stopped_seconds": STAYS_STOPPED_SECONDS,
    }  # fmt: skip


def _trial(one: Subject, candidate: Candidate, number: int, render: Renderer, has_text: bool) -> dict[str, Any]:
    """Command line and directives of a candidate, as its service would have them."""
    instance, plan = replace(one.tuning.asked, **candidate.settings, sleep_idle_seconds=None), candidate.plan
    if number == BASELINE:
        # As it ships it guesses nothing, and takes what memory it wants.
        instance = replace(instance, speculation="none", draft=None, draft_max_tokens=None, draft_min_tokens=None)
        plan = replace(plan, host_bytes=one.desired.machine.memory.total_bytes)
    service = service_of(one.desired, instance, plan, render)
    lines = service.unit_text.partition("\n[Service]\n")[2].partition("\n[")[0].splitlines()
    dropped = _dropped(one.desired, one.name)
    return {**trial.measured(service.argv, has_text),
            "directives": [_from_folder(line, one.name) for line in lines if line not in dropped]}  # fmt: skip


def _dropped(desired: Desired, name: str) -> set[str]:
    """Directives that the preflight of the installed unit found not to work on this host."""
    there = desired.installed.instances.get(name)
    found: Any = there.preflight if there and there.preflight else {}
    dropped = found.get("dropped")
    lines = [one.get("directives") for one in dropped if isinstance(one, dict)] if isinstance(dropped, list) else []
    return {line for some in lines if isinstance(some, list) for line in some if isinstance(line, str)}


def _from_folder(line: str, name: str) -> str:
    """A directive that loads a prompt file, from where a tune has it: the service's own may not be installed yet."""
    for text in TEXTS:
        if line.startswith(f"LoadCredential={text}:"):
            return f"LoadCredential={text}:{folder(name)}/{text}"
    return line


def texts(instance: Instance, secrets: Mapping[str, str]) -> dict[str, str]:
    """The prompt files that the trials' servers read, by path on the host."""
    return {f"{folder(instance.name)}/{name}": secrets[name] for name in credentials(instance) if name in TEXTS}


def measured(trials: Sequence[answers.Trial]) -> list[Measured]:
    """The trials that a host told."""
    return [Measured(Trial(one["candidate"], one["seconds"], one["stage"]), one["took_seconds"]) for one in trials]


# --- the record -------------------------------------------------------------------------------------


def record(one: Subject, now: Course, trials: Sequence[answers.Trial], ended: float) -> dict[str, Any] | None:
    """tuned.json of a tune that is over, with every trial; None where what would be installed was never measured."""
    assert isinstance(now.step, Verdict), "a record is of a tune that is over"
    chosen = installed(now, [each.trial for each in measured(trials)])
    number = now.candidates.index(chosen)
    good = [each for each in trials if each["candidate"] == number and each["seconds"]]
    if not good:
        return None
    base = _median(each["seconds"] for each in trials if each["candidate"] == BASELINE)
    won = number == now.step.winner
    made = {
        "schema": SCHEMA, "instance": one.name, "fingerprint": asdict(one.tuning.fingerprint),
        "settings": dict(chosen.settings), "ended": ended, "budget_minutes": one.desired.settings.tune_minutes,
        "why": now.step.why,
        "winner": {
            "label": chosen.label, "seconds": _median(each["seconds"] for each in good),
            "gain": _finite(now.step.gain) if won else 1.0, "low": _finite(now.step.low),
            "high": _finite(now.step.high),
            "prompt_tokens_per_s": _median(each["prompt_tokens_per_s"] for each in good),
            "decode_tokens_per_s": _median(each["decode_tokens_per_s"] for each in good),
        },
        "baseline": {"label": now.candidates[BASELINE].label, "seconds": base},
        "candidates": [{"label": each.label, "settings": dict(each.settings), "argv": list(each.plan.argv)}
                       for each in now.candidates],
        # By it and the trials of the planner's best, rates of the host are learnt: tuning/rates.py.
        "expected": at.to_json() if (at := now.candidates[PLANNED_NUMBER].plan.at_work) else None,
        "not_run": [{"label": each.label, "why": each.why} for each in (*one.lost, *without_time(one, now, trials))],
        "trials": [dict(each) for each in trials],
    }  # fmt: skip
    assert Tuned.of(json.loads(json.dumps(made))) is not None, "a record is read as it was written"
    return made


def without_time(one: Subject, now: Course, found: Sequence[answers.Trial]) -> list[Lost]:
    """The candidates that the budget had no time for, with the minutes that would do; of those beyond the most that are
    measured, no minutes would."""
    first = [each["took_seconds"] for each in found[:FIRST]]
    asked, left = one.desired.settings.tune_minutes, []
    for position, each in enumerate(one.found):
        if any(each is other for other in now.candidates):
            continue
        minutes = math.ceil(seconds_for(position + 1, max(first, default=0.0)) / 60)
        why = f"tune_minutes = {asked} has no time for it; about {minutes} would do"
        left.append(Lost(each.label, why if position < MOST_CANDIDATES else f"at most {MOST_CANDIDATES} are measured"))
    return left


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def in_lines(found: Sequence[Wish]) -> Iterator[str]:
    """A line for each instance, for a run that only says what it would do."""
    for one in found:
        yield f"to do: measure {one.name}: {one.why}" if one.is_measured else f"{one.name} is not measured: {one.why}"
