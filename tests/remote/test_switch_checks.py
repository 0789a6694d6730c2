"""What is known to fail is refused before anything is stopped."""

from __future__ import annotations

import errno
import json
import os
import types

import common
import pytest
import switch_checks
from addresses import cannot_bind
from switch_back import Failed

NAME = "chat"
UNIT = common.unit_of(NAME)
ARGV = ["/opt/llamafleet/releases/k/bin/llama-server", "--model", "/m/a b.gguf", "--port", "8080", "--alias", "a$b"]


@pytest.fixture
def host(tmp_path, monkeypatch):
    for name in ("UNITS", "ETC", "OPT", "VAR", "INSTANCES"):
        (tmp_path / name.lower()).mkdir()
        monkeypatch.setattr(common, name, str(tmp_path / name.lower()))
    (tmp_path / "instances" / NAME).mkdir()
    (tmp_path / "instances" / NAME / "plan.json").write_text(json.dumps({"gate": {"argv": ARGV}}))
    return tmp_path


@pytest.mark.parametrize("full", ["units", "etc", "opt", "var"])
@pytest.mark.parametrize("what", ["bytes", "inodes"])
def test_a_full_disk_is_named_with_its_place(host, monkeypatch, full, what):
    def statvfs(path):
        short = path.endswith(full)
        return types.SimpleNamespace(
            f_bavail=1 if short and what == "bytes" else 10**6, f_frsize=4096,
            f_files=100, f_favail=3 if short and what == "inodes" else 90,
        )  # fmt: skip

    monkeypatch.setattr(switch_checks.os, "statvfs", statvfs)
    with pytest.raises(Failed, match=f"/{full}.* {'4096 bytes' if what == 'bytes' else '3 inodes'} free"):
        switch_checks.space()


def test_a_disk_with_room_is_no_reason(host, monkeypatch):
    """btrfs counts no inodes; a folder that is not there yet is no full disk."""
    os.rmdir(common.OPT)
    found = types.SimpleNamespace(f_bavail=10**6, f_frsize=4096, f_files=0, f_favail=0)
    monkeypatch.setattr(switch_checks.os, "statvfs", lambda path: found if os.path.isdir(path) else os.stat(path))
    switch_checks.space()


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.9", "0.0.0.0"])
def test_an_address_of_the_host_can_be_bound(address):
    assert cannot_bind(address) is None


@pytest.mark.parametrize("address", ["203.0.113.7", "2001:db8::7", "fe80::1%nosuch0"])
def test_an_address_of_others_cannot(address):
    assert cannot_bind(address)


def test_the_address_of_the_staged_plan_counts():
    switch_checks.address(NAME, {"gate": {"url": "http://127.0.0.1:1"}})
    with pytest.raises(Failed, match=r"chat: listen: 203\.0\.113\.7: .*: give an address that the host has"):
        switch_checks.address(NAME, {"gate": {"url": "https://203.0.113.7:1"}})


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone becomes another user")
@pytest.mark.parametrize("how", ["file", "folder"])
def test_a_model_that_the_services_user_cannot_read_is_named(host, monkeypatch, how):
    monkeypatch.setattr(common, "USER", "nobody")
    folder = host / "model"
    folder.mkdir()
    model = folder / "m.gguf"
    model.write_bytes(b"GGUF")
    for path in (*reversed(host.relative_to("/tmp").parents), host.relative_to("/tmp")):
        os.chmod(f"/tmp/{path}", 0o755) if str(path) != "." else None
    switch_checks.readable(NAME, [str(model)])
    os.chmod(model if how == "file" else folder, 0o600 if how == "file" else 0o700)
    with pytest.raises(Failed, match=f"the user nobody cannot read {model}: Permission denied; .*chmod a.r"):
        switch_checks.readable(NAME, [str(model)])


def test_a_model_that_is_gone_is_named(host):
    with pytest.raises(Failed, match=os.strerror(errno.ENOENT)):
        switch_checks.readable(NAME, [str(host / "gone.gguf")])


def shown(argv, user="llamafleet", drop_ins="/etc/systemd/system/x.service.d/a.conf"):
    """As `systemctl show` prints it."""
    command = f"{{ path={argv[0]} ; argv[]={' '.join(argv)} ; ignore_errors=no ; start_time=[n/a] ; pid=0 }}"
    return {"ExecStart": command, "User": user, "DropInPaths": drop_ins}


WRITTEN = [word.replace("$", "$$") for word in ARGV]


@pytest.mark.parametrize(
    "found",
    [shown(WRITTEN), shown(WRITTEN[:3], drop_ins=""), {}],
    ids=["a drop-in of something else", "no drop-in", "systemd does not say"],
)
def test_what_systemd_would_start_is_what_is_planned(host, monkeypatch, found):
    monkeypatch.setattr(common, "show", lambda *_, **__: found)
    switch_checks.effective(NAME)


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (shown([word.replace("8080", "9090") for word in WRITTEN]), "it would start .* --port 9090"),
        (shown(WRITTEN, user=""), "it would run as root"),
    ],
)
def test_a_drop_in_that_changes_the_command_or_the_user_is_named(host, monkeypatch, found, why):
    monkeypatch.setattr(common, "show", lambda *_, **__: found)
    with pytest.raises(Failed, match=f"drop-ins change what {UNIT} runs: /etc/.*a.conf: {why}"):
        switch_checks.effective(NAME)
