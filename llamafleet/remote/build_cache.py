"""Finished builds in a folder that hosts share: taken only with a digest that the operator carries.

Part of build.py and under its contract. The cache has `KEY-DIGEST.tar` for each build, where DIGEST is the SHA-256 of
its release.json, which names every other file with its own; and `KEY.lock`. `KEY.tar` is the form of llamafleet 0.1.0,
with the same content. Whoever can write to the folder can put anything there: so a build is taken only if its digest is
one that build.py was given, whose origin is not the folder. All is read within bounds and written anew as root's files,
without links that lead out, special files or mode bits of the archive.

Decision 8: docs/decisions/0008-source-pinned-known-by-a-build-key.md.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import re
import stat
import tarfile
import tempfile
import time
from typing import IO, Any, Dict, Iterator, List, Optional  # the contract is Python 3.8, whose own are typing's

from common import RELEASES, listing, sha256, sha256_of

RECORD = "release.json"
# Of an archive: entries, bytes of release.json, bytes of one file. A CUDA build for all GPUs has 30 files, the largest
# of 1.5 GB.
MOST_ENTRIES, MOST_RECORD_BYTES, MOST_FILE_BYTES = 512, 1 << 20, 16 << 30
# The most that is read at once: a header of an archive may ask for more than there is memory.
MOST_READ = 8 << 20
# Builds of one key that are kept, newest first: hosts of other operators may have the digest of another one.
KEPT = 3
# Who waits longer for another host compiles beside it.
WAIT_SECONDS = 4 * 3600.0


class Refused(Exception):
    """An archive is not the build that it should be; the text says why."""


# What the operator should know although all went well.
notes: List[str] = []


def say(text: str) -> None:
    print(text, flush=True)


def note(text: str) -> None:
    say(text)
    notes.append(text)


def archive_of(cache: str, key: str, digest: str) -> str:
    return f"{cache}/{key}-{digest}.tar"


# --- one host at a time -------------------------------------------------------------------------


@contextlib.contextmanager
def turn(cache: Optional[str], key: str) -> Iterator[None]:
    """Hold the lock of this key in the cache; wait while another host compiles the same build."""
    lock = opened_lock(cache, key) if cache else None
    if lock is None:
        yield
        return
    with lock:
        if acquire(lock, key):
            lock.seek(0)
            lock.truncate()
            lock.write(os.uname().nodename)
            lock.flush()
        yield


def opened_lock(cache: str, key: str) -> Optional[IO[str]]:
    """The lock's file; None, with a note, where it cannot be used."""
    try:
        make(cache)
        # No link: who can write to the folder could have root truncate another file.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        handle = os.open(f"{cache}/{key}.lock", flags, 0o644)
    except OSError as error:
        note(f"build_cache: {error}; other hosts are not waited for")
        return None
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        os.close(handle)
        note(f"build_cache: {cache}/{key}.lock is no ordinary file: remove it; other hosts are not waited for")
        return None
    return os.fdopen(handle, "r+", errors="replace")


def acquire(lock: IO[str], key: str) -> bool:
    """Wait for the lock, WAIT_SECONDS at most; whether it is held then."""
    began = time.monotonic()
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            waited = time.monotonic() - began
            if waited > WAIT_SECONDS:
                note(f"the lock of build {key} was held for {waited / 3600:.0f} h; compiling beside its holder")
                return False
            lock.seek(0)
            holder = " ".join(lock.read(64).split()) or "another host"
            say(f"waiting for {holder}, which compiles the same build, {waited:.0f} s")
            time.sleep(3)


def make(cache: str) -> None:
    """Make the folder where it is missing, and say where others than root can write to it."""
    os.makedirs(cache, mode=0o755, exist_ok=True)
    found = os.stat(cache)
    if found.st_uid != 0 or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        note(f"build_cache: others than root can write to {cache} (owner {found.st_uid}, mode "
             f"{stat.S_IMODE(found.st_mode):04o}). Nothing of theirs is installed, but they can make hosts compile or "
             f"wait: chown root {cache}; chmod 755 {cache}")  # fmt: skip


