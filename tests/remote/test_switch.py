"""Switching an instance, and back: files below a folder, and stand-ins for systemd's programs and the gate.

The stand-in for the gate calls good what plan.json says serves.
"""

from __future__ import annotations

import json
import os
import sys
import types

import common
import pytest
import starting
import switch
import switch_checks
from instance_files import places

UNIT = "llama-server-chat.service"
TIMER, CHECK = "llama-server-chat-liveness.timer", "llama-server-chat-liveness.service"
GATE = """\
import json, sys
plan = json.load(open(sys.argv[2]))
if plan["serves"] is None:
    sys.exit(9)
found = {"name": "health", "ok": plan["serves"], "expected": 200, "found": 503, "hint": plan["version"]}
print(json.dumps({"ok": plan["serves"], "checks": [found]}))
"""


class Host:
    def __init__(self, folder):
        self.folder = folder
        for name in ("units", "instances", "staged", "good", "gate", "bin"):
            (folder / name).mkdir()
        (folder / "gate.py").write_text(GATE)
        for name in ("systemctl", "systemd-analyze", "systemd-run", "journalctl"):
            self.program(name, "exit 0")

    def program(self, name, then):
        path = self.folder / "bin" / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >>{self.folder}/calls\n{then}\n')
        path.chmod(0o755)

    def stage(self, version, serves=True, keys=None, watched=False):
        staged = self.folder / "staged/chat"
        staged.mkdir(mode=0o700)
        (staged / UNIT).write_text(unit(version, keys))
        (staged / "plan.json").write_text(json.dumps({"version": version, "serves": serves}))
        if keys:
            (staged / "api-keys").write_text(keys)
        if watched:
            self.stage_check(version)

    def stage_check(self, version):
        for name in (TIMER, CHECK):
            (self.folder / "staged/chat").mkdir(exist_ok=True)
            (self.folder / "staged/chat" / name).write_text(f"{common.MADE_BY}\n# {version}\n")

    def installed(self):
        """The texts of what is installed, by name."""
        found = {name: self.folder / path for name, path in
                 {"unit": f"units/{UNIT}", "plan": "instances/chat/plan.json", "keys": "instances/chat/api-keys"}.items()}  # fmt: skip
        return {name: path.read_text() for name, path in found.items() if path.exists()}

    def kept(self):
        good = self.folder / "good/chat"
        names = sorted(os.listdir(good)) if good.exists() else []
        return {name: (good / name).read_text() for name in names if name != "manifest.json"}

    def calls(self):
        """What was asked of systemd's programs, but for questions."""
        calls = (self.folder / "calls").read_text().splitlines() if (self.folder / "calls").exists() else []
        return [call for call in calls if not call.startswith(("systemctl show", "systemd-run"))]

    def hidden(self):
        """What a switch keeps of itself: nothing, once it is over."""
        places = [*self.folder.rglob(".*.new"), *self.folder.rglob(".*.old"), *self.folder.rglob("*recover*")]
        return [
            *places,
            *(one for state in (".switching", ".passed", ".preparing") for one in self.folder.glob(f"good/{state}/*")),
        ]


def unit(version, keys=None):
    loads = f"LoadCredential=api-keys:{common.INSTANCES}/chat/api-keys\n" if keys else ""
    return f"{common.MADE_BY}\n[Unit]\n# {version}\n[Service]\n{loads}"


@pytest.fixture
def host(tmp_path, monkeypatch):
    one = Host(tmp_path)
    for name in ("units", "instances", "staged", "good", "run"):
        monkeypatch.setattr(common, name.upper(), str(tmp_path / name))
    monkeypatch.setattr(common, "GATES", str(tmp_path / "gate"))
    monkeypatch.setattr(common, "CACHES", str(tmp_path / "caches"))
    monkeypatch.setattr(starting, "GATE", str(tmp_path / "gate.py"))
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    for check in ("space", "readable"):  # of the machine
        monkeypatch.setattr(switch_checks, check, lambda *_: None)
    # Which has tests of its own; a sibling on a host.
    preflight = types.SimpleNamespace(prepare=lambda *_: None, Unfit=type("Unfit", (Exception,), {}))
    monkeypatch.setitem(sys.modules, "preflight", preflight)
    return one


