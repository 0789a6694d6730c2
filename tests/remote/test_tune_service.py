"""A service is stopped for a tune only where it may be, and is put back in every case but one: somebody else decided.

systemd is a stand-in that knows states; with the real one it is tried elsewhere.
"""

import os
import subprocess
import threading
import time

import common
import draining
import lock
import pytest
import starting
import tune_service
from tune_service import Aside, Refused

NAME = "chat"
UNIT, TIMER = common.unit_of(NAME), starting.timer_of(NAME)
SOCKET = common.demand_units(NAME)[0]
MARK, GUARD = tune_service.mark_of(NAME), tune_service.guard_of(NAME)


class Systemd:
    """Units by state; what is started here runs at once."""

    def __init__(self, monkeypatch, folder):
        self.states, self.enabled, self.on_demand = {UNIT: "active", TIMER: "active"}, "enabled", False
        self.broken, self.drained, self.let_in, self.now = set(), [], [], 1000.0
        for name in ("RUN", "UNITS"):
            (folder / name).mkdir()
            monkeypatch.setattr(common, name, str(folder / name))
        monkeypatch.setattr(common, "is_on_demand", lambda name: self.on_demand)
        monkeypatch.setattr(common, "output_of", lambda words: self.enabled + "\n")
        monkeypatch.setattr(tune_service, "show", self.show)
        monkeypatch.setattr(tune_service, "systemctl", self.systemctl)
        monkeypatch.setattr(tune_service, "forget", lambda unit: self.states.pop(unit, None))
        monkeypatch.setattr(subprocess, "run", self.run)
        monkeypatch.setattr(starting, "stop", self.stop)
        monkeypatch.setattr(starting, "start_watching", lambda name, check: self.states.update({TIMER: "active"}))
        monkeypatch.setattr(starting, "open_door", lambda name, check: self.systemctl("start", SOCKET))
        monkeypatch.setattr(draining, "Draining", lambda names, seconds: seconds)
        monkeypatch.setattr(draining, "let_in", self.let_in.append)
        monkeypatch.setattr(lock, "now", lambda: self.now)
        monkeypatch.setattr(lock, "read", lambda: None)
        monkeypatch.setattr(tune_service, "POLL_SECONDS", 0.01)
        monkeypatch.setattr(tune_service, "AGAIN_SECONDS", 0.01)
        monkeypatch.setattr(tune_service, "LOCK_SECONDS", 0.2)

    def show(self, unit, *_, seconds=None):
        return {"ActiveState": self.states.get(unit, "inactive")}

    def systemctl(self, verb, *units, check=True):
        for unit in units:
            if verb == "start":
                self.states[unit] = "failed" if unit in self.broken else "active"
            elif verb == "stop":
                self.states[unit] = "inactive"

    def run(self, words, check):
        assert words[0] == "systemd-run"
        self.states[next(word for word in words if word.startswith("--unit="))[len("--unit=") :]] = "active"

    def stop(self, names, drained):
        assert self.states[GUARD] == "active", "who puts it back must be there first"
        self.drained.append(drained)
        self.systemctl("stop", UNIT, SOCKET)

    def stopped_by_somebody(self):
        """systemd stops what is part of a unit with it, also where the unit itself is stopped already."""
        self.systemctl("stop", UNIT, MARK)

    @property
    def note(self):
        return common.read_json(tune_service.note_path(NAME))


@pytest.fixture
def systemd(monkeypatch, tmp_path):
    return Systemd(monkeypatch, tmp_path)


def spec(**more):
    return {"trial_seconds": 60, "stops": True, **more}


def cut_off(**more):
    """As of a job that was killed: what was done stays, and its locks are free."""
    aside = Aside(NAME, spec(**more))
    aside.__enter__()
    aside.stack.close()
    return aside


def guarding():
    """The guard in a thread, as it runs beside the job."""
    thread = threading.Thread(target=tune_service.guard, args=(NAME,))
    thread.start()
    return thread


def test_a_service_is_stopped_for_the_block_and_runs_again(systemd):
    with Aside(NAME, spec(drain_seconds=7)):
        assert systemd.states[UNIT] == systemd.states[TIMER] == "inactive" and systemd.states[MARK] == "active"
        assert systemd.note["marked"] and systemd.drained == [7]
    assert systemd.states[UNIT] == systemd.states[TIMER] == "active" and MARK not in systemd.states
    assert not systemd.note and tune_service.guard(NAME) == 0, "the guard ends with the note"


def test_one_on_demand_is_reached_again_and_starts_when_it_is_asked(systemd):
    systemd.on_demand = True
    systemd.states.update({UNIT: "inactive", SOCKET: "active"})
    with Aside(NAME, spec()):
        assert systemd.states[SOCKET] == "inactive"
    assert (systemd.states[SOCKET], systemd.states[UNIT]) == ("active", "inactive")


