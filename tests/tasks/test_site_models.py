"""What hosts of a site do for the models of a run: who is one site, who waits for whom, and what fails whom."""

from __future__ import annotations

import json
from types import SimpleNamespace

import gevent
import pytest

from llamafleet.cli.arguments import default_data
from llamafleet.host import answers
from llamafleet.host.answers import Job
from llamafleet.hub.network import Network
from llamafleet.settings.schema import Settings
from tasks.lib import jobs, remote, site_members, site_models, sites
from tasks.lib.site_members import Member, Site
from tasks.lib.site_models import Model

A, B = "a" * 64, "b" * 64


def spec(sha256=A, name="x.gguf", **file):
    entry = {"name": name, "urls": ["https://h/x.gguf"], "size_bytes": 9, "sha256": sha256, **file}
    return {
        "directory": f"/var/lib/llamafleet/models/{name}",
        "files": [entry],
        "curl_config": None,
        "reserve_bytes": 0,
    }


class Host(SimpleNamespace):
    __hash__ = object.__hash__


class Run:
    """A run over hosts whose jobs end well, unless `fails` has (host, kind of job); `log` has (host, program, peers)."""

    def __init__(self, monkeypatch):
        self.state = SimpleNamespace(inventory=[], active_hosts=set(), is_host_in_limit=lambda host: True)
        self.site, self.log, self.fails, self.specs, self.apart = Site(self.state, 9345), [], set(), {}, {}
        self.locked, self.certificates = [], set()
        monkeypatch.setattr(sites, "LOOK_SECONDS", 0.02)
        monkeypatch.setattr(jobs, "hold", self.hold)
        monkeypatch.setattr(jobs, "ended", self.ended)
        monkeypatch.setattr(remote, "run", self.send)
        monkeypatch.setattr(
            remote, "run_json", lambda host, *_: answers.apart(json.dumps({"apart": self.apart.get(host.name, [])}))
        )
        monkeypatch.setattr(remote, "space_left", lambda *_: "")
        monkeypatch.setattr(jobs, "sent_spec", lambda job, spec: SimpleNamespace(job=job, spec=spec))

    def host(self, name, address, *models, **more):
        made = Host(name=name, lines=[], state=self.state)
        made.log = made.log_styled = lambda text, *_, **__: made.lines.append(text)
        made.print_prefix = ""
        self.state.active_hosts.add(made)
        self.site.members[name] = Member(made, address, Network(), **more)
        self.site.note(name, models)
        return made

    def hold(self, state, host):
        self.locked.append(host.name)
        if (host.name, "hold") in self.fails:
            raise remote.RemoteError("another run holds it")
        return True

    def send(self, host, command):
        self.specs[host.name, command.job] = command.spec
        return True, [], []

    def ended(self, state, host, job, command, secret=None, network=None):
        kind = job.partition("-")[0]
        peers = self.specs.get((host.name, job), {}).get("peers")
        if secret is not None:
            self.certificates.add(json.loads(secret.text)["certificate"])
        self.log.append((host.name, kind, [one["name"] for one in peers["hosts"]] if peers else None))
        gevent.sleep(0.02)
        code = int((host.name, kind) in self.fails)
        line = "error: no mirror answers" if code else "done"
        return Job("ended", code, line, [line], "")

    def models(self, host):
        return tuple(self.site.members[host.name].items.values())

    def fetch(self):
        """All hosts at once; what each one's operation gives, or the exception."""
        going = {host.name: gevent.spawn(site_models._fetch, self.state, host, self.site, self.models(host))
                 for host in sorted(self.state.active_hosts, key=lambda one: one.name)
                 if self.site.has_work(self.models(host))}  # fmt: skip
        gevent.joinall(list(going.values()), timeout=20)
        assert all(one.ready() for one in going.values()), "some wait for ever"
        return {name: one.exception or one.value for name, one in going.items()}

    def of(self, kind):
        return [(host, peers) for host, what, peers in self.log if what == kind]


@pytest.fixture
def run(monkeypatch):
    return Run(monkeypatch)