def test_files_are_put_with_their_modes(host):
    host.stage("one", keys="k", watched=True)
    switch.install(["chat"])
    assert host.installed() == {"unit": unit("one", "k"), "plan": '{"version": "one", "serves": true}', "keys": "k"}
    modes = {name: os.stat(path).st_mode & 0o777 for name, (path, _) in places("chat").items() if os.path.exists(path)}
    assert modes == {UNIT: 0o644, TIMER: 0o644, CHECK: 0o644, "plan.json": 0o644, "api-keys": 0o600}
    assert host.hidden() == []


def test_keys_that_are_staged_no_longer_are_removed(host):
    host.stage("one", keys="k")
    switch.install(["chat"])
    host.stage("two")
    switch.install(["chat"])
    assert "keys" not in host.installed() and "api-keys" not in host.kept()


def test_an_instance_that_serves_is_kept_as_the_good_one(host):
    host.stage("one", keys="k")
    switch.install(["chat"])
    assert host.kept() == {UNIT: unit("one", "k"), "plan.json": '{"version": "one", "serves": true}', "api-keys": "k"}
    assert os.stat(host.folder / "good/chat").st_mode & 0o777 == 0o700
    host.stage("two")
    switch.install(["chat"])
    assert host.kept()[UNIT] == unit("two")
    assert common.listing(common.GOOD) == ["chat"] and host.hidden() == []


def test_the_old_server_has_stopped_before_the_new_one_is_asked(host):
    host.stage("one")
    switch.install(["chat"])
    verbs = [call.split()[1] for call in host.calls() if call.startswith("systemctl")]
    assert verbs == ["daemon-reload", "enable", "reset-failed", "stop", "start"]


@pytest.mark.parametrize("serves", [False, None], ids=["does not serve", "the gate itself fails"])
def test_the_last_good_files_come_back(host, serves):
    host.stage("one", keys="k")
    switch.install(["chat"])
    before = host.installed()
    host.stage("two", serves=serves)
    with pytest.raises(switch.Failed, match="the previous one was put back and serves") as failed:
        switch.install(["chat"])
    said = "the gate itself failed with exit code 9" if serves is None else "health: expected 200, found 503 (two)"
    assert said in str(failed.value)
    assert host.installed() == before
    assert host.kept()[UNIT] == before["unit"]


def test_a_previous_one_that_does_not_serve_either_is_told(host):
    host.stage("one")
    switch.install(["chat"])
    (host.folder / "good/chat/plan.json").write_text('{"version": "one", "serves": false}')
    host.stage("two", serves=False)
    with pytest.raises(switch.Failed, match="put back but does not serve either: health"):
        switch.install(["chat"])


def test_a_first_one_that_does_not_serve_is_stopped(host):
    host.stage("one", serves=False)
    with pytest.raises(switch.Failed, match="there was no previous one, so it was stopped"):
        switch.install(["chat"])
    assert host.calls()[-1] == f"systemctl disable --quiet --now {UNIT}"
    assert host.kept() == {}


def test_a_unit_that_systemd_refuses_changes_nothing(host):
    host.stage("one")
    switch.install(["chat"])
    before, calls = host.installed(), len(host.calls())
    host.program("systemd-analyze", "echo 'Unknown key'; exit 1")
    host.stage("two")
    with pytest.raises(switch.Failed, match="refuses the unit: Unknown key"):
        switch.install(["chat"])
    assert host.installed() == before
    assert [call.split()[0] for call in host.calls()[calls:]] == ["systemd-analyze"]


