"""The data of the Hub stand-in: files, faults, recorded requests, refusals."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Entry:
    """One file of one revision of a repository."""

    repo: str
    path: str
    file: Path
    gated: bool
    revision: str

    @property
    def key(self) -> str:
        return f"{self.repo}/{self.path}"

    @property
    def commit(self) -> str:
        return commit_of(self.repo, self.revision)

    @property
    def size(self) -> int:
        return self.file.stat().st_size

    @cached_property
    def sha256(self) -> str:
        """The file's sum; of a large sparse file (a weightless model, never downloaded) a sum of length and name."""
        stat = self.file.stat()
        if stat.st_size > HOLE_BYTES and 512 * stat.st_blocks < stat.st_size // 2:
            return hashlib.sha256(f"{stat.st_size} {self.path}".encode()).hexdigest()
        with self.file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()


HOLE_BYTES = 1 << 30  # takes a second or two to hash


@dataclass
class Fault:
    """A fault of one path. Offsets count from the file's first byte, also in a range request."""

    on: str  # "hub" or "cdn"; /plain counts as cdn
    times: int | None  # how many times; None: always
    status: int = 0  # answer this instead of the file
    retry_after: str = ""  # header beside `status`
    cut_at: int | None = None  # reset the connection before this byte
    close_at: int | None = None  # close it normally before this byte: Content-Length was too large
    ends_at: int | None = None  # serve a file of this length, with a matching Content-Length
    corrupt_at: int | None = None  # invert this byte
    bytes_per_second: int | None = None


@dataclass
class Request:
    """One request as it was served. `bytes_sent` counts the body; it is final after `Hub.settled()` has returned."""

    server: str
    method: str
    path: str
    range: str
    had_authorization: bool
    status: int = 0
    bytes_sent: int = 0


@dataclass(frozen=True)
class Problem(Exception):
    """A refusal in the Hub's words."""

    status: int
    code: str
    message: str
    headers: tuple[tuple[str, str], ...] = ()


class Files(Protocol):
    """The methods of `Hub` that the servers use."""

    address: str
    token: str
    stopping: threading.Event

    def begin(self, request: Request) -> None: ...
    def end(self) -> None: ...
    def take_fault(self, key: str, on: str, wanted: Callable[[Fault], bool]) -> Fault | None: ...
    def find(self, repo: str, revision: str, path: str, token: str | None) -> Entry: ...
    def files(self, repo: str, revision: str, token: str | None) -> list[Entry]: ...
    def sign(self, entry: Entry) -> str: ...
    def signed(self, path: str, query: dict[str, list[str]]) -> Entry: ...


def byte_range(header: str, size: int) -> tuple[int, int] | None:
    """`[start, stop)` of a Range header; empty if it cannot be satisfied, None if the header is to be ignored.

    RFC 9110 section 14: a malformed header, or one with several ranges, may be answered with the whole file.
    """
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header.strip())
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:
        return max(0, size - int(match[2])), size
    start, last = int(match[1]), int(match[2]) if match[2] else size - 1
    if match[2] and last < start:
        return None
    return start, min(size, last + 1)


def commit_of(repo: str, revision: str) -> str:
    """The commit of a revision, 40 hex digits; it is the same in every run."""
    return hashlib.sha1(f"{repo}@{revision}".encode(), usedforsecurity=False).hexdigest()


def touches(fault: Fault, span: tuple[int, int]) -> bool:
    """Does the fault affect a response with these bytes? A range without the fault's offset is served normally."""
    offsets = [n for n in (fault.cut_at, fault.close_at, fault.corrupt_at) if n is not None]
    return not offsets or any(span[0] <= n < span[1] for n in offsets)


def blob_id(entry: Entry) -> str:
    """The git object id of the LFS pointer file, which is in the Hub's repository."""
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{entry.sha256}\nsize {entry.size}\n".encode()
    return hashlib.sha1(f"blob {len(pointer)}\0".encode() + pointer, usedforsecurity=False).hexdigest()