def site_of(host, settings):
    """As the stage of models has it."""
    return site_members.of(host, settings) if site_members.has_a_model_in_common(host, settings) else None


def lacking(sha256=A):
    return Model("x-0123", spec(sha256), is_needed=True)


def having(sha256=A):
    return Model("x-0123", spec(sha256), is_needed=False)


def test_one_host_asks_the_origin_and_the_others_those_that_have_it(run):
    for number in (1, 2, 3):
        run.host(f"h{number}", f"10.0.0.{number}", lacking())
    assert run.fetch() == {"h1": True, "h2": True, "h3": True}
    assert run.of("fetch")[0] == ("h1", None)
    assert all(peers for _, peers in run.of("fetch")[1:])


def test_a_converged_host_gives_what_it_has_and_nobody_asks_the_origin(run):
    """It comes last in the run, and only then takes its lock."""
    run.host("h1", "10.0.0.1", lacking())
    run.host("h2", "10.0.0.2", having())
    assert run.fetch() == {"h1": True, "h2": True}
    assert run.of("fetch") == [("h1", ["h2"])]
    assert "h2" in run.locked


def test_what_is_asked_before_all_hosts_are_known_decides_nothing(run):
    """pyinfra runs an operation once while it prepares, to tell what would change."""
    two = run.host("h2", "10.0.0.2", having())
    assert not run.site.has_work(run.models(two))
    run.host("h1", "10.0.0.1", lacking())
    assert run.fetch() == {"h1": True, "h2": True}
    assert run.of("fetch") == [("h1", ["h2"])]


def test_all_hosts_of_a_run_know_one_certificate(run, monkeypatch):
    """Looking up a name lets the greenlets of other hosts run."""

    def slow(name):
        gevent.sleep(0.005)
        return name

    monkeypatch.setattr(site_members.site_access, "resolved", slow)
    for number in (1, 2, 3):
        run.host(f"h{number}", f"10.0.0.{number}", lacking())
    for number in (4, 5):
        run.host(f"h{number}", f"10.0.0.{number}", having())
    run.fetch()
    assert len(run.certificates) == 1
    assert {host for host, _ in run.of("share")} == {"h4", "h5"}


def test_hosts_that_have_all_models_do_nothing(run):
    run.host("h1", "10.0.0.1", having())
    run.host("h2", "10.0.0.2", having())
    assert run.fetch() == {}


@pytest.mark.parametrize("fault", ["hold", "share"])
def test_a_host_that_lacks_nothing_never_fails_and_nobody_waits_for_it_for_ever(run, fault):
    run.host("h1", "10.0.0.1", lacking())
    two = run.host("h2", "10.0.0.2", having())
    run.fails.add(("h2", fault))
    assert run.fetch() == {"h1": True, "h2": True}
    assert run.of("fetch") == [("h1", None)]
    assert any("serve" in line for line in two.lines)


def test_a_download_that_fails_fails_its_host_alone_and_the_next_one_asks(run):
    for number in (1, 2):
        run.host(f"h{number}", f"10.0.0.{number}", lacking())
    run.fails.add(("h1", "fetch"))
    assert run.fetch() == {"h1": False, "h2": True}
    assert run.of("fetch") == [("h1", None), ("h2", None)]


def test_nobody_waits_for_what_a_failed_host_had_begun_before(run):
    """A failed host is part of the run until all others have ended the operation."""
    begun = Model("y-0123", spec(B), is_needed=True, is_under_way=True)
    run.host("h1", "10.0.0.1", lacking(), begun)
    run.host("h2", "10.0.0.2", lacking(B))
    run.fails.add(("h1", "fetch"))
    assert run.fetch() == {"h1": False, "h2": True}
    assert ("h2", None) in run.of("fetch")


def test_hosts_that_do_not_reach_each_other_wait_for_none(run):
    for number in (1, 2):
        run.host(f"h{number}", f"10.0.0.{number}", lacking())
    run.apart = {"h1": ["10.0.0.2"], "h2": ["10.0.0.1"]}
    assert run.fetch() == {"h1": True, "h2": True}
    assert run.of("fetch") == [("h1", None), ("h2", None)]


