"""The folder of one model: partial files, finished ones, their records, the lock.

Part of fetch.py and under its contract: Python 3.8, standard library, what lies beside it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pwd
import time
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Dict  # the contract is Python 3.8, whose own Dict is typing's

from common import is_as_verified, make_way, read_json, replace_link, set_aside, sync
from fetch_log import MIB, PROGRESS_S, Progress, gib, say
from fetch_spec import ARCHIVE, MISMATCH, NO_SPACE, NOT_GGUF, Failed, Spec, Wanted


def size_of(path: Path) -> int:
    """Bytes of the file, 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def make_folder(spec: Spec) -> None:
    """The model's folder, which may be a link to one on another disk. Raises Failed where that disk is not there."""
    directory = str(spec.directory)
    if os.path.islink(directory) and not os.path.isdir(directory):
        target = os.readlink(directory)
        if spec.store in (None, target):
            raise Failed(1, f"{directory} leads to {target}, which is not there: mount its disk, or remove the link to "
                         "have the model downloaded again")  # fmt: skip
        os.unlink(directory)
    if spec.store is not None and not os.path.isdir(directory):
        os.makedirs(spec.store, mode=0o755, exist_ok=True)
        os.makedirs(os.path.dirname(directory), mode=0o755, exist_ok=True)
        replace_link(directory, spec.store)
    os.makedirs(directory, mode=0o755, exist_ok=True)
    hand_over(spec, spec.directory, 0o755)


def take_lock(spec: Spec) -> IO[str]:
    """The folder's lock, held as long as the returned file is open; says who has it while it waits."""
    handle = open(spec.directory / ".fetch.lock", "a+", encoding="utf-8")  # noqa: SIM115 - open until we end
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.seek(0)
        say(f"waiting: another download (pid {handle.read().strip() or 'unknown'}) holds {handle.name}")
        fcntl.flock(handle, fcntl.LOCK_EX)
    handle.seek(0)
    handle.truncate()
    handle.write(f"{os.getpid()}\n")
    handle.flush()
    return handle


def is_known(spec: Spec, wanted: Wanted) -> bool:
    """Whether the sidecar vouches for the file as it is, and for what is wanted now."""
    noted = notes(spec, wanted)
    if not is_as_verified(str(spec.final(wanted)), noted, owner_of(spec)):
        return False
    size, digest = wanted.size_bytes or noted["size_bytes"], wanted.sha256 or noted.get("sha256")
    return bool(digest and size == noted["size_bytes"] and digest == noted.get("sha256"))


def notes(spec: Spec, wanted: Wanted) -> Dict[str, Any]:
    """What the sidecar says, empty where there is none."""
    return read_json(str(spec.sidecar(wanted)))


def adopt(spec: Spec, wanted: Wanted) -> bool:
    """Whether a file of that name, without a record that fits, is the one; another one is set aside.

    Where no sha256 is told, it must be the one that was recorded: what changed since is not taken for the model."""
    final = spec.final(wanted)
    make_way(str(final))
    if final.is_symlink():
        say(f"{final} is a link, not a file: it is replaced, and what it leads to stays")
        final.unlink()
    if not final.exists():
        return False
    noted = notes(spec, wanted).get("sha256")
    wanted = replace(wanted, sha256=wanted.sha256 or (noted if isinstance(noted, str) else None))
    say(f"verifying {gib(size_of(final))} ({wanted.name}), found without a matching record")
    try:
        digest = verify(final, wanted, str(final))
    except Failed as failure:
        aside = Path(set_aside(str(final)))
        kept = f"{aside} ({gib(size_of(aside))})"
        say(f"note: {failure}; set aside as {kept}, removed after 30 days: delete it to have the space now")
        return False
    hand_over(spec, final, 0o644)
    record(spec, wanted, digest)
    return True


