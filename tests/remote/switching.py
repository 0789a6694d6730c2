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
import instance_files
import switch

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
    """What systemd does for one instance, as far as a switch can tell."""

    def __init__(self, monkeypatch):
        self.calls, self.at = [], None
        self.boot()
        monkeypatch.setattr(switch, "systemctl", self.systemctl)
        monkeypatch.setattr(common, "show", self.show)
        monkeypatch.setattr(switch, "guard", lambda name: None)
        monkeypatch.setattr(switch, "verify", lambda name: None)
        monkeypatch.setattr(switch, "try_hardening", lambda name: None)
        monkeypatch.setattr(switch, "gate", self.gate)
        monkeypatch.setattr(switch, "journal", lambda *options: "")

    def boot(self):
        """Nothing runs."""
        self.serving, self.starts, self.watching = None, 0, False

    def start_enabled(self):
        """What systemd starts by itself after `recover`."""
        if os.path.islink(f"{common.UNITS}/multi-user.target.wants/{UNIT}"):
            self.start(UNIT)

    def systemctl(self, *words, check=True):
        self.calls.append(words)
        if self.at and self.at(len(self.calls), words[0]):
            if check:
                raise subprocess.CalledProcessError(1, ["systemctl", *words])
            return
        verb, unit = words[0], words[-1]
        if verb in ("enable", "disable"):
            self.link(unit, verb == "enable")
            verb = {"enable": "start", "disable": "stop"}[verb] if "--now" in words else ""
        if verb in ("start", "restart"):
            self.start(unit)
        elif verb == "stop":
            self.stop(unit)

    @staticmethod
    def link(unit, wanted):
        folder = f"{common.UNITS}/{'multi-user.target' if unit == UNIT else UNIT}.wants"
        if wanted and not os.path.lexists(f"{folder}/{unit}"):
            if not os.path.isdir(folder):
                REAL["mkdir"](folder)
            REAL["symlink"](f"../{unit}", f"{folder}/{unit}")
        elif not wanted and os.path.lexists(f"{folder}/{unit}"):
            REAL["unlink"](f"{folder}/{unit}")

    def start(self, unit):
        if unit != UNIT:
            self.watching = os.path.exists(f"{common.UNITS}/{unit}")
            return
        files = instance_files.installed(NAME)
        self.serving = files if instance_files.damage(NAME, files) is None else None
        self.starts += 1
        if os.path.islink(f"{common.UNITS}/{UNIT}.wants/{TIMER}"):
            self.watching = True

    def stop(self, unit):
        if unit == UNIT:
            self.serving = None
        self.watching = False

    def show(self, unit, *properties, seconds=None):
        return {"ActiveState": "active" if self.serving else "inactive", "InvocationID": str(self.starts)}

    def gate(self, name, *options):
        files = instance_files.installed(NAME)
        if files != self.serving:
            return "what runs is not what is installed"
        return None if json.loads(files["plan.json"])["serves"] else "health: expected 200, found 503"


def place(monkeypatch, folder):
    """Our paths below a folder."""
    for name in PATHS:
        monkeypatch.setattr(common, name, f"{folder}/{name.lower()}")
        os.makedirs(f"{folder}/{name.lower()}", exist_ok=True)
    for name in ("GATE", "VERIFY", "FOLDER"):
        monkeypatch.setattr(switch, name, f"{folder}/helpers/1/{name.lower()}.py")


def files_of(version, serves=True, watched=True):
    """The whole files of a version; its key is its own."""
    text = f"{common.MADE_BY}, {version}\n[Service]\nLoadCredential=api-keys:{common.INSTANCES}/{NAME}/api-keys\n"
    files = {
        UNIT: text.encode(),
        "plan.json": json.dumps({"version": version, "serves": serves, "filler": "x" * 5000}).encode(),
        "api-keys": f"key-of-{version}\n".encode(),
    }
    check = f"{common.MADE_BY}, {version}\n".encode()
    return {**files, CHECK: check, TIMER: check} if watched else files


def stage(version, **options):
    staged = f"{common.STAGED}/{NAME}"
    shutil.rmtree(staged, ignore_errors=True)
    os.makedirs(staged)
    files = files_of(version, **options)
    for name, data in files.items():
        with open(f"{staged}/{name}", "wb") as file:
            file.write(data)
    return files


def leftovers():
    """What a switch keeps of itself: nothing, once it is over."""
    found = []
    for folder in (common.UNITS, common.INSTANCES, common.GOOD):
        for path, folders, names in os.walk(folder):
            state = os.path.basename(path) in (".switching", ".passed", ".preparing")
            found += [f"{path}/{name}" for name in (*names, *folders)
                      if state or name.startswith((f".{NAME}", ".llama", ".api", ".plan")) or "recover" in name]  # fmt: skip
    return found


def is_enabled(unit):
    folder = f"{common.UNITS}/{'multi-user.target' if unit == UNIT else UNIT}.wants"
    return os.path.islink(f"{folder}/{unit}")


def error(number):
    return OSError(number, os.strerror(number))


ERRORS = [errno.ENOSPC, errno.EROFS, errno.EIO]
