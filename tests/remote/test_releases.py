"""Which release is the current one, and which old ones go."""

from __future__ import annotations

import json
import os

import pytest

from llamafleet.remote import releases


@pytest.fixture
def host(tmp_path, monkeypatch):
    """Four releases, a the oldest; nothing uses them."""
    for name, folder in {"OPT": "opt", "UNITS": "units", "GOOD": "good"}.items():
        (tmp_path / folder).mkdir()
        monkeypatch.setattr(releases, name, str(tmp_path / folder))
    monkeypatch.setattr(releases, "running", lambda: iter(()))
    for age, letter in enumerate("abcd"):
        release(tmp_path, f"key-{letter}", age)
    return tmp_path


def release(host, key, seconds):
    folder = host / "opt/releases" / key
    folder.mkdir(parents=True)
    (folder / "release.json").write_text('{"files": {}}')
    os.utime(folder, (seconds, seconds))


def left(host):
    return sorted(path.name.replace("key-", "") for path in (host / "opt/releases").iterdir())


def test_the_link_leads_to_the_release(host):
    assert releases.main(["key-b", "9"]) == 0
    assert os.readlink(host / "opt/current") == "releases/key-b"
    assert releases.main(["key-c", "9"]) == 0
    assert os.readlink(host / "opt/current") == "releases/key-c"
    assert left(host) == list("abcd")


def test_a_link_half_made_by_a_killed_run_does_not_matter(host):
    (host / "opt/.current").symlink_to("releases/nowhere")
    assert releases.main(["key-b", "9"]) == 0
    assert os.readlink(host / "opt/current") == "releases/key-b"
    assert not os.path.lexists(host / "opt/.current")


@pytest.mark.parametrize(("keep", "names"), [(0, "b"), (1, "bd"), (2, "bcd"), (3, "abcd")])
def test_the_newest_others_stay(host, capsys, keep, names):
    assert releases.main(["key-b", str(keep)]) == 0
    assert left(host) == list(names)
    assert capsys.readouterr().out.count("removed the old release") == 4 - len(names)


@pytest.mark.parametrize("place", ["units/llama-server-chat.service", "good/chat/llama-server-chat.service"])
def test_one_that_a_unit_names_stays(host, place):
    unit = host / place
    unit.parent.mkdir(exist_ok=True)
    unit.write_text("ExecStart=/opt/llamafleet/releases/key-a/bin/llama-server\n")
    assert releases.main(["key-d", "0"]) == 0
    assert left(host) == ["a", "d"]


def test_one_that_a_process_runs_from_stays(host, monkeypatch):
    monkeypatch.setattr(
        releases, "running", lambda: iter(["/opt/llamafleet/releases/key-c/bin/llama-server (deleted)"])
    )
    assert releases.main(["key-d", "0"]) == 0
    assert left(host) == ["c", "d"]


def test_running_tells_this_process():
    assert os.readlink(f"/proc/{os.getpid()}/exe") in set(releases.running())


def test_half_made_releases_of_other_keys_go(host):
    for name in (".key-a.partial", ".key-b.partial"):
        (host / "opt/releases" / name).mkdir()
    assert releases.main(["key-b", "9"]) == 0
    assert left(host) == [".b.partial", *"abcd"]


def test_an_incomplete_release_is_not_linked(host, capsys):
    (host / "opt/releases/key-a/release.json").unlink()
    assert releases.main(["key-a", "0"]) == 1
    assert "releases/key-a is not a complete release" in capsys.readouterr().err
    assert not os.path.lexists(host / "opt/current") and left(host) == list("abcd")


def test_a_release_of_a_later_version_is_named(host, capsys):
    (host / "opt/releases/key-a/release.json").write_text('{"files": {}, "schema": 7}')
    assert releases.main(["key-a", "0"]) == 1
    assert "key-a release.json: it has schema 7, and this llamafleet knows up to 1" in capsys.readouterr().err


@pytest.fixture
def whole(tmp_path):
    (tmp_path / "bin").mkdir()
    for name in ("llama-server", "libllama.so.0"):
        (tmp_path / "bin" / name).write_bytes(b"ELF" * 9)
    (tmp_path / "bin/libllama.so").symlink_to("libllama.so.0")
    sizes = {"llama-server": 27, "libllama.so.0": 27, "libllama.so": 27}
    (tmp_path / "release.json").write_text(json.dumps({"files": dict.fromkeys(sizes, "ab"), "sizes": sizes}))
    return tmp_path


def test_a_whole_release_is_told_by_its_record(whole):
    assert releases.record_of(str(whole))["files"]["llama-server"] == "ab"


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / "bin/llama-server").unlink(),
        lambda folder: (folder / "bin/libllama.so.0").unlink(),  # leaves a link to nowhere
        lambda folder: os.truncate(folder / "bin/libllama.so.0", 9),
        lambda folder: (folder / "release.json").unlink(),
        lambda folder: (folder / "release.json").write_text("{"),
        lambda folder: (folder / "release.json").write_text("{}"),
        lambda folder: (folder / "release.json").write_text("[1]"),
        lambda folder: (folder / "release.json").write_text('{"files": 5}'),
        lambda folder: (folder / "release.json").write_text('{"files": {}, "sizes": 5}'),
        lambda folder: (folder / "release.json").write_text('{"files": {}, "schema": 2}'),
        lambda folder: (folder / "release.json").write_bytes(b"\0" * 99),
    ],
)
def test_half_a_release_is_none(whole, harm):
    harm(whole)
    assert releases.record_of(str(whole)) is None


def test_records_without_sizes_are_believed_for_what_they_say(whole):
    (whole / "release.json").write_text('{"files": {"llama-server": "ab"}}')
    assert releases.record_of(str(whole))