def verify(path: Path, wanted: Wanted, source: str) -> str:
    """The file's sha256, after size, first bytes and checksum were found right. Raises Failed."""
    size = size_of(path)
    if wanted.size_bytes is not None and size != wanted.size_bytes:
        raise Failed(MISMATCH, f"{wanted.name} from {source}: expected {wanted.size_bytes} bytes, found {size}")
    digest, done, said_at = hashlib.sha256(), 0, time.monotonic()
    with open(path, "rb") as stream:
        for block in iter(lambda: stream.read(4 * MIB), b""):
            if done == 0 and block[:4] != b"GGUF" and not ARCHIVE.fullmatch(wanted.name):
                raise Failed(NOT_GGUF, f"{wanted.name} from {source} is not a GGUF file: it begins with {block[:24]!r}")
            digest.update(block)
            done += len(block)
            if time.monotonic() - said_at >= PROGRESS_S:
                said_at = time.monotonic()
                say(f"verifying {100 * done / size:.0f} % of {gib(size)} ({wanted.name})")
    if done == 0:
        raise Failed(NOT_GGUF, f"{wanted.name} from {source} is empty")
    found = digest.hexdigest()
    if wanted.sha256 is not None and found != wanted.sha256:
        raise Failed(MISMATCH, f"{wanted.name} from {source}: expected sha256 {wanted.sha256}, found {found}")
    return found


def put_in_place(spec: Spec, wanted: Wanted, digest: str) -> None:
    """The checked partial file gets its name, safe from a power cut before the record says so."""
    partial, final = spec.partial(wanted), spec.final(wanted)
    hand_over(spec, partial, 0o644)
    sync(partial)
    os.replace(partial, final)
    sync(spec.directory)
    record(spec, wanted, digest)


def record(spec: Spec, wanted: Wanted, digest: str) -> None:
    """The sidecar: what was checked, and the stat by which the next run knows the file again."""
    found = spec.final(wanted).stat()
    draft = spec.directory / f".{wanted.name}.verified.new"
    content = {"size_bytes": found.st_size, "sha256": digest, "mtime_ns": found.st_mtime_ns}
    make_way(str(spec.sidecar(wanted)))
    draft.write_text(json.dumps(content) + "\n", encoding="utf-8")
    hand_over(spec, draft, 0o644)
    sync(draft)
    os.replace(draft, spec.sidecar(wanted))


def hand_over(spec: Spec, path: Path, mode: int) -> None:
    os.chmod(path, mode)
    if spec.owner is not None:
        user = pwd.getpwnam(spec.owner)
        os.chown(path, user.pw_uid, user.pw_gid)
    else:
        with contextlib.suppress(PermissionError):  # a network mount may not let root own files
            os.chown(path, os.geteuid(), os.getegid())


def owner_of(spec: Spec) -> int:
    """The number of the user who is to own the files."""
    return os.geteuid() if spec.owner is None else pwd.getpwnam(spec.owner).pw_uid


def discard(spec: Spec, wanted: Wanted, progress: Progress) -> None:
    """The partial file is gone, and no longer counted."""
    progress.present -= size_of(spec.partial(wanted))
    if spec.partial(wanted).exists():
        spec.partial(wanted).unlink()


def check_space(spec: Spec, missing: list[Wanted]) -> None:
    """Raises Failed unless all that is missing of all files fits beside the reserve."""
    needed = sum(max((wanted.size_bytes or 0) - size_of(spec.partial(wanted)), 0) for wanted in missing)
    free = free_bytes(spec)
    lacking = needed + spec.reserve_bytes - free
    if needed and lacking > 0:
        raise Failed(
            NO_SPACE,
            f"{spec.directory}: {gib(needed)} are needed beside a reserve of {gib(spec.reserve_bytes)}, "
            f"{gib(free)} are free, {gib(lacking)} are missing ({lacking} bytes): "
            "free that much or choose a smaller quantisation",
        )


def free_bytes(spec: Spec) -> int:
    """What a user without privileges may still write on the folder's file system."""
    left = os.statvfs(spec.directory)
    return left.f_bavail * left.f_frsize
