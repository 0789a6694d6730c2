"""Files from the operator arrive whole, in order and with their modes, or nothing changes."""

from __future__ import annotations

import io
import os

import pytest

from llamafleet.remote import receive
from tasks.lib.sending import packed  # what is sent


def run(tmp_path, *arguments, sent):
    return receive.main(list(arguments), io.BytesIO(sent.encode()))


def content(path):
    return path.read_bytes(), oct(path.stat().st_mode & 0o777)


def test_files_arrive_with_their_modes(tmp_path):
    sent = packed([(0o600, b"secret\n"), (0o644, b"\x00\xff")])
    assert run(tmp_path, str(tmp_path / "a"), str(tmp_path / "b"), sent=sent) == 0
    assert content(tmp_path / "a") == (b"secret\n", "0o600")
    assert content(tmp_path / "b") == (b"\x00\xff", "0o644")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize(
    "spoil",
    [lambda text: text[:-1], lambda text: text[:70], lambda text: "", lambda text: text.replace("MQ==", "Mg=="),
     lambda text: "0" * 64 + text[64:]],
    ids=["cut", "cut early", "nothing", "changed", "another sum"],
)  # fmt: skip
def test_what_is_not_what_was_sent_changes_nothing(tmp_path, capsys, spoil):
    (tmp_path / "a").write_text("old")
    assert (
        run(tmp_path, "--fresh", str(tmp_path / "new"), str(tmp_path / "a"), sent=spoil(packed([(0o644, b"1")]))) == 1
    )
    assert "error: what arrived has another SHA-256" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_a_fresh_folder_is_root_s_alone_and_has_nothing_old(tmp_path):
    folder = tmp_path / "staged"
    folder.mkdir(mode=0o777)
    (folder / "old").write_text("x")
    assert run(tmp_path, "--fresh", str(folder), str(folder / "unit"), sent=packed([(0o644, b"[Unit]")])) == 0
    assert os.listdir(folder) == ["unit"] and oct(folder.stat().st_mode & 0o777) == "0o700"


def test_a_folder_is_made_where_it_is_missing_and_keeps_what_it_has(tmp_path):
    folder = tmp_path / "var" / "tuned"
    for name in ("a", "b"):
        assert run(tmp_path, "--make", str(folder), str(folder / name), sent=packed([(0o644, b"{}")])) == 0
    assert sorted(os.listdir(folder)) == ["a", "b"] and folder.stat().st_mode & 0o077 == 0
    with_harm = packed([(0o644, b"1")])[:-1]
    assert run(tmp_path, "--make", str(tmp_path / "other"), str(tmp_path / "other/a"), sent=with_harm) == 1
    assert not (tmp_path / "other").exists()


def test_a_prepared_link_is_replaced_not_followed(tmp_path):
    """Whoever may write in the folder could have made it; in folders of root's nobody can."""
    victim = tmp_path / "victim"
    victim.write_text("root's")
    (tmp_path / "plan.json").symlink_to(victim)
    assert run(tmp_path, str(tmp_path / "plan.json"), sent=packed([(0o644, b"{}")])) == 0
    assert victim.read_text() == "root's" and not (tmp_path / "plan.json").is_symlink()


def test_the_last_good_copy_gets_it_too_where_there_is_one(tmp_path):
    (tmp_path / "good").mkdir()
    too = ["--too", str(tmp_path / "good/plan.json"), "--too", str(tmp_path / "nowhere/plan.json")]
    assert run(tmp_path, *too, str(tmp_path / "plan.json"), sent=packed([(0o644, b"{}")])) == 0
    assert content(tmp_path / "good/plan.json") == (b"{}", "0o644") and not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("count", [0, 2])
def test_as_many_files_as_names(tmp_path, capsys, count):
    assert run(tmp_path, str(tmp_path / "a"), sent=packed([(0o644, b"1")] * count)) == 1
    assert f"{count} files were sent for 1 names" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_a_disk_that_is_full_is_said(tmp_path, capsys, monkeypatch):
    def full(path, data, mode):
        raise OSError(28, "No space left on device", path)

    monkeypatch.setattr(receive, "replace_file", full)
    assert run(tmp_path, str(tmp_path / "a"), sent=packed([(0o644, b"1")])) == 1
    assert capsys.readouterr().err == f"error: cannot write {tmp_path / 'a'}: No space left on device\n"
