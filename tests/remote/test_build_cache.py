"""A build cache that somebody else may have written to: what is taken from it is what the digest says, or nothing."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import tarfile
import time

import pytest

from llamafleet.remote import build_cache

KEY = "0123456789abcdef"
SERVER, LIBRARY = b"#!/bin/sh\necho version\n", b"a library"


def sha(data):
    return hashlib.sha256(data).hexdigest()


def record(**files):
    files = files or {"llama-server": SERVER, "libllama.so.1": LIBRARY, "libllama.so": LIBRARY}
    return {"key": KEY, "files": {name: sha(data) for name, data in files.items()},
            "sizes": {name: len(data) for name, data in files.items()}}  # fmt: skip


TEXT = json.dumps(record()).encode()
DIGEST = sha(TEXT)


def file(name, data, mode=0o755, **other):
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), mode
    for key, value in other.items():
        setattr(member, key, value)
    return member, data


def link(name, target, kind=tarfile.SYMTYPE):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member, b""


RIGHT = {
    "release.json": file("release.json", TEXT, 0o644),
    "server": file("bin/llama-server", SERVER),
    "library": file("bin/libllama.so.1", LIBRARY),
    "link": link("bin/libllama.so", "libllama.so.1"),
}


@pytest.fixture
def cache(tmp_path):
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def partial(tmp_path, monkeypatch):
    monkeypatch.setattr(build_cache, "notes", [])
    (tmp_path / "partial").mkdir()
    return tmp_path / "partial"


def put(cache, *members, name=f"{KEY}-{DIGEST}.tar", form=tarfile.GNU_FORMAT):
    """An archive of these members."""
    with tarfile.open(cache / name, "w", format=form) as tar:
        for member, data in members:
            tar.addfile(member, io.BytesIO(data))
    return cache / name


def take(cache, partial, *digests):
    return build_cache.take(str(cache), KEY, list(digests), str(partial))


def other_than(**members):
    return {**RIGHT, **members}.values()


def test_the_right_archive_is_taken_and_is_roots(cache, partial):
    put(cache, *other_than(server=file("bin/llama-server", SERVER, 0o6777, uid=1234, gid=1234, uname="eve")))
    assert take(cache, partial, DIGEST)
    assert (partial / "release.json").read_bytes() == TEXT
    for path in (partial / "bin", *(partial / "bin").iterdir(), partial / "release.json"):
        found = os.lstat(path)
        assert (found.st_uid, found.st_gid) == (os.geteuid(), os.getegid()), path
        assert path.is_symlink() or found.st_mode & 0o7777 == (0o644 if path.suffix == ".json" else 0o755), path
    assert build_cache.notes == []


TAMPERED = {
    "another program": (other_than(server=file("bin/llama-server", SERVER.replace(b"v", b"V"))), "bin/llama-server has sha256"),
    "a longer program": (other_than(server=file("bin/llama-server", SERVER + b"x")), "has 24 bytes, should have 23"),
    "a program and a record that fits": (
        other_than(**{
            "release.json": file("release.json", json.dumps(record(**{"llama-server": b"evil"})).encode()),
            "server": file("bin/llama-server", b"evil"),
        }),
        "which this run does not know",
    ),
    "a record beside the right files": (
        other_than(**{"release.json": file("release.json", TEXT.replace(b"llama-server", b"LLAMA-SERVER"))}),
        "which this run does not know",
    ),
    "no record": ([RIGHT["server"]], "it has no release.json"),
    "an endless record": (
        other_than(**{"release.json": file("release.json", b" " * (build_cache.MOST_RECORD_BYTES + 1))}),
        "it has no release.json of at most",
    ),
    "a missing file": ([RIGHT["release.json"], RIGHT["server"], RIGHT["link"]], "bin/libllama.so.1 is missing"),
    "a link out": (other_than(library=link("bin/libllama.so.1", "/etc/passwd")), "is a link to '/etc/passwd'"),
    "a link up": (other_than(link=link("bin/libllama.so", "../../../etc/passwd")), "is a link to"),
    "a link to itself": (other_than(link=link("bin/libllama.so", "libllama.so")), "is a link to"),
    "links in a circle": (
        other_than(link=link("bin/libllama.so", "libllama.so.1"), library=link("bin/libllama.so.1", "libllama.so")),
        "has sha256 None",
    ),
    "a hard link": (
        other_than(library=link("bin/libllama.so.1", "/etc/passwd", tarfile.LNKTYPE)), "is missing or no ordinary file",
    ),
    "a device": (other_than(server=link("bin/llama-server", "", tarfile.CHRTYPE)), "is missing or no ordinary file"),
    "a pipe": (other_than(server=link("bin/llama-server", "", tarfile.FIFOTYPE)), "is missing or no ordinary file"),
    "too many files": (
        [*RIGHT.values(), *(file(f"bin/{number}", b"") for number in range(build_cache.MOST_ENTRIES))], "more than 512",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", TAMPERED)
def test_what_is_not_the_build_is_not_taken(cache, partial, what):
    members, why = TAMPERED[what]
    archive = put(cache, *members)
    assert not take(cache, partial, DIGEST)
    assert why in build_cache.notes[0] and str(archive) in build_cache.notes[0], build_cache.notes
    assert os.listdir(partial) == [], "something of it is left"
    # Its name says what it is not: it loses that name, so that no run relies on it again.
    assert os.listdir(cache) == [f"{KEY}.rejected"]


@pytest.mark.parametrize("kind", ["a link", "a pipe", "no archive", "cut off", "a header of 9 GB"])
def test_what_is_no_archive_is_refused_at_once(cache, partial, tmp_path, kind):
    path = cache / f"{KEY}-{DIGEST}.tar"
    if kind == "a link":
        path.symlink_to(put(tmp_path, *RIGHT.values()))
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "no archive":
        path.write_bytes(b"x" * 5000)
    elif kind == "cut off":
        data = put(cache, *RIGHT.values()).read_bytes()
        path.write_bytes(data[: data.index(LIBRARY) + 4])
    else:
        header = tarfile.TarInfo("long")
        header.type, header.size = tarfile.XHDTYPE, 9 << 30
        path.write_bytes(header.tobuf(tarfile.GNU_FORMAT))
        os.truncate(path, 10 << 30)  # sparse
    began = time.monotonic()
    assert not take(cache, partial, DIGEST)
    assert time.monotonic() - began < 30 and len(build_cache.notes) == 1
    assert os.listdir(partial) == []


def test_files_that_the_record_does_not_name_are_left_out(cache, partial):
    put(
        cache,
        *RIGHT.values(),
        file("bin/libevil.so", b"evil"),
        file("../../etc/cron.d/evil", b"evil"),
        file("/x", b"x"),
    )
    assert take(cache, partial, DIGEST)
    assert sorted(os.listdir(partial)) == ["bin", "release.json"]
    assert sorted(os.listdir(partial / "bin")) == ["libllama.so", "libllama.so.1", "llama-server"]


@pytest.mark.parametrize("name", ["../evil", "..", ".", "a/b", "a\0b"])
def test_a_name_that_leads_out_is_refused_also_with_its_digest(cache, partial, name):
    """The digest may come from a host that lies."""
    text = json.dumps({"key": KEY, "files": {name: sha(b"evil")}}).encode()
    put(
        cache,
        file("release.json", text),
        file(f"bin/{name.replace(chr(0), '')}", b"evil"),
        name=f"{KEY}-{sha(text)}.tar",
    )
    assert not take(cache, partial, sha(text))
    assert "its record names" in build_cache.notes[0]


@pytest.mark.parametrize(
    "text", [b"[1]", b"{}", b'{"key": "0123456789abcdef"}', b'{"key": "0123456789abcdef", "files": [1]}', b"{", b"\xff"]
)
def test_a_record_of_another_form_is_refused_also_with_its_digest(cache, partial, text):
    put(cache, file("release.json", text), name=f"{KEY}-{sha(text)}.tar")
    assert not take(cache, partial, sha(text)) and len(build_cache.notes) == 1


def test_a_build_of_another_key_is_refused(cache, partial):
    text = TEXT.replace(KEY.encode(), b"f" * 16)
    put(cache, *other_than(**{"release.json": file("release.json", text)}), name=f"{KEY}-{sha(text)}.tar")
    assert not take(cache, partial, sha(text))
    assert "it is build ffffffffffffffff" in build_cache.notes[0]


OLD = [("./release.json", TEXT), ("./bin/llama-server", SERVER), ("./bin/libllama.so.1", LIBRARY)]


def test_an_archive_of_the_earlier_form_is_taken_with_a_digest_alone(cache, partial):
    members = [file(name, data) for name, data in reversed(OLD)]
    archive = put(cache, *members, link("./bin/libllama.so", "libllama.so.1"), name=f"{KEY}.tar")
    (cache / f"{KEY}.tar.sha256").write_text(sha(archive.read_bytes()))  # beside it, so worth nothing
    assert not take(cache, partial)
    assert "does not know the digest" in build_cache.notes[0] and archive.exists()
    assert not take(cache, partial, "f" * 64)
    assert "which this run does not know" in build_cache.notes[1] and archive.exists()
    assert take(cache, partial, "f" * 64, DIGEST)


def test_the_first_known_build_of_several_is_taken(cache, partial):
    put(cache, file("release.json", b"{}"), name=f"{KEY}-{'f' * 64}.tar")
    put(cache, *RIGHT.values())
    assert take(cache, partial, "f" * 64, DIGEST)


def test_an_empty_cache_says_nothing(cache, partial):
    assert not take(cache, partial, DIGEST) and not take(cache / "missing", partial, DIGEST)
    assert build_cache.notes == []


# --- keep


@pytest.fixture
def release(tmp_path, monkeypatch):
    """A release of this host."""
    monkeypatch.setattr(build_cache, "RELEASES", str(tmp_path / "releases"))
    folder = tmp_path / "releases" / KEY
    (folder / "bin").mkdir(parents=True)
    (folder / "release.json").write_bytes(TEXT)
    (folder / "bin/llama-server").write_bytes(SERVER)
    (folder / "bin/libllama.so.1").write_bytes(LIBRARY)
    (folder / "bin/libllama.so").symlink_to("libllama.so.1")
    return folder


def test_what_is_kept_can_be_taken(cache, partial, release):
    build_cache.publish(str(cache), KEY)
    assert os.listdir(cache) == [f"{KEY}-{DIGEST}.tar"]
    assert (cache / f"{KEY}-{DIGEST}.tar").stat().st_mode & 0o7777 == 0o644
    assert take(cache, partial, DIGEST)


def test_older_builds_of_the_key_go_and_those_of_others_stay(cache, release):
    for number in range(5):
        path = cache / f"{KEY}-{str(number) * 64}.tar"
        path.write_bytes(b"")
        os.utime(path, (number, number))
    for name in (f"{'f' * 16}-{DIGEST}.tar", f"{KEY}.tar", f"{KEY}.tar.sha256", f".{KEY}.abc.new", f"{KEY}.lock"):
        (cache / name).write_bytes(b"")
    build_cache.publish(str(cache), KEY)
    kept = {f"{KEY}-{DIGEST}.tar", f"{KEY}-{'4' * 64}.tar", f"{KEY}-{'3' * 64}.tar"}
    assert set(os.listdir(cache)) == kept | {f"{'f' * 16}-{DIGEST}.tar", f"{KEY}.lock"}


def test_a_cache_that_cannot_be_written_fails_no_build(tmp_path, release, partial):
    build_cache.publish(str(tmp_path / "missing"), KEY)
    assert "the build cannot be kept" in build_cache.notes[0]


def test_a_name_that_somebody_prepared_is_not_followed(cache, release, tmp_path):
    victim = tmp_path / "shadow"
    victim.write_bytes(b"secret")
    (cache / f"{KEY}-{DIGEST}.tar").symlink_to(victim)
    (cache / f"{KEY}.tar.new").symlink_to(victim)
    build_cache.publish(str(cache), KEY)
    assert victim.read_bytes() == b"secret" and not (cache / f"{KEY}-{DIGEST}.tar").is_symlink()


# --- one host at a time


@pytest.mark.parametrize("kind", ["symbolic link", "hard link", "pipe"])
def test_a_lock_that_somebody_prepared_is_not_written(cache, tmp_path, kind, monkeypatch):
    monkeypatch.setattr(build_cache, "notes", [])
    victim = tmp_path / "shadow"
    victim.write_bytes(b"secret")
    lock = cache / f"{KEY}.lock"
    {"symbolic link": lambda: lock.symlink_to(victim), "hard link": lambda: lock.hardlink_to(victim),
     "pipe": lambda: os.mkfifo(lock)}[kind]()  # fmt: skip
    with build_cache.turn(str(cache), KEY):
        assert victim.read_bytes() == b"secret"
    assert "other hosts are not waited for" in build_cache.notes[0]


def test_a_second_host_waits_for_the_first_and_says_for_whom(cache, monkeypatch, capsys):
    with open(cache / f"{KEY}.lock", "w") as held:
        held.write("anna")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        slept = []

        def sleep(seconds):
            slept.append(seconds)
            if len(slept) == 2:
                fcntl.flock(held, fcntl.LOCK_UN)  # anna is done

        monkeypatch.setattr(build_cache.time, "sleep", sleep)
        with build_cache.turn(str(cache), KEY):
            assert len(slept) == 2
            assert (cache / f"{KEY}.lock").read_text() == os.uname().nodename
            with pytest.raises(BlockingIOError):
                fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
    assert capsys.readouterr().out.count("waiting for anna, which compiles the same build") == 2


def test_a_lock_that_is_never_released_stops_nobody(cache, monkeypatch):
    monkeypatch.setattr(build_cache, "notes", [])
    monkeypatch.setattr(build_cache, "WAIT_SECONDS", 0.0)
    with open(cache / f"{KEY}.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with build_cache.turn(str(cache), KEY):
            pass
    assert "compiling beside its holder" in build_cache.notes[0]


def test_without_a_cache_nothing_is_waited_for(tmp_path):
    with build_cache.turn(None, KEY):
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("mode", "told"), [(0o755, False), (0o775, True), (0o777, True), (0o1777, True)])
def test_a_cache_that_others_can_write_to_is_told(cache, monkeypatch, mode, told):
    monkeypatch.setattr(build_cache, "notes", [])
    monkeypatch.setattr(build_cache.os, "stat", lambda path: os.stat_result((0o40000 | mode, *[0] * 9)))
    build_cache.make(str(cache))
    assert bool(build_cache.notes) == told
