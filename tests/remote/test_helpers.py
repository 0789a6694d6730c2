"""The helpers' own installation, in a tree of its own: whole, linked, and nothing removed that is used."""

from __future__ import annotations

import os
import subprocess
import sys

import common
import pytest

from llamafleet.remote import helpers

MARKED = "# Made by llamafleet, plan 123\n[Service]\nExecStartPost=python3 {root}/helpers/{key}/gate.py\n"


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A host without helpers, and a copy of them as it was sent."""
    for name in ("HELPERS", "UNITS", "GOOD"):
        monkeypatch.setattr(helpers, name, str(tmp_path / name.lower()))
    monkeypatch.setattr(helpers.survey, "UNITS", str(tmp_path / "units"))
    monkeypatch.setattr(common, "FOLDERS", {str(tmp_path / "helpers"): 0o755, str(tmp_path / "staged"): 0o700})
    for path, text in {
        "sent/gate.py": "print('gate')\n",
        "sent/psutil/__init__.py": "",
        "sent/try": "#!/bin/sh\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    (tmp_path / "units").mkdir()
    monkeypatch.setattr(helpers, "__file__", str(tmp_path / "sent/helpers.py"))
    return tmp_path


def unit(root, path, key, first=""):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(first + MARKED.format(root=root, key=key))


def folders(root):
    return sorted(os.listdir(root / "helpers"))


def test_they_are_installed_linked_and_readable_by_all(root):
    assert helpers.main(["install", "k1"]) == 0
    assert folders(root) == ["current", "k1"] and os.readlink(root / "helpers/current") == "k1"
    assert (root / "helpers/k1/gate.py").read_text() == "print('gate')\n"
    assert not (root / "helpers/k1/try").exists()
    assert [name for name in os.listdir(root / "helpers/k1/__pycache__") if name.startswith("gate.")]
    for path in [root / "helpers/k1", *(root / "helpers/k1").rglob("*")]:
        assert oct(path.stat().st_mode & 0o777) == ("0o755" if path.is_dir() else "0o644"), path
    assert oct((root / "staged").stat().st_mode & 0o777) == "0o700"


def test_what_no_unit_names_goes(root):
    assert helpers.main(["install", "k1"]) == 0
    (root / "helpers/k1.zip").write_text("of llamafleet 0.1.0")
    (root / "helpers/k0.new").mkdir()
    assert helpers.main(["install", "k2"]) == 0
    assert folders(root) == ["current", "k2"] and os.readlink(root / "helpers/current") == "k2"


@pytest.mark.parametrize(
    "path", ["units/llama-server-a.service", "units/llama-server-a-liveness.service", "good/a/llama-server-a.service"]
)
def test_what_an_installed_or_last_good_unit_names_stays(root, path):
    assert helpers.main(["install", "k1"]) == 0
    unit(root, path, "k1")
    for key in ("k2", "k3"):
        assert helpers.main(["install", key]) == 0
    assert folders(root) == ["current", "k1", "k3"]


def test_a_unit_of_somebody_else_s_keeps_nothing(root):
    assert helpers.main(["install", "k1"]) == 0
    unit(root, "units/llama-server-x.service", "k1", first="[Unit]\n")
    assert helpers.main(["install", "k2"]) == 0
    assert folders(root) == ["current", "k2"]


def test_what_a_process_runs_from_stays_while_it_runs(root):
    """A job of a run that was killed."""
    assert helpers.main(["install", "k1"]) == 0
    (root / "helpers/k1/sleep.py").write_text("import time; print(flush=True); time.sleep(60)")
    running = subprocess.Popen([sys.executable, str(root / "helpers/k1/sleep.py")], stdout=subprocess.PIPE)
    running.stdout.readline()
    try:
        assert helpers.main(["install", "k2"]) == 0
        assert folders(root) == ["current", "k1", "k2"]
    finally:
        running.kill()
        running.communicate()
    assert helpers.main(["install", "k2"]) == 0
    assert folders(root) == ["current", "k2"]


def test_damaged_helpers_of_this_version_are_replaced(root):
    assert helpers.main(["install", "k1"]) == 0
    (root / "helpers/k1/gate.py").write_text("")
    (root / "helpers/k1/odd.py").write_text("")
    assert helpers.main(["install", "k1"]) == 0
    assert (root / "helpers/k1/gate.py").read_text() == "print('gate')\n"
    assert not (root / "helpers/k1/odd.py").exists() and folders(root) == ["current", "k1"]


def test_whole_helpers_are_linked_and_not_written_again(root, monkeypatch):
    gate = (root / "sent/gate.py").read_bytes()
    (root / "sent/common.py").write_text("")
    sums = {"gate.py": common.sha256(gate), "common.py": common.sha256(b"")}
    (root / "sent" / common.SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    assert helpers.main(["install", "k1"]) == 0 and helpers.main(["install", "k2"]) == 0
    unit(root, "units/llama-server-a.service", "k1")
    assert helpers.main(["install", "k1"]) == 0
    before = os.stat(root / "helpers/k1/gate.py").st_ino
    assert helpers.main(["install", "k1"]) == 0
    assert os.stat(root / "helpers/k1/gate.py").st_ino == before
    (root / "helpers/k1/gate.py").write_text("")
    assert helpers.main(["install", "k1"]) == 0
    assert (root / "helpers/k1/gate.py").read_bytes() == gate and common.helpers_damage(
        str(root / "helpers/k1")
    ) is None


def test_a_switch_under_way_keeps_its_helpers(root):
    assert helpers.main(["install", "k1"]) == 0
    unit(root, "good/.switching/a/files/llama-server-a.service", "k1")
    assert helpers.main(["install", "k2"]) == 0
    assert folders(root) == ["current", "k1", "k2"]


def test_a_folder_has_its_name_only_after_its_files_are_on_the_disk(root, monkeypatch):
    """Every file and folder is synced before the rename, the folder of the names after the link."""
    steps = []
    rename, sync = os.rename, helpers.sync
    monkeypatch.setattr(os, "rename", lambda a, b: (steps.append(f"rename {b}"), rename(a, b)))
    for module in (helpers, common):
        monkeypatch.setattr(module, "sync", lambda path: (steps.append(f"sync {path}"), sync(path)))
    assert helpers.main(["install", "k1"]) == 0
    named = steps.index(f"rename {root}/helpers/k1")
    synced = {step.split()[1].replace("k1.new", "k1") for step in steps[:named]}
    everything = {str(path) for path in [root / "helpers/k1", *(root / "helpers/k1").rglob("*")]}
    assert synced - {str(root)} == everything  # in `root` the folder of all helpers was made
    assert steps[-1] == f"sync {root}/helpers"


def test_a_full_disk_is_said_and_the_old_ones_stay(root, monkeypatch, capsys):
    assert helpers.main(["install", "k1"]) == 0

    def full(path):
        raise OSError(28, "No space left on device", path)

    monkeypatch.setattr(helpers, "sync", full)
    assert helpers.main(["install", "k2"]) == 1
    assert "error: the helpers cannot be installed: [Errno 28] No space left on device" in capsys.readouterr().err
    assert os.readlink(root / "helpers/current") == "k1"
