"""Draining at the gateways, with a gateway in place of gateway_admin.py: it keeps that program's contract."""

import json
from types import SimpleNamespace

import gevent
import pytest
from pyinfra.api.exceptions import ConnectError

from tasks.lib import gateway_drains
from tasks.lib.gateway_drains import drained, not_up, put_back
from tasks.lib.remote import RemoteError


class Host:
    print_prefix = ""

    def __init__(self, name, state, *groups):
        self.name, self.state, self.groups, self.lines, self.connected = name, state, groups, [], True
        self.unreachable, self.problem, self.servers, self.calls = False, "", {}, []
        state.inventory.append(self)

    def log(self, line, *_):
        self.lines.append(line)

    def connect(self, **_):
        if self.unreachable:
            raise ConnectError("no route to host")
        self.connected = True

    def disconnect(self):
        self.connected = False

    def serves(self, **up):
        """The servers of the gateway, {host_instance: is it up}."""
        self.servers = {name.replace("_", "/"): {"up": is_up, "drained": False, "drained_seconds": None, "check": "L7OK"}
                        for name, is_up in up.items()}  # fmt: skip

    def admin(self, verb, *words):
        """gateway_admin.py: (ok, stdout, stderr)."""
        self.calls.append((verb, *words))
        if self.problem:
            return False, [], [f"error: {self.problem}"]
        names = [word for word in words if "/" in word]
        if verb == "drain":
            others = [name for name, one in self.servers.items() if one["up"] and name not in names]
            if not others and "--even-last" not in words:
                return False, [], [f"error: {names[0]} is the last server of x that is up: put another one in first"]
            for name in names:
                self.servers[name].update(
                    up=False, drained=True, drained_seconds=int(words[words.index("--seconds") + 1])
                )
        if verb == "undrain":
            for name in names:
                self.servers[name].update(up=True, drained=False, drained_seconds=None)
        shown = self.servers if verb == "show" else {name: self.servers[name] for name in names}
        return True, ["progress", json.dumps(shown)], []


@pytest.fixture
def fleet(monkeypatch):
    """A host h that serves, and a gateway g that has h/x and k/x up."""
    monkeypatch.setattr(gateway_drains.remote, "run", lambda host, command: host.admin(*command.words[5:]))
    monkeypatch.setattr(gateway_drains, "LOOK_SECONDS", 0.01)
    state = SimpleNamespace(inventory=[], activated_hosts=set())
    host, gateway = Host("h", state, "fleet"), Host("g", state, "gateway")
    gateway.serves(h_x=True, k_x=True)
    return SimpleNamespace(state=state, host=host, gateway=gateway)


def drains(gateway):
    return {name for name, one in gateway.servers.items() if one["drained"]}


def test_in_the_block_the_gateway_sends_nothing_and_afterwards_it_does(fleet):
    with drained(fleet.host, ["x", "unknown"], strict=True, even_last=False):
        assert drains(fleet.gateway) == {"h/x"}
    assert drains(fleet.gateway) == set() and [call[0] for call in fleet.gateway.calls] == ["show", "drain", "undrain"]


def test_after_a_failure_it_is_put_back_too(fleet):
    with pytest.raises(OSError, match="disk"), drained(fleet.host, ["x"], strict=True, even_last=False):
        raise OSError("disk")
    assert drains(fleet.gateway) == set()


def test_what_is_removed_stays_out_until_its_time_is_over(fleet):
    with drained(fleet.host, ["x"], strict=False, even_last=True, back=False):
        pass
    assert drains(fleet.gateway) == {"h/x"}
    assert fleet.gateway.servers["h/x"]["drained_seconds"] == gateway_drains.LEASE_SECONDS


def test_while_the_switch_goes_on_the_drain_is_lengthened(fleet, monkeypatch):
    monkeypatch.setattr(gateway_drains, "REFRESH_SECONDS", 0.02)
    with drained(fleet.host, ["x"], strict=True, even_last=False):
        gevent.sleep(0.2)
    count = len([call for call in fleet.gateway.calls if call[0] == "drain"])
    assert count >= 3
    gevent.sleep(0.1)
    assert len([call for call in fleet.gateway.calls if call[0] == "drain"]) == count


def test_every_gateway_of_the_inventory_is_asked_also_one_that_is_not_in_the_run(fleet):
    other = Host("g2", fleet.state, "gateway")
    other.serves(h_x=True, k_x=True)
    other.connected = False
    with drained(fleet.host, ["x"], strict=True, even_last=False):
        assert drains(fleet.gateway) == drains(other) == {"h/x"}
    assert drains(other) == set() and other.connected
    fleet.state.activated_hosts.add(fleet.gateway)
    gateway_drains.disconnect(fleet.state)
    assert fleet.gateway.connected and not other.connected