@pytest.mark.parametrize("state", ["inactive", "failed"])
def test_a_service_that_does_not_run_is_not_started(state, systemd):
    systemd.states[UNIT] = state
    with Aside(NAME, spec(stops=False)):
        assert not systemd.note and GUARD not in systemd.states
    assert systemd.states[UNIT] == state


@pytest.mark.parametrize("state", ["active", "activating"])
def test_without_leave_a_service_runs_on(state, systemd):
    systemd.states[UNIT] = state
    with pytest.raises(Refused, match="tune_stops_service") as refused, Aside(NAME, spec(stops=False)):
        pytest.fail("it may not be stopped")
    assert refused.value.code == tune_service.RUNS and systemd.states[UNIT] == state and not systemd.note


def at(clock):
    return time.strptime(f"2026-01-01 {clock}", "%Y-%m-%d %H:%M")


@pytest.mark.parametrize(
    ("window", "clock", "minutes"),
    [("02:00-05:00", "04:00", 60), ("02:00-05:00", "05:00", 0), ("02:00-05:00", "01:59", 0), ("02:00-05:00", "02:00", 180),
     ("23:00-01:00", "23:30", 90), ("23:00-01:00", "00:30", 30), ("23:00-01:00", "12:00", 0),
     ("03:00-03:00", "12:00", 15 * 60)],
)  # fmt: skip
def test_the_time_that_is_left_of_a_window(window, clock, minutes):
    assert tune_service.left_of(window, at(clock)) == 60 * minutes


@pytest.mark.parametrize(("left", "allowed"), [(125, True), (115, False)])
def test_a_trial_with_the_start_of_the_service_ends_in_the_window(left, allowed, systemd, monkeypatch):
    monkeypatch.setattr(tune_service, "left_of", lambda window, now=None: left)  # a trial of 60 s, a start of 60 s
    if not allowed:
        with pytest.raises(Refused, match="02:00-05:00") as refused, Aside(NAME, spec(window="02:00-05:00")):
            pytest.fail("too late")
        assert refused.value.code == tune_service.CLOSED and systemd.states[UNIT] == "active"
        return
    with Aside(NAME, spec(window="02:00-05:00")) as aside:
        assert aside.has_time()
        aside.start_seconds = 90  # it took as long to load
        assert not aside.has_time()


def test_the_window_is_nothing_to_a_service_that_did_not_run(systemd, monkeypatch):
    systemd.states[UNIT] = "inactive"
    monkeypatch.setattr(tune_service, "left_of", lambda window, now=None: 0)
    with Aside(NAME, spec(window="02:00-05:00")) as aside:
        assert aside.has_time()


def test_an_instance_that_is_being_switched_is_not_touched(systemd):
    with tune_service.unswitched(NAME) as free, pytest.raises(Refused) as refused, Aside(NAME, spec()):
        pytest.fail("held")
    assert free and refused.value.code == tune_service.HELD and systemd.states[UNIT] == "active"


def test_another_run_s_host_is_left_alone(systemd, monkeypatch):
    monkeypatch.setattr(lock, "read", lambda: {"run": "other", "who": "eve"})
    with pytest.raises(Refused, match="eve") as refused, Aside(NAME, spec(run="mine")):
        pytest.fail("held")
    assert refused.value.code == tune_service.HELD and systemd.states[UNIT] == "active"


def test_the_guard_puts_back_what_a_killed_job_stopped(systemd):
    cut_off()
    assert systemd.states[UNIT] == "inactive"
    assert tune_service.guard(NAME) == 0
    assert systemd.states[UNIT] == systemd.states[TIMER] == "active" and not systemd.note


def test_a_job_that_was_killed_while_replies_ended_leaves_no_closed_door(systemd, monkeypatch):
    def killed(names, drained):
        raise KeyboardInterrupt

    monkeypatch.setattr(starting, "stop", killed)
    with pytest.raises(KeyboardInterrupt), Aside(NAME, spec()):
        pytest.fail("killed")
    assert tune_service.guard(NAME) == 0
    assert systemd.let_in == [NAME] and systemd.states[UNIT] == systemd.states[TIMER] == "active"


def test_a_job_that_was_killed_between_stop_and_mark_loses_nothing(systemd, monkeypatch):
    monkeypatch.setattr(tune_service, "mark", lambda name: None)
    cut_off()
    assert tune_service.guard(NAME) == 0 and systemd.states[UNIT] == "active"


def test_the_guard_waits_for_a_job_that_lives(systemd):
    with Aside(NAME, spec()):
        guard = guarding()
        time.sleep(0.2)
        assert guard.is_alive() and systemd.states[UNIT] == "inactive"
    guard.join(5)
    assert not guard.is_alive() and systemd.states[UNIT] == "active"


def test_the_guard_ends_a_job_that_is_past_its_time(systemd, monkeypatch):
    killed = []
    aside = cut_off()
    monkeypatch.setattr(common, "command_line", lambda pid: ["python3", "/opt/tune.py", "run"])
    with tune_service.locked(NAME):  # by the job
        monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(pid))
        guard = guarding()
        time.sleep(0.1)
        assert not killed
        systemd.now += aside.trial_seconds + 2 * tune_service.LATE_SECONDS
        while not killed:
            time.sleep(0.01)
    guard.join(5)
    assert set(killed) == {os.getpid()} and systemd.states[UNIT] == "active"


