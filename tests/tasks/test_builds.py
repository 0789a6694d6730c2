"""Builds that hosts share: whose word for a digest counts, and in what order hosts make one build."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import gevent
import pytest
from gevent.event import Event

from tasks.lib import builds, operations

KEY, OTHER = "0123456789abcdef", "f" * 16
A, B, C = "a" * 64, "b" * 64, "c" * 64


@pytest.fixture
def path(tmp_path, monkeypatch):
    """This operator's record, in an empty folder; nothing is known from hosts."""
    path = tmp_path / "state" / "known-builds.json"
    monkeypatch.setattr(builds, "record_path", lambda: path)
    for name in ("_made", "_surveyed", "_first", "_making"):
        monkeypatch.setattr(builds, name, {})
    return path


def test_a_digest_of_this_run_is_known_to_later_runs(path, monkeypatch):
    assert builds.known(KEY) == []
    builds.made(KEY, A)
    builds.made(KEY, B)
    builds.made(OTHER, C)
    assert builds.known(KEY) == [B, A]
    monkeypatch.setattr(builds, "_made", {})  # another run
    assert builds.known(KEY) == [B, A] and builds.known(OTHER) == [C]


def test_what_a_survey_says_counts_for_this_run_and_last(path, monkeypatch):
    builds.tell(KEY, C)
    builds.made(KEY, A)
    assert builds.known(KEY) == [A, C]
    assert builds.recorded() == {KEY: [A]}


def test_the_record_is_the_operators_alone(path):
    builds.made(KEY, A)
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    assert not [name for name in os.listdir(path.parent) if name.endswith(".new")]


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_record_that_others_can_write_is_not_used(path, mode, caplog):
    builds.made(KEY, A)
    path.chmod(mode)
    assert builds.recorded() == {} and str(path) in caplog.text


def test_a_record_of_another_user_is_not_used(path, monkeypatch):
    builds.made(KEY, A)
    monkeypatch.setattr(builds.os, "geteuid", lambda: 1000)
    os.chown(path, 1001, -1) if os.getuid() == 0 else pytest.skip("only root gives files away")
    assert builds.recorded() == {}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", '{"schema": 2, "builds": {}}', '{"schema": 1, "builds": []}',
     json.dumps({"schema": 1, "builds": {"../x": [A], KEY: A, OTHER: ["$(reboot)"]}})],
)  # fmt: skip
def test_a_damaged_record_is_worth_nothing_and_is_replaced(path, text):
    path.parent.mkdir()
    path.write_text(text)
    path.chmod(0o600)
    assert builds.recorded() == {}
    builds.made(KEY, A)
    assert builds.recorded() == {KEY: [A]}


def test_the_record_stays_small(path, monkeypatch):
    monkeypatch.setattr(builds, "MOST_BUILDS", 3)
    for number in range(12):
        builds.record(KEY, f"{number:064x}")
        builds.record(f"{number:016x}", A)
    assert len(builds.recorded()[KEY]) == builds.MOST_DIGESTS and builds.recorded()[KEY][-1] == f"{11:064x}"
    assert list(builds.recorded()) == [f"{10:016x}", KEY, f"{11:016x}"]


def test_a_record_that_cannot_be_written_ends_no_run(path, caplog):
    path.parent.write_text("a file where the folder should be")
    builds.made(KEY, A)
    assert builds.known(KEY) == [A] and "known in this run only" in caplog.text


class Host:
    def __init__(self, name):
        self.name, self.lines = name, []
        self.state = SimpleNamespace(active_hosts={self})

    def log(self, line):
        self.lines.append(line)


def settle():
    """Let every host go on until it waits."""
    for _ in range(5):
        gevent.sleep(0)


@pytest.fixture
def fleet(path):
    """Hosts that make a build at once; a test lets each end, well or not. `began` has the order in which they began."""

    class Fleet:
        def __init__(self):
            self.began, self.hosts, self.ends, self.failing, self.greenlets = [], {}, {}, set(), []

        def start(self, name, key=KEY, cache="/mnt/b"):
            self.hosts.setdefault(name, Host(name))
            self.ends[name] = Event()

            def make():
                with builds.turn(self.hosts[name], key, cache):
                    self.began.append(name)
                    self.ends[name].wait()
                    if name in self.failing:
                        raise RuntimeError(name)

            self.greenlets.append(gevent.spawn(make))
            settle()
            return self.greenlets[-1]

        def end(self, name, well=True):
            if not well:
                self.failing.add(name)
            self.ends[name].set()
            settle()

    fleet = Fleet()
    yield fleet
    gevent.killall(fleet.greenlets)


