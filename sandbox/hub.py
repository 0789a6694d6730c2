"""A stand-in for the Hugging Face Hub's file service, with faults that a test switches on while it runs.

Two servers on loopback: the hub answers `/OWNER/REPO/resolve/REVISION/PATH` with a 302 to a signed, expiring address
on the CDN, which is another origin (another port), so that a forwarded token is seen: the CDN records it and answers
400, as object stores do. Headers and error codes are those that huggingface_hub reads (its `file_download.py` and
`utils/_http.py`). `/plain/OWNER/REPO/PATH` gives the same file without redirect, as an ordinary web server would.

    with Hub() as hub:
        hub.add("acme/tiny-GGUF", "tiny.gguf", path_on_disk)
        hub.fault("acme/tiny-GGUF/tiny.gguf", cut_at=1000)   # the next transfer dies at byte 1000
        ...
        assert [r.range for r in hub.settled() if r.server == "cdn"] == ["", "bytes=1000-"]
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import json
import re
import secrets
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import BinaryIO
from urllib.parse import parse_qs, quote, unquote, urlsplit

CHUNK_BYTES = 1 << 20
IDLE_SECONDS = 60  # a kept-alive connection is closed after this long
RESOLVE = re.compile(r"^/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)$")
API = re.compile(r"^/api/models/(?P<repo>[^/]+/[^/]+)(?:/(?P<kind>tree|revision)/(?P<revision>[^/]+)(?:/.*)?)?$")
PLAIN = re.compile(r"^/plain/(?P<repo>[^/]+/[^/]+)/(?P<path>.+)$")


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
        with self.file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass
class Fault:
    """What goes wrong with one path. Offsets count from the file's first byte, also in a ranged request."""

    on: str  # "hub" or "cdn"; /plain counts as cdn
    times: int | None  # how often; None: always
    status: int = 0  # answer this instead of the file
    retry_after: str = ""  # header beside `status`
    cut_at: int | None = None  # reset the connection before this byte
    close_at: int | None = None  # close it in order before this byte: Content-Length lied
    ends_at: int | None = None  # the file is this long, and Content-Length says so
    corrupt_at: int | None = None  # this byte comes out inverted
    bytes_per_second: int | None = None


@dataclass
class Request:
    """One request as it was served; `bytes_sent` counts the body and is final once `Hub.settled()` returned it."""

    server: str
    method: str
    path: str
    range: str
    had_authorization: bool
    status: int = 0
    bytes_sent: int = 0


@dataclass(frozen=True)
class Problem(Exception):
    """An answer that is not a file, as the Hub words it."""

    status: int
    code: str
    message: str
    headers: tuple[tuple[str, str], ...] = ()


