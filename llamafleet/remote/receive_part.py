"""Receive a large file from the operator, part by part.

Contract: `receive_part.py begin PATH SIZE RESERVE [--fresh]` makes PATH ready for a file of SIZE bytes and prints
{"offset": the bytes of it that are there already, from an earlier run}; with `--fresh` none are. It fails where the
rest does not fit on the disk beside RESERVE bytes. `receive_part.py add PATH OFFSET` writes what comes by standard
input, in the form of receive.py, behind byte OFFSET, and prints {"offset": the next one}. The file is root's alone;
whoever knows its SHA-256 checks it when it is whole. What fails is the last line on stderr, beginning with `error: `.
Exit 0 done, 1 failed. Root, the standard library; common.py and receive.py lie beside it.

Decision 9: docs/decisions/0009-nothing-half-done-has-its-final-name.md.
"""

from __future__ import annotations

import json
import os
import sys
from typing import BinaryIO, List

import receive

FLAGS = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


def begin(path: str, size: int, reserve: int, fresh: bool) -> int:
    """The offset to go on from. Raises OSError and receive.Failed."""
    folder = os.path.dirname(path)
    os.makedirs(folder, mode=0o755, exist_ok=True)
    handle = os.open(path, FLAGS, 0o600)
    try:
        there = os.fstat(handle).st_size
        if fresh or there > size:
            os.ftruncate(handle, 0)
            there = 0
    finally:
        os.close(handle)
    disk = os.statvfs(folder)
    lacking = size - there + reserve - disk.f_bavail * disk.f_frsize
    if size > there and lacking > 0:
        raise receive.Failed(
            f"{folder}: No space left: {size - there} bytes are to come, beside {reserve} that stay free; {lacking} "
            "are missing: free that much or choose a smaller quantisation"
        )
    return there


def add(path: str, offset: int, stream: BinaryIO) -> int:
    """Write one part behind what is there; the end of it. Raises OSError and receive.Failed."""
    [(_, data)] = receive.contents(stream)
    handle = os.open(path, FLAGS & ~os.O_CREAT)
    try:
        if os.fstat(handle).st_size != offset:
            raise receive.Failed(f"{path} has {os.fstat(handle).st_size} bytes, not {offset}: another run writes to it")
        os.lseek(handle, offset, os.SEEK_SET)
        left = memoryview(data)
        while left:
            left = left[os.write(handle, left) :]
    except OSError:
        os.ftruncate(handle, offset)
        raise
    finally:
        os.close(handle)
    return offset + len(data)


def main(argv: List[str], stream: BinaryIO) -> int:
    verb, path, *rest = argv
    os.umask(0o022)
    try:
        if verb == "begin":
            offset = begin(path, int(rest[0]), int(rest[1]), "--fresh" in rest)
        else:
            offset = add(path, int(rest[0]), stream)
    except (receive.Failed, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: cannot write {error.filename or path}: {error.strerror or error}", file=sys.stderr)
        return 1
    print(json.dumps({"offset": offset}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], sys.stdin.buffer))