# --- take ---------------------------------------------------------------------------------------


def take(cache: str, key: str, digests: List[str], partial: str) -> bool:
    """Unpack a build of this key with one of these digests into the empty folder `partial`; whether there was one.

    Says why none was taken. Raises OSError where the folder cannot be written.
    """
    names = listing(cache)
    wanted = [one for one in (*(f"{key}-{digest}.tar" for digest in digests), f"{key}.tar") if one in names]
    if not digests:
        wanted = []
    for name in wanted:
        try:
            unpack(f"{cache}/{name}", key, digests, partial)
        except (Refused, tarfile.TarError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
            note(f"{cache}/{name} is not used: {error}")
            empty(partial)
            set_aside(cache, key, name)
            continue
        say(f"taking release {key} from {cache}/{name}")
        return True
    others = [name for name in names if re.fullmatch(rf"{key}(-[0-9a-f]{{64}})?\.tar", name)]
    if others and not wanted:
        note(f"{cache} has {others[0]}, but this run does not know the digest of that build: another operator made it, "
             "or llamafleet 0.1.0. So it is compiled here")  # fmt: skip
    return False


def set_aside(cache: str, key: str, name: str) -> None:
    """Rename an archive that is not what its name says, so that no later run relies on it."""
    if name != f"{key}.tar":
        with contextlib.suppress(OSError):
            os.replace(f"{cache}/{name}", f"{cache}/{key}.rejected")


def empty(folder: str) -> None:
    for root, folders, files in os.walk(folder, topdown=False):
        for name in files:
            os.unlink(f"{root}/{name}")
        for name in folders:
            path = f"{root}/{name}"
            os.unlink(path) if os.path.islink(path) else os.rmdir(path)


class Bounded(io.RawIOBase):
    """A file of which no more than MOST_READ bytes are read at once. Raises Refused beyond."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MOST_READ:
            raise Refused(f"a header in it has {size} bytes")
        return self.file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True


def unpack(archive: str, key: str, digests: List[str], partial: str) -> None:
    """Write the archive's release into `partial`. Raises Refused where it is not a build of `digests`."""
    # A pipe of that name must not stop us, nor a link lead elsewhere.
    try:
        handle = os.open(archive, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise Refused(str(error)) from error
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise Refused("it is no ordinary file")
        with tarfile.open(fileobj=Bounded(file), mode="r:") as tar:
            members = entries(tar)
            text = content(tar, members.get(RECORD))
            digest = sha256(text)
            if digest not in digests:
                raise Refused(f"its release.json has sha256 {digest}, which this run does not know")
            record = json.loads(text)
            if record["key"] != key:
                raise Refused(f"it is build {record['key']}")
            os.mkdir(f"{partial}/bin", 0o755)
            for name in record["files"]:
                write(tar, members.get(f"bin/{name}"), name, record, partial)
    check(record, partial)
    with open(f"{partial}/{RECORD}", "wb") as target:
        target.write(text)
    os.chmod(f"{partial}/{RECORD}", 0o644)


def entries(tar: tarfile.TarFile) -> Dict[str, tarfile.TarInfo]:
    """The members by their path in the release; of several with one name the first."""
    found: Dict[str, tarfile.TarInfo] = {}
    for count, member in enumerate(tar):
        if count >= MOST_ENTRIES:
            raise Refused(f"it has more than {MOST_ENTRIES} entries")
        found.setdefault(member.name[2:] if member.name.startswith("./") else member.name, member)
    return found


def content(tar: tarfile.TarFile, member: Optional[tarfile.TarInfo]) -> bytes:
    """The bytes of release.json."""
    file = tar.extractfile(member) if member is not None and member.isreg() else None
    if member is None or file is None or not 0 <= member.size <= MOST_RECORD_BYTES:
        raise Refused(f"it has no {RECORD} of at most {MOST_RECORD_BYTES} bytes")
    return file.read(member.size)


def write(
    tar: tarfile.TarFile, member: Optional[tarfile.TarInfo], name: str, record: Dict[str, Any], partial: str
) -> None:
    """One file of bin/, with the mode of a program, or a link to its neighbour."""
    if name in (".", "..") or "/" in name or "\0" in name:
        raise Refused(f"its record names {name!r}")
    if member is not None and member.issym():
        if member.linkname not in record["files"] or member.linkname == name:
            raise Refused(f"bin/{name} is a link to {member.linkname!r}, which is none of its files")
        os.symlink(member.linkname, f"{partial}/bin/{name}")
        return
    source = tar.extractfile(member) if member is not None and member.isreg() else None
    if member is None or source is None:
        raise Refused(f"bin/{name} is missing or no ordinary file")
    size = record.get("sizes", {}).get(name, member.size)
    if member.size != size or not 0 <= size <= MOST_FILE_BYTES:
        raise Refused(f"bin/{name} has {member.size} bytes, should have {size}")
    with open(f"{partial}/bin/{name}", "xb") as target:
        while size > 0:
            block = source.read(min(size, 1 << 20))
            if not block:
                raise Refused(f"bin/{name} ends early")
            target.write(block)
            size -= len(block)
    os.chmod(f"{partial}/bin/{name}", 0o755)  # noqa: S103 -- a program that the services' user runs


def check(record: Dict[str, Any], folder: str) -> None:
    """Compare every file with the record. Raises Refused at the first that differs."""
    for name, expected in record["files"].items():
        found = sha256_of(f"{folder}/bin/{name}")
        if found != expected:
            raise Refused(f"bin/{name} has sha256 {found}, should have {expected}")


# --- keep ---------------------------------------------------------------------------------------


def publish(cache: str, key: str) -> None:
    """Put this host's release of the key into the cache, and remove what is older than the KEPT newest of that key.

    A cache that cannot be written is no reason to fail: the release is there.
    """
    try:
        _publish(cache, key)
    except OSError as error:
        note(f"build_cache: the build cannot be kept: {error}")


def _publish(cache: str, key: str) -> None:
    archive = archive_of(cache, key, str(sha256_of(f"{RELEASES}/{key}/{RECORD}")))
    pack(key, archive)
    say(f"kept as {archive}")
    forget_older(cache, key, archive)


def pack(key: str, archive: str) -> None:
    """Write this host's release of the key as an archive; equal releases give equal bytes. Raises OSError."""
    release = f"{RELEASES}/{key}"
    handle, draft = tempfile.mkstemp(  # of a name that nobody has taken
        prefix=f".{key}.", suffix=".new", dir=os.path.dirname(archive)
    )
    try:
        with os.fdopen(handle, "wb") as file:
            with tarfile.open(fileobj=file, mode="w") as tar:
                tar.add(f"{release}/{RECORD}", arcname=RECORD, filter=as_root)
                for name in sorted(os.listdir(f"{release}/bin")):
                    tar.add(f"{release}/bin/{name}", arcname=f"bin/{name}", filter=as_root)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(draft, 0o644)
        os.replace(draft, archive)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise


def as_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    member.mtime = 0
    return member


def remove(folder: str, key: str) -> None:
    """Remove all archives of the key, and what belongs to them."""
    for name in listing(folder):
        if name.lstrip(".").startswith(key):
            with contextlib.suppress(OSError):
                os.unlink(f"{folder}/{name}")


def forget_older(cache: str, key: str, new: str) -> None:
    """Remove builds of the key beyond the KEPT newest, its archive of the earlier form, and drafts of killed jobs."""
    archives = [f"{cache}/{name}" for name in listing(cache)
                if name.startswith(f"{key}-") and name.endswith(".tar")]  # fmt: skip
    archives.sort(key=lambda path: (path != new, -os.lstat(path).st_mtime))
    drafts = [f"{cache}/{name}" for name in os.listdir(cache) if name.startswith(f".{key}.") and name.endswith(".new")]
    earlier = [f"{cache}/{key}.tar", f"{cache}/{key}.tar.sha256"]  # llamafleet 0.1.0's
    for path in [*archives[KEPT:], *drafts, *earlier]:
        with contextlib.suppress(OSError):
            os.unlink(path)