def test_one_host_makes_a_build_and_then_all_others_take_it_at_once(fleet):
    for name in ("anna", "bert", "carl"):
        fleet.start(name)
    assert fleet.began == ["anna"] and fleet.hosts["carl"].lines == ["waiting for anna, which makes the same build"]
    fleet.end("anna")
    assert sorted(fleet.began) == ["anna", "bert", "carl"]
    fleet.start("dora")
    assert fleet.began[-1] == "dora"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_where_the_first_host_fails_the_next_one_makes_it(fleet, capsys):
    for name in ("anna", "bert", "carl"):
        fleet.start(name)
    fleet.end("anna", well=False)
    assert fleet.began == ["anna", "bert"] and "waiting for bert" in fleet.hosts["carl"].lines[-1]
    fleet.end("bert")
    assert fleet.began == ["anna", "bert", "carl"]


def test_where_the_first_hosts_work_is_killed_nobody_waits_for_ever(fleet):
    first = fleet.start("anna")
    fleet.start("bert")
    first.kill()
    settle()
    assert fleet.began == ["anna", "bert"]


def test_a_host_whose_job_makes_the_build_already_goes_first_wherever_it_stands(fleet, monkeypatch):
    monkeypatch.setattr(builds.gevent, "sleep", lambda _, sleep=gevent.sleep: sleep(0))
    fleet.hosts["carl"] = Host("carl")
    builds.makes(fleet.hosts["carl"], KEY, "/mnt/b")
    for name in ("anna", "bert", "carl"):
        fleet.start(name)
    assert fleet.began == ["carl"] and "waiting for carl" in fleet.hosts["anna"].lines[-1]
    fleet.end("carl", well=False)  # it has had its turn
    assert fleet.began == ["carl", "anna"]


def test_nobody_waits_for_a_host_that_failed_before_its_turn(fleet, monkeypatch):
    monkeypatch.setattr(builds.gevent, "sleep", lambda _, sleep=gevent.sleep: sleep(0))
    carl = Host("carl")
    builds.makes(carl, KEY, "/mnt/b")
    fleet.start("anna")
    assert fleet.began == []
    carl.state.active_hosts.clear()
    settle()
    assert fleet.began == ["anna"]


def test_other_builds_and_other_caches_wait_for_nobody(fleet):
    fleet.start("anna")
    fleet.start("bert", key=OTHER)
    fleet.start("carl", cache="/mnt/other")
    fleet.start("dora", cache=None)
    assert fleet.began == ["anna", "bert", "carl", "dora"]


@pytest.fixture
def made_on(path, monkeypatch):
    """Makes the build on a host whose job ends well or not, and whose release has this digest; `told` has what each
    host was told to do, without the words that start Python."""
    told = {}

    def make(name, digest=A, well=True, cache="/mnt/b"):
        def follow(state, host, job, command, *_):
            told[host.name] = command[command.index("/var/lib/llamafleet/jobs/build-k.json") :]
            return well

        def run_json(host, command, read):
            if digest is None:
                raise operations.remote.RemoteError("/opt/llamafleet/releases/k is damaged")
            return read(json.dumps({"digest": digest}))

        monkeypatch.setattr(operations.jobs, "follow", follow)
        monkeypatch.setattr(operations.remote, "run_json", run_json)
        host = Host(name)
        return operations._build(None, host, "build-k", KEY, cache)

    make.told = told
    return make


def test_the_second_host_is_given_the_digest_of_the_first(made_on):
    assert made_on("anna") and made_on("bert", B)
    assert made_on.told == {
        "anna": ["/var/lib/llamafleet/jobs/build-k.json"],
        "bert": ["/var/lib/llamafleet/jobs/build-k.json", A],
    }
    assert builds.recorded() == {KEY: [A, B]}


def test_a_host_that_failed_gives_no_digest(made_on):
    assert not made_on("anna", well=False)
    assert made_on("bert") and made_on.told["bert"] == ["/var/lib/llamafleet/jobs/build-k.json"]


def test_a_host_whose_release_is_damaged_has_failed_and_gives_no_digest(made_on):
    with pytest.raises(operations.remote.RemoteError, match="is damaged"):
        made_on("anna", None)
    made_on("bert")
    assert made_on.told["bert"] == ["/var/lib/llamafleet/jobs/build-k.json"]


def test_without_a_cache_no_digest_is_asked(made_on):
    assert made_on("anna", None, cache=None) and builds.recorded() == {}
