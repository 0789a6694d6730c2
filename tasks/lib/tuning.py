"""Measure the instances of a host, one after another, and plan again with what won.

The state of a tune is its trials, which the host keeps: a run that ends, or is ended, is gone on with by the next one.

Decision 23: docs/decisions/0023-tuned-by-measurement.md.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from pyinfra import logger
from pyinfra.api.host import Host
from pyinfra.api.state import State

from llamafleet.host import answers
from llamafleet.planner.result import Refusal
from llamafleet.remote.common import RUN, TUNED, tuned_path
from llamafleet.service import tune
from llamafleet.service.desired import Desired, with_record
from llamafleet.service.tune import Subject
from llamafleet.tuning.race import Batch, Verdict
from llamafleet.tuning.record import Tuned, record_text
from llamafleet.tuning.records import Kept, in_words, read
from llamafleet.tuning.search import Course, Measured, progress
from tasks.lib import decision, jobs, lookups, memory_check, records, remote, sending, switching, templates
from tasks.lib.decision import READ_ERRORS, Decision
from tasks.lib.this_run import this_run

BAR = 20  # characters
# Exit codes of tune.py: the service runs and may not be stopped, the window is closed, another run or switch.
NOT_NOW = (3, 4, 5)
END_SECONDS = 600.0  # to start a service again, which loads its model


def tune_instance(state: State, host: Host, name: str, *, installs: bool) -> bool:
    """Measure the instance, write its record, and go on with the plan that follows. `installs`: a later stage of the
    run installs that. False where the host fails. Where a running service is stopped for it, that is done in the host's
    turn, as for a switch."""
    now = decision.decision()
    assert now is not None, "a host that was refused measures nothing"
    if not _wish(now, name, installs).is_measured or not _stops(now.desired, name):
        return _tune(state, host, name, installs=installs)
    with switching.turn(host, [name], now.desired.settings.switch_at_once):
        return _tune(state, host, name, installs=installs)


def _wish(now: Decision, name: str, installs: bool) -> tune.Wish:
    return next(one for one in tune.wishes(now.desired, as_set=installs) if one.name == name)


def _stops(desired: Desired, name: str) -> bool:
    """Whether the instance has a service that may be stopped."""
    return desired.settings.tune_stops_service and name in desired.installed.instances


def _tune(state: State, host: Host, name: str, *, installs: bool) -> bool:
    now = decision.decision()
    assert now is not None, "as above"
    wish = _wish(now, name, installs)
    if not wish.is_measured:  # another instance of this run is alike, and was measured meanwhile
        host.log(f"{name} is not measured: {wish.why}")
        return True
    one = tune.subject(now.desired, name)
    if isinstance(one, Refusal):  # with other settings than those that are served now
        host.log(f"{name} is not measured: {one.reason}", logger.warning)
        return True
    jobs.hold(state, host)
    try:
        course, trials, why = _measured(state, host, one)
    finally:
        _put_back(host, one)
    if isinstance(course.step, Batch):
        host.log(f"{name} is not measured{' to the end' if trials else ''} now: {why}", logger.warning)
        return True
    record = tune.record(one, course, trials, time.time())
    if record is None:
        _forget(host, name, course.step, trials)
        return True
    _write(host, name, record)
    used = Tuned.of(json.loads(json.dumps(record)))
    assert used is not None, "a record is read as it was written"
    host.log(f"{name}: {in_words(used)}; {course.step.why}; {len(trials)} trials")
    if left := tune.without_time(one, course, trials):
        others = f" nor {len(left) - 1} others" if left[1:] else ""
        host.log(f"{name}: not measured {left[0].label}{others}: {left[0].why}")
    return _go_on(host, now, name, record, installs=installs)


def _forget(host: Host, name: str, verdict: Verdict, trials: Sequence[answers.Trial]) -> None:
    """Say why nothing could be measured, and let the next run begin anew."""
    errors = dict.fromkeys(trial["error"] for trial in trials if trial["error"])
    told = "; ".join(list(errors)[-3:]) or verdict.why
    host.log(
        f"{name}: nothing could be measured, so that its plan stays: {told}; where a trial needs more time, set a "
        "larger tune_minutes", logger.warning,
    )  # fmt: skip
    path = f"{tune.folder(name)}/trials.jsonl"
    remote.run(host, remote.HostCommand(["rm", "-f", path], purpose="rm"))


def _measured(state: State, host: Host, one: Subject) -> tuple[Course, Sequence[answers.Trial], str]:
    """The trials until the verdict, and where they end before that, why."""
    text = lookups.tune_prompt(one.tuning.asked) if one.tuning.asked.tune_prompt_file else None
    secret = None if text is None else jobs.Secret(f"{RUN}/tune-{one.name}.txt", text)
    _send_texts(host, one)
    before = -1
    while True:
        trials = remote.run_json(host, remote.program("tune.py", "read", one.name, one.key), answers.trials)
        measured = tune.measured(trials)
        course = one.course(measured)
        if isinstance(course.step, Verdict):
            return course, trials, ""
        if len(measured) == before:  # something else happens on the host, as the job has noted
            return course, trials, "the host ended a batch without a trial"
        before = len(measured)
        if measured:
            host.log(_bar(one, course, measured))
        if why := _batch(state, host, one, course, measured, secret):
            return course, trials, why


def _batch(
    state: State, host: Host, one: Subject, course: Course, measured: Sequence[Measured], secret: jobs.Secret | None
) -> str:  # fmt: skip
    """Run the next trials as a job; why nothing can be measured now, empty where it was. Raises `RemoteError`."""
    assert isinstance(course.step, Batch), "the verdict is measured no more"
    numbers = one.batch(course.step, measured)
    asked = tune.spec(one, course, numbers, measured, templates.render, run=this_run()["run"],
                      text=secret.path if secret else None)  # fmt: skip
    name = jobs.name_of("tune", one.name)
    ok, out, err = remote.run(host, jobs.sent_spec(name, asked))
    if not ok:
        raise remote.RemoteError(f"{name}: {remote.explain(out, err)}")
    seen = jobs.ended(state, host, name, remote.words("tune.py", "run", jobs.spec_path(name)), secret)
    if seen.exit_code in NOT_NOW:
        errors = [line.removeprefix("error: ") for line in seen.tail if line.startswith("error: ")]
        return errors[-1] if errors else seen.how
    if not jobs.told(host, name, seen):
        raise remote.RemoteError(f"{one.name} cannot be measured")
    return ""


def _send_texts(host: Host, one: Subject) -> None:
    """The prompt files of the instance, which its trials load as its service does. Raises `RemoteError`."""
    files = tune.texts(one.tuning.asked, lookups.instance_secrets(one.tuning.asked))
    if not files:
        return
    sent = {path: (0o600, text.encode()) for path, text in files.items()}
    ok, out, err = remote.run(host, sending.received(sent, "--make", tune.folder(one.name)))
    if not ok:
        raise remote.RemoteError(remote.explain(out, err))


def _put_back(host: Host, one: Subject) -> None:
    """Let the service that was stopped run again at once; where this cannot be said, the host does it by itself."""
    if not _stops(one.desired, one.name):
        return
    try:
        ok, out, err = remote.run(host, remote.program("tune.py", "end", one.name, seconds=END_SECONDS))
        if not ok:
            host.log(f"{one.name}: {remote.explain(out, err)}", logger.warning)
    except remote.RemoteError as error:
        host.log(f"{one.name}: its service comes back within some minutes: {error}", logger.warning)


def _bar(one: Subject, course: Course, measured: Sequence[Measured]) -> str:
    """How far the tune is, such as "tune m0: [####......] 12 of about 60 trials; best so far: ubatch 1024 (1.12 times
    llama-server as it ships); 9 min left at most"."""
    at = progress(course, measured, one.budget_seconds)
    about = max(at.about, at.done)
    full = round(BAR * at.done / about)
    left = f"{at.left_seconds / 60:.0f} min" if at.left_seconds >= 60 else f"{at.left_seconds:.0f} s"
    return (
        f"tune {one.name}: [{'#' * full}{'.' * (BAR - full)}] {at.done} of about {about} trials; best so far: "
        f"{at.best} ({at.gain:.2f} times llama-server as it ships); {left} left at most"
    )


