"""Hosts of a site in the greenlets of one run: one asks the origin, the others draw on hosts that have the file."""

from __future__ import annotations

import fetch_spec
import gevent
import pytest

from llamafleet.host.answers import Job
from tasks.lib import sites
from tasks.lib.sites import Outcome, Shared

DONE, AGAIN, FAILED = Outcome(True), Outcome(False, asks_again=True), Outcome(False)


class Host:
    """Does what it is told to in some milliseconds; `outcomes` are those of its transfers, then all are good."""

    def __init__(self, site, name, *outcomes, serves=True):
        self.site, self.name, self.outcomes, self.serves = site, name, list(outcomes), serves
        self.told, self.drew, self.seconds = [], [], []
        self.seconds_to_serve = self.seconds_at_origin = 0.01

    def transfer(self, what):
        self.site.log.append((self.name, what))
        gevent.sleep(0.01)
        outcome = self.outcomes.pop(0) if self.outcomes else DONE
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def from_origin(self):
        self.site.at_origin += 1
        self.site.most_at_origin = max(self.site.at_origin, self.site.most_at_origin)
        gevent.sleep(self.seconds_at_origin)
        self.site.at_origin -= 1
        return self.transfer("origin")

    def from_peers(self, names, seconds):
        self.drew.append(names)
        self.seconds.append(seconds)
        return self.transfer("peers")

    def serve(self):
        self.site.served.append(self.name)
        gevent.sleep(self.seconds_to_serve)
        return self.serves

    def say(self, text):
        self.told.append(text)


class Site:
    def __init__(self, monkeypatch, count):
        monkeypatch.setattr(sites, "LOOK_SECONDS", 0.02)
        self.log, self.served, self.away = [], [], set()
        self.at_origin = self.most_at_origin = 0
        self.shared = Shared(lambda name: name not in self.away)
        self.names = [f"h{number}" for number in range(count)]
        self.hosts = {name: Host(self, name) for name in self.names}

    def run(self, having=(), only=None, until=None):
        """All hosts at once, until these are done; what each one's fetch gives, or the exception that it raised."""
        needing = [name for name in self.names if name not in having]
        self.shared.note(needing, having)
        going = [name for name in needing if only is None or name in only]
        fetching = {name: gevent.spawn(self.shared.fetch, name, self.hosts[name]) for name in going}
        offering = [gevent.spawn(self.shared.offer, name, self.hosts[name]) for name in having if name not in self.away]
        awaited = [one for name, one in fetching.items() if until is None or name in until]
        gevent.joinall([*awaited, *offering], timeout=20, raise_error=False)
        assert all(one.ready() for one in awaited), "some wait for ever"
        gevent.killall([one for one in fetching.values() if one not in awaited])
        return {name: one.exception or one.value for name, one in fetching.items()}

    @property
    def asked_origin(self):
        return [name for name, what in self.log if what == "origin"]


@pytest.fixture
def site(monkeypatch):
    return Site(monkeypatch, 6)


def test_one_host_asks_the_origin_and_all_have_the_file(site):
    assert site.run() == dict.fromkeys(site.names, True)
    assert site.asked_origin == ["h0"]
    assert "waiting for h0" in site.hosts["h1"].told


def test_a_host_that_has_the_file_spares_the_origin(site):
    assert site.run(having=["h4"]) == {name: True for name in site.names if name != "h4"}
    assert site.asked_origin == []


def test_hosts_serve_only_as_long_as_others_have_no_source(site):
    """Before a host serves a file it reads it once more: the last ones need not."""
    site.run()
    assert site.served[0] == "h0"
    assert "h5" not in site.served


def test_sources_have_places_again_while_the_next_host_prepares_to_serve(site):
    for name in ("h1", "h2"):
        site.hosts[name].seconds_to_serve = 5.0
    with gevent.Timeout(3):
        site.run(only=["h0", "h1", "h2", "h3"], until=["h3"])
    assert site.hosts["h3"].drew == [("h0",)]


