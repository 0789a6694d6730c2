"""What the programs share: files that are replaced as a whole, readers that do not fail, names that fit together."""

from __future__ import annotations

import os
import re
import shlex
from urllib.parse import urlsplit

import common
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.mutations import FUZZ


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


# --- what comes from outside -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [("5", 5), (" 7\r\n", 7), ("0", 0), ("007", 7), (str(2**63 - 1), 2**63 - 1), (str(2**63), None), ("9" * 5000, None),
     ("\u00b2", None), ("\u0663", None), ("-1", None), ("+1", None), ("1.0", None), ("1e3", None), ("0x1", None), ("", None),
     (None, None), ("1_000", None), ("5 5", None), ("\uff15", None)],
    ids=lambda value: repr(value)[:10],
)  # fmt: skip
def test_whole_numbers(text, number):
    assert common.whole_number(text) == number
    assert common.whole_number(text, 4) in (number, None) and (common.whole_number(text, 4) or 0) <= 4


@pytest.mark.parametrize(
    ("source", "name"),
    [("hf:o/r/a/b.gguf@main", "b.gguf"), ("hf:o/r/x;y.gguf", "x;y.gguf"), ("https://h/a/b.gguf?x=/c.gguf#/d.gguf", "b.gguf"),
     ("https://h/a%20b.gguf", "a b.gguf"), ("https://h/a%2Fb.gguf", "a/b.gguf"), ("https://h/", ""), ("https://h", ""),
     ("http://[::1/x.gguf", ""), ("/srv/my model.gguf", "my model.gguf"), ("x", "x"), ("", ""), ("https://h/%00.gguf", "\0.gguf")],
)  # fmt: skip
def test_the_name_of_a_source_s_file(source, name):
    assert common.file_name(source) == name


@pytest.mark.parametrize("name", ["x.gguf", "X.GGUF", "a+b=c_d-e.f.gguf", "_.gguf", "0.gguf", "m" * 201 + ".gguf"])
def test_names_of_models(name):
    assert common.is_model_file(name)


@pytest.mark.parametrize(
    "name",
    ["m" * 202 + ".gguf", ".gguf", "..gguf", "-x.gguf", "x", "x.gguf\n", "x y.gguf", "x/y.gguf", "x;y.gguf", "x$y.gguf", "", None,
     5, "x.gguf.partial", "\u00e9.gguf", "\u0661.gguf", "x\0.gguf", "x'.gguf", "x(1).gguf", "x:y.gguf", "x,y.gguf", "x@y.gguf"],
    ids=repr,
)  # fmt: skip
def test_names_that_no_model_has(name):
    assert not common.is_model_file(name)


@FUZZ
@given(st.text(max_size=30).map(lambda text: text + ".gguf"))
def test_a_name_of_a_model_is_a_word_for_a_shell_a_path_and_a_unit(name):
    if common.is_model_file(name):
        assert shlex.quote(name) in (name, f"'{name}'") and re.fullmatch(r"[\w.+=-]+", name, re.ASCII)
        assert os.path.basename(name) == name and not name.startswith((".", "-"))


@pytest.mark.parametrize(
    ("address", "safe"),
    [("https://h/x", True), ("HTTPS://h/x", True), ("http://127.0.0.1:9/x", True), ("http://127.8.9.1", True),
     ("http://[::1]:9/x", True), ("http://localhost:9", True), ("http://h/x", False), ("http://10.0.0.7/x", False),
     ("http://127.0.0.1.example/x", False), ("http://localhost.example/x", False), ("http://0.0.0.0/", False),
     ("http://h/@127.0.0.1", False), ("http://127.0.0.1@h/", False), ("ftp://127.0.0.1@h/", False), ("", False), ("http://[::1", False),
     ("http://2130706433/", False), ("http://[fe80::1]/", False), ("//h", False)],
)  # fmt: skip
def test_where_a_secret_may_go(address, safe):
    assert common.keeps_secrets(address) is safe


@FUZZ
@given(st.one_of(st.text(), st.text(alphabet="htps:/[]@.%?#0a \u00e9").map("http://".__add__)))
def test_an_address_is_one_for_python_and_for_curl(text):
    if common.is_address(text):
        parts = urlsplit(text)
        assert parts.hostname and (parts.port is None or 0 < parts.port < 65536)
        assert not re.search(r"[\s\"\\@\x00-\x20\x7f]", text) and len(text) <= 4096


def test_a_file_of_any_length_is_no_record(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "JSON_LIMIT_BYTES", 100)
    path = tmp_path / "record.json"
    for text, expected in (
        ('{"a": 1}', {"a": 1}),
        ('{"a": 1}' + " " * 100, {}),
        ("[" * 99, {}),
        ("5", {}),
        ("\ud800", {}),
    ):
        path.write_text(text, errors="surrogatepass")
        assert common.read_json(str(path)) == expected
    path.write_text("[" * 10**5)
    monkeypatch.setattr(common, "JSON_LIMIT_BYTES", 10**6)
    assert common.read_json(str(path)) == {}


def test_of_a_long_journal_both_ends_are_read(tmp_path, monkeypatch):
    program = tmp_path / "journalctl"
    program.write_text("#!/bin/sh\necho begin\nseq 1 300000\necho end\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(common, "JOURNAL_PART_BYTES", 1000)
    text = common.journal("--unit=x")
    assert text.startswith("begin\n1\n2\n") and text.endswith("300000\nend\n") and len(text) == 2000
    monkeypatch.setattr(common, "JOURNAL_PART_BYTES", 10**7)
    assert len(common.journal()) == len("begin\nend\n") + sum(len(str(n)) + 1 for n in range(1, 300001))