def to_copy(now: Decision, host_name: str, kept: Kept) -> tuple[str, ...]:
    """The instances whose record on the host holds, and is not the operator's, as after a run that ended between the
    two."""
    here = kept.records.get(host_name, {})
    own = {name: tuning.own for name, tuning in now.desired.inputs.tunings.items() if tuning.own and not tuning.stale}
    return tuple(name for name, record in own.items() if name not in here or here[name].ended != record.ended)


def copy_here(state: State, host: Host, name: str) -> bool:
    """Copy the host's record of the instance, with its trials; where that is not possible, it is said."""
    command = remote.HostCommand(["cat", tuned_path(name)], purpose="the record of a tune")
    ok, out, err = remote.run(host, command)
    try:
        if not ok:
            raise remote.RemoteError(remote.explain(out, err))
        value = answers.json_value("\n".join(out), tuned_path(name))
        found = read(value, tuned_path(name))
        if not isinstance(found, Tuned):
            raise remote.RemoteError(found)
        host.log(f"{name}: its record is copied to {records.keep(host.name, name, value)}")
    except (remote.RemoteError, answers.AnswerError, OSError) as error:
        host.log(f"{name}: its record is not copied: {error}", logger.warning)
    return True


def _write(host: Host, name: str, record: dict[str, object]) -> None:
    """The record on the host, and its copy here. Raises `RemoteError`."""
    text = record_text(record)
    sent = sending.received({tuned_path(name): (0o644, text.encode())}, "--make", TUNED)
    ok, out, err = remote.run(host, sent)
    if not ok:
        raise remote.RemoteError(f"{tuned_path(name)} cannot be written: {remote.explain(out, err)}")
    try:
        path = records.keep(host.name, name, record)
        host.log(f"{name}: the record is in {tuned_path(name)} on the host and in {path}")
    except OSError as error:
        host.log(f"{name}: the copy of its record cannot be written here: {error}", logger.warning)


def _go_on(host: Host, before: Decision, name: str, record: dict[str, object], *, installs: bool) -> bool:
    """Plan again with the record; a later stage installs that."""
    try:
        after = decision.go_on(host, with_record(before.desired, name, record, templates.render))
    except READ_ERRORS as error:
        after = decision.refused_by(error)
    if not isinstance(after, Decision):
        decision.log_refused(host, after)
        return False
    old, new = (next(one.plan for one in now.desired.servings if one.name == name) for now in (before, after))
    if flags := memory_check.changed_flags(old, new):
        host.log(f"{name}: planned with it: {' '.join(flags)}")
    if not installs:
        changed = name in after.changes.services
        host.log(f"{name}: {'deploy.py installs what won' if changed else 'what won is what it runs with'}")
        return True
    return memory_check.check_plans(host)
