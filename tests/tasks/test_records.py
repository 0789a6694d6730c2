"""The operator's records beside the inventory: found as pyinfra finds the inventory, written whole, damage kept aside."""

import json
import sys

import pytest

from tasks.lib import lookups, records
from tests.tuning.test_record import value


@pytest.fixture
def inventory(tmp_path, monkeypatch):
    """An inventory file in a folder of its own; the run is of it."""
    (tmp_path / "here").mkdir()
    path = tmp_path / "here" / "fleet.py"
    path.write_text("")
    monkeypatch.setattr(records, "_inventory", None)
    monkeypatch.setattr(lookups, "_known", {})
    monkeypatch.setattr(sys, "argv", ["pyinfra", "-y", "--limit", "a", str(path), "deploy.py", "--data", "x=y"])
    return path


def test_the_records_lie_beside_the_inventory_that_pyinfra_was_given(inventory, monkeypatch, tmp_path):
    assert records.folder() == inventory.parent / "tuned"
    monkeypatch.chdir(tmp_path)
    for words in (["@local", "deploy.py"], ["a,b", "deploy.py"], [], ["--no-such-flag"], ["--help"]):
        monkeypatch.setattr(sys, "argv", ["pyinfra", *words])
        assert records.folder() == tmp_path / "tuned"
    records.of_inventory(inventory)
    assert records.folder() == inventory.parent / "tuned"


def test_what_is_kept_is_read_again_with_every_record(inventory):
    path = records.keep("@ssh/gpu 1", "chat", value({"threads": 2}))
    records.keep("@ssh/gpu 1", "code", value())
    records.keep("@ssh/gpu 1", "chat", value({"threads": 3}))
    assert path == inventory.parent / "tuned" / "@ssh%2Fgpu%201.json" and path.stat().st_mode & 0o777 == 0o644
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    found = records.kept().records["@ssh/gpu 1"]
    assert {name: record.settings for name, record in found.items()} == {"chat": {"threads": 3}, "code": {}}
    text = path.read_text()
    records.keep("@ssh/gpu 1", "chat", value({"threads": 3}))
    assert path.read_text() == text  # an order that stays, for those who commit it


@pytest.mark.parametrize("text", ["{", "[]", '{"chat": 1e999}', "\x00", '{"a": 1, "a": 2}'])
def test_a_damaged_file_is_named_and_set_aside_by_the_next_record(inventory, text):
    path = records.path_of("box", records.folder())
    path.parent.mkdir()
    path.write_text(text)
    assert records.kept().problems["box"] == (f"{path} is damaged: its records are not used; restore or remove it",)
    records.keep("box", "chat", value())
    assert path.with_name("box.json.damaged").read_text() == text
    assert list(json.loads(path.read_text())) == ["chat"]


def test_without_a_folder_there_are_no_records(inventory):
    assert records.kept().records == {} and records.kept().problems == {}
    assert not records.folder().exists()
