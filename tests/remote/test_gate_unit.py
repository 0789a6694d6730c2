"""The gate's unit: what its checks may see, and what root makes of what they say."""

from __future__ import annotations

import json
import sys

import common
import confined
import pytest

from llamafleet.remote import gate, gate_unit

UNIT = "llama-server-chat.service"
SPEC = {"unit": UNIT, "url": "http://127.0.0.1:8080", "api_keys": None, "tls_certificate": None, "health_seconds": 60,
        "gpus": [], "argv": [], "context_tokens": 512, "slots": 1, "backend": "cpu"}  # fmt: skip
CHECK = {"name": "health", "ok": True, "expected": 200, "found": 200, "hint": ""}
GOOD = {"found": {"ok": True, "checks": [CHECK]}, "record": None, "devices": {}}


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"gate": SPEC}))
    return str(path)


@pytest.fixture
def unit(monkeypatch):
    """What the process in the unit prints; `ran` is how it was started."""

    class Unit:
        code, said, stderr, ran = 0, json.dumps(GOOD).encode(), "", []

    def run(name, command, directives, seconds):
        Unit.ran.append((name, command, directives))
        if isinstance(Unit.said, Exception):
            raise Unit.said
        return confined.Result(Unit.code, Unit.said, Unit.stderr)

    Unit.ran = []
    monkeypatch.setattr(gate_unit.confined, "run", run)
    return Unit


@pytest.mark.parametrize(
    ("verb", "name"), [("start", "llamafleet-start-check-chat.service"), ("check", "llamafleet-gate-chat.service")]
)
def test_the_checks_run_in_a_unit_that_ends_with_the_server(unit, plan, verb, name):
    assert gate_unit.examine([verb, plan, "--record"], SPEC) == GOOD
    [(called, command, directives)] = unit.ran
    assert called == name and command[0] == sys.executable and command[-3:] == [plan, "--record", "--confined"]
    assert {"DynamicUser=yes", "User=nobody"} & set(directives)
    assert {"CapabilityBoundingSet=", "ProtectSystem=strict", f"PartOf={UNIT}"} <= set(directives)
    assert not [one for one in directives if one.startswith("ReadWritePaths")]


def test_keys_come_as_credentials(monkeypatch):
    spec = {**SPEC, "api_keys": "/etc/llamafleet/instances/chat/api-keys", "tls_certificate": "/etc/x/tls-certificate"}
    found = gate_unit.directives(spec)
    assert "LoadCredential=api-keys:/etc/llamafleet/instances/chat/api-keys" in found
    assert "LoadCredential=tls-certificate:/etc/x/tls-certificate" in found
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "/run/credentials/u")
    inside = gate_unit.with_credentials(spec)
    assert (inside["api_keys"], inside["tls_certificate"]) == (
        "/run/credentials/u/api-keys",
        "/run/credentials/u/tls-certificate",
    )
    assert gate_unit.with_credentials(SPEC) == SPEC


@pytest.mark.parametrize(
    ("url", "allowed"),
    [("http://127.0.0.1:1", "localhost"), ("https://[::1]:1", "localhost"), ("http://10.0.0.7:1", "10.0.0.7"),
     ("http://[fe80::1%25eth0]:1", "fe80::1"), ("http://[fe80::1%eth0]:1", "fe80::1")],
)  # fmt: skip
def test_it_speaks_with_the_server_alone(url, allowed):
    found = gate_unit.directives({**SPEC, "url": url})
    assert "IPAddressDeny=any" in found and f"IPAddressAllow={allowed}" in found


def test_it_sees_the_servers_devices_and_no_others(tmp_path, monkeypatch):
    monkeypatch.setattr(gate_unit, "UNITS", str(tmp_path))
    (tmp_path / UNIT).write_text(
        "[Service]\nDevicePolicy=closed\n# DeviceAllow=char-drm rwm\nDeviceAllow=char-nvidia rwm\n"
        "SupplementaryGroups=video\n"
    )
    found = gate_unit.directives({**SPEC, "gpus": [{}]})
    assert [one for one in found if one.startswith("Device")] == ["DevicePolicy=closed", "DeviceAllow=char-nvidia rwm"]
    assert "SupplementaryGroups=video" in found  # NVML opens them too
    assert "PrivateDevices=yes" not in found and "PrivateDevices=yes" in gate_unit.directives(SPEC)


