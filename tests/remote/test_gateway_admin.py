"""Draining servers of a real HAProxy through its runtime API, in the place of a host's gateway."""

import json
import threading

import common
import gateway_admin
import pytest

from tests.fleet.gateways import Gateway, StandIn, needs_haproxy, server, settings, until

pytestmark = needs_haproxy


@pytest.fixture
def timers(monkeypatch):
    """The drains that systemd was asked to end: name and seconds."""
    asked = {}
    monkeypatch.setattr(gateway_admin, "schedule", lambda name, seconds: asked.update({name: seconds}))
    monkeypatch.setattr(gateway_admin.subprocess, "run", lambda *_, **__: None)  # stops a timer
    return asked


@pytest.fixture
def stand_ins():
    with StandIn("gpu1") as one, StandIn("gpu2") as two:
        yield one, two


@pytest.fixture
def gateway(tmp_path, stand_ins, monkeypatch, timers):
    made = Gateway(tmp_path, settings(), [server(one) for one in stand_ins])
    for name in ("GATEWAY", "GATEWAY_RUN", "GATEWAY_SOCKET", "GATEWAY_STATE"):
        monkeypatch.setattr(common, name, made.local(getattr(common, name)))
    with made:
        yield made


def admin(capsys, *words):
    """Exit status, and what was printed: the JSON object, or the error."""
    code = gateway_admin.main([*words])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else err.strip()


def servers_of(gateway):
    return {*gateway.homes(range(8)).values()}


def test_all_servers_are_shown(gateway, capsys):
    code, shown = admin(capsys, "show")
    assert (code, list(shown)) == (0, ["gpu1/tiny", "gpu2/tiny"])
    assert shown["gpu1/tiny"] | {"check": ""} == {
        "model": "tiny", "up": True, "drained": False, "drained_seconds": None, "in_flight": 0, "queued": 0, "check": "",
    }  # fmt: skip


def test_a_drained_server_gets_no_request_also_of_its_sessions(gateway, stand_ins, capsys, timers):
    assert servers_of(gateway) == {"gpu1", "gpu2"}
    code, shown = admin(capsys, "drain", "--seconds", "60", "gpu1/tiny")
    assert (code, timers) == (0, {"gpu1/tiny": 60})
    assert shown["gpu1/tiny"]["drained"] and 58 <= shown["gpu1/tiny"]["drained_seconds"] <= 60
    assert servers_of(gateway) == {"gpu2"}
    assert admin(capsys, "undrain", "gpu1/tiny")[1]["gpu1/tiny"]["drained"] is False
    assert {*gateway.homes(f"new {number}" for number in range(4)).values()} == {"gpu1", "gpu2"}


def test_running_replies_end_in_peace(gateway, stand_ins, capsys):
    stand_ins[0].gate.clear()
    stand_ins[1].gate.clear()
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(gateway.ask("/tiny/v1/completions", {}, X_Session_Id="s")))
    ]
    threads[0].start()
    busy = until(lambda: next((one for one in stand_ins if one.seen), None))
    shown = admin(capsys, "drain", f"{busy.name}/tiny")[1]
    assert shown[f"{busy.name}/tiny"]["in_flight"] == 1
    busy.gate.set()
    threads[0].join()
    assert [status for status, _, _ in answers] == [200]
    until(gateway.is_idle)
    assert admin(capsys, "show")[1][f"{busy.name}/tiny"]["in_flight"] == 0


def test_the_last_server_of_a_model_stays_unless_it_is_asked_for(gateway, capsys):
    assert admin(capsys, "drain", "gpu1/tiny")[0] == 0
    code, said = admin(capsys, "drain", "gpu2/tiny")
    assert code == 3 and "gpu2/tiny is the last server of tiny" in said and "--even-last" in said
    assert admin(capsys, "show")[1]["gpu2/tiny"]["drained"] is False
    assert admin(capsys, "drain", "gpu1/tiny", "gpu2/tiny", "--even-last")[0] == 0


def test_an_unknown_server_changes_nothing(gateway, capsys, timers):
    code, said = admin(capsys, "drain", "gpu1/tiny", "gpu9/tiny")
    assert (code, said) == (4, "error: the gateway has no server gpu9/tiny: it has gpu1/tiny, gpu2/tiny")
    assert (timers, admin(capsys, "show")[1]["gpu1/tiny"]["drained"]) == ({}, False)


def test_a_reload_keeps_a_drain_and_an_undrain(gateway, stand_ins, capsys):
    admin(capsys, "drain", "gpu1/tiny")
    gateway.reload()
    assert admin(capsys, "show")[1]["gpu1/tiny"]["drained"]
    assert servers_of(gateway) == {"gpu2"}
    admin(capsys, "undrain", "gpu1/tiny")
    gateway.reload()
    assert not admin(capsys, "show")[1]["gpu1/tiny"]["drained"]


def test_a_drain_is_ended_by_its_timer_but_not_by_one_from_before(gateway, capsys, monkeypatch):
    admin(capsys, "drain", "--seconds", "60", "gpu1/tiny")
    assert gateway_admin.main(["expire", "gpu1/tiny"]) == 0
    assert admin(capsys, "show")[1]["gpu1/tiny"]["drained"]
    now = gateway_admin.now()
    monkeypatch.setattr(gateway_admin, "now", lambda: now + 61)
    assert gateway_admin.main(["expire", "gpu1/tiny"]) == 0
    assert not admin(capsys, "show")[1]["gpu1/tiny"]["drained"]


def test_an_undrain_holds_also_where_the_gateway_is_down(gateway, capsys):
    admin(capsys, "drain", "gpu1/tiny")
    gateway.process.terminate()
    gateway.process.wait()
    code, said = admin(capsys, "undrain", "gpu1/tiny")
    assert code == 1 and "the gateway does not answer" in said
    with gateway:
        assert not admin(capsys, "show")[1]["gpu1/tiny"]["drained"]
        assert servers_of(gateway) == {"gpu1", "gpu2"}


def test_what_cannot_be_drained_is_not_half_drained(gateway, capsys, monkeypatch):
    def refuse(command):
        if "maint" in command:
            raise gateway_admin.Failed("no")

    monkeypatch.setattr(gateway_admin, "told", refuse)
    assert admin(capsys, "drain", "gpu1/tiny")[0] == 1
    assert gateway_admin.drains() == {}


def test_a_server_s_new_port_is_not_replaced_by_the_old_one_of_the_state(gateway, stand_ins, capsys):
    with StandIn("gpu1") as moved:
        place = gateway_admin.Place("model:tiny", "gpu1:tiny")
        stand_ins[0].shutdown()
        gateway.write([server(moved), server(stand_ins[1])])
        gateway_admin.save({place: moved.server_port})
        gateway.reload()
        servers_of(gateway)
        assert moved.seen and not stand_ins[0].seen
