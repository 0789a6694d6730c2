"""A server that starts on demand: its units as texts, its command line and record, and what of them counts as drift."""

import dataclasses
import shutil
import subprocess

import pytest

from llamafleet.remote.common import core_of_unit, demand_units, is_as_written
from llamafleet.service.demand import demand_texts, listen_stream, too_old
from llamafleet.service.desired import Service
from llamafleet.service.instance_changes import (
    _demand_differs,
    _socket_differs,
    differences,
    liveness_differences,
    quiet_differences,
    sha256,
)
from tasks.lib.templates import render
from tests import planning
from tests.exposure import exposure
from tests.planning import argument
from tests.service.test_changes import INSTALLED, INSTANCE
from tests.service.test_unit import HOST, directive, made

DEMAND = {"start": "demand", "idle_seconds": 900, "port": 8123}
SOCKET, HANDS_ON = demand_units("m0")


def texts(**asked):
    wanted = planning.settings({"context_tokens": 4096, **DEMAND, **asked})
    return demand_texts(render, wanted.models[0], wanted, "k1")


def test_the_server_listens_at_a_path_and_has_no_network():
    unit, record, argv = made([24564], **DEMAND)
    assert argument(argv, "--host") == record["gate"]["socket"] == "/run/llama-server-m0/http.sock"
    assert argument(argv, "--port") == "8123" and record["gate"]["url"] == "http://127.0.0.1:8123"
    assert directive(unit, "RestrictAddressFamilies") == ["AF_UNIX"] and directive(unit, "SocketBindAllow") == []
    assert directive(unit, "IPAddressDeny") == ["any"] and directive(unit, "IPAddressAllow") == []
    assert directive(unit, "RuntimeDirectory") == ["llama-server-m0"]
    assert is_as_written(record)


def test_it_starts_only_when_it_is_asked_and_has_room():
    unit, record, _ = made([24564], **DEMAND)
    assert "[Install]" not in unit and directive(unit, "BindsTo") == [HANDS_ON] and directive(unit, "Restart") == ["no"]
    (room,) = directive(unit, "ExecCondition")
    assert room.startswith("+/usr/bin/python3 -s -E -B ") and room.endswith('/room.py" "m0"')
    assert int(directive(unit, "TimeoutStartSec")[0]) >= record["gate"]["health_seconds"] + 120
    assert set(record["demand"]) == {"needs_bytes", "room_bytes"} and set(record["demand"]["needs_bytes"]) == {
        "GPU0",
        "host",
    }


@pytest.mark.parametrize(("gpus", "most"), [([], 0.8), ([24564], 1.0)])
def test_exposure_is_what_the_documents_say(gpus, most, tmp_path):
    assert exposure(made(gpus, **DEMAND)[0], tmp_path) <= most


def test_nothing_changes_for_what_starts_with_the_host():
    unit, record, _ = made([24564])
    assert "llamafleet-demand" not in unit and "ExecCondition" not in unit and "[Install]" in unit
    assert "demand" not in record and "socket" not in record["gate"] and texts(start="boot") == {}


def test_helpers_of_another_version_restart_nothing():
    unit, _, _ = made([24564], **DEMAND)
    assert core_of_unit(unit) == core_of_unit(unit.replace("feedfacefeedface", "0123456789abcdef"))


@pytest.mark.parametrize(
    ("listen", "stream"),
    [
        ("127.0.0.1", "127.0.0.1:8123"),
        ("0.0.0.0", "0.0.0.0:8123"),
        ("::1", "[::1]:8123"),
        ("fe80::1%eth0", "[fe80::1]:8123%eth0"),
    ],
)
def test_clients_connect_where_the_settings_say(listen, stream):
    asked = planning.settings({**DEMAND, "listen": listen, "allow_unauthenticated": True}).models[0]
    assert listen_stream(asked) == stream
    (found,) = directive(texts(listen=listen, allow_unauthenticated=True)[SOCKET], "ListenStream")
    assert found == stream.replace("%", "%%"), "% begins a specifier"


def test_clients_that_may_come_are_told_to_the_socket():
    found = texts(listen="10.0.0.7", allowed_clients=["10.1.0.0/16"], allow_unauthenticated=True)
    assert directive(found[SOCKET], "IPAddressAllow") == ["localhost 10.0.0.7 10.1.0.0/16"]
    assert directive(found[HANDS_ON], "IPAddressAllow") == ["10.0.0.7"], "it is its own client once"
    everybody = texts(listen="10.0.0.7", allow_unauthenticated=True)
    assert directive(everybody[SOCKET], "IPAddressDeny") == []


