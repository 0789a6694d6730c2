"""A host for tests of the switch: our folders below a path, a stand-in for systemd, and the steps that a switch takes.

The stand-in enables units by links, as systemctl does, without syncing them; a start serves what lies in the files at
that moment. A step is a call of the file system that changes it or syncs it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess

import common
import draining
import instance_files
import starting
import switch
import switch_back
import switch_checks

NAME = "chat"
UNIT = common.unit_of(NAME)
CHECK, TIMER = common.liveness_units(NAME)
CHANGING = ("open", "write", "fsync", "fchmod", "chmod", "replace", "rename", "unlink", "mkdir", "rmdir", "symlink")
REAL = {name: getattr(os, name) for name in CHANGING}
PATHS = ("UNITS", "INSTANCES", "STAGED", "GOOD", "GATES", "RUN", "HELPERS", "OPT", "ETC", "VAR", "CACHES")


class PowerCut(BaseException):
    """The host is dead: nothing of ours runs any more."""


class Steps:
    """Counts the steps, and calls `at(number, name)` before each; it may raise."""

    def __init__(self, monkeypatch, below):
        self.count, self.at, self.below = 0, None, str(below)
        for name in CHANGING:
            monkeypatch.setattr(os, name, self._counted(name))

    def _counted(self, name):
        real = getattr(os, name)

        def call(*arguments, **options):
            reading = name == "open" and not arguments[1] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR)
            path = os.fspath(arguments[0]) if isinstance(arguments[0], (str, os.PathLike)) else self.below
            elsewhere = not path.startswith(self.below) and "dir_fd" not in options
            if not reading and not elsewhere:
                self.count += 1
                if self.at:
                    self.at(self.count, name)
            return real(*arguments, **options)

        return call


class Systemd:
    """What systemd does for instances, as far as a switch can tell. Of two with one port, which stands in plan.json,
    the second does not start."""

    def __init__(self, monkeypatch):
        self.calls, self.at = [], None
        self.boot()
        for module in (switch, switch_back, starting):
            monkeypatch.setattr(module, "systemctl", self.systemctl)
        monkeypatch.setattr(common, "show", self.show)
        monkeypatch.setattr(draining, "show", self.show)
        monkeypatch.setattr(switch, "guard", lambda names: None)
        for check in ("space", "address", "readable", "verify", "try_hardening"):
            monkeypatch.setattr(switch_checks, check, lambda *_: None)
        monkeypatch.setattr(starting, "gate", self.gate)
        monkeypatch.setattr(switch, "journal", lambda *options: "")

    def boot(self):
        """Nothing runs."""
        self.running, self.starts, self.watched = {}, 0, set()

    @property
    def serving(self):
        """What the one instance of most tests serves."""
        return self.running.get(NAME, (None, 0))[0]

    @property
    def watching(self):
        return NAME in self.watched

    def start_enabled(self, *names):
        """What systemd starts by itself after `recover`."""
        for name in names or (NAME,):
            if is_enabled(common.unit_of(name)):
                self.start(common.unit_of(name))

    def systemctl(self, *words, check=True):
        self.calls.append(words)
        if self.at and self.at(len(self.calls), words[0]):
            if check:
                raise subprocess.CalledProcessError(1, ["systemctl", *words])
            return
        verb, units = words[0], [word for word in words[1:] if not word.startswith("-")]
        if verb in ("enable", "disable"):
            for unit in units:
                self.link(unit, verb == "enable")
            verb = {"enable": "start", "disable": "stop"}[verb] if "--now" in words else ""
        for unit in units:
            if verb in ("start", "restart"):
                self.start(unit)
            elif verb == "stop":
                self.stop(unit)

    @staticmethod
    def link(unit, wanted):
        folder, link = link_of(unit)
        if wanted and not os.path.lexists(link):
            if not os.path.isdir(folder):
                REAL["mkdir"](folder)
            REAL["symlink"](f"../{unit}", link)
        elif not wanted and os.path.lexists(link):
            REAL["unlink"](link)

    def start(self, unit):
        name = owner_of(unit)
        if unit != common.unit_of(name):
            if os.path.exists(f"{common.UNITS}/{unit}"):
                self.watched.add(name)
            return
        self.running.pop(name, None)
        self.starts += 1
        files = instance_files.installed(name)
        if instance_files.damage(name, files) is None and port_of(files) not in map(port_of, self.served()):
            self.running[name] = (files, self.starts)
        if os.path.islink(f"{common.UNITS}/{unit}.wants/{common.liveness_units(name)[1]}"):
            self.watched.add(name)

    def served(self):
        return [files for files, _ in self.running.values()]

    def stop(self, unit):
        name = owner_of(unit)
        if unit == common.unit_of(name):
            self.running.pop(name, None)
        self.watched.discard(name)

    def show(self, unit, *properties, seconds=None):
        files, start = self.running.get(owner_of(unit), (None, 0))
        return {"ActiveState": "active" if files else "inactive", "InvocationID": str(start) if files else ""}

    def gate(self, name, *options):
        files = instance_files.installed(name)
        if files != self.running.get(name, (None, 0))[0]:
            return "what runs is not what is installed"
        return None if json.loads(files["plan.json"])["serves"] else "health: expected 200, found 503"


def port_of(files):
    """A port; of instances without one each its own."""
    return json.loads(files["plan.json"]).get("port") or id(files)


def owner_of(unit):
    """The instance of a unit, also of its liveness check's."""
    for end in (*common.LIVENESS, common.SUFFIX):
        if unit.endswith(end):
            return unit[len(common.PREFIX) : -len(end)]
    raise ValueError(unit)


