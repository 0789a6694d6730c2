"""What gives files and folders their place, mode and owner again touches nothing that is not ours, and can be repeated."""

import json
import os
import stat

import common
import pytest
import restore


@pytest.fixture
def root(tmp_path, monkeypatch):
    for name in ("OPT", "ETC", "VAR", "RUN", "UNITS", "INSTANCES", "GOOD", "MODELS", "JOBS"):
        monkeypatch.setattr(common, name, str(tmp_path / name.lower()))
    (tmp_path / "units").mkdir()
    (tmp_path / "etc").mkdir()
    return tmp_path


def asked(path, kind, mode):
    return restore.main([json.dumps([{"path": str(path), "kind": kind, "mode": mode}])])


def mode_of(path):
    return stat.S_IMODE(os.lstat(path).st_mode)


def test_a_folder_is_made_with_those_above_it(root):
    assert asked(root / "var/a/b", "folder", 0o700) == 0
    assert mode_of(root / "var/a/b") == 0o700 and mode_of(root / "var/a") == 0o755


def test_what_lies_where_a_folder_belongs_is_set_aside(root):
    (root / "etc/instances").write_text("notes of somebody")
    assert asked(root / "etc/instances", "folder", 0o755) == 0 == asked(root / "etc/instances", "folder", 0o755)
    assert (root / "etc/instances").is_dir() and (root / "etc/.instances.rejected").read_text() == "notes of somebody"


def test_a_link_in_a_folder_s_place_is_removed_unless_it_may_lie_elsewhere(root):
    (root / "disk").mkdir(mode=0o700)
    (root / "disk/secret").write_text("of somebody else")
    for name in ("etc/instances", "models"):
        (root / name).symlink_to(root / "disk")
    restore.folder(str(root / "etc/instances"), 0o755)
    assert list((root / "etc/instances").iterdir()) == [] and mode_of(root / "disk") == 0o700
    restore.folder(str(root / "models"), 0o755)
    assert (root / "models").is_symlink() and (root / "disk/secret").exists()


def test_a_file_gets_its_mode_and_keeps_its_content(root):
    file = root / "etc/plan.json"
    file.write_text("{}")
    file.chmod(0o666)
    assert asked(file, "file", 0o644) == 0 and mode_of(file) == 0o644 and file.read_text() == "{}"


def test_what_a_link_leads_to_is_never_copied_and_stays(root):
    """Who could write to the folder may have made it: its content, copied, would be readable for everybody."""
    (root / "shadow").write_text("secret")
    (root / "shadow").chmod(0o600)
    (root / "etc/plan.json").symlink_to(root / "shadow")
    assert asked(root / "etc/plan.json", "file", 0o644) == 0
    assert not os.path.lexists(root / "etc/plan.json") and mode_of(root / "shadow") == 0o600


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to nowhere", "link to a folder"])
def test_what_is_no_file_makes_way(root, kind):
    path = root / "etc/plan.json"
    (root / "disk").mkdir()
    make = {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "link to nowhere": lambda: path.symlink_to("x"),
            "link to a folder": lambda: path.symlink_to(root / "disk")}  # fmt: skip
    make[kind]()
    assert asked(path, "file", 0o644) == 0 and not os.path.lexists(path) and (root / "disk").is_dir()


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "{root}/etc/../outside", "{root}/units/other.service", "{root}/etcetera", "etc"]
)
def test_what_is_not_ours_is_not_touched(root, capsys, path):
    (root / "units/other.service").write_text("[Unit]\n")
    (root / "outside").write_text("")
    (root / "outside").chmod(0o666)
    assert asked(path.format(root=root), "file", 0o600) == 1
    assert "is not llamafleet's: it stays as it is" in capsys.readouterr().err
    assert mode_of(root / "outside") == 0o666 and mode_of("/etc/passwd") != 0o600


def test_a_unit_of_ours_is(root):
    unit = root / "units/llama-server-a.service"
    unit.write_text(f"{common.MADE_BY}\n")
    unit.chmod(0o666)
    assert asked(unit, "file", 0o644) == 0 and mode_of(unit) == 0o644


def test_what_cannot_be_changed_is_said(root, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(30, "Read-only file system", "/etc/llamafleet")

    monkeypatch.setattr(os, "chmod", refuse)
    assert asked(root / "etc", "folder", 0o755) == 1
    assert capsys.readouterr().err.startswith(
        "error: /etc/llamafleet: Read-only file system; correct that, then run again"
    )