def test_where_nothing_works_even_without_hardening_nothing_changes(host):
    def prepare(*_):
        raise sys.modules["preflight"].Unfit("even without hardening: no libcuda")

    host.stage("one", keys="k")
    switch.install(["chat"])
    before, kept = host.installed(), host.kept()
    sys.modules["preflight"].prepare = prepare
    host.stage("two", keys="k2")
    with pytest.raises(switch.Failed, match="no libcuda"):
        switch.install(["chat"])
    assert host.installed() == before and host.kept() == kept
    assert os.listdir(host.folder / "staged") == []


def test_an_older_systemd_is_asked_without_the_option_it_does_not_know(host):
    refuse = """case "$*" in *recursive*) echo "systemd-analyze: unrecognized option '--recursive-errors=no'"; exit 1;; esac"""
    host.program("systemd-analyze", refuse)
    host.stage("one")
    switch.install(["chat"])
    assert host.kept()[UNIT] == unit("one")
    asked = [call for call in host.calls() if call.startswith("systemd-analyze")]
    assert [("recursive" in call) for call in asked] == [True, False]


@pytest.mark.parametrize("how", ["serves", "does not serve", "is refused", "cannot be put"])
def test_staged_files_never_stay(host, how):
    if how == "is refused":
        host.program("systemd-analyze", "exit 1")
    if how == "cannot be put":
        host.program("systemctl", "exit 1")
    host.stage("one", serves=how == "serves", keys="secret")
    if how == "serves":
        switch.install(["chat"])
    else:
        with pytest.raises((switch.Failed, switch.subprocess.CalledProcessError)):
            switch.install(["chat"])
    assert os.listdir(host.folder / "staged") == []


def test_removed_is_removed_everywhere(host):
    host.stage("one", keys="k")
    switch.install(["chat"])
    host.stage("two", watched=True)
    (host.folder / "gate/liveness").mkdir()
    for name in ("chat", "other"):
        (host.folder / f"caches/llama-server-{name}").mkdir(parents=True)
    for name in ("chat.json", "liveness/chat.json"):
        (host.folder / "gate" / name).write_text("{}")
    switch.remove("chat")
    assert host.installed() == {}
    for name in ("units", "instances", "staged", "good", "gate/liveness"):
        assert common.listing(str(host.folder / name)) in ([], ["multi-user.target.wants"]), name
    assert common.listing(common.GATES) == ["liveness"]
    assert common.listing(common.CACHES) == ["llama-server-other"]
    assert [call.split(" ", 1)[1] for call in host.calls()[-2:]] == [
        f"disable --quiet --now {UNIT}",
        "daemon-reload",
    ]


def test_the_unit_outlives_a_removal_that_fails(host):
    host.stage("one")
    switch.install(["chat"])
    host.program("systemctl", "exit 1")
    with pytest.raises(switch.subprocess.CalledProcessError):
        switch.remove("chat")
    assert "unit" in host.installed()


# --- a GPU without room for the question beside the old server -------------------------------------

VERIFY = """\
import json, sys
with open(sys.argv[3]) as file:
    plan = json.load(file)
plan["verified"] = "asked"
with open(sys.argv[3], "w") as file:
    json.dump(plan, file)
open(sys.argv[2] + ".calls", "w").close()
sys.exit(json.load(open(sys.argv[2]))["exit"])
"""


@pytest.fixture
def asking(host, monkeypatch):
    """Stages an instance with the question, which then ends as told."""
    (host.folder / "verify.py").write_text(VERIFY)
    monkeypatch.setattr(switch, "VERIFY", str(host.folder / "verify.py"))

    def stage(version, code):
        host.stage(version)
        (host.folder / "staged/chat/question.json").write_text(json.dumps({"exit": code}))

    return stage


def test_it_is_asked_with_the_old_one_stopped_and_recorded(host, asking):
    host.stage("one")
    switch.install(["chat"])
    asking("two", 0)
    before = len(host.calls())
    switch.install(["chat"])
    assert json.loads(host.installed()["plan"]) == {"version": "two", "serves": True, "verified": "asked"}
    made = host.calls()[before:]
    assert made.index(f"systemctl stop {UNIT}") < made.index("systemctl daemon-reload")
    assert not (host.folder / "staged/chat").exists()


