"""Compile llama.cpp on this host into a release folder.

Contract: `build.py SPEC.json`, where SPEC has key, commit, source (a checkout of that commit), tree
(build folder), cmake_flags, jobs, build_cache (folder | null) and record (what release.json says).
Progress lines on stdout; the last one of a failure begins with `error: `. Exit 0: the release
/opt/llamafleet/releases/KEY is complete. Killed at any point it goes on where it was: Ninja keeps
what is compiled, and a release appears under its name only when it is whole. Standard library,
CMake, Ninja; common.py and releases.py lie beside it.

With a build cache the first host that needs a key compiles it, others that ask meanwhile wait for
that one (flock) and take its result, checked by sha256.

Decision 8: docs/decisions/0008-source-pinned-known-by-a-build-key.md.
Decision 9: docs/decisions/0009-nothing-half-done-has-its-final-name.md.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from typing import Any, Iterator  # the contract is Python 3.8, whose own Iterator is typing's

from common import RELEASE_SCHEMA, RELEASES, sha256_of, write_json
from releases import record_of

ERROR_LINES = 12


class Failed(Exception):
    """The build cannot go on; the text is for the operator."""


def say(text: str) -> None:
    print(text, flush=True)


def build(spec: dict[str, Any]) -> None:
    if record_of(f"{RELEASES}/{spec['key']}"):
        say(f"release {spec['key']} is already complete")
        return
    with turn(spec):
        if not take_from_cache(spec):
            compile_release(spec)
            publish(spec)
    forget_other_trees(spec["tree"])


def forget_other_trees(tree: str) -> None:
    """Keep this build folder, from which the next commit is compiled quickly, and no other."""
    folder = os.path.dirname(tree)
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        if name != os.path.basename(tree):
            shutil.rmtree(os.path.join(folder, name))


@contextlib.contextmanager
def turn(spec: dict[str, Any]) -> Iterator[None]:
    """Hold this key's lock in the shared build cache; wait while another host compiles it."""
    if not spec["build_cache"]:
        yield
        return
    os.makedirs(spec["build_cache"], exist_ok=True)
    with open(f"{spec['build_cache']}/{spec['key']}.lock", "a+") as lock:
        began = time.monotonic()
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                lock.seek(0)
                holder = lock.read().strip() or "another host"
                say(f"waiting for {holder}, which compiles the same build, {time.monotonic() - began:.0f} s")
                time.sleep(3)
        lock.seek(0)
        lock.truncate()
        lock.write(os.uname().nodename)
        lock.flush()
        yield


def take_from_cache(spec: dict[str, Any]) -> bool:
    """True where the cache had the release, whole."""
    archive = f"{spec['build_cache']}/{spec['key']}.tar" if spec["build_cache"] else None
    if not archive or not os.path.exists(archive) or not os.path.exists(archive + ".sha256"):
        return False
    with open(archive + ".sha256") as file:
        expected = file.read().split()[0]
    found = sha256_of(archive)
    if found != expected:
        # The run relies on the cache: this host may have neither the source nor a compiler.
        raise Failed(f"{archive} should have sha256 {expected}, has {found}: delete it and run again")
    say(f"taking release {spec['key']} from the build cache")
    partial = fresh(f"{RELEASES}/.{spec['key']}.partial")
    with tarfile.open(archive) as tar:
        # The filter exists from 3.8.17/3.11.4 on; the archive is one of our own, checked above.
        if hasattr(tarfile, "tar_filter"):
            tar.extractall(partial, filter="tar")
        else:
            tar.extractall(partial)
    version_of(partial)
    give_name(spec, partial)
    return True


def fresh(path: str) -> str:
    shutil.rmtree(path, ignore_errors=True)
    os.makedirs(path, mode=0o755)
    return path


def compile_release(spec: dict[str, Any]) -> None:
    configure = ["cmake", "-S", spec["source"], "-B", spec["tree"], "-G", "Ninja", *spec["cmake_flags"]]
    say(f"configuring llama.cpp {spec['commit'][:12]}")
    run(configure, "cmake cannot configure the build")
    say(f"compiling with {spec['jobs']} jobs")
    run(["cmake", "--build", spec["tree"], "--target", "llama-server", "-j", str(spec["jobs"])],
        "llama.cpp does not compile")  # fmt: skip
    partial = fresh(f"{RELEASES}/.{spec['key']}.partial")
    os.mkdir(f"{partial}/bin")
    for name in sorted(os.listdir(f"{spec['tree']}/bin")):
        if name == "llama-server" or ".so" in name:
            shutil.copy2(f"{spec['tree']}/bin/{name}", f"{partial}/bin/{name}", follow_symlinks=False)
    describe(spec, partial)
    give_name(spec, partial)


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
    server = f"{folder}/bin/llama-server"
    done = subprocess.run([server, "--version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise Failed(f"the new llama-server does not run on this host: {done.stdout.strip()[:500]}")
    return done.stdout.strip().splitlines()[:2]


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


def publish(spec: dict[str, Any]) -> None:
    if not spec["build_cache"]:
        return
    archive = f"{spec['build_cache']}/{spec['key']}.tar"
    with tarfile.open(archive + ".new", "w") as tar:
        tar.add(f"{RELEASES}/{spec['key']}", arcname=".")
    with open(archive + ".sha256", "w") as file:
        file.write(f"{sha256_of(archive + '.new')}\n")
    os.replace(archive + ".new", archive)
    say(f"kept as {archive}")


def main(argv: list[str]) -> int:
    with open(argv[0]) as file:
        spec = json.load(file)
    try:
        build(spec)
    except (Failed, OSError, tarfile.TarError) as error:
        say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