def test_the_guard_tries_again_where_the_service_does_not_start(systemd):
    cut_off()
    systemd.broken.add(UNIT)
    guard = guarding()
    time.sleep(0.2)
    assert guard.is_alive() and systemd.note
    systemd.broken.clear()
    guard.join(5)
    assert not guard.is_alive() and systemd.states[UNIT] == "active"


def test_a_service_that_does_not_start_again_is_told(systemd):
    with pytest.raises(Refused, match="does not start again") as refused, Aside(NAME, spec()):
        systemd.broken.add(UNIT)
    assert refused.value.code == tune_service.FAILED and systemd.note, "the guard goes on with it"


@pytest.mark.parametrize("way", ["job", "guard"])
def test_a_service_that_somebody_stopped_meanwhile_stays_stopped(way, systemd):
    aside = Aside(NAME, spec())
    aside.__enter__()
    assert aside.disturbed() is None
    systemd.stopped_by_somebody()
    assert "stopped by somebody else" in aside.disturbed()
    if way == "job":
        aside.__exit__(None, None, None)
    else:
        aside.stack.close()
        tune_service.guard(NAME)
    assert systemd.states[UNIT] == "inactive" and not systemd.note


@pytest.mark.parametrize("state", ["disabled", "masked"])
def test_a_service_that_somebody_disabled_meanwhile_stays_stopped(state, systemd):
    with Aside(NAME, spec()):
        systemd.enabled = state
    assert systemd.states[UNIT] == "inactive" and not systemd.note


def test_one_that_was_never_enabled_runs_again_all_the_same(systemd):
    systemd.enabled = "disabled"
    with Aside(NAME, spec()):
        pass
    assert systemd.states[UNIT] == "active"


def test_a_service_that_somebody_started_meanwhile_is_left_as_it_is(systemd):
    with Aside(NAME, spec()) as aside:
        systemd.states[UNIT] = "active"
        assert "started by somebody else" in aside.disturbed()
    assert systemd.states[UNIT] == "active" and not systemd.note


def test_between_batches_it_stays_stopped_for_a_while(systemd):
    with Aside(NAME, spec(stays_stopped_seconds=30)):
        pass
    assert systemd.states[UNIT] == "inactive" and systemd.note["waits"]
    guard = guarding()
    time.sleep(0.1)
    assert systemd.states[UNIT] == "inactive"
    with Aside(NAME, spec(stays_stopped_seconds=30)):
        assert len(systemd.drained) == 1, "it was stopped once"
        systemd.now += 60  # less than a trial may take
        time.sleep(0.1)
        assert systemd.states[UNIT] == "inactive", "a batch is at work"
    systemd.now += 31
    guard.join(5)
    assert systemd.states[UNIT] == "active" and not guard.is_alive()


def test_a_next_batch_that_comes_too_late_for_the_window_is_refused(systemd, monkeypatch):
    monkeypatch.setattr(tune_service, "left_of", lambda window, now=None: 3600)
    with Aside(NAME, spec(stays_stopped_seconds=30, window="02:00-05:00")):
        monkeypatch.setattr(tune_service, "left_of", lambda window, now=None: 100)
    assert systemd.states[UNIT] == "inactive"
    with pytest.raises(Refused) as refused, Aside(NAME, spec(window="02:00-05:00")):
        pytest.fail("too late")
    assert refused.value.code == tune_service.CLOSED and systemd.states[UNIT] == "active"


def test_a_batch_that_fails_puts_back_at_once(systemd):
    with pytest.raises(OSError), Aside(NAME, spec(stays_stopped_seconds=300)):
        raise OSError
    assert systemd.states[UNIT] == "active" and not systemd.note


def test_end_puts_back_at_once_and_again_does_nothing(systemd):
    with Aside(NAME, spec(stays_stopped_seconds=30)):
        pass
    assert tune_service.end(NAME) == 0 and systemd.states[UNIT] == "active"
    systemd.states[UNIT] = "inactive"
    assert tune_service.end(NAME) == 0 and systemd.states[UNIT] == "inactive"


def test_it_stays_stopped_no_longer_than_the_window(systemd, monkeypatch):
    monkeypatch.setattr(tune_service, "left_of", lambda window, now=None: 130)
    with Aside(NAME, spec(stays_stopped_seconds=300, window="02:00-05:00")):
        pass
    assert systemd.note["until"] == systemd.now + 70  # 60 s for the start


def test_the_note_of_a_batch_that_somebody_ended_is_no_one_s_duty(systemd):
    cut_off()
    systemd.stopped_by_somebody()
    with Aside(NAME, spec()) as aside:
        assert aside.disturbed() is None
    assert systemd.states[UNIT] == "inactive" and not systemd.note