@pytest.mark.parametrize("outcome", [FAILED, RuntimeError("no answer")])
def test_a_host_that_fails_at_the_origin_is_followed_by_one_other(site, outcome):
    site.hosts["h0"].outcomes = [outcome]
    results = site.run()
    assert {name for name, done in results.items() if done is True} == set(site.names[1:])
    assert len(site.asked_origin) == 2


def test_a_host_that_has_it_and_cannot_serve_it_is_not_waited_for(site):
    site.hosts["h4"].serves = False
    assert False not in site.run(having=["h4"]).values()
    assert site.asked_origin == ["h0"]


def test_a_host_that_left_the_run_before_it_began_is_not_waited_for(site):
    site.away = {"h4"}
    assert False not in site.run(having=["h4"]).values()
    assert len(site.asked_origin) == 1


def test_who_serves_damaged_bytes_is_named_and_others_are_asked_with_more_time(site):
    site.hosts["h3"].outcomes = [Outcome(False, True, (("damaged", "h0", "bytes 0 to 9"),)), AGAIN]
    assert False not in site.run(only=["h0", "h3"]).values()
    host = site.hosts["h3"]
    assert "left h0, which served other bytes than it should: bytes 0 to 9" in host.told
    assert host.drew[0] == ("h0",)
    assert ("h3", "origin") in site.log  # nobody else has it


def test_each_further_transfer_has_twice_the_time(site):
    site.hosts["h1"].outcomes = [AGAIN, AGAIN]
    assert site.run(only=["h0", "h1"])["h1"] is True
    assert site.hosts["h1"].seconds == [60.0, 120.0, 240.0]


def test_hosts_that_fail_for_themselves_leave_places_to_others(site):
    for name in ("h1", "h2"):
        site.hosts[name].outcomes = [FAILED]
    results = site.run()
    assert [name for name, done in results.items() if done is not True] == ["h1", "h2"]
    assert set(site.shared.sharing.holders.values()) == {0}


@pytest.mark.parametrize("outcome", [FAILED, RuntimeError("no answer")])
def test_an_origin_that_is_down_fails_all_hosts_in_the_time_of_three(site, outcome):
    for host in site.hosts.values():
        host.outcomes, host.seconds_at_origin = [outcome], 0.3
    with gevent.Timeout(1.5):  # one after another they would take 1.8
        results = site.run()
    assert True not in results.values()
    assert site.most_at_origin == 4


def test_hosts_that_cannot_serve_hold_the_others_up_twice_at_most(site):
    for host in site.hosts.values():
        host.serves = False
    assert site.run() == dict.fromkeys(site.names, True)
    assert (len(site.asked_origin), site.most_at_origin) == (6, 4)


def test_both_sides_know_the_same_exit_code():
    assert sites.ASK_AGAIN == fetch_spec.ASK_AGAIN


@pytest.mark.parametrize(
    ("state", "code", "expected"),
    [("ended", 0, (True, False)), ("ended", 9, (False, True)), ("ended", 3, (False, False)),
     ("absent", None, (False, False))],
)  # fmt: skip
def test_a_job_says_how_it_ended_and_whom_it_left(state, code, expected):
    tail = [
        "progress 5 %",
        "told: left gone h2: it ended at byte 4",
        "told: left damaged h 3: x",
        "told: left odd h4: x",
    ]
    job = Job(state=state, exit_code=code, how="", line="", tail=tail)
    found = Outcome.of(job)
    assert (found.is_there, found.asks_again) == expected
    assert found.left == (("gone", "h2", "it ended at byte 4"),)


def test_a_host_that_asks_the_origin_already_goes_on_and_the_others_wait_for_it(site):
    site.shared.begin("h3")
    site.run()
    assert site.asked_origin == ["h3"]
    assert site.hosts["h0"].told[0] == "waiting for h3"
