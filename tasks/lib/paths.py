"""Paths as sources, of models and of llama.cpp: what the operator's machine has is sent, what the host has is used.

A path means the host's file where the host has one that is as large as the operator's, or the operator has none. Where
this machine is the host, there is nothing to send.
"""

from __future__ import annotations

import base64
import hashlib
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pyinfra.api.host import Host
from pyinfra.api.state import State

from llamafleet import causes
from llamafleet.hub.source import ModelFiles, RemoteFile
from llamafleet.model import gguf
from llamafleet.remote import git_pack
from llamafleet.remote.common import replace_file
from llamafleet.settings.schema import Instance
from llamafleet.sources import SourceError
from tasks.lib import builds, host_lock, lookups, remote, sending

PART_BYTES = 8 * 2**20
PART_SECONDS = 600.0  # at 14 kB/s
TELL_SECONDS = 10.0
# Of a host's file: size in bytes and time of its last change; nothing for what is no file.
_STAT = 'for path; do [ -f "$path" ] && stat -L -c "%s %Y %n" -- "$path"; done; true'
_READ = 'tail -c "+$2" -- "$1" | head -c "$3" | base64 -w 0'
# Jobs have folders of their own in place of these.
PRIVATE = ("/tmp/", "/var/tmp/")  # noqa: S108 -- named, not used
MOST_SUMS = 1000


@dataclass(frozen=True)
class Sending:
    """A file of this machine, and where it goes on the host; with `fresh` nothing there is gone on from."""

    local: str
    path: str
    size_bytes: int
    fresh: bool = False


def is_local(host: Host) -> bool:
    """Whether this machine is the host."""
    return type(host.connector).__name__ == "LocalConnector"


def model(host: Host, instance: Instance) -> ModelFiles:
    """Files and header of an instance whose source is a path. Raises `SourceError`, `GgufError` and `RemoteError`."""
    place = f"models: {instance.name}: source"
    try:
        names = gguf.shard_names(instance.source)
    except gguf.GgufError as error:
        raise SourceError(f"{place}: {error}") from error
    if names[0] != instance.source:
        raise SourceError(f"{place}: {instance.source} should name the first shard, {Path(names[0]).name}")
    here = [] if is_local(host) else [Path(name) for name in names if Path(name).is_file()]
    there = _stat(host, names)
    sizes = {str(path): path.stat().st_size for path in here}
    if names[0].startswith(PRIVATE) and here:  # what may be there, no job sees
        there = {}
    if there and names[0].startswith(PRIVATE):
        raise SourceError(f"{place}: {names[0]}: the host's jobs have a /tmp of their own: put the file elsewhere")
    if len(there) == len(names) and (not here or sizes == {name: size for name, (size, _) in there.items()}):
        files = [_of_host(name, *there[name]) for name in names]
        header = lookups.once(
            ("header", host.name, *files), lambda: gguf.read_header([_HostFile(host, file) for file in files])
        )
        return ModelFiles(_with_sums(files, instance), header)
    if len(here) == len(names):
        return lookups.once(("path", names, instance.sha256, *sizes.values()), lambda: _sent(here, instance))
    missing = next(name for name in names if name not in (sizes or there))
    who = "there is no such file on this host" if is_local(host) else "neither your machine nor the host has this file"
    raise SourceError(f"{place}: {missing}: {who}")


def _path(file: RemoteFile) -> str:
    return unquote(urlsplit(file.url).path)


def _of_host(name: str, size: int, changed: int) -> RemoteFile:
    return RemoteFile(Path(name).name, Path(name).as_uri(), size, commit=str(changed), place="host")


def _sent(paths: list[Path], instance: Instance) -> ModelFiles:
    """Of the operator's files; their sums are calculated once."""
    files = [RemoteFile(path.name, path.as_uri(), path.stat().st_size, place="operator") for path in paths]
    named = _with_sums(files, instance)
    summed = tuple(
        file if file.sha256 else replace(file, sha256=sum_of(path)) for file, path in zip(named, paths, strict=True)
    )
    return ModelFiles(summed, gguf.read_header([gguf.FileSource(path) for path in paths]))


def _with_sums(files: list[RemoteFile], instance: Instance) -> tuple[RemoteFile, ...]:
    sums = instance.sha256 or ()
    if len(sums) not in (0, 1, len(files)):
        raise SourceError(
            f"models: {instance.name}: sha256: {len(sums)} are given, the model has {len(files)} files: give one for "
            "each"
        )
    return tuple(replace(file, sha256=sums[n] if n < len(sums) else None) for n, file in enumerate(files))


def sum_of(path: Path, record: Path | None = None) -> str:
    """The file's SHA-256, from the record of earlier runs where it was not changed since."""
    record = record or builds.record_path().with_name("known-sums.json")
    found = path.stat()
    key = f"{path} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
    known = _recorded(record)
    if key not in known:
        with path.open("rb") as file:
            known[key] = hashlib.file_digest(file, "sha256").hexdigest()
        record.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(str(record), json.dumps(dict(list(known.items())[-MOST_SUMS:]), indent=1).encode(), 0o600)
    return known[key]


def _recorded(record: Path) -> dict[str, str]:
    try:
        data = json.loads(record.read_text())
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in data.items() if isinstance(value, str)} if isinstance(data, dict) else {}


