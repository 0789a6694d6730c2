"""Which release is the current one, and which old ones go."""

from __future__ import annotations

import hashlib
import json
import os
import time

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
    (folder / "bin").mkdir(parents=True)
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
    """A release, as build.py makes it: release.json is the last file, and then the folder gets its name."""
    folder = tmp_path / "partial"
    (folder / "bin").mkdir(parents=True)
    for name in ("llama-server", "libllama.so.0"):
        (folder / "bin" / name).write_bytes(b"ELF" * 9)
    (folder / "bin/libllama.so").symlink_to("libllama.so.0")
    sizes = {"llama-server": 27, "libllama.so.0": 27, "libllama.so": 27}
    digest = hashlib.sha256(b"ELF" * 9).hexdigest()
    (folder / "release.json").write_text(json.dumps({"files": dict.fromkeys(sizes, digest), "sizes": sizes}))
    time.sleep(0.02)  # past a tick of the file system's clock
    folder.rename(tmp_path / "key")
    return tmp_path / "key"


def test_a_whole_release_is_told_by_its_record(whole, monkeypatch):
    monkeypatch.setattr(releases, "sha256_of", lambda path: pytest.fail(f"{path} is read"))
    assert "llama-server" in releases.record_of(str(whole))["files"]


def keeping_times(path, act):
    """Do it, and set size and times back, as somebody who hides it does."""
    before = path.stat()
    time.sleep(0.02)
    act()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def renamed(folder, name):
    (folder / name).rename(folder / "elsewhere")
    (folder / name).symlink_to(folder / "elsewhere")


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / "bin/llama-server").unlink(),
        lambda folder: (folder / "bin/libllama.so.0").unlink(),  # leaves a link to nowhere
        lambda folder: os.truncate(folder / "bin/libllama.so.0", 9),
        lambda folder: keeping_times(
            folder / "bin/libllama.so.0", lambda: (folder / "bin/libllama.so.0").write_bytes(b"elf" * 9)
        ),
        lambda folder: (folder / "bin/more.so").write_bytes(b"ELF"),
        lambda folder: renamed(folder / "bin", "libllama.so.0"),
        lambda folder: ((folder / "bin/libllama.so.0").unlink(), (folder / "bin/libllama.so.0").mkdir()),
        lambda folder: (folder / "release.json").write_text((folder / "release.json").read_text().replace("a", "b")),
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
    record = json.loads((whole / "release.json").read_text())
    (whole / "release.json").write_text(json.dumps({"files": record["files"]}))
    assert releases.record_of(str(whole))


def test_a_file_whose_mode_changed_is_read_and_whole(whole):
    (whole / "bin/llama-server").chmod(0o755)
    assert releases.record_of(str(whole))
