"""A rollout as an operator sees it: the waves are pyinfra's own runs, over hosts that are pretended."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tasks import rollout
from tests import forked

ROOT = Path(__file__).resolve().parents[2]


class Fleet:
    """Hosts a, b, ... of one model that have 1 and should have 2, but for what is given by their letters."""

    def __init__(self, folder, count=4, **special):
        self.file, self.inventory = folder / "fleet.json", folder / "fleet.py"
        self.hosts = {name(letter): {"now": 1, "wanted": 2, **special.get(letter, {})} for letter in "abcdefgh"[:count]}
        self.file.write_text(json.dumps(self.hosts))
        self.inventory.write_text(f"hosts = {list(self.hosts)!r}\n")

    def words(self, *options):
        return ["-m", "tests.tasks.rolled_out", str(self.file), str(self.inventory), *options]

    def roll_out(self, *options):
        return forked.pyinfra().run(self.words(*options), env=environment())

    def start(self, *options):
        return subprocess.Popen([sys.executable, *self.words(*options)], cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip

    def mend(self, letter):
        """From now on the host does what it should."""
        data = json.loads(self.file.read_text())
        one = data[name(letter)]
        data[name(letter)] = {"now": one["now"], "wanted": one["wanted"]}
        self.file.write_text(json.dumps(data))

    @property
    def done(self):
        return {one[-1] for one, data in json.loads(self.file.read_text()).items() if data["now"] == data["wanted"]}

    @property
    def begun(self):
        """The hosts whose deploys began, in their order."""
        log = self.file.with_suffix(".log")
        return [line[-1] for line in log.read_text().splitlines() if line[0] == "@"] if log.exists() else []

    def add_gateway(self, **special):
        """A host of the group `gateway`, before the others."""
        self.hosts = {name("g"): {"now": 1, "wanted": 1, "models": "", **special}, **self.hosts}
        self.file.write_text(json.dumps(self.hosts))
        self.inventory.write_text(f"gateway = [{name('g')!r}]\nhosts = {list(self.hosts)[1:]!r}\n")

    def add_monitor(self):
        """One that watches the others, and is as planned."""
        self.hosts[name("m")] = {"now": 1, "wanted": 1, "models": ""}
        self.file.write_text(json.dumps(self.hosts))
        self.inventory.write_text(f"hosts = {list(self.hosts)[:-1]!r}\nmonitoring = [{name('m')!r}]\n")

    @property
    def told(self):
        """What the gateway was told."""
        return self.noted("gateway: ")

    @property
    def watched(self):
        """The hosts whose monitoring was looked at after the waves."""
        return {line[-1] for line in self.noted("monitoring: ")}

    def noted(self, begin):
        log = self.file.with_suffix(".log")
        lines = log.read_text().splitlines() if log.exists() else []
        return [line.removeprefix(begin) for line in lines if line.startswith(begin)]


def name(letter):
    return f"@fake/{letter}"


def environment():
    return {**os.environ, "PYINFRA_PROGRESS": "off", "NO_COLOR": "1", "PYTHONPATH": str(ROOT)}


def test_dry_prints_the_waves_with_every_change_and_changes_nothing(tmp_path):
    fleet = Fleet(tmp_path, 4, d={"now": 2})
    run = fleet.roll_out("--dry")
    assert (run.returncode, fleet.begun) == (0, [])
    assert run.stdout.splitlines() == [
        "wave 1 of 3: @fake/a", "    @fake/a: serve x: 1 is not 2",
        "wave 2 of 3: @fake/b", "    @fake/b: serve x: 1 is not 2",
        "wave 3 of 3: @fake/c", "    @fake/c: serve x: 1 is not 2",
        "as planned, and left alone: @fake/d",
    ]  # fmt: skip


def test_dry_tells_what_gateway_and_monitoring_learn_after_the_waves(tmp_path):
    """Also as JSON, and as all hosts are then."""
    fleet = Fleet(tmp_path, 2, b={"now": 2, "unwatched": True})
    fleet.add_gateway(now=2, wanted=2)
    fleet.inventory.write_text(fleet.inventory.read_text() + f"monitoring = [{name('b')!r}]\n")
    run = fleet.roll_out("--dry")
    assert (run.returncode, fleet.begun, fleet.told) == (0, [], []), run.stderr
    assert run.stdout.splitlines() == [
        "wave 1 of 1: @fake/a", "    @fake/a: serve x: 1 is not 2",
        "after the waves", "    @fake/g: gateway: @fake/a/x has changed", "    @fake/b: monitoring: it is new",
        "as planned, and left alone: @fake/g, @fake/b",
    ]  # fmt: skip
    afterwards = json.loads(fleet.roll_out("--dry", "--json").stdout)["afterwards"]
    assert afterwards == {"@fake/g": ["gateway: @fake/a/x has changed"], "@fake/b": ["monitoring: it is new"]}


def test_where_the_gateway_alone_has_to_learn_dry_does_not_say_that_nothing_is_to_do(tmp_path):
    fleet = Fleet(tmp_path, 1, a={"now": 2})
    fleet.inventory.write_text(fleet.inventory.read_text() + f"monitoring = [{name('a')!r}]\n")
    assert fleet.roll_out("--dry").stdout.splitlines() == ["nothing to do: all 1 hosts are as planned"]
    fleet.hosts[name("a")]["unwatched"] = True
    fleet.file.write_text(json.dumps(fleet.hosts))
    assert fleet.roll_out("--dry").stdout.splitlines()[:2] == ["after the waves", "    @fake/a: monitoring: it is new"]


def test_all_hosts_one_wave_after_the_other_and_a_second_time_nothing(tmp_path):
    fleet = Fleet(tmp_path)
    run = fleet.roll_out()
    assert run.returncode == 0 and fleet.done == set("abcd"), run.stderr
    assert fleet.begun[:2] == ["a", "b"] and set(fleet.begun[2:]) == {"c", "d"}
    assert run.stdout.splitlines()[-1] == "rolled out: @fake/a, @fake/b, @fake/c, @fake/d"
    headings = [line for line in run.stderr.splitlines() if line.startswith("--> Wave")]
    assert headings == ["--> Wave 1 of 3: @fake/a", "--> Wave 2 of 3: @fake/b", "--> Wave 3 of 3: @fake/c, @fake/d"]
    again = fleet.roll_out()
    assert (again.returncode, again.stdout) == (0, "nothing to do: all 4 hosts are as planned\n")
    assert len(fleet.begun) == 4 and fleet.watched == set()


def test_the_first_failure_ends_it_and_the_next_run_goes_on_there(tmp_path):
    fleet = Fleet(tmp_path, b={"fails": "the gate: it writes nonsense"})
    run = fleet.roll_out()
    assert run.returncode == 1 and fleet.begun == ["a", "b"] and fleet.done == {"a"}
    assert run.stdout.splitlines()[-5:] == [
        "the rollout stopped in wave 2 of 3: @fake/b",
        "    @fake/b failed: the gate: it writes nonsense",
        "done: @fake/a",
        "not touched: @fake/c, @fake/d",
        "to go on, mend what failed on @fake/b, or take the change back in the inventory. Then run again; what is as "
        f"planned is left alone: llamafleet rollout --inventory {fleet.inventory}",
    ]
    fleet.mend("b")
    again = fleet.roll_out()
    assert again.returncode == 0 and fleet.done == set("abcd")
    assert "as planned, and left alone: @fake/a" in again.stdout and fleet.begun.count("a") == 1


def test_a_wave_with_a_refused_host_is_not_begun(tmp_path):
    fleet = Fleet(tmp_path, 8, c={"refused": "the disk is full by now"})
    run = fleet.roll_out("--waves", "1,50%", "--json")
    told = json.loads(run.stdout)
    assert run.returncode == 1 and fleet.begun == ["a"], run.stderr
    assert told["failed"] == {"@fake/c": "the disk is full by now"} and told["done"] == ["@fake/a"]
    assert told["untouched"] == [name(letter) for letter in "bdefgh"]


def test_it_does_not_begin_where_a_host_cannot_be_read_unless_that_is_left_out(tmp_path):
    fleet = Fleet(tmp_path, b={"unread": "cannot be reached: no route"})
    run = fleet.roll_out()
    assert run.returncode == 1 and fleet.begun == [] and run.stdout == ""
    assert "@fake/b: cannot be reached: no route" in run.stderr and run.stderr.endswith("--exclude @fake/b\n")
    without = fleet.roll_out("--exclude", "@fake/b", "--limit", "@fake/[abc]")
    assert without.returncode == 0 and fleet.done == {"a", "c"}


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--waves", "10%,5%"], "--waves 10%,5%: 5% should be more"), (["--limit", "x"], "leave no host"),
     (["--exclude", "hosts"], "leave no host")],
)  # fmt: skip
def test_what_cannot_be_used_is_told(tmp_path, options, said):
    fleet = Fleet(tmp_path)
    run = fleet.roll_out(*options)
    assert (run.returncode, run.stdout, fleet.begun) == (2, "", [])
    assert said in run.stderr and "Traceback" not in run.stderr


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_ended_in_the_middle_it_goes_on_with_the_next_run(tmp_path, sent, code):
    fleet = Fleet(tmp_path, b={"hangs": 60})
    with fleet.start() as process:
        deadline = time.monotonic() + 60
        while fleet.begun != ["a", "b"]:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(sent)
        process.communicate(timeout=30)
    assert (process.returncode, fleet.done) == (code, {"a"})
    fleet.mend("b")
    again = fleet.roll_out()
    assert again.returncode == 0 and fleet.done == set("abcd"), again.stdout + again.stderr
    assert fleet.begun.count("a") == 1


def test_each_host_leaves_the_gateway_while_it_switches_and_the_gateway_learns_of_every_wave(tmp_path):
    fleet = Fleet(tmp_path, 2)
    fleet.add_gateway()
    run = fleet.roll_out()
    assert run.returncode == 0 and fleet.done >= {"a", "b"}, run.stdout + run.stderr
    assert fleet.told == [
        "drain @fake/a/x", "undrain @fake/a/x", "learns of @fake/a",
        "drain @fake/b/x", "undrain @fake/b/x", "learns of @fake/a, @fake/b",
    ]  # fmt: skip
    assert fleet.roll_out().returncode == 0 and fleet.told[6:] == ["learns of @fake/a, @fake/b"]
    assert fleet.roll_out("--dry").returncode == 0 and len(fleet.told) == 7


def test_a_gateway_outside_of_the_rollout_drains_and_is_not_changed(tmp_path):
    fleet = Fleet(tmp_path, 2)
    fleet.add_gateway(fails=True)
    assert fleet.roll_out("--limit", "@fake/a").returncode == 0
    assert fleet.told == ["drain @fake/a/x", "undrain @fake/a/x"]


@pytest.mark.parametrize(
    ("letter", "special", "said"),
    [("a", {"up": False}, "@fake/a failed: the gateway of @fake/g does not find @fake/a/x up: L4TOUT"),
     ("g", {"fails": True}, "@fake/g failed: ")],
)  # fmt: skip
def test_what_is_wrong_at_the_gateway_after_a_wave_ends_the_rollout(tmp_path, letter, special, said):
    fleet = Fleet(tmp_path, 2, **({letter: special} if letter != "g" else {}))
    fleet.add_gateway(**(special if letter == "g" else {}))
    run = fleet.roll_out()
    assert run.returncode == 1 and fleet.begun == ["a"], run.stdout + run.stderr
    assert said in run.stdout and "not touched: @fake/b" in run.stdout


@pytest.mark.parametrize("now", [1, 2])
def test_what_a_killed_rollout_has_left_out_is_put_back_also_where_nothing_else_is_to_do(tmp_path, now):
    fleet = Fleet(tmp_path, 1, a={"now": now, "left": 60})
    fleet.add_gateway()
    assert fleet.roll_out().returncode == 0
    assert fleet.told[0] == "undrain @fake/a/x"


def test_all_hosts_are_watched_as_they_are_after_the_last_wave_also_those_that_were_as_planned(tmp_path):
    fleet = Fleet(tmp_path, 3, c={"now": 2})
    fleet.add_monitor()
    assert fleet.roll_out("--dry").returncode == 0 and fleet.watched == set()
    assert fleet.roll_out().returncode == 0
    assert fleet.watched == set("abcm") and fleet.begun == ["a", "b"]


def test_nobody_is_watched_before_the_last_wave(tmp_path):
    fleet = Fleet(tmp_path, 2, b={"fails": "no memory"})
    fleet.add_monitor()
    assert fleet.roll_out().returncode == 1 and fleet.watched == set()


def test_a_host_that_cannot_be_watched_fails_the_rollout(tmp_path):
    fleet = Fleet(tmp_path, 2, a={"unwatched": True})
    fleet.add_monitor()
    run = fleet.roll_out()
    assert run.returncode == 1 and "@fake/a failed" in run.stdout, run.stdout


def test_a_switch_of_a_run_that_was_killed_is_waited_for(monkeypatch):
    """It goes on without its run, and changes what the host has."""
    jobs = [("switch-chat-0123", "fetch-chat"), ("switch-chat-0123",), ("fetch-chat",), ()]
    monkeypatch.setattr(rollout.decision, "decide", lambda host: decided(jobs.pop(0)))
    monkeypatch.setattr(rollout.HostState, "of", lambda name, desired, changes, wanted: desired.installed.jobs)
    monkeypatch.setattr(rollout.switching, "wanted", lambda host: ())
    monkeypatch.setattr(rollout.gevent, "sleep", lambda seconds: None)
    lines = []
    host = SimpleNamespace(name="a", log=lines.append)
    assert rollout.look(host) == ("fetch-chat",) and jobs == [()]
    assert lines == ["waiting for switch-chat-0123, which another run began"] * 2
    monkeypatch.setattr(rollout, "SWITCH_SECONDS", -1.0)
    jobs[:] = [("switch-chat-0123",)]
    assert rollout.look(host) == ("switch-chat-0123",), "for some minutes, not for ever"


def decided(jobs):
    return SimpleNamespace(desired=SimpleNamespace(installed=SimpleNamespace(jobs=jobs)), changes=None)