def _stat(host: Host, names: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Size and time of the host's files of these names. Raises `RemoteError`."""
    words = ["sh", "-c", _STAT, "sh", *names]
    ok, out, err = remote.run(host, remote.HostCommand(words, purpose="stat"))
    if not ok:
        raise remote.RemoteError(remote.explain(out, err))
    found = {}
    for line in out:
        size, changed, name = (*line.split(" ", 2), "", "")[:3]
        if name in names and size.isdigit() and changed.lstrip("-").isdigit():
            found[name] = (int(size), int(changed))
    return found


@dataclass
class _HostFile:
    """A file of the host as a `gguf.ByteSource`."""

    host: Host
    file: RemoteFile

    @property
    def name(self) -> str:
        return f"{self.file.name} on the host"

    @property
    def size(self) -> int | None:
        return self.file.size_bytes

    def read(self, offset: int, length: int) -> bytes:
        """Bytes from `offset`. Raises `RemoteError`."""
        path = _path(self.file)
        words = ["sh", "-c", _READ, "sh", path, str(offset + 1), str(length)]
        ok, out, err = remote.run(self.host, remote.HostCommand(words, purpose=f"reading {self.file.name}"))
        try:
            data = base64.b64decode("".join(out), validate=True)
        except ValueError as error:
            raise remote.RemoteError(f"{self.file.name}: {remote.explain(out[-1:], err)}") from error
        if not ok or (not data and err):
            raise remote.RemoteError(f"{self.file.name}: {remote.explain([], err)}")
        return data


# --- sending -------------------------------------------------------------------------------------


def sent_files(model: ModelFiles, folder: str) -> Iterator[Sending]:
    """The files of a model that go from this machine to a folder on the host, each under its partial name there."""
    for file in model.files:
        if file.place == "operator" and file.size_bytes is not None:
            yield Sending(_path(file), f"{folder}/.{file.name}.partial", file.size_bytes)


def send(state: State, host: Host, files: tuple[Sending, ...], reserve_bytes: int) -> bool:
    """Send files part by part, from where an earlier run was cut. Raises `RemoteError` and OSError."""
    for one in files:
        fresh = ["--fresh"] if one.fresh else []
        begin = remote.program("receive_part.py", "begin", one.path, str(one.size_bytes), str(reserve_bytes), *fresh)
        offset = remote.run_json(host, begin, _offset)
        told = time.monotonic()
        with open(one.local, "rb") as file:
            file.seek(offset)
            while part := file.read(PART_BYTES):
                host_lock.check(host)
                add = remote.program(
                    "receive_part.py", "add", one.path, str(offset),
                    seconds=PART_SECONDS, stdin=sending.packed([(0o600, part)]),
                )  # fmt: skip
                offset = remote.run_json(host, add, _offset)
                if time.monotonic() - told >= TELL_SECONDS:
                    told = time.monotonic()
                    share = 100 * offset // max(1, one.size_bytes)
                    host.log(f"sending {Path(one.local).name}: {share} % of {one.size_bytes / 2**30:.1f} GiB")
    return True


def _offset(line: str) -> int:
    try:
        return int(json.loads(line)["offset"])
    except (ValueError, KeyError, TypeError) as error:
        raise remote.RemoteError(f"receive_part.py on the host: answer: should have an offset: {line[:80]}") from error


# --- llama.cpp -----------------------------------------------------------------------------------


def is_ours(host: Host, repository: str) -> bool:
    """Whether a repository is a path of this machine whose commit is sent."""
    return repository.startswith("/") and not is_local(host) and Path(repository).is_dir()


def commit(host: Host, repository: str, ref: str) -> str:
    """The commit that a ref names in a repository that is a path. Raises `LookupFailed` and `RemoteError`."""
    if is_ours(host, repository):
        return lookups.once(("commit", repository, ref), lambda: _our_commit(repository, ref))
    words = [*git_pack.git(repository, "rev-parse", "--quiet", "--verify", "--end-of-options", ref + "^{commit}")]
    ok, out, err = remote.run(host, remote.HostCommand(words, purpose="git rev-parse"))
    if ok and out:
        return out[-1].strip()
    said = remote.explain(out, err) if out or err else f"it has no tag, branch or commit {ref!r}"
    where = "on the host" if is_local(host) else "neither on your machine nor usable on the host"
    raise lookups.LookupFailed(
        f"llama_cpp_repository: {repository} is {where}: {said}; name a git repository, or give llama_cpp_ref as a "
        "commit of 40 digits where the host has no git yet"
    )


def _our_commit(repository: str, ref: str) -> str:
    try:
        return git_pack.commit_of(repository, ref)
    except (git_pack.Failed, OSError) as error:
        said = causes.of_local(str(error))
        raise lookups.LookupFailed(f"llama_cpp_repository: {repository}: {said}") from error


def send_commit(state: State, host: Host, repository: str, commit: str, path: str) -> bool:
    """Send one commit of a repository of this machine as a pack file. Raises `RemoteError`."""
    try:
        with git_pack.of_commit(repository, commit) as pack, tempfile.NamedTemporaryFile() as file:
            file.write(pack.read())
            file.flush()
            return send(state, host, (Sending(file.name, path, file.tell(), fresh=True),), 2**28)
    except (git_pack.Failed, OSError) as error:
        raise remote.RemoteError(f"llama_cpp_repository: {repository}: {causes.of_local(str(error))}") from error
