"""What lies at a place of ours is described as it is, not as what it leads to."""

import os

import common
import places
import pytest


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "VAR", str(tmp_path / "var"))
    monkeypatch.setattr(common, "MODELS", str(tmp_path / "models"))
    (tmp_path / "folder").mkdir(mode=0o750)
    (tmp_path / "file").write_text("")
    (tmp_path / "file").chmod(0o640)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "var").symlink_to("folder")
    (tmp_path / "models").symlink_to("nowhere")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "kind", "mode", "target"),
    [
        ("folder", "folder", 0o750, None), ("file", "file", 0o640, None), ("pipe", "other", None, None),
        ("link", "link", 0o777, "folder"), ("var", "folder", 0o750, "folder"), ("models", "link", 0o777, "nowhere"),
    ],
)  # fmt: skip
def test_each_kind(root, name, kind, mode, target):
    found = places.describe(str(root / name))
    assert (found["kind"], found["target"], found["uid"]) == (kind, target, os.geteuid())
    assert mode in (None, found["mode"])


def test_nothing_is_nothing(root):
    assert places.describe(str(root / "none")) is None
    assert places.describe(str(root / "file/below")) is None
