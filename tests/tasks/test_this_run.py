"""Who a run is, and whose lock it may take: only from itself, and from a process that it sees to have ended."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest

from llamafleet.host.installed import Holder
from llamafleet.service.refusals import held_by
from tasks.lib import this_run
from tasks.lib.this_run import is_ours_or_dead

ASK = "import json; from tasks.lib import this_run; print(json.dumps(this_run.this_run()))"


@pytest.fixture
def ours():
    return Holder(**this_run.this_run())


@pytest.fixture
def ended():
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_the_run_itself_is_no_stranger(ours):
    assert is_ours_or_dead(ours)
    assert is_ours_or_dead(replace(ours, pid=1, machine="elsewhere"))


def test_another_run_of_a_living_process_keeps_its_lock(ours):
    assert not is_ours_or_dead(replace(ours, run="another"))


def test_a_process_that_has_ended_loses_it(ours, ended):
    assert is_ours_or_dead(replace(ours, run="another", pid=ended))


def test_a_process_number_that_was_given_away_since_is_no_holder(ours):
    assert is_ours_or_dead(replace(ours, run="another", pid_began=ours.pid_began - 100))


def test_of_another_machine_s_processes_nothing_is_known(ours, ended):
    assert not is_ours_or_dead(replace(ours, run="another", pid=ended, machine="elsewhere"))


def test_nor_of_another_container_s_of_the_same_host_name(ours, ended):
    assert not is_ours_or_dead(replace(ours, run="another", pid=ended, pid_namespace="4026539999"))


def test_nor_of_a_holder_of_llamafleet_0_1_0_which_names_no_container(ours, ended):
    early = Holder("another", ours.who, ours.machine, ended, ours.pid_started, ours.began)
    assert not is_ours_or_dead(early)


@pytest.mark.skipif(os.geteuid() != 0, reason="a namespace of processes needs root")
def test_two_containers_of_one_host_name_are_told_apart(ours):
    """A real one: the same host name and boot, another namespace, in which this test's process cannot be seen."""
    words = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", ASK]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    other = Holder(**json.loads(done.stdout))
    assert other.machine == ours.machine and other.pid_namespace != ours.pid_namespace
    # It has ended, but we could not see that, were we in another container.
    assert not is_ours_or_dead(other)


def test_a_change_of_the_time_of_day_makes_nobody_dead(ours, monkeypatch):
    """Python's own and psutil's start times follow the clock; ours does not."""
    monkeypatch.setattr(time, "time", lambda: 10**6)
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: 12345.0)
    assert not is_ours_or_dead(replace(ours, run="another"))


def test_the_message_for_the_second_run_names_the_first(ours):
    text = held_by(replace(ours, who="ann@desk", age_seconds=3.2))
    assert "ann@desk" in text and "3 s ago" in text
