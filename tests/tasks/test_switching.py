"""Whose turn it is to switch: in a run over several hosts of a model some always serve it."""

import contextlib
from types import SimpleNamespace

import gevent
import pytest

from llamafleet.settings.schema import Settings
from tasks.lib import decision, switching
from tasks.lib.remote import RemoteError


class Host:
    groups = ()

    def __init__(self, name, state, wanted):
        self.name, self.state, self.lines = name, state, []
        self.data = SimpleNamespace(
            dict=lambda: {"models": [{"name": one, "source": "hf:a/b/c.gguf"} for one in wanted]}
        )

    def log(self, line, *_):
        self.lines.append(line)


class State:
    """pyinfra's, as far as turns look at it."""

    def __init__(self):
        self.inventory, self.callback_handlers, self.outside = [], [], set()

    def add_callback_handler(self, handler):
        self.callback_handlers.append(handler)

    def is_host_in_limit(self, host):
        return host not in self.outside


@pytest.fixture
def fleet(monkeypatch):
    """Adds a host with names wanted, which are installed unless others are."""
    monkeypatch.setattr(decision, "_decisions", {})
    monkeypatch.setattr(switching, "_away", {})
    monkeypatch.setattr(switching, "_failed", [])
    monkeypatch.setattr(switching, "_told", set())
    monkeypatch.setattr(switching, "_in_rollout", False)
    monkeypatch.setattr(switching, "LOOK_SECONDS", 0.01)
    state = State()

    def add(name, *wanted, installed=None):
        host = Host(name, state, wanted)
        state.inventory.append(host)
        instances = dict.fromkeys(wanted if installed is None else installed)
        decision._decisions[host] = SimpleNamespace(
            desired=SimpleNamespace(installed=SimpleNamespace(instances=instances))
        )
        return host

    return add


def switches(*hosts, at_once=None, names=None):
    """All hosts switch at the same time; the most that were at it together, and the hosts by name in their order."""
    now, seen, order = set(), [], []

    def switch(host):
        with switching.turn(host, names or [one for one, _ in decision.wanted_models(host)], at_once):
            now.add(host.name)
            order.append(host.name)
            seen.append(frozenset(now))
            gevent.sleep(0.05)
            now.discard(host.name)

    gevent.joinall([gevent.spawn(switch, host) for host in hosts], raise_error=True, timeout=120)
    return max(map(len, seen)), order


@pytest.mark.parametrize(("count", "most"), [(1, 1), (2, 1), (3, 1), (4, 2), (7, 3)])
def test_half_of_a_model_s_hosts_serve_it_on(fleet, count, most):
    together, order = switches(*(fleet(f"h{number}", "x") for number in range(count)))
    assert together == most and len(order) == count


def test_hosts_of_different_models_do_not_wait_for_each_other(fleet):
    assert switches(fleet("a", "x"), fleet("b", "y"))[0] == 2


def test_the_setting_counts_hosts_whatever_they_serve(fleet):
    hosts = [fleet(f"h{number}", "x" if number % 2 else "y") for number in range(6)]
    assert switches(*hosts, at_once=1)[0] == 1
    assert switches(*hosts, at_once=3)[0] == 3


def test_a_host_that_serves_nothing_yet_waits_for_nobody(fleet):
    hosts = [fleet(f"h{number}", "x", installed=()) for number in range(4)]
    assert switches(*hosts)[0] == 4
    assert switches(*hosts, at_once=1)[0] == 4


def test_copies_are_one_model(fleet):
    hosts = [fleet(name, "x", installed=("x-1", "x-2")) for name in ("a", "b")]
    assert switches(*hosts, names=["x-1", "x-2"])[0] == 1


def test_what_is_replaced_leaves_the_gateways_and_what_is_new_is_not_there(fleet, monkeypatch):
    seen = []
    drained = lambda host, names, **options: seen.append((names, options)) or contextlib.nullcontext()  # noqa: E731
    monkeypatch.setattr(switching.gateway_drains, "drained", drained)
    a, _ = fleet("a", "x", "y", installed=("x",)), fleet("b", "x")
    switches(a)
    switching.begin_rollout()
    switches(fleet("c", "z"))
    assert seen == [(["x"], {"strict": False, "even_last": False}), (["z"], {"strict": True, "even_last": True})]


def test_a_host_that_waits_says_for_whom_once(fleet):
    a, b = fleet("a", "x"), fleet("b", "x")
    switches(a, b)
    assert (a.lines, b.lines) == ([], ["waiting for a to switch first"])


def test_a_failure_in_a_turn_lets_the_next_one_go(fleet):
    a, b = fleet("a", "x"), fleet("b", "x")
    with pytest.raises(OSError, match="disk"), switching.turn(a, ["x"], None):
        raise OSError("disk")
    assert switches(b) == (1, ["b"])


def test_in_a_rollout_nothing_is_switched_after_a_failure_and_else_it_is(fleet):
    a, b = fleet("a", "x"), fleet("b", "x")
    switches(a)
    a.state.callback_handlers[0].operation_host_error(a.state, a, "hash")
    switches(b)
    switching.begin_rollout()
    with pytest.raises(RemoteError, match="because a failed before"), switching.turn(b, ["x"], None):
        pytest.fail("it switched")
    assert len(a.state.callback_handlers) == 1


def test_a_plain_run_over_several_hosts_of_a_model_says_once_that_it_is_no_rollout(fleet):
    hosts = [fleet(name, "x", "y") for name in "abcd"]
    new, other = fleet("e", "x", installed=()), fleet("f", "z")
    hosts[3].state.outside.add(hosts[3])
    told = [list(switching.not_a_rollout(one, ["x", "z"], None)) for one in (new, *hosts, other)]
    assert [len(one) for one in told] == [0, 1, 0, 0, 0, 0]
    assert told[1][0].startswith("this is no rollout: 4 hosts of this run serve x, and replace it at most 2 at a time")


def test_a_plain_run_names_the_setting_s_limit_and_a_rollout_says_nothing(fleet):
    a, _ = fleet("a", "x"), fleet("b", "x")
    switching.begin_rollout()
    assert list(switching.not_a_rollout(a, ["x"], 7)) == []
    switching._in_rollout = False
    assert "at most 7 at a time" in next(switching.not_a_rollout(a, ["x"], 7))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, ["--drain", "30"]),
        ({"drain_seconds": 5, "drain_overdue": "wait"}, ["--drain", "5", "--overdue", "wait"]),
        ({"drain_seconds": 0, "drain_overdue": "stop"}, []),
    ],
)
def test_settings_reach_the_host_s_program(changed, words):
    asked = Settings.from_data({"models": [{"name": "m", "source": "hf:a/b/c.gguf", "port": 8080}], **changed})
    assert switching.Options.of(asked).words() == words