def test_what_hands_connections_on_has_no_rights_and_no_keys():
    found = texts(api_key_file="/keys", tls_certificate_file="/c", tls_key_file="/k")
    unit = found[HANDS_ON]
    assert directive(unit, "DynamicUser") == ["yes"] and directive(unit, "CapabilityBoundingSet") == [""]
    assert [one.partition(":")[0] for one in directive(unit, "LoadCredential")] == ["tls-certificate", "tls-key"]
    assert directive(texts(api_key_file="/keys")[HANDS_ON], "LoadCredential") == []
    (line,) = directive(unit, "ExecStart")
    assert line.endswith('helpers/k1/forward.py" "/run/llama-server-m0/http.sock" "900"')
    assert directive(unit, "After") == directive(unit, "PartOf") == ["llama-server-m0.service"]
    assert directive(unit, "Wants") == [f"llama-server-m0.service {SOCKET}"]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not here to ask")
def test_systemd_understands_the_units(tmp_path):
    unit, _, _ = made([], **DEMAND)
    for name, text in {**texts(), "llama-server-m0.service": unit}.items():
        (tmp_path / name).write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", *map(str, tmp_path.iterdir())], capture_output=True, text=True)
    told = (done.stdout + done.stderr).splitlines()
    ours = [line for line in told if "m0" in line and "is not executable" not in line]
    assert not ours, ours


@pytest.mark.parametrize(
    ("systemd", "fits"), [("252 (252.39-1)", True), ("246", True), ("245 (245.4)", False), (None, False)]
)
def test_a_systemd_that_cannot_do_it_is_refused_by_name(systemd, fits):
    asked = planning.settings(DEMAND).models[0]
    installed = dataclasses.replace(HOST, ground={"systemd": systemd})
    found = too_old(asked, installed)
    assert (found is None) is fits
    assert fits or ("m0" in str(found) and "246" in str(found) and "sleep_idle_seconds" in str(found))
    assert too_old(dataclasses.replace(asked, start="boot"), installed) is None


# --- drift ------------------------------------------------------------------------------------------

WANTED = {SOCKET: "socket\n", HANDS_ON: "service\n"}


def service(demand=WANTED, liveness=()):
    return Service(name="m0", unit_text="u", plan_json="{}", secrets={}, argv=("x",), release="/r",
                   liveness=dict(liveness), demand=demand)  # fmt: skip


def installed(**changes):
    sums = {name: sha256(text) for name, text in WANTED.items()}
    same = {"unit_sha256": sha256("u"), "good_sha256": sha256("u"), "demand_sha256": sums, "good_demand_sha256": sums,
            "socket": "active", "socket_enabled": "enabled", "enabled": "static", "active": "inactive", "argv": (),
            "secrets": {}, "loaded": {}, "drop_ins": (), "exe": None}  # fmt: skip
    return dataclasses.replace(INSTANCE, **{**same, **changes})


def restarts(service, installed):
    return differences(service, installed, INSTALLED.ground)


@pytest.mark.parametrize("active", ["inactive", "failed", "activating", "deactivating"])
def test_one_that_is_stopped_is_as_it_should_be(active):
    assert restarts(service(), installed(active=active)) == ()
    assert list(_demand_differs(service(), installed(active=active))) == []


def test_one_that_runs_is_compared_as_any():
    assert restarts(service(), installed(active="active", argv=("y",))) == ("it runs with other arguments",)


def test_another_socket_is_a_switch_and_so_is_none_any_more():
    other = {**installed().demand_sha256, SOCKET: "0" * 64}
    assert restarts(service(), installed(demand_sha256=other)) == ("the socket that starts it is missing or differs",)
    assert list(_socket_differs(service({}), installed())) == ["it starts on demand"]
    assert "it is inactive" in restarts(service({}), installed(demand_sha256={}))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"socket": "inactive"}, "its socket is inactive"),
        ({"socket": None}, "its socket is not active"),
        ({"socket_enabled": "disabled"}, "its socket is disabled"),
        ({"enabled": "enabled"}, "it starts with the host"),
        ({"demand_drop_ins": ("/x.conf",)}, "drop-ins change how it starts: /x.conf"),
        ({"demand_sha256": {**installed().demand_sha256, HANDS_ON: "0" * 64}}, "what hands its connections on differs"),
        ({"demand_sha256": {SOCKET: sha256("socket\n")}}, "what hands its connections on differs"),
        ({"good_demand_sha256": {}}, "the files to go back to are damaged or missing"),
    ],
)
def test_what_is_set_right_while_it_runs_on(changes, reason):
    assert reason in quiet_differences(service(), installed(**changes))
    assert restarts(service(), installed(**changes)) == ()


def test_its_liveness_timer_stops_with_it():
    check = {"a.service": "s", "a.timer": "t"}
    there = {"liveness_sha256": {name: sha256(text) for name, text in check.items()}, "liveness_enabled": "enabled",
             "liveness_drop_ins": (), "liveness": "inactive"}  # fmt: skip
    assert liveness_differences(service(liveness=check), installed(**there)) == ()
    assert liveness_differences(service(liveness=check), installed(active="active", **there)) != ()
