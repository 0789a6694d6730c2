"""A model's file that is on this host already.

Part of fetch.py and under its contract: Python 3.8, standard library, what lies beside it.

The file stays where it is and as it is. Where it is of the user who runs this, with the mode that we give, on the same
file system, the model's folder gets another name of it (a hard link), which takes no space; where the file system can
share blocks, a copy that shares them; else a copy.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path
from urllib.parse import unquote, urlsplit

from common import MODEL_MODE
from fetch_curl import FULL, check_reserve, check_time
from fetch_folder import free_bytes, size_of
from fetch_log import MIB, Progress, gib, say
from fetch_spec import MISMATCH, NO_SPACE, NOT_FOUND, Failed, Spec, Wanted

FICLONE = 0x40049409  # linux/fs.h: share the blocks of another file
BLOCK_BYTES = 8 * MIB


def is_local(url: str) -> bool:
    return url.startswith("file:///")


def path_of(url: str) -> Path:
    return Path(unquote(urlsplit(url).path))


def can_link(spec: Spec, path: Path) -> bool:
    """Whether the model's folder can have another name of this file, which then needs no space."""
    try:
        found, folder = path.stat(), os.stat(spec.directory)
    except OSError:
        return False
    ours = (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (os.geteuid(), os.getegid(), MODEL_MODE)
    return ours and spec.owner is None and found.st_dev == folder.st_dev and not path.is_symlink()


def linked(spec: Spec, path: Path, partial: Path) -> bool:
    """Whether the file got another name. Between two mounts of one file system it gets none."""
    if not can_link(spec, path):
        return False
    try:
        os.link(path, partial)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            return False
        raise
    say(f"{path} is used where it lies")
    return True


def needs_no_space(spec: Spec, wanted: Wanted) -> bool:
    return bool(wanted.urls) and is_local(wanted.urls[0]) and can_link(spec, path_of(wanted.urls[0]))


def take(spec: Spec, wanted: Wanted, url: str, progress: Progress) -> None:
    """The file at its partial name. Raises Failed."""
    path, partial = path_of(url), spec.partial(wanted)
    try:
        size = path.stat().st_size
        if wanted.size_bytes is not None and size != wanted.size_bytes:
            raise Failed(
                MISMATCH, f"{path} has {size} bytes, expected were {wanted.size_bytes}: it was changed meanwhile"
            )
        if partial.exists():
            partial.unlink()
        if not linked(spec, path, partial) and not shares(path, partial):
            copy(path, partial, spec, wanted, url, progress)
    except OSError as error:
        if error.errno in FULL:
            left = f"{spec.directory} has {gib(free_bytes(spec))} free"
            raise Failed(NO_SPACE, f"{partial}: {error.strerror}; {left}") from None
        raise Failed(NOT_FOUND, f"{error.filename or path}: {error.strerror}") from None


def shares(path: Path, partial: Path) -> bool:
    """Whether the file system made a copy that shares the file's blocks."""
    with open(path, "rb") as source, open(partial, "wb") as sink:
        try:
            fcntl.ioctl(sink.fileno(), FICLONE, source.fileno())
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.EPERM, errno.ENOSYS):
                return False
            raise
    return True


def copy(path: Path, partial: Path, spec: Spec, wanted: Wanted, url: str, progress: Progress) -> None:
    say(f"copying {gib(size_of(path))} from {path}")
    with open(path, "rb") as source, open(partial, "wb") as sink:
        for block in iter(lambda: source.read(BLOCK_BYTES), b""):
            check_time(spec, url, progress)
            check_reserve(spec, wanted, len(block))
            sink.write(block)
            progress.add(len(block), wanted.name)