def test_what_does_not_fit_leaves_the_old_one_serving(host, asking):
    host.stage("one")
    switch.install(["chat"])
    asking("two", 1)
    with pytest.raises(switch.Failed, match="does not fit; the previous one was put back and serves"):
        switch.install(["chat"])
    assert json.loads(host.installed()["plan"])["version"] == "one"
    assert host.calls()[-1] == f"systemctl start {UNIT}"
    assert not (host.folder / "staged/chat").exists()


def test_without_a_question_nothing_is_asked(host, asking):
    host.stage("one")
    switch.install(["chat"])
    assert "verified" not in json.loads(host.installed()["plan"])


# --- the liveness check -------------------------------------------------------------------------


def verbs(calls):
    return [call.removeprefix("systemctl ").replace(" --quiet", "") for call in calls if call.startswith("systemctl")]


def test_a_liveness_check_comes_with_the_instance_and_only_after_the_gate(host):
    host.stage("one", watched=True)
    switch.install(["chat"])
    assert verbs(host.calls())[-2:] == [f"start {UNIT}", f"enable --now {TIMER}"]
    assert "# one" in (host.folder / "units" / TIMER).read_text() == host.kept()[CHECK]


def test_the_check_does_not_come_between_a_switch_and_back(host):
    host.stage("one", watched=True)
    switch.install(["chat"])
    calls = len(host.calls())
    host.stage("two", serves=False, watched=True)
    with pytest.raises(switch.Failed, match="put back and serves"):
        switch.install(["chat"])
    told = verbs(host.calls()[calls:])
    assert told[0] == f"disable --now {TIMER}" and told[-1] == f"enable --now {TIMER}"
    assert told.count(f"enable --now {TIMER}") == 1
    assert "# one" in (host.folder / "units" / TIMER).read_text()


def test_a_check_that_is_wanted_no_longer_is_switched_off(host):
    host.stage("one", watched=True)
    switch.install(["chat"])
    host.stage("two")
    switch.install(["chat"])
    assert f"disable --now {TIMER}" in verbs(host.calls())
    assert [*(host.folder / "units").glob("llama*")] == [host.folder / "units" / UNIT] and TIMER not in host.kept()


def test_a_check_alone_leaves_the_server_alone(host):
    host.stage("one", keys="k", watched=True)
    switch.install(["chat"])
    before, calls = host.installed(), len(host.calls())
    host.stage_check("two")
    switch.watch("chat")
    assert verbs(host.calls()[calls:]) == [f"disable --now {TIMER}", "daemon-reload", f"enable --now {TIMER}"]
    assert host.installed() == before and os.listdir(host.folder / "staged") == []
    assert "# two" in (host.folder / "units" / CHECK).read_text() == host.kept()[CHECK]
    (host.folder / "staged/chat").mkdir()
    switch.watch("chat")  # none is wanted any more
    assert [*(host.folder / "units").glob("llama*")] == [host.folder / "units" / UNIT]
    assert set(host.kept()) == {UNIT, "plan.json", "api-keys"}


def test_the_gate_is_told_to_record(host):
    (host.folder / "gate.py").write_text(
        f"import sys\nopen({str(host.folder / 'asked')!r}, 'w').write(' '.join(sys.argv[1:]))\n" + GATE
    )
    host.stage("one")
    switch.install(["chat"])
    assert (host.folder / "asked").read_text().split()[::2] == ["check", "--record"]


def test_what_is_put_back_may_be_slow(host):
    (host.folder / "gate.py").write_text(
        f"import sys\nopen({str(host.folder / 'asked')!r}, 'a').write(sys.argv[-1] + chr(10))\n" + GATE
    )
    host.stage("one")
    switch.install(["chat"])
    host.stage("two", serves=False)
    with pytest.raises(switch.Failed, match="put back and serves"):
        switch.install(["chat"])
    assert (host.folder / "asked").read_text().split() == ["--record", "--record", "--no-floor"]
