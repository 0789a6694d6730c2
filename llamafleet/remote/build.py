"""Compile llama.cpp on this host into a release folder, or take a finished build of the key.

Contract: `build.py SPEC.json [DIGEST...]`, where SPEC has key, commit, source (a checkout of that commit), tree (build
folder), cmake_flags, jobs, bytes_for_job (of memory that each compiler may need | null), build_cache (folder | null)
and record (what release.json says), and each DIGEST is one of a build of the key that may be taken from that folder.
Progress lines on stdout; those at the end that begin with `note: ` are for the operator, the last one of a failure
begins with `error: `. Exit 0: the release /opt/llamafleet/releases/KEY is complete. Killed at any point it goes on
where it was: Ninja (or make, where the host has no Ninja) keeps what is compiled, and a release appears under its name
only when it is whole. `build.py digest KEY` prints {"digest": the SHA-256 of the release's release.json}, after its
files were compared with it; exit 1 and a line `error: ` where one differs. `build.py pack KEY` does so too, and makes
an archive of the release in pieces.BUILDS, from which other hosts of the site may take it: {"digest", "sha256" and
"size_bytes" of the archive}. What build.py itself takes from there it removes. Root, systemd, CMake, Ninja or make, the
standard library; common.py, build_cache.py, confined.py, job_limits.py, pieces.py and releases.py lie beside it.

With a build cache one host of several compiles a key, under a lock there; build_cache.py has what the others may take.

Decision 8: docs/decisions/0008-source-pinned-known-by-a-build-key.md.
Decision 9: docs/decisions/0009-nothing-half-done-has-its-final-name.md.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from typing import Any

import build_cache
import confined
import job_limits
import pieces
from common import RELEASE_SCHEMA, RELEASES, output_of, sha256_of, write_json
from releases import record_of

ERROR_LINES = 12
# Before release 14 g++ reads 8 of the 64 bytes that set up AMX's tiles, and drops what writes the others: the first
# matrix ends in an illegal instruction (seen with 12.2 and llama.cpp b11434; github.com/ggml-org/llama.cpp/pull/26954).
AMX_COMPILER_VERSION = 14
WITHOUT_AMX = ("-DCMAKE_C_FLAGS=-U__AMX_INT8__", "-DCMAKE_CXX_FLAGS=-U__AMX_INT8__")


class Failed(Exception):
    """The build cannot go on; the text is for the operator."""


def say(text: str) -> None:
    print(text, flush=True)


def build(spec: dict[str, Any], digests: list[str]) -> None:
    if record_of(f"{RELEASES}/{spec['key']}"):
        say(f"release {spec['key']} is already complete")
        return
    cache = spec["build_cache"]
    with build_cache.turn(cache, spec["key"]):
        if not (cache and take_from_cache(spec, digests)):
            compile_release(spec)
            if cache:
                build_cache.publish(cache, spec["key"])
    forget_other_trees(spec["tree"])
    for text in build_cache.notes:
        say(f"note: {text}")


def forget_other_trees(tree: str) -> None:
    """Keep this build folder, from which the next commit is compiled quickly, and no other."""
    folder = os.path.dirname(tree)
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        if name != os.path.basename(tree):
            shutil.rmtree(os.path.join(folder, name))


def take_from_cache(spec: dict[str, Any], digests: list[str]) -> bool:
    """True where the cache had a build of the key whose digest the operator carries."""
    partial = fresh(f"{RELEASES}/.{spec['key']}.partial")
    if not build_cache.take(spec["build_cache"], spec["key"], digests, partial):
        return False
    version_of(partial)
    give_name(spec, partial)
    if spec["build_cache"] == pieces.BUILDS:  # an archive of the site's is there once
        build_cache.remove(pieces.BUILDS, spec["key"])
    return True


def fresh(path: str) -> str:
    shutil.rmtree(path, ignore_errors=True)
    os.makedirs(path, mode=0o755)
    return path


def compile_release(spec: dict[str, Any]) -> None:
    at = output_of(["git", "-C", spec["source"], "rev-parse", "HEAD"]).strip()
    if at != spec["commit"] or shutil.which("cmake") is None:
        raise Failed("this host has not what it takes to compile, because the build cache had the build when the run "
                     "began: run again, and it compiles")  # fmt: skip
    flags = [*spec["cmake_flags"], *flags_of_compiler()]
    configure = ["cmake", "-S", spec["source"], "-B", spec["tree"], "-G", generator_for(spec["tree"]), *flags]
    say(f"configuring llama.cpp {spec['commit'][:12]}")
    run(configure, "cmake cannot configure the build")
    jobs = parallel_jobs(spec)
    say(f"compiling with {jobs} jobs")
    run(["cmake", "--build", spec["tree"], "--target", "llama-server", "-j", str(jobs)],
        "llama.cpp does not compile")  # fmt: skip
    partial = fresh(f"{RELEASES}/.{spec['key']}.partial")
    os.mkdir(f"{partial}/bin")
    for name in sorted(os.listdir(f"{spec['tree']}/bin")):
        if name == "llama-server" or ".so" in name:
            shutil.copy2(f"{spec['tree']}/bin/{name}", f"{partial}/bin/{name}", follow_symlinks=False)
    describe(spec, partial)
    give_name(spec, partial)


def generator_for(tree: str) -> str:
    """What CMake writes its rules for: Ninja where the host has it, as on Fedora also under another name. A tree of
    another generator is compiled anew, because CMake refuses it."""
    generator = "Ninja" if shutil.which("ninja") or shutil.which("ninja-build") else "Unix Makefiles"
    try:
        with open(f"{tree}/CMakeCache.txt", errors="replace") as file:
            before = [line.strip().partition("=")[2] for line in file if line.startswith("CMAKE_GENERATOR:")]
    except OSError:
        before = []
    if before and before != [generator]:
        shutil.rmtree(tree)
    return generator


def flags_of_compiler() -> tuple[str, ...]:
    """CMake options for what this host's compiler compiles wrongly for this host's processor."""
    macros = output_of(["c++", "-march=native", "-dM", "-E", "-x", "c++", "/dev/null"])
    version = re.search(r"define __GNUC__ (\d+)", macros)
    if "define __AMX_INT8__ " not in macros or "define __clang__ " in macros or not version:
        return ()
    if int(version[1]) >= AMX_COMPILER_VERSION:
        return ()
    build_cache.notes.append(f"compiled without AMX, which g++ {version[1]} compiles wrongly: prompts are read more "
                             f"slowly than with g++ {AMX_COMPILER_VERSION}")  # fmt: skip
    return WITHOUT_AMX


def parallel_jobs(spec: dict[str, Any]) -> int:
    """As many compilers as were planned, or as fit into the memory that this job may use."""
    each: int | None = spec.get("bytes_for_job")
    return max(1, min(spec["jobs"], job_limits.free_bytes() // each)) if each else int(spec["jobs"])


def run(command: list[str], problem: str) -> None:
    """Run a command with its output in the log. Raises Failed with the lines that speak of an error."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines = [*lines[-2000:], line.rstrip()]
        say(line.rstrip())
    if process.wait():
        telling = [line for line in lines if "error" in line.lower() or "CMake Error" in line] or lines
        text = "\n".join(telling[:ERROR_LINES])
        raise Failed(f"{problem} (exit code {process.returncode}):\n{text}")


