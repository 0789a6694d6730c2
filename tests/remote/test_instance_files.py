"""Which files of an instance are whole, and which ones a switch goes back to."""

from __future__ import annotations

import json
import os

import common
import instance_files
import pytest

from tests.remote import switching
from tests.remote.switching import CHECK, NAME, TIMER, UNIT


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    switching.place(monkeypatch, tmp_path)


def put(folder, files):
    os.makedirs(folder, exist_ok=True)
    for name, data in files.items():
        common.write_file(f"{folder}/{name}", data)


def install(files):
    for name, data in files.items():
        path, mode = instance_files.places(NAME)[name]
        os.makedirs(os.path.dirname(path), exist_ok=True)
        common.write_file(path, data, mode)


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        ({}, None),
        ({CHECK: None, TIMER: None}, None),
        ({UNIT: None}, "is missing"),
        ({UNIT: b""}, "does not begin with '# Made by llamafleet'"),
        ({UNIT: b"\0" * 100}, "does not begin with '# Made by llamafleet'"),
        ({TIMER: b""}, "does not begin with '# Made by llamafleet'"),
        ({"plan.json": None}, "plan.json is missing, or no JSON object"),
        ({"plan.json": b"[1]"}, "plan.json is missing, or no JSON object"),
        ({"plan.json": b""}, "plan.json is missing, or no JSON object"),
        ({"api-keys": None}, "api-keys, which the unit loads, is missing or empty"),
        ({"api-keys": b"\n"}, "api-keys, which the unit loads, is missing or empty"),
        ({"api-keys": b"\0" * 20}, "api-keys, which the unit loads, is missing or empty"),
    ],
)  # fmt: skip
def test_damage_is_named_and_such_files_are_never_gone_back_to(damage, what):
    files = {name: data for name, data in {**switching.files_of("1"), **damage}.items() if data is not None}
    said = instance_files.damage(NAME, files)
    assert said is None if what is None else what in said
    put(f"{common.GOOD}/{NAME}", files)
    install(switching.files_of("2"))
    assert instance_files.last_good(NAME) == (files if what is None else None)
    assert instance_files.previous(NAME) == (files if what is None else switching.files_of("2"))


def test_where_neither_is_whole_there_is_no_previous_one():
    put(f"{common.GOOD}/{NAME}", {"api-keys": b"k"})
    install({**switching.files_of("2"), "plan.json": b""})
    assert instance_files.previous(NAME) is None


@pytest.mark.parametrize(
    ("change", "whole"),
    [
        ({}, True),
        ({UNIT: b"# Made by llamafleet, edited\n"}, False),
        ({"api-keys": b"other"}, False),
        ({TIMER: None}, False),
        # Earlier versions replace these in place, and know no manifest.
        ({"plan.json": b'{"noted": 1}'}, True),
        ({TIMER: b"# Made by llamafleet, another\n"}, True),
        ({"manifest.json": b"[1]"}, True),
        ({"manifest.json": b""}, True),
    ],
)
def test_last_good_files_are_those_of_their_manifest(change, whole):
    files = switching.files_of("1")
    put(f"{common.GOOD}/{NAME}", {**files, "manifest.json": instance_files.manifest(files)})
    for name, data in change.items():
        path = f"{common.GOOD}/{NAME}/{name}"
        os.unlink(path) if data is None else common.write_file(path, data)
    assert (instance_files.last_good(NAME) is not None) is whole


def test_credentials_are_those_of_this_instance():
    unit = switching.files_of("1")[UNIT] + f"LoadCredential=tls-key:{common.INSTANCES}/other/tls-key\n".encode()
    assert instance_files.credentials(NAME, unit) == ["api-keys"]


def test_leftovers_of_39f1a14_are_no_last_good_files_of_another_instance():
    """It kept `m`'s files as `m.new` for a moment; `m.new` is also the name of an instance."""
    put(f"{common.GOOD}/{NAME}.new", switching.files_of("1"))
    assert instance_files.last_good(f"{NAME}.new") is None


def test_the_files_of_instances_whose_names_look_alike_are_different():
    names = ("m", "m.new", "m.old", "m.liveness", "m.service")
    paths = [path for name in names for path, _ in instance_files.places(name).values()]
    assert len(set(paths)) == len(paths)
    import transaction

    hidden = [transaction.beside(path, end) for path in paths for end in ("new", "old")]
    assert len({*hidden, *paths}) == 3 * len(paths)


def test_a_manifest_lists_all_files():
    files = switching.files_of("1")
    assert json.loads(instance_files.manifest(files)) == {
        "schema": 1,
        "files": {name: common.sha256(data) for name, data in files.items()},
    }
