"""A large file comes part by part, and an interrupted one goes on."""

import io
import json
import os
import types

import pytest

from llamafleet.remote import receive_part
from tasks.lib.sending import packed


def run(capsys, *argv, data=None):
    stream = io.BytesIO(packed([(0o600, data)]).encode() if data is not None else b"")
    code = receive_part.main([str(one) for one in argv], stream)
    out, err = capsys.readouterr()
    return json.loads(out)["offset"] if code == 0 else err


def test_it_goes_on_where_it_was(tmp_path, capsys):
    file = tmp_path / "m-0123" / ".m.gguf.partial"
    assert run(capsys, "begin", file, 10, 0) == 0
    assert run(capsys, "add", file, 0, data=b"GGUF") == 4
    assert run(capsys, "begin", file, 10, 0) == 4
    assert run(capsys, "add", file, 4, data=b"123456") == 10
    assert file.read_bytes() == b"GGUF123456" and oct(file.stat().st_mode & 0o777) == "0o600"
    assert run(capsys, "begin", file, 10, 0, "--fresh") == 0 and file.read_bytes() == b""


def test_a_part_that_is_not_the_next_one_changes_nothing(tmp_path, capsys):
    file = tmp_path / "f"
    run(capsys, "begin", file, 10, 0)
    run(capsys, "add", file, 0, data=b"GGUF")
    assert "f has 4 bytes, not 8: another run writes to it" in run(capsys, "add", file, 8, data=b"x")
    assert file.read_bytes() == b"GGUF"


def test_what_lies_there_of_a_larger_file_is_not_kept(tmp_path, capsys):
    file = tmp_path / "f"
    file.write_bytes(b"x" * 20)
    assert run(capsys, "begin", file, 10, 0) == 0 and file.read_bytes() == b""


def test_a_part_that_was_cut_changes_nothing(tmp_path, capsys):
    file = tmp_path / "f"
    run(capsys, "begin", file, 10, 0)
    stream = io.BytesIO(packed([(0o600, b"GGUF")]).encode()[:-5])
    assert receive_part.main(["add", str(file), "0"], stream) == 1
    assert "another SHA-256" in capsys.readouterr().err and file.read_bytes() == b""


def test_what_does_not_fit_is_refused_before_it_is_sent(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda folder: types.SimpleNamespace(f_bavail=100, f_frsize=1))
    assert f"{tmp_path}: No space left: 90 bytes are to come, beside 20 that stay free; 10 are missing" in run(
        capsys, "begin", tmp_path / "f", 90, 20
    )


def test_a_link_is_not_followed(tmp_path, capsys):
    (tmp_path / "f").symlink_to(tmp_path / "elsewhere")
    assert "error: cannot write" in run(capsys, "begin", tmp_path / "f", 10, 0)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("number", ["x", "-1e3"])
def test_a_number_that_is_none_is_one_line(tmp_path, capsys, number):
    assert run(capsys, "begin", tmp_path / "f", number, 0).startswith("error: ")