@pytest.mark.parametrize(
    "said",
    [b"", b"{", b"[1]", b"null", b'{"found": {"ok": true, "checks": 1}, "record": null, "devices": {}}',
     b'{"found": {"ok": 1, "checks": []}, "record": null, "devices": {}}',
     b'{"found": {"ok": true, "checks": [{}]}, "record": null, "devices": {}}',
     b'{"found": {"ok": true, "checks": []}, "record": [1], "devices": {}}',
     b'{"found": {"ok": true, "checks": []}, "record": null}'],
)  # fmt: skip
def test_what_is_no_verdict_fails(unit, plan, said, capsys):
    unit.said, unit.stderr = said, "Traceback: boom"
    assert gate.main(["start", plan]) == 1
    assert "boom" in capsys.readouterr().err


def test_checks_that_die_fail_whatever_they_printed(unit, plan):
    unit.code = 1
    with pytest.raises(gate_unit.GateFailed, match="exit status 1"):
        gate_unit.examine(["start", plan], SPEC)


def test_root_writes_the_record_and_what_the_log_told(unit, plan, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "GATES", str(tmp_path / "gate"))
    monkeypatch.setattr(gate.gate_devices, "KEPT", str(tmp_path / "run"))
    unit.said = json.dumps({**GOOD, "record": {"ok": True, "speeds": [1.0]}, "devices": {"start": "i"}}).encode()
    assert gate.main(["check", plan, "--record"]) == 0
    assert json.loads((tmp_path / "gate/chat.json").read_text())["speeds"] == [1.0]
    assert json.loads((tmp_path / f"run/devices-{UNIT}.json").read_text()) == {"start": "i"}
    assert json.loads(capsys.readouterr().out) == GOOD["found"]


def test_in_the_unit_it_writes_nothing_and_prints_all(plan, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "GATES", str(tmp_path / "gate"))
    monkeypatch.setattr(gate, "CHECKS", (lambda spec: CHECK,))
    monkeypatch.setattr(gate.gate_devices, "unwritten", {})
    monkeypatch.setattr(gate, "speed_key", lambda spec: "k")
    assert gate.main(["check", plan, "--record", "--confined"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["found"]["ok"] and told["record"]["checks"] == [CHECK] and not (tmp_path / "gate").exists()


def test_where_there_is_no_unit_the_checks_run_without_capabilities(unit, plan, tmp_path, monkeypatch, capsys):
    unit.said = confined.NotStarted("exit status 226")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (tmp_path / "setpriv").write_text(f"#!/bin/sh\necho \"$*\" >{tmp_path}/called\necho '{json.dumps(GOOD)}'\n")
    (tmp_path / "setpriv").chmod(0o755)
    assert gate_unit.examine(["start", plan], SPEC) == GOOD
    called = (tmp_path / "called").read_text()
    assert (
        "--bounding-set=-all" in called and "--no-new-privs" in called and "exit status 226" in capsys.readouterr().err
    )


PROC = "proc /proc proc rw,nosuid,nodev,noexec,relatime{} 0 0\nproc /srv/proc proc rw,hidepid=2 0 0\n"


@pytest.mark.parametrize(
    ("options", "needed"),
    [("", []), (",hidepid=0", []), (",hidepid=off", []), (",hidepid=2,gid=104", ["SupplementaryGroups=104"]),
     (",gid=104,hidepid=invisible", ["SupplementaryGroups=104"]),
     (",hidepid=2", ["CapabilityBoundingSet=CAP_SYS_PTRACE", "AmbientCapabilities=CAP_SYS_PTRACE"])],
)  # fmt: skip
def test_where_processes_are_hidden_it_sees_the_servers(tmp_path, options, needed):
    (tmp_path / "mounts").write_text(PROC.format(options))
    assert gate_unit.processes(str(tmp_path / "mounts")) == needed
