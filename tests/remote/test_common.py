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


@pytest.mark.parametrize("text", [None, "", "{", "[]", "null"])
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
