"""What the programs share: files that are replaced as a whole, readers that do not fail, names that fit together."""

from __future__ import annotations

import os

import common
import pytest


def test_a_json_file_is_replaced_whole_and_readable_by_all(tmp_path):
    path = tmp_path / "made/here/record.json"
    common.write_json(str(path), {"a": 1})
    common.write_json(str(path), {"b": 2})
    assert common.read_json(str(path)) == {"b": 2}
    assert [one.name for one in path.parent.iterdir()] == ["record.json"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_writer_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "record.json"
    common.write_json(str(path), {"a": 1})
    with pytest.raises(TypeError):
        common.write_json(str(path), {"a": object()})
    assert common.read_json(str(path)) == {"a": 1}


@pytest.mark.parametrize("fault", ["write", "fchmod", "fsync", "replace"])
def test_a_disk_that_refuses_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, fault):
    path = tmp_path / "record.json"
    common.write_json(str(path), {"a": 1})

    def refuse(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, fault, refuse)
    with pytest.raises(OSError, match="No space left"):
        common.write_json(str(path), {"a": 2})
    assert common.read_json(str(path)) == {"a": 1} and os.listdir(tmp_path) == ["record.json"]


def test_names_that_look_like_a_file_being_written_are_left_alone(tmp_path):
    for name in ("m", "m.new", ".m.new"):
        (tmp_path / name).write_text(name)
    common.replace_file(str(tmp_path / "m"), b"other", 0o600)
    assert (tmp_path / "m").read_text() == "other" and (tmp_path / "m").stat().st_mode & 0o777 == 0o600
    assert {name: (tmp_path / name).read_text() for name in ("m.new", ".m.new")} == {
        "m.new": "m.new",
        ".m.new": ".m.new",
    }


def test_records_of_instances_whose_names_look_alike_are_different_files():
    paths = [
        record(name)
        for name in ("m", "m.liveness", "liveness")
        for record in (common.gate_record, common.liveness_record)
    ]
    assert len(set(paths)) == 6


UNIT = """\
# Made by llamafleet, plan 1
[Unit]
Description=a server
After=network.target
[Service]
ExecStart=/bin/server \\
    # within
    --port 1
ExecStartPost=gate
; another
User=llamafleet
User = other
[Install]
WantedBy=multi-user.target
"""


def test_the_core_of_a_unit_is_what_a_running_server_depends_on():
    core = common.core_of_unit(UNIT)
    assert core.splitlines() == ["[Unit]", "[Service]", "ExecStart=/bin/server      --port 1", "User=llamafleet",
                                 "User = other", "[Install]", "WantedBy=multi-user.target"]  # fmt: skip
    assert common.core_of_unit(UNIT, ["User=llamafleet", "WantedBy=multi-user.target"]) == core.replace(
        "User=llamafleet\n", ""
    )
    assert common.core_of_unit("# a \\\nUser=root\n") == "User=root"


@pytest.mark.parametrize(("schema", "later"), [(None, False), (1, False), (2, True), ("1", True), ([], True)])
def test_a_record_of_a_later_form_is_named(schema, later):
    record = {} if schema is None else {"schema": schema}
    said = common.later_schema(record, 1)
    assert bool(said) is later and (not said or f"it has schema {schema!r}, and this llamafleet knows up to 1" in said)


@pytest.mark.parametrize("text", [None, "", "{", "[]", "null", "[" * 100_000])
def test_what_is_no_json_object_is_read_as_an_empty_one(tmp_path, text):
    if text is not None:
        (tmp_path / "x").write_text(text)
    assert common.read_json(str(tmp_path / "x")) == {}


def test_sums_are_those_of_the_whole_file(tmp_path):
    (tmp_path / "x").write_bytes(b"a" * (3 << 20))
    (tmp_path / "empty").write_bytes(b"")
    assert common.sha256_of(str(tmp_path / "x")).startswith("6f850bc94ae6f7de")
    assert common.sha256_of(str(tmp_path / "empty")).startswith("e3b0c44298fc1c14")
    assert common.sha256_of(str(tmp_path / "none")) is None


def test_a_unit_s_name_leads_back_to_its_instance():
    assert common.instance_of(common.unit_of("chat-7.b")) == "chat-7.b"
    assert common.liveness_units("chat") == ["llama-server-chat-liveness.service", "llama-server-chat-liveness.timer"]


def test_output_is_taken_whatever_the_exit_status_unless_success_is_asked_for():
    fails = ["sh", "-c", "echo said; exit 3"]
    assert common.output_of(fails) == "said\n" and common.output_of(fails, only_success=True) == ""
    assert common.output_of(["/nowhere/at-all"]) == "" and common.output_of(["sleep", "5"], 0.05) == ""


def test_a_process_is_known_by_its_command_line():
    assert common.command_line(os.getpid())[0].rsplit("/", 1)[-1].startswith("python")
    assert common.command_line(0) == []


def test_both_sides_read_the_same_module():
    from llamafleet.remote import common as ours

    assert ours.__file__ == common.__file__