def link_of(unit):
    """The folder and the path of the link that enables a unit."""
    name = owner_of(unit)
    wanted_by = "multi-user.target" if unit == common.unit_of(name) else common.unit_of(name)
    return f"{common.UNITS}/{wanted_by}.wants", f"{common.UNITS}/{wanted_by}.wants/{unit}"


def place(monkeypatch, folder):
    """Our paths below a folder."""
    for name in PATHS:
        monkeypatch.setattr(common, name, f"{folder}/{name.lower()}")
        os.makedirs(f"{folder}/{name.lower()}", exist_ok=True)
    monkeypatch.setattr(switch, "VERIFY", f"{folder}/helpers/1/verify.py")
    for name in ("GATE", "FOLDER"):
        monkeypatch.setattr(starting, name, f"{folder}/helpers/1/{name.lower()}.py")


def files_of(version, serves=True, watched=True, name=NAME, port=None):
    """The whole files of a version; its key is its own."""
    text = f"{common.MADE_BY}, {version}\n[Service]\nLoadCredential=api-keys:{common.INSTANCES}/{name}/api-keys\n"
    files = {
        common.unit_of(name): text.encode(),
        "plan.json": json.dumps({"version": version, "serves": serves, "port": port, "filler": "x" * 5000}).encode(),
        "api-keys": f"key-of-{version}\n".encode(),
    }
    units = {unit: f"{common.MADE_BY}, {version}\n".encode() for unit in common.liveness_units(name)}
    return {**files, **units} if watched else files


def stage(version, name=NAME, **options):
    staged = f"{common.STAGED}/{name}"
    shutil.rmtree(staged, ignore_errors=True)
    os.makedirs(staged)
    files = files_of(version, name=name, **options)
    for file, data in files.items():
        with open(f"{staged}/{file}", "wb") as out:
            out.write(data)
    return files


def leftovers():
    """What a switch keeps of itself: nothing, once it is over."""
    found = []
    for folder in (common.UNITS, common.INSTANCES, common.GOOD):
        for path, folders, names in os.walk(folder):
            state = os.path.basename(path) in (".switching", ".passed", ".preparing", ".before")
            found += [f"{path}/{name}" for name in (*names, *folders)
                      if state or name.startswith((f".{NAME}", ".llama", ".api", ".plan")) or "recover" in name]  # fmt: skip
    return found


def is_enabled(unit):
    return os.path.islink(link_of(unit)[1])


def error(number):
    return OSError(number, os.strerror(number))


ERRORS = [errno.ENOSPC, errno.EROFS, errno.EIO]
