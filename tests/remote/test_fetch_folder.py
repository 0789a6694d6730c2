"""A model's folder: where it is made, and what is done where it leads to another disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fetch_folder import make_folder
from fetch_spec import Failed, Spec


def spec(root, store="big/models/m-1"):
    return Spec(root / "var/models/m-1", (), store=str(root / store) if store else None)


def test_a_model_without_a_store_lies_in_its_own_folder(tmp_path):
    make_folder(spec(tmp_path, store=None))
    assert (tmp_path / "var/models/m-1").is_dir() and not (tmp_path / "var/models/m-1").is_symlink()


def test_a_new_model_lies_on_the_other_disk(tmp_path):
    """ollama/ollama#2701, #14347, #1311: models on another disk."""
    for _ in range(2):
        make_folder(spec(tmp_path))
        assert os.readlink(tmp_path / "var/models/m-1") == str(tmp_path / "big/models/m-1")
        assert (tmp_path / "big/models/m-1").stat().st_mode & 0o777 == 0o755
    (tmp_path / "var/models/m-1/m.gguf").write_bytes(b"GGUF")
    assert Path(tmp_path / "big/models/m-1/m.gguf").read_bytes() == b"GGUF"


def test_a_model_that_is_there_stays_where_it_is(tmp_path):
    (tmp_path / "var/models/m-1").mkdir(parents=True)
    make_folder(spec(tmp_path))
    assert not (tmp_path / "var/models/m-1").is_symlink() and not (tmp_path / "big").exists()


def test_a_model_on_an_earlier_disk_stays_there(tmp_path):
    make_folder(spec(tmp_path, store="old/m-1"))
    make_folder(spec(tmp_path))
    assert os.readlink(tmp_path / "var/models/m-1") == str(tmp_path / "old/m-1")
    make_folder(spec(tmp_path, store=None))
    assert os.readlink(tmp_path / "var/models/m-1") == str(tmp_path / "old/m-1")


@pytest.mark.parametrize("store", ["big/models/m-1", None])
def test_a_disk_that_is_not_there_is_named_and_not_replaced_by_another_one(tmp_path, store):
    (tmp_path / "var/models").mkdir(parents=True)
    (tmp_path / "var/models/m-1").symlink_to(tmp_path / "big/models/m-1")
    with pytest.raises(Failed, match="which is not there: mount its disk"):
        make_folder(spec(tmp_path, store=store))
    assert not (tmp_path / "big").exists()


def test_a_link_to_a_disk_that_is_gone_is_replaced_where_another_disk_is_named(tmp_path):
    (tmp_path / "var/models").mkdir(parents=True)
    (tmp_path / "var/models/m-1").symlink_to(tmp_path / "gone/m-1")
    make_folder(spec(tmp_path))
    assert os.readlink(tmp_path / "var/models/m-1") == str(tmp_path / "big/models/m-1")
