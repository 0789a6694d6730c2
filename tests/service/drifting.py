"""A deployed host below a folder: its survey, what a run would change, and the host's own programs that change it.

Files, folders, modes and owners are real; systemd and the running server are stand-ins. Paths lose the folder's name
when the survey is read, and get it again when something is set right.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import types

import common
import fetch_folder
import helpers
import instance_files
import places
import releases
import restore
import starting
import survey
import switch
from fetch_spec import Spec, Wanted

from llamafleet.hub.source import ModelFiles, RemoteFile
from llamafleet.service.changes import changes_needed
from llamafleet.service.desired import desire
from llamafleet.service.plan_inputs import plan_inputs
from tasks.lib.templates import render
from tests import mutants, planning
from tests.remote import switching
from tests.service.test_desired import RUN, Survey

PATHS = ("OPT", "HELPERS", "RELEASES", "CURRENT", "ETC", "INSTANCES", "VAR", "MODELS", "BUILD", "SOURCE", "JOBS",
         "STAGED", "GOOD", "GATES", "RUN", "UNITS", "RUN_UNITS", "CONTROL", "RUN_CONTROL")  # fmt: skip
CONTENT = b"GGUF!"
NAME, KEYS = "m0", "secret\n"
UNIT = common.unit_of(NAME)


class Systemd(switching.Systemd):
    """What systemd knows of the instance: the state of its units, and the drop-ins that it has read."""

    serving, watching = None, False

    def __init__(self, monkeypatch, host):
        super().__init__(monkeypatch)
        self.host, self.loaded, self.pid = host, [], 1
        monkeypatch.setattr(starting, "gate", lambda name, *options: None)

    def systemctl(self, *words, check=True):
        self.calls.append(words)
        verb, unit = words[0], words[-1]
        if verb == "daemon-reload":
            self.loaded = common.drop_ins(UNIT)
        elif verb in ("enable", "disable"):
            self.link(unit, verb == "enable")
        if unit == UNIT and (verb in ("start", "stop") or "--now" in words):
            self.serving = verb in ("start", "enable")
            self.pid += verb == "start"
        elif "--now" in words:
            self.watching = verb == "enable"

    @staticmethod
    def link(unit, wanted):
        folder = f"{common.UNITS}/{'multi-user.target' if unit == UNIT else UNIT}.wants"
        os.makedirs(folder, exist_ok=True)
        if os.path.lexists(f"{folder}/{unit}"):
            os.unlink(f"{folder}/{unit}")
        if wanted:
            os.symlink(f"../{unit}", f"{folder}/{unit}")

    def show(self, unit, *properties, seconds=None):
        folder = f"{common.UNITS}/{'multi-user.target' if unit == UNIT else UNIT}.wants"
        is_active = self.serving if unit == UNIT else self.watching
        return {
            "ActiveState": "active" if is_active else "inactive",
            "UnitFileState": "enabled" if os.path.islink(f"{folder}/{unit}") else "disabled",
            "MainPID": str(self.pid if is_active else 0), "DropInPaths": " ".join(self.loaded),
            "InvocationID": str(self.pid), "NeedDaemonReload": "no",
        }  # fmt: skip


class Host:
    """A host where everything is as it should be, until somebody changes it by hand."""

    def __init__(self, monkeypatch, folder):
        self.root = str(folder)
        for module in (common, survey, switch, releases, helpers, places):
            for name in PATHS:
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, self.root + getattr(module, name))
        monkeypatch.setattr(common, "FOLDERS", {self.root + path: mode for path, mode in common.FOLDERS.items()})
        monkeypatch.setattr(survey, "CREDENTIALS", f"{self.root}/run/credentials")
        self.systemd = Systemd(monkeypatch, self)
        self.settings = planning.settings({"source": "hf:a/b/m.gguf", "context_tokens": 4096, "api_key_file": "/keys"})
        file = RemoteFile("m.gguf", "https://x/m.gguf", 5, hashlib.sha256(CONTENT).hexdigest())
        self.models = {NAME: ModelFiles((file,), planning.header("Qwen3-8B"))}
        self._sent(monkeypatch)
        self._process(monkeypatch)
        os.makedirs(common.UNITS)
        self.run()
        assert not self.changes().any, self.changes()

    def _sent(self, monkeypatch):
        """The helpers as a run sends them."""
        sent = f"{self.root}/sent"
        os.makedirs(sent)
        with open(f"{sent}/common.py", "w") as file:
            file.write("")
        with open(f"{sent}/{common.SUMS}", "w") as file:
            file.write(f"{common.sha256(b'')}  common.py\n")
        monkeypatch.setattr(helpers, "__file__", f"{sent}/helpers.py")

    def _process(self, monkeypatch):
        """The server runs as planned, from files that are there."""
        self.argv, self.deleted = (), []
        monkeypatch.setattr(survey, "has_user", lambda name: True)
        fake = types.SimpleNamespace(**vars(common))
        fake.command_line = lambda pid: list(self.argv) if pid else []
        monkeypatch.setattr(survey, "common", fake)
        for name in PATHS:
            setattr(fake, name, getattr(common, name))
        monkeypatch.setattr(survey, "exe_of", lambda pid: self.argv[0] if pid else None)
        monkeypatch.setattr(survey, "deleted_files", lambda pid: self.deleted if pid else [])
        fake.show = self.systemd.show

    def found(self):
        """What the survey says of the installation."""
        found = {
            **mutants.BARE, "missing_packages": [], "helpers": survey.current_helpers(), "releases": survey.releases(),
            "current": survey.link_name(common.CURRENT), "models": survey.verified_models(),
            "instances": survey.instances(), "paths": survey.paths(),
            "foreign_units": [unit for unit in survey.units() if not survey.is_ours(unit)],
        }  # fmt: skip
        ours = {os.geteuid(): 0, os.getegid(): 0}
        for place in found["paths"].values():
            place["uid"], place["gid"] = ours.get(place["uid"], place["uid"]), ours.get(place["gid"], place["gid"])
        return json.loads(json.dumps(found).replace(self.root, ""))

    def desired(self):
        """What the host should be, decided by what is found."""
        run = RUN.__class__(helpers="h1", oldest_python=(3, 9), commit="c" * 40, secrets={NAME: {"api-keys": KEYS}},
                            holder=None)  # fmt: skip
        from llamafleet.host.installed import Installed

        read = Survey(planning.machine([], package_manager="apt", python="3.13.5"), Installed.from_json(self.found()))
        return desire(plan_inputs(self.settings, read, self.models), run, render)

    def changes(self):
        """What a run would change."""
        desired = self.desired()
        return changes_needed(desired, desired.installed)

    def run(self):
        """One run: what is decided at its beginning is done by the host's programs, in the order of the stages."""
        desired = self.desired()
        changes = changes_needed(desired, desired.installed)
        [serving] = desired.servings
        if changes.helpers:
            assert helpers.main(["install", "h1"]) == 0
        restore.restore([{"path": self.root + one.place.path, "kind": "folder" if one.place.kind == "folder" else "file",
                          "mode": one.place.mode} for one in changes.paths.values()])  # fmt: skip
        if changes.build:
            self.build(desired.build.key)
        if changes.models:
            self.fetch(self.root + serving.folder)
        if changes.services or changes.refreshed or changes.liveness:
            self.stage(serving, changes)
            verb = "install" if changes.services else "refresh" if changes.refreshed else "watch"
            switch.act(switch.parsed([verb, NAME]))
            if verb == "install":
                self.serve(serving.service)
        if changes.current:
            assert releases.main([desired.build.key, "2"]) == 0

    def stage(self, serving, changes):
        staged = f"{common.STAGED}/{NAME}"
        shutil.rmtree(staged, ignore_errors=True)
        os.makedirs(staged)
        service = serving.service
        files = {**service.liveness}
        if not changes.liveness:
            files |= {service.unit: service.unit_text, "plan.json": service.plan_json, **service.secrets}
        for name, text in files.items():
            common.replace_file(f"{staged}/{name}", text.encode(), 0o600)

    def serve(self, service):
        self.argv, self.deleted = service.argv, []
        folder = f"{survey.CREDENTIALS}/{UNIT}"
        os.makedirs(folder, exist_ok=True)
        common.replace_file(f"{folder}/api-keys", KEYS.encode())

    def build(self, key):
        """As build.py makes a release."""
        folder, partial = f"{common.RELEASES}/{key}", f"{common.RELEASES}/.{key}.partial"
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(f"{partial}/bin")
        for name in ("llama-server", "libllama.so.0"):
            common.replace_file(f"{partial}/bin/{name}", name.encode(), 0o755)
        os.symlink("libllama.so.0", f"{partial}/bin/libllama.so")
        files = {name: common.sha256_of(f"{partial}/bin/{name}") for name in os.listdir(f"{partial}/bin")}
        common.write_json(f"{partial}/release.json", {"schema": 1, "key": key, "commit": "c" * 40, "files": files})
        time.sleep(0.02)  # past a tick of the file system's clock
        os.rename(partial, folder)

    def fetch(self, folder):
        """As fetch.py does, without the network."""
        from pathlib import Path

        os.makedirs(folder, exist_ok=True)
        wanted = Wanted("m.gguf", ("https://x/m.gguf",), 5, hashlib.sha256(CONTENT).hexdigest())
        spec = Spec(directory=Path(folder), files=(wanted,))
        if fetch_folder.is_known(spec, wanted) or fetch_folder.adopt(spec, wanted):
            return
        spec.partial(wanted).write_bytes(CONTENT)
        fetch_folder.put_in_place(spec, wanted, fetch_folder.verify(spec.partial(wanted), wanted, "x"))

    def paths(self):
        """Every file, folder and link of ours that is installed, without the folder's name, by kind."""
        return {path: one["kind"] for path, one in self.found()["paths"].items()}


__all__ = ["NAME", "UNIT", "Host", "instance_files"]