@pytest.mark.parametrize(
    "addresses", [("127.0.0.1", "10.0.0.2"), ("10.0.0.9", "10.0.0.9")], ids=["this machine's", "of both"]
)
def test_a_host_without_an_address_of_its_own_is_asked_by_none(run, addresses):
    run.host("h1", addresses[0], having())
    run.host("h2", addresses[1], lacking())
    assert run.fetch()["h2"] is True
    assert run.of("fetch") == [("h2", None)]


def test_nginx_is_installed_where_others_may_come_and_a_host_without_it_is_not_waited_for(run):
    installs = ("apt", "{}")
    one = run.host("h1", "10.0.0.1", lacking(), installs=installs)
    run.host("h2", "10.0.0.2", lacking(), installs=installs)
    run.host("h3", "10.0.0.3", lacking(B), installs=installs)
    run.fails |= {("h1", "packages"), ("h2", "packages")}
    assert run.fetch() == {"h1": True, "h2": True, "h3": True}
    assert sorted(host for host, _ in run.of("packages")) == ["h1", "h2"]
    assert sorted(run.of("fetch")) == [("h1", None), ("h2", None), ("h3", None)]
    assert "gives its site nothing, because nginx was not installed: no mirror answers" in one.lines
    assert not run.of("share")


def test_a_file_of_the_operator_s_machine_is_sent_once(run, monkeypatch):
    sent = []
    monkeypatch.setattr(site_models.paths, "send", lambda state, host, files, reserve: sent.append((host.name, files)))
    for number in (1, 2):
        run.host(f"h{number}", f"10.0.0.{number}", Model("x", spec(urls=[]), True, sent=("a file",)))
    assert run.fetch() == {"h1": True, "h2": True}
    assert sent == [("h1", ("a file",))]
    assert run.of("fetch") == [("h1", None), ("h2", ["h1"])]


@pytest.mark.parametrize(
    ("file", "can"),
    [({}, True), ({"sha256": None}, False), ({"size_bytes": None}, False), ({"urls": ["file:///srv/x.gguf"]}, False),
     ({"urls": []}, True)],
)  # fmt: skip
def test_what_is_not_known_beforehand_and_what_is_the_host_s_own_is_not_shared(file, can):
    assert Model("x", {**spec(), "files": [{**spec()["files"][0], **file}]}, True).can_be_shared is can


@pytest.mark.parametrize(
    ("first", "second", "is_one"),
    [
        ({}, {}, True),
        ({"site": "a"}, {"site": "a"}, True),
        ({"site": "a"}, {"site": "b"}, False),
        ({"site": None}, {"site": None}, False),
        ({"site_port": 9000}, {}, False),
        ({}, {"models": [{"name": "m", "source": "https://h/other.gguf", "port": 8080}]}, False),
    ],
)
def test_a_site_is_hosts_that_name_it_and_one_of_the_same_models(first, second, is_one):
    state = Host(inventory=[], is_host_in_limit=lambda host: True)
    found = []
    for name, more in (("h1", first), ("h2", second)):
        data = {"models": [{"name": "m", "source": "https://h/x.gguf", "port": 8080}], **more}
        state.inventory.append(Host(name=name, state=state, data=SimpleNamespace(dict=lambda data=data: data)))
    for host in state.inventory:
        found.append(site_of(host, Settings.from_data({**default_data(), **host.data.dict()})))
    assert (found[0] is not None) is is_one
    assert found[0] is found[1]


def test_a_host_alone_has_no_site():
    state = Host(is_host_in_limit=lambda host: True)
    data = {"models": [{"name": "m", "source": "https://h/x.gguf", "port": 8080}] * 2}
    host = Host(name="h1", state=state, data=SimpleNamespace(dict=lambda: data))
    state.inventory = [host]
    data["models"] = data["models"][:1]
    assert site_of(host, Settings.from_data({**default_data(), **data})) is None
