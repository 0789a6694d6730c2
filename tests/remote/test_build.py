"""The host's build program: what it makes, what it takes from the cache, and what is left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import pytest

from llamafleet.remote import build

build_cache = build.build_cache  # as build.py has it, by its bare name
RECORD = {"cmake": "3.31", "compiled_on": "anna"}
KEY = "0123456789abcdef"


def run_directly(server):
    """As `confined.version_of`, without systemd."""
    done = subprocess.run([server, "--version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


@pytest.fixture
def spec(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "RELEASES", str(tmp_path / "releases"))
    monkeypatch.setattr(build_cache, "RELEASES", str(tmp_path / "releases"))
    monkeypatch.setattr(build_cache, "notes", [])
    monkeypatch.setattr(build.confined, "version_of", run_directly)
    return {"key": KEY, "commit": "c" * 40, "source": "/nonexistent", "tree": str(tmp_path / "trees" / "one"),
            "cmake_flags": [], "jobs": 1, "build_cache": str(tmp_path / "cache"), "record": RECORD}  # fmt: skip


def server(folder, code=0):
    program = folder / "bin" / "llama-server"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\necho 'version: 1'\nexit {code}\n")
    program.chmod(0o755)


@pytest.fixture
def digest(spec, tmp_path):
    """The cache as another host left it, which told this digest; this host has no release yet."""
    partial = tmp_path / "partial"
    server(partial)
    (partial / "bin/libllama.so.1").write_bytes(b"library")
    (partial / "bin/libllama.so").symlink_to("libllama.so.1")
    build.describe(spec, str(partial))
    build.give_name(spec, str(partial))
    (tmp_path / "cache").mkdir()
    build_cache.publish(spec["build_cache"], KEY)
    told = build.digest_of(KEY)
    os.rename(tmp_path / "releases", tmp_path / "the other host's")
    return told


def test_a_cached_release_is_taken_whole_with_its_record(spec, digest, tmp_path):
    before = (tmp_path / "the other host's" / KEY / "release.json").read_bytes()
    build.build({**spec, "record": {"compiled_on": "bert"}}, [digest])
    release = tmp_path / "releases" / KEY
    assert (release / "release.json").read_bytes() == before and build.digest_of(KEY) == digest
    files = json.loads(before)["files"]
    assert json.loads(before)["compiled_on"] == "anna" and sorted(files) == sorted(os.listdir(release / "bin"))
    assert build.sha256_of(str(release / "bin/llama-server")) == files["llama-server"]
    assert os.access(release / "bin/llama-server", os.X_OK)
    assert os.readlink(release / "bin/libllama.so") == "libllama.so.1"
    assert sorted(os.listdir(tmp_path / "releases")) == [KEY] and build_cache.notes == []


def test_a_build_that_is_in_the_cache_but_not_known_is_not_taken(spec, digest, tmp_path):
    with pytest.raises(build.Failed, match="run again, and it compiles"):
        build.build(spec, [])
    assert "does not know the digest of that build" in build_cache.notes[0]
    assert not (tmp_path / "releases" / KEY).exists()


def test_without_a_compiler_a_refused_archive_is_compiled_by_the_next_run(spec, digest, tmp_path):
    """The survey named it, so nothing to compile with was installed; its name goes, so that the next survey does not."""
    archive = tmp_path / "cache" / f"{KEY}-{digest}.tar"
    archive.write_bytes(archive.read_bytes().replace(b"library", b"Library"))
    with pytest.raises(build.Failed, match="run again, and it compiles"):
        build.build(spec, [digest])
    assert not archive.exists() and (tmp_path / "cache" / f"{KEY}.rejected").exists()


def test_a_refused_archive_is_compiled_at_once_where_that_is_possible(spec, digest, tmp_path, monkeypatch):
    archive = tmp_path / "cache" / f"{KEY}-{digest}.tar"
    archive.write_bytes(archive.read_bytes().replace(b"library", b"Library"))
    compiled = []

    def compile_release(spec):
        compiled.append(spec["key"])
        shutil.copytree(tmp_path / "the other host's", tmp_path / "releases", symlinks=True, dirs_exist_ok=True)

    monkeypatch.setattr(build, "compile_release", compile_release)
    build.build(spec, [digest])
    assert compiled == [KEY] and archive.exists()  # the compiled one's, which is published
    assert "bin/libllama.so" in build_cache.notes[0]


def test_a_cached_release_that_does_not_run_here_is_not_given_its_name(spec, tmp_path, digest):
    shutil.rmtree(tmp_path / "the other host's")
    other = tmp_path / "releases" / KEY
    server(other, code=127)
    (other / "release.json").write_text(
        json.dumps({"key": KEY, "files": {"llama-server": build.sha256_of(str(other / "bin/llama-server"))}})
    )
    build_cache.publish(spec["build_cache"], KEY)
    told = build.digest_of(KEY)
    shutil.rmtree(tmp_path / "releases")
    with pytest.raises(build.Failed, match="does not run on this host"):
        build.build(spec, [told])
    assert not other.exists()


def test_a_complete_release_is_not_made_again(spec, tmp_path, capsys):
    (tmp_path / "releases" / KEY / "bin").mkdir(parents=True)
    (tmp_path / "releases" / KEY / "release.json").write_text('{"files": {}}')
    build.build(spec, [])
    assert "already complete" in capsys.readouterr().out
    assert not (tmp_path / "cache").exists()


def test_the_digest_of_a_damaged_release_is_not_told(spec, digest, tmp_path, capsys):
    os.rename(tmp_path / "the other host's", tmp_path / "releases")
    assert build.main(["digest", KEY]) == 0
    assert json.loads(capsys.readouterr().out) == {"digest": digest}
    (tmp_path / "releases" / KEY / "bin/libllama.so.1").write_bytes(b"Library")  # of the same size
    assert build.main(["digest", KEY]) == 1
    assert "is not a complete release" in capsys.readouterr().out
    assert build.main(["digest", "f" * 16]) == 1
    assert "is not a complete release" in capsys.readouterr().out


def test_notes_are_the_last_lines_for_the_operator(spec, digest, tmp_path, capsys):
    (tmp_path / "cache").chmod(0o777)
    build.build(spec, [digest])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("note: build_cache: others than root can write to") and "chmod 755" in last


def test_only_this_build_folder_is_kept(tmp_path):
    for name in ("one", "two", "three"):
        (tmp_path / "trees" / name / "bin").mkdir(parents=True)
    build.forget_other_trees(str(tmp_path / "trees/one"))
    assert os.listdir(tmp_path / "trees") == ["one"]
    assert (tmp_path / "trees/one/bin").is_dir()
    build.forget_other_trees(str(tmp_path / "nowhere/one"))


def test_a_failed_command_is_told_by_the_lines_that_say_why(capsys):
    script = "echo compiling a; echo 'b.cpp:1: error: no such thing'; echo ninja: stopped; exit 3"
    with pytest.raises(build.Failed) as failed:
        build.run(["sh", "-c", script], "it does not compile")
    assert str(failed.value) == "it does not compile (exit code 3):\nb.cpp:1: error: no such thing"
    assert capsys.readouterr().out.splitlines()[0] == "compiling a"


@pytest.mark.parametrize(("each", "jobs"), [(None, 8), (1 << 30, 5), (4 << 30, 1), (64 << 30, 1)])
def test_no_more_compilers_run_than_the_jobs_memory_holds(monkeypatch, each, jobs):
    monkeypatch.setattr(build.job_limits, "free_bytes", lambda: 5 << 30)
    assert build.parallel_jobs({"jobs": 8, "bytes_for_job": each}) == jobs


@pytest.mark.parametrize(
    ("macros", "flags"),
    [
        ("#define __GNUC__ 12\n#define __AMX_INT8__ 1\n", build.WITHOUT_AMX),
        ("#define __GNUC__ 14\n#define __AMX_INT8__ 1\n", ()),
        ("#define __GNUC__ 12\n#define __AMX_TILE__ 1\n", ()),
        ("#define __GNUC__ 4\n#define __clang__ 1\n#define __AMX_INT8__ 1\n", ()),
        ("", ()),
    ],
)
def test_a_compiler_that_breaks_amx_compiles_without_it(spec, tmp_path, monkeypatch, macros, flags):
    """ggml-org/llama.cpp#26954: what g++ 12 made of AMX's tiles ended in an illegal instruction."""
    escaped = macros.replace("\n", "\\n")
    compiler = tmp_path / "programs" / "c++"
    compiler.parent.mkdir()
    compiler.write_text(f"#!/bin/sh\ncase $* in *-march=native*) printf '{escaped}';; esac\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(compiler.parent), prepend=":")
    assert build.flags_of_compiler() == flags
    assert ["AMX" in note for note in build_cache.notes] == [True] * bool(flags)


def test_without_ninja_make_compiles_and_a_tree_of_the_other_is_made_anew(tmp_path, monkeypatch):
    """ninja-build/ninja#2199: on RHEL's rebuilds Ninja is in a repository that is off. CMake refuses a tree of another
    generator."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "CMakeCache.txt").write_text("//x\nCMAKE_GENERATOR:INTERNAL=Ninja\n")
    (tmp_path / "ninja-build").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.generator_for(str(tree)) == "Ninja" and tree.exists()
    (tmp_path / "ninja-build").unlink()
    assert build.generator_for(str(tree)) == "Unix Makefiles" and not tree.exists()
    assert build.generator_for(str(tree)) == "Unix Makefiles"


# --- for other hosts of the site ------------------------------------------------------------------


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """The folder of archives for other hosts."""
    monkeypatch.setattr(build.pieces, "BUILDS", str(tmp_path / "builds"))
    return tmp_path / "builds"


def pack(capsys):
    assert build.main(["pack", KEY]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_equal_releases_are_packed_into_equal_archives(spec, digest, tmp_path, shelf, capsys):
    """Hosts that took a build serve it together with the one that made it."""
    os.rename(tmp_path / "the other host's", tmp_path / "releases")
    first = pack(capsys)
    [archive] = shelf.iterdir()
    assert (first["digest"], first["size_bytes"]) == (digest, archive.stat().st_size)
    assert archive.name == f"{KEY}-{digest}.tar"
    assert pack(capsys) == first
    shutil.rmtree(shelf)
    for path in (tmp_path / "releases" / KEY / "bin").iterdir():
        os.utime(path, (5, 5), follow_symlinks=False)
    assert pack(capsys) == first


def test_what_the_site_brought_is_taken_and_not_kept_twice(spec, digest, tmp_path, shelf, capsys):
    os.rename(tmp_path / "the other host's", tmp_path / "releases")
    pack(capsys)
    os.rename(tmp_path / "releases", tmp_path / "the other host's")
    build.build({**spec, "build_cache": str(shelf)}, [digest])
    assert build.digest_of(KEY) == digest
    assert not [path for path in shelf.iterdir() if path.suffix == ".tar"]


def test_a_damaged_release_is_not_packed(spec, digest, tmp_path, shelf, capsys):
    os.rename(tmp_path / "the other host's", tmp_path / "releases")
    (tmp_path / "releases" / KEY / "bin/libllama.so.1").write_bytes(b"LIBRARY")
    assert build.main(["pack", KEY]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"error: {tmp_path}/releases/{KEY} is ")
    assert not shelf.exists()