@dataclass
class Hub:
    """The two servers. `root`, if given, holds OWNER/REPO/PATH and is served at revision `main`.

    `token` opens gated and private repositories; `outsider_token` is a valid token without access to them; every
    other token is refused, as an expired one is.
    """

    root: Path | None = None
    address: str = "127.0.0.1"
    port: int = 0
    token: str = "hf_sandbox"  # noqa: S105 - a made-up value of a stand-in
    outsider_token: str = "hf_outsider"  # noqa: S105 - as above
    link_seconds: float = 3600  # how long a CDN address is valid
    requests: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._entries: dict[tuple[str, str, str], Entry] = {}
        self._private: set[str] = set()
        self._faults: list[tuple[str, Fault]] = []
        self._secret = secrets.token_bytes(16)
        self._idle = threading.Condition()
        self._in_flight = 0
        self.stopping = threading.Event()
        self._servers = [_server(self, "hub", self.port), _server(self, "cdn", 0)]
        self.url, self.cdn_url = (f"http://{self.address}:{s.server_address[1]}" for s in self._servers)
        for file in sorted(self.root.rglob("*")) if self.root else []:
            parts = file.relative_to(self.root or file).parts
            if file.is_file() and len(parts) > 2:  # noqa: PLR2004 - OWNER/REPO/PATH
                self.add("/".join(parts[:2]), "/".join(parts[2:]), file)

    def __enter__(self) -> Hub:
        self._threads = [threading.Thread(target=s.serve_forever, args=(0.05,), daemon=True) for s in self._servers]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopping.set()
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()

    def add(self, repo: str, path: str, file: Path, *, gated: bool = False, revision: str = "main",
            private: bool = False) -> Entry:  # fmt: skip
        """Publish one file; a revision exists once it has a file, under its name and under its commit."""
        entry = Entry(repo, path, file, gated, revision)
        self._entries[repo, revision, path] = self._entries[repo, entry.commit, path] = entry
        if private:
            self._private.add(repo)
        return entry

    def fault(self, path: str, *, on: str = "cdn", times: int | None = 1, **what: int | str) -> None:
        """Make `path` ("OWNER/REPO/FILE", "api/models/OWNER/REPO" or "*") fail: see `Fault` for the names in `what`."""
        self._faults.append((path, Fault(on, times, **what)))  # type: ignore[arg-type]  # names are Fault's, checked there

    def heal(self) -> None:
        """Forget every fault."""
        self._faults.clear()

    def settled(self, timeout_seconds: float = 10) -> list[Request]:
        """All requests, once none is being served any more. Raises TimeoutError."""
        with self._idle:
            if not self._idle.wait_for(lambda: self._in_flight == 0, timeout_seconds):
                raise TimeoutError(f"{self._in_flight} requests still being served after {timeout_seconds} s")
            return list(self.requests)

    # What the handlers ask.

    def begin(self, request: Request) -> None:
        with self._idle:
            self.requests.append(request)
            self._in_flight += 1

    def end(self) -> None:
        with self._idle:
            self._in_flight -= 1
            self._idle.notify_all()

    def take_fault(self, key: str, on: str, wanted: Callable[[Fault], bool]) -> Fault | None:
        """The first fault for this path that applies now; counts it as used."""
        with self._idle:
            for path, fault in self._faults:
                if path in (key, "*") and fault.on == on and fault.times != 0 and wanted(fault):
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault
        return None

    def find(self, repo: str, revision: str, path: str, token: str | None) -> Entry:
        """The file, or the Hub's own refusal (Problem), in the order in which the Hub checks."""
        self.files(repo, revision, token)
        entry = self._entries.get((repo, revision, path))
        if entry is None:
            raise Problem(404, "EntryNotFound", "Entry not found")
        if entry.gated and token != self.token:
            status = 401 if token is None else 403
            raise Problem(status, "GatedRepo", f"Access to model {repo} is restricted. "
                          "You must have access to it and be authenticated to access it. Please log in.")  # fmt: skip
        return entry

    def files(self, repo: str, revision: str, token: str | None) -> list[Entry]:
        """All files of a revision; gated ones too, since the Hub lists them to everyone. Raises Problem."""
        if token not in (None, self.token, self.outsider_token):
            raise Problem(401, "", "Invalid credentials in Authorization header")
        known = {r for r, _, _ in self._entries}
        if repo not in known or (repo in self._private and token != self.token):
            raise Problem(401 if token is None else 404, "RepoNotFound", "Repository not found")
        entries = [e for (r, v, _), e in sorted(self._entries.items()) if r == repo and v == revision]
        if not entries:
            raise Problem(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return entries

    def sign(self, entry: Entry) -> str:
        """A CDN address for this file that is valid for `link_seconds`."""
        expires = f"{time.time() + self.link_seconds:.3f}"
        path = f"/{entry.repo}/{entry.commit}/{entry.path}"
        return f"{self.cdn_url}{quote(path)}?Expires={expires}&Signature={self._signature(path, expires)}"

    def signed(self, path: str, query: dict[str, list[str]]) -> Entry:
        """The file that a CDN address names. Raises Problem 403 if it was not signed here, or no longer is valid."""
        expires, signature = query.get("Expires", ["0"])[0], query.get("Signature", [""])[0]
        if not hmac.compare_digest(signature, self._signature(path, expires)):
            raise Problem(403, "", "<Error><Code>SignatureDoesNotMatch</Code></Error>")
        if time.time() > float(expires):
            raise Problem(403, "", "<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>")
        owner, name, commit, rest = path.lstrip("/").split("/", 3)
        return self._entries[f"{owner}/{name}", commit, rest]

    def _signature(self, path: str, expires: str) -> str:
        return hmac.new(self._secret, f"{path}\n{expires}".encode(), "sha256").hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    role: str
    protocol_version = "HTTP/1.1"
    server_version = "sandbox-hub"
    timeout = IDLE_SECONDS
    disable_nagle_algorithm = True

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        authorization = self.headers.get("Authorization")
        self.record = Request(
            self.role, self.command, self.path, self.headers.get("Range", ""), authorization is not None
        )
        self.hub.begin(self.record)
        try:
            token = authorization.removeprefix("Bearer ") if authorization else None
            (self._cdn if self.role == "cdn" else self._hub)(unquote(urlsplit(self.path).path), token)
        except Problem as problem:
            self._refuse(problem)
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            self.close_connection = True  # the client went away, which is its right
        finally:
            self.hub.end()

    def _hub(self, path: str, token: str | None) -> None:
        if match := RESOLVE.match(path):
            self._fail_if_told(f"{match['repo']}/{match['path']}")
            self._redirect(self.hub.find(match["repo"], match["revision"], match["path"], token))
        elif match := PLAIN.match(path):
            entry = self.hub.find(match["repo"], "main", match["path"], self.hub.token)
            self._fail_if_told(entry.key, on="cdn")
            self._file(entry)
        elif match := API.match(path):
            self._fail_if_told(f"api/models/{match['repo']}")
            self._list(self.hub.files(match["repo"], match["revision"] or "main", token), match["kind"] or "revision")
        else:
            raise Problem(404, "", "Not found")

    def _cdn(self, path: str, token: str | None) -> None:
        if token is not None:
            raise Problem(400, "", "<Error><Code>InvalidArgument</Code>"
                          "<Message>Only one auth mechanism allowed</Message></Error>")  # fmt: skip
        entry = self.hub.signed(path, parse_qs(urlsplit(self.path).query))
        self._fail_if_told(entry.key)
        self._file(entry)

    def _fail_if_told(self, key: str, on: str = "") -> None:
        fault = self.hub.take_fault(key, on or self.role, lambda f: f.status != 0)
        if fault:
            headers = (("Retry-After", fault.retry_after),) if fault.retry_after else ()
            raise Problem(fault.status, "", "a fault that the test asked for", headers)

    def _redirect(self, entry: Entry) -> None:
        self._start(302, 0, [
            ("Location", self.hub.sign(entry)), ("X-Repo-Commit", entry.commit), ("Accept-Ranges", "bytes"),
            ("X-Linked-Size", str(entry.size)), ("X-Linked-Etag", f'"{entry.sha256}"'), ("ETag", f'"{entry.sha256}"'),
        ])  # fmt: skip

    def _list(self, entries: list[Entry], kind: str) -> None:
        repo, commit = entries[0].repo, entries[0].commit
        if kind == "tree":
            body: object = [{"type": "file", "oid": _blob_id(e), "size": e.size, "path": e.path,
                             "lfs": {"oid": e.sha256, "size": e.size, "pointerSize": 135}} for e in entries]  # fmt: skip
        else:
            siblings = [{"rfilename": e.path, "size": e.size, "blobId": _blob_id(e),
                         "lfs": {"sha256": e.sha256, "size": e.size, "pointerSize": 135}} for e in entries]  # fmt: skip
            gated = "manual" if any(e.gated for e in entries) else False
            body = {"id": repo, "modelId": repo, "sha": commit, "private": False, "gated": gated, "siblings": siblings}
        self._text(200, json.dumps(body), [("Content-Type", "application/json"), ("X-Repo-Commit", commit)])

    def _file(self, entry: Entry) -> None:
        touched = byte_range(self.headers.get("Range", ""), entry.size) or (0, entry.size)
        fault = self.hub.take_fault(entry.key, "cdn", lambda f: not f.status and _touches(f, touched))
        size = entry.size if fault is None or fault.ends_at is None else min(entry.size, fault.ends_at)
        etag = f'"{entry.sha256}"'
        headers = [("ETag", etag), ("Accept-Ranges", "bytes"), ("Content-Type", "application/octet-stream")]
        wanted = self.headers.get("Range", "") if self.headers.get("If-Range", etag) == etag else ""
        span = byte_range(wanted, size)
        if span and span[0] >= span[1]:
            raise Problem(416, "", "Requested Range Not Satisfiable", (("Content-Range", f"bytes */{size}"),))
        if span:
            headers.append(("Content-Range", f"bytes {span[0]}-{span[1] - 1}/{size}"))
        start, stop = span or (0, size)
        self._start(206 if span else 200, stop - start, headers)
        if self.command == "GET":
            with entry.file.open("rb") as stream:
                self._send(stream, start, stop, fault)

    def _send(self, stream: BinaryIO, start: int, stop: int, fault: Fault | None) -> None:
        if fault is None:
            self.record.bytes_sent = self.connection.sendfile(stream, start, stop - start)
            return
        end = min(stop, *(n for n in (fault.cut_at, fault.close_at, stop) if n is not None))
        stream.seek(start)
        position = start
        chunk_bytes = min(CHUNK_BYTES, max(1, (fault.bytes_per_second or CHUNK_BYTES * 20) // 20))
        while position < end and not self.hub.stopping.is_set():
            chunk = bytearray(stream.read(min(chunk_bytes, end - position)))
            if fault.corrupt_at is not None and position <= fault.corrupt_at < position + len(chunk):
                chunk[fault.corrupt_at - position] ^= 0xFF
            self.connection.sendall(chunk)
            position += len(chunk)
            self.record.bytes_sent = position - start
            if fault.bytes_per_second:
                time.sleep(len(chunk) / fault.bytes_per_second)
        if end < stop:
            self.close_connection = True
            if fault.cut_at is not None:  # SO_LINGER with 0 s turns the close into a reset
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _refuse(self, problem: Problem) -> None:
        headers = list(problem.headers)
        if self.role == "hub":
            headers.append(("X-Error-Message", problem.message))
            headers += [("X-Error-Code", problem.code)] if problem.code else []
        self._text(problem.status, problem.message, [("Content-Type", "text/plain"), *headers])

    def _text(self, status: int, text: str, headers: list[tuple[str, str]]) -> None:
        body = text.encode()
        self._start(status, len(body), headers)
        if self.command == "GET":
            self.wfile.write(body)
            self.record.bytes_sent = len(body)

    def _start(self, status: int, length: int, headers: list[tuple[str, str]]) -> None:
        self.record.status = status
        self.send_response(status)
        for name, value in [*headers, ("Content-Length", str(length))]:
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Silent: `Hub.requests` is the log."""


def byte_range(header: str, size: int) -> tuple[int, int] | None:
    """`[start, stop)` of a Range header with one range; empty if it cannot be met, None if there is none to heed.

    RFC 9110 section 14: what is malformed, and what asks for several ranges, may be answered with the whole file.
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
    """The commit that stands for a revision, 40 hex digits, the same in every run."""
    return hashlib.sha1(f"{repo}@{revision}".encode(), usedforsecurity=False).hexdigest()


def _touches(fault: Fault, span: tuple[int, int]) -> bool:
    """Does a response with these bytes meet the fault? A range that ends before it is served well."""
    offsets = [n for n in (fault.cut_at, fault.close_at, fault.corrupt_at) if n is not None]
    return not offsets or any(span[0] <= n < span[1] for n in offsets)


def _blob_id(entry: Entry) -> str:
    """git's own id of the LFS pointer file, which is what the Hub's repository holds."""
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{entry.sha256}\nsize {entry.size}\n".encode()
    return hashlib.sha1(f"blob {len(pointer)}\0".encode() + pointer, usedforsecurity=False).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


def _server(hub: Hub, role: str, port: int) -> _Server:
    handler = type(f"_{role.capitalize()}Handler", (_Handler,), {"hub": hub, "role": role})
    return _Server((hub.address, port), handler)


def main(arguments: list[str] | None = None) -> int:
    """Serve a folder until SIGTERM or SIGINT; the first line on stdout is the hub's URL."""
    parser = argparse.ArgumentParser(prog="python -m sandbox.hub", description=main.__doc__)
    parser.add_argument("--root", type=Path, required=True, help="folder of OWNER/REPO/FILE")
    parser.add_argument("--address", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="port of the hub; the CDN takes a free one")
    parser.add_argument("--token", default=Hub.token, help="the token that opens gated repositories")
    given = parser.parse_args(arguments)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with Hub(given.root, given.address, given.port, given.token) as hub:
        print(hub.url, flush=True)
        stop.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
