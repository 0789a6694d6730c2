"""What leaves a host, in small trees: all that is marked as ours, nothing that only looks like it."""

from __future__ import annotations

import json
import os

import lock
import pytest
import survey

from llamafleet.remote import uninstall

MARKED = "# Made by llamafleet, plan 123\n[Unit]\n"
ASKED = {"models": False, "holder": {"run": "me", "who": "me@desk", "machine": "desk", "pid": 1}, "over": None}


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A tree with an instance, its timer and a model, and with things of others; `calls` are the commands run."""
    for path, text in {
        "units/llama-server-chat.service": MARKED,
        "units/llama-server-chat-liveness.timer": MARKED,
        "units/llama-liveness@.service": MARKED,
        "units/llama-server-mine.service": "[Unit]\n# Made by llamafleet\n",
        "var/models/m-1/m.gguf": "weights",
        "var/jobs/build.log": "log",
        "opt/current": "x",
        "run/lock.json.guard": "",
        "cache/llama-server-chat/x": "",
        "stamps/stamp-llama-server-chat-liveness.timer": "",
        "stamps/stamp-fstrim.timer": "",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    calls = []
    for module in (uninstall, survey):
        monkeypatch.setattr(module, "UNITS", str(tmp_path / "units"))
    for name, path in {"VAR": "var", "MODELS": "var/models", "RUN": "run", "STAMPS": "stamps"}.items():
        monkeypatch.setattr(uninstall, name, str(tmp_path / path))
    monkeypatch.setattr(uninstall, "OURS", (str(tmp_path / "opt"), str(tmp_path / "run")))
    monkeypatch.setattr(uninstall, "caches", lambda: [str(tmp_path / "cache/llama-server-chat")])
    monkeypatch.setattr(uninstall, "jobs", lambda: ["llamafleet-job-build.service"])
    monkeypatch.setattr(uninstall, "user_id", lambda: 990)
    monkeypatch.setattr(uninstall, "run", lambda *command, check=True: calls.append(" ".join(command)))
    monkeypatch.setattr(os, "chown", lambda path, *owner, follow_symlinks: calls.append(f"chown {path} {owner}"))
    monkeypatch.setattr(lock, "PATH", str(tmp_path / "run/lock.json"))
    for function in (lock.read, lock.take, lock.refresh, lock.release, lock.last_run):
        defaults = [str(tmp_path / "run/lock.json") if d == "/run/llamafleet/lock.json" else d
                    for d in function.__defaults__]  # fmt: skip
        monkeypatch.setattr(function, "__defaults__", tuple(defaults))
    return type("Host", (), {"root": tmp_path, "calls": calls, "left": lambda self: left(tmp_path)})()


def left(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def names(paths):
    return [os.path.basename(path) for path in paths]


def test_ours_is_found_and_nothing_is_changed(host, capsys):
    before = host.left()
    assert uninstall.main(["find", "{}"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["units"] == [
        "llama-liveness@.service", "llama-server-chat-liveness.timer", "llama-server-chat.service",
    ]  # fmt: skip
    assert names(found["paths"]) == [
        "opt", "run", "jobs", "llama-server-chat", "stamp-llama-server-chat-liveness.timer",
    ]  # fmt: skip
    assert names(found["models"]) == ["m-1"] and found["user"] is True and found["lock"] is None
    assert host.left() == before and host.calls == []


def test_all_of_it_goes_and_models_stay_as_roots(host):
    assert uninstall.main(["remove", json.dumps(ASKED)]) == 0
    assert host.left() == ["stamps/stamp-fstrim.timer", "units/llama-server-mine.service", "var/models/m-1/m.gguf"]
    assert f"chown {host.root}/var/models/m-1/m.gguf (0, 0)" in host.calls
    assert host.calls[-1] == "userdel llamafleet"


def test_everything_is_stopped_before_anything_is_removed(host):
    uninstall.main(["remove", json.dumps(ASKED)])
    stops = [at for at, call in enumerate(host.calls) if call.startswith("systemctl stop")]
    assert [host.calls[at].split()[-1] for at in stops] == [
        "llamafleet-job-build.service", "llama-liveness@*.service", "llama-server-chat-liveness.timer",
        "llama-server-chat.service",
    ]  # fmt: skip
    assert stops[-1] < min(at for at, call in enumerate(host.calls) if "disable" in call)
    assert not [call for call in host.calls if "llama-server-mine" in call]


def test_the_lock_is_refreshed_while_models_of_hundreds_of_gigabytes_go(host, monkeypatch):
    refreshed = []
    monkeypatch.setattr(lock, "refresh", refreshed.append)
    uninstall.main(["remove", json.dumps({**ASKED, "models": True})])
    assert len(refreshed) >= 6 and set(refreshed) == {"me"}


def test_models_go_where_they_are_asked_for(host):
    uninstall.main(["remove", json.dumps({**ASKED, "models": True})])
    assert host.left() == ["stamps/stamp-fstrim.timer", "units/llama-server-mine.service"]
    assert not (host.root / "var").exists()


def test_a_host_that_another_run_holds_is_left_alone(host, capsys):
    lock.take({"run": "other", "who": "bob@desk"})
    before = host.left()
    assert uninstall.main(["remove", json.dumps(ASKED)]) == 3
    assert json.loads(capsys.readouterr().out)["who"] == "bob@desk"
    assert host.left() == before and host.calls == []
    assert uninstall.main(["remove", json.dumps({**ASKED, "over": "other"})]) == 0


def test_a_failure_is_told_and_gives_the_lock_back(host, monkeypatch, capsys):
    def fail(*command, check=True):
        raise OSError("systemd is away")

    monkeypatch.setattr(uninstall, "run", fail)
    assert uninstall.main(["remove", json.dumps(ASKED)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "error: systemd is away"
    assert lock.read() is None


def test_a_user_of_that_name_that_we_did_not_make_stays(monkeypatch):
    import pwd

    def user(gecos):
        return pwd.struct_passwd(("llamafleet", "x", 990, 990, gecos, "/", "/bin/sh"))

    monkeypatch.setattr(pwd, "getpwnam", lambda name: user("llama-server instances"))
    assert uninstall.user_id() == 990
    monkeypatch.setattr(pwd, "getpwnam", lambda name: user("Lea Fleet"))
    assert uninstall.user_id() is None


@pytest.mark.parametrize("with_models", [True, False])
def test_models_on_another_disk_go_where_models_go(host, with_models):
    (host.root / "big/m-2").mkdir(parents=True)
    (host.root / "big/m-2/m.gguf").write_text("weights")
    (host.root / "big/other").mkdir()
    (host.root / "var/models/m-2").symlink_to(host.root / "big/m-2")
    (host.root / "var/models/mine").symlink_to(host.root / "big/other")  # the operator's: of another name
    uninstall.remove(with_models, "run")
    assert (host.root / "big/m-2/m.gguf").exists() is not with_models
    assert (host.root / "big/other").is_dir()