def test_the_last_server_waits_for_another_one(fleet):
    fleet.gateway.serves(h_x=True, k_x=False)
    up = gevent.spawn_later(0.2, lambda: fleet.gateway.servers["k/x"].update(up=True))
    with drained(fleet.host, ["x"], strict=True, even_last=False):
        assert up.ready() and drains(fleet.gateway) == {"h/x"}
    assert fleet.host.lines == ["waiting until the gateway of g has another server up"]


def test_where_no_other_comes_a_rollout_fails_and_a_plain_run_goes_on(fleet, monkeypatch):
    monkeypatch.setattr(gateway_drains, "LAST_SECONDS", 0.1)
    fleet.gateway.serves(h_x=True, k_x=False)
    with (
        pytest.raises(RemoteError, match="the gateway of g: h/x is the last server of x"),
        drained(fleet.host, ["x"], strict=True, even_last=False),
    ):
        pytest.fail("it was switched")
    assert drains(fleet.gateway) == set()
    with drained(fleet.host, ["x"], strict=False, even_last=False):
        assert drains(fleet.gateway) == {"h/x"}


def test_the_only_host_of_a_model_is_drained_at_once(fleet):
    fleet.gateway.serves(h_x=True)
    with drained(fleet.host, ["x"], strict=True, even_last=True):
        assert drains(fleet.gateway) == {"h/x"}
    assert fleet.host.lines == []


@pytest.mark.parametrize("seconds", [600, None])
def test_what_somebody_else_has_drained_for_longer_stays_so(fleet, seconds):
    """None: HAProxy itself was told, without an end."""
    fleet.gateway.servers["h/x"].update(up=False, drained=True, drained_seconds=seconds)
    with drained(fleet.host, ["x"], strict=True, even_last=False):
        pass
    put_back(fleet.state, ["h"])
    assert drains(fleet.gateway) == {"h/x"} and not_up(fleet.state, ["h"]) == {}
    assert {call[0] for call in fleet.gateway.calls} == {"show"}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("problem", ["python3: can't open file '/opt/x'", "the gateway does not answer at /run/x: y"])
def test_a_gateway_that_does_not_run_sends_nothing_anyway(fleet, strict, problem):
    fleet.gateway.problem = problem
    with drained(fleet.host, ["x"], strict=strict, even_last=False):
        pass
    [line] = fleet.host.lines
    assert line.startswith("nothing is drained at g: ") and not_up(fleet.state, ["h"]) == {}


def test_one_that_cannot_be_asked_stops_a_rollout_and_no_plain_run(fleet):
    fleet.gateway.connected, fleet.gateway.unreachable = False, True
    with (
        pytest.raises(RemoteError, match="the gateway of g: no route to host"),
        drained(fleet.host, ["x"], strict=True, even_last=False),
    ):
        pytest.fail("it was switched")
    with drained(fleet.host, ["x"], strict=False, even_last=False):
        pass
    assert fleet.host.lines == ["the gateway of g does not know of this switch: no route to host"]


def test_without_a_gateway_nothing_is_asked(fleet):
    fleet.state.inventory.remove(fleet.gateway)
    with drained(fleet.host, ["x"], strict=True, even_last=False):
        pass
    put_back(fleet.state, ["h"])
    assert not_up(fleet.state, ["h"]) == {} and fleet.host.lines == fleet.gateway.calls == []


def test_what_a_killed_rollout_has_left_is_put_back(fleet):
    fleet.gateway.serves(h_x=True, k_x=True, other_x=True)
    for name in ("h/x", "other/x"):
        fleet.gateway.servers[name].update(up=False, drained=True, drained_seconds=80)
    put_back(fleet.state, ["h", "k"])
    assert drains(fleet.gateway) == {"other/x"}
    assert fleet.gateway.lines == ["put back what an earlier run has drained: h/x"]


def test_after_a_wave_its_servers_have_to_be_up_at_the_gateway(fleet, monkeypatch):
    fleet.gateway.serves(h_x=False, k_x=False)
    gevent.spawn_later(0.1, lambda: fleet.gateway.servers["h/x"].update(up=True))
    assert not_up(fleet.state, ["h"]) == {}
    monkeypatch.setattr(gateway_drains, "UP_SECONDS", 0.05)
    assert not_up(fleet.state, ["h", "k"]) == {"k": "the gateway of g does not find k/x up: L7OK"}


def test_a_gateway_s_answer_is_not_trusted(fleet):
    fleet.gateway.servers = {"h/x": {"up": "yes"}}
    with (
        pytest.raises(RemoteError, match=r"gateway_admin\.py"),
        drained(fleet.host, ["x"], strict=True, even_last=False),
    ):
        pytest.fail("it was switched")


def test_for_no_server_no_gateway_is_asked(fleet):
    with drained(fleet.host, [], strict=True, even_last=False):
        pass
    assert fleet.gateway.calls == []