def version_of(folder: str) -> list[str]:
    """The version lines of a release's llama-server; raises Failed if it does not run here."""
    code, said = confined.version_of(f"{folder}/bin/llama-server")
    if code:
        raise Failed(f"the new llama-server does not run on this host: {said.strip()[:500]}")
    return said.strip().splitlines()[:2]


def describe(spec: dict[str, Any], partial: str) -> None:
    """Write release.json: of what the release was made, where, and what every file must hash to."""
    version = version_of(partial)
    files = {name: sha256_of(f"{partial}/bin/{name}") for name in sorted(os.listdir(f"{partial}/bin"))}
    sizes = {name: os.path.getsize(f"{partial}/bin/{name}") for name in files}
    record = {"schema": RELEASE_SCHEMA, **spec["record"], "key": spec["key"], "commit": spec["commit"],
              "version": version, "files": files, "sizes": sizes}  # fmt: skip
    write_json(f"{partial}/release.json", record)


def give_name(spec: dict[str, Any], partial: str) -> None:
    """Give the release its name, now that it is complete and on disk."""
    os.sync()
    os.makedirs(RELEASES, exist_ok=True)
    target = f"{RELEASES}/{spec['key']}"
    shutil.rmtree(target, ignore_errors=True)  # a release of that name that was half deleted
    os.rename(partial, target)
    say(f"release {spec['key']} is complete")


def digest_of(key: str) -> str:
    """The digest by which other hosts may take this host's release. Raises Failed where it is not whole."""
    record = record_of(f"{RELEASES}/{key}")
    if record is None:
        raise Failed(f"{RELEASES}/{key} is not a complete release")
    try:
        build_cache.check(record, f"{RELEASES}/{key}")
    except build_cache.Refused as error:
        raise Failed(f"{RELEASES}/{key} is damaged: {error}") from error
    return str(sha256_of(f"{RELEASES}/{key}/{build_cache.RECORD}"))


def packed(key: str) -> dict[str, Any]:
    """What the contract says of `pack`. Raises Failed and OSError."""
    digest = digest_of(key)
    archive = build_cache.archive_of(pieces.BUILDS, key, digest)
    if not os.path.exists(archive):
        os.makedirs(pieces.BUILDS, mode=0o755, exist_ok=True)
        build_cache.remove(pieces.BUILDS, key)
        build_cache.pack(key, archive)
    return {"digest": digest, "sha256": sha256_of(archive), "size_bytes": os.path.getsize(archive)}


def main(argv: list[str]) -> int:
    try:
        if argv[0] == "pack":
            print(json.dumps(packed(argv[1])))
            return 0
        if argv[0] == "digest":
            print(json.dumps({"digest": digest_of(argv[1])}))
            return 0
        with open(argv[0]) as file:
            spec = json.load(file)
        build(spec, argv[1:])
    except (Failed, OSError, tarfile.TarError) as error:
        say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
