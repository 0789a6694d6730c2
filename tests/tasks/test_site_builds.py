"""One host of a site makes a build, the others take it, with the digest that it told."""

from __future__ import annotations

import json
from types import SimpleNamespace

import gevent
import pytest

from llamafleet.host import answers
from llamafleet.host.answers import Job
from llamafleet.hub.network import Network
from tasks.lib import builds, jobs, remote, site_builds, sites
from tasks.lib.site_builds import Release
from tasks.lib.site_members import Member, Site

KEY, DIGEST = "0123456789abcdef", "d" * 64
SUMS = {"h1": "1" * 64, "h2": "1" * 64, "h3": "1" * 64}


class Host(SimpleNamespace):
    __hash__ = object.__hash__


class Run:
    """A run over hosts; `log` has (host, job's program, the digest that build.py gets or the peers that are asked)."""

    def __init__(self, monkeypatch):
        self.state = SimpleNamespace(active_hosts=set())
        self.site, self.log, self.fails, self.specs, self.made, self.sums = (
            Site(self.state, 9345),
            [],
            set(),
            {},
            [],
            dict(SUMS),
        )
        monkeypatch.setattr(sites, "LOOK_SECONDS", 0.02)
        monkeypatch.setattr(jobs, "hold", lambda *_: True)
        monkeypatch.setattr(jobs, "ended", self.ended)
        monkeypatch.setattr(remote, "run", self.send)
        monkeypatch.setattr(remote, "run_json", self.asked)
        monkeypatch.setattr(remote, "space_left", lambda *_: "")
        monkeypatch.setattr(jobs, "sent_spec", lambda job, spec: SimpleNamespace(job=job, spec=spec))
        monkeypatch.setattr(builds, "made", lambda key, digest: self.made.append((key, digest)))

    def host(self, name, **release):
        made = Host(name=name, lines=[], state=self.state, print_prefix="")
        made.log = made.log_styled = lambda text, *_, **__: made.lines.append(text)
        self.state.active_hosts.add(made)
        asked = {"key": KEY, "build_cache": None}
        item = Release(f"build-{KEY}", asked, **{"is_needed": True, **release})
        self.site.members[name] = Member(made, f"10.0.0.{name[1:]}", Network())
        self.site.note(name, [item])
        return made

    def send(self, host, command):
        self.specs[host.name, command.job] = command.spec
        return True, [], []

    def asked(self, host, command, read):
        if read is answers.apart:
            return ()
        self.log.append((host.name, "pack", None))
        return answers.packed(json.dumps({"digest": DIGEST, "sha256": self.sums[host.name], "size_bytes": 7}))

    def ended(self, state, host, job, command, secret=None, network=None):
        kind, spec = job.partition("-")[0], self.specs[host.name, job]
        what = [one["name"] for one in spec["peers"]["hosts"]] if kind == "fetch" else None
        if kind == "build":
            what = command[command.index(jobs.spec_path(job)) + 1 :]
            assert bool(what) == (spec["build_cache"] == "/var/lib/llamafleet/builds")
        self.log.append((host.name, kind, what))
        gevent.sleep(0.02)
        code = int((host.name, kind) in self.fails)
        return Job("ended", code, "", ["error: it does not compile"] * code, "")

    def build(self):
        going = {
            name: gevent.spawn(site_builds._build, self.state, one.host, self.site, one.items[KEY])
            for name, one in self.site.members.items()
            if self.site.has_work([one.items[KEY]])
        }
        gevent.joinall(list(going.values()), timeout=20)
        assert all(one.ready() for one in going.values()), "some wait for ever"
        return {name: one.exception or one.value for name, one in going.items()}

    def of(self, kind):
        return [(host, what) for host, program, what in self.log if program == kind]


@pytest.fixture
def run(monkeypatch):
    return Run(monkeypatch)


def test_one_host_compiles_and_the_others_take_it_with_its_digest(run):
    for name in ("h1", "h2", "h3"):
        run.host(name)
    assert run.build() == dict.fromkeys(SUMS, True)
    assert run.of("build") == [("h1", []), ("h2", [DIGEST]), ("h3", [DIGEST])]
    assert run.of("fetch")[0] == ("h2", ["h1"])
    assert set(run.made) == {(KEY, DIGEST)}
    spec = run.specs["h2", f"fetch-build-{KEY}"]
    assert (spec["directory"], spec["files"][0]["name"]) == ("/var/lib/llamafleet/builds", f"{KEY}-{DIGEST}.tar")


def test_a_host_that_has_the_release_gives_it_and_nobody_compiles(run):
    run.host("h1")
    run.host("h2", is_needed=False)
    assert run.build() == {"h1": True, "h2": True}
    assert run.of("build") == [("h1", [DIGEST])]


def test_hosts_that_have_the_release_do_nothing(run):
    for name in ("h1", "h2"):
        run.host(name, is_needed=False)
    assert run.build() == {}


def test_where_it_does_not_compile_the_next_one_tries(run):
    for name in ("h1", "h2"):
        run.host(name)
    run.fails.add(("h1", "build"))
    assert run.build() == {"h1": False, "h2": True}
    assert run.of("build") == [("h1", []), ("h2", [])]


def test_a_host_that_compiles_since_an_earlier_run_goes_on(run):
    run.host("h1")
    run.host("h2", is_under_way=True)
    assert run.build() == {"h1": True, "h2": True}
    assert run.of("build") == [("h2", []), ("h1", [DIGEST])]


def test_archives_of_different_builds_are_not_mixed(run):
    run.host("h1")
    run.host("h2", is_needed=False)
    run.host("h3", is_needed=False)
    run.sums["h3"] = "3" * 64
    assert run.build() == {"h1": True, "h2": True, "h3": True}
    assert all(len(peers) == 1 for _, peers in run.of("fetch"))


def test_hosts_without_a_common_build_do_not_wait_for_each_other(run):
    run.host("h1")
    two = run.host("h2", is_needed=False)
    other = Release("build-f", {"key": "f" * 16, "build_cache": None}, is_needed=True)
    run.site.note("h2", [other])
    assert site_builds._build(run.state, two, run.site, other)
    assert run.of("build") == [("h2", [])]
    assert run.of("pack") == []
