"""The HTTP handler of the Hub stand-in's two servers; `role` says which of them it answers for."""

from __future__ import annotations

import json
import re
import socket
import struct
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import BinaryIO
from urllib.parse import parse_qs, unquote, urlsplit

from sandbox.hub_data import Entry, Fault, Files, Problem, Request, blob_id, byte_range, touches

CHUNK_BYTES = 1 << 20
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER on, with 0 s: socket(7)
IDLE_SECONDS = 60  # a kept-alive connection is closed after this long
RESOLVE = re.compile(r"^/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)$")
API = re.compile(r"^/api/models/(?P<repo>[^/]+/[^/]+)(?:/(?P<kind>tree|revision)/(?P<revision>[^/]+)(?:/.*)?)?$")
REFS = re.compile(r"^/api/models/(?P<repo>[^/]+/[^/]+)/refs$")
PLAIN = re.compile(r"^/plain/(?P<repo>[^/]+/[^/]+)/(?P<path>.+)$")


class _Handler(BaseHTTPRequestHandler):
    hub: Files
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
            self.close_connection = True  # the client closed the connection, which is allowed
        finally:
            self.hub.end()

    def _hub(self, path: str, token: str | None) -> None:
        if match := RESOLVE.match(path):
            self._raise_fault(f"{match['repo']}/{match['path']}")
            self._redirect(self.hub.find(match["repo"], match["revision"], match["path"], token))
        elif match := PLAIN.match(path):
            entry = self.hub.find(match["repo"], "main", match["path"], self.hub.token)
            self._raise_fault(entry.key, on="cdn")
            self._file(entry)
        elif match := REFS.match(path):
            commit = self.hub.files(match["repo"], "main", token)[0].commit
            self._text(200, json.dumps({"branches": [{"name": "main", "targetCommit": commit}]}), [])
        elif match := API.match(path):
            self._raise_fault(f"api/models/{match['repo']}")
            self._list(self.hub.files(match["repo"], match["revision"] or "main", token), match["kind"] or "revision")
        else:
            raise Problem(404, "", "Not found")

    def _cdn(self, path: str, token: str | None) -> None:
        if token is not None:
            raise Problem(
                400,
                "",
                "<Error><Code>InvalidArgument</Code><Message>Only one auth mechanism allowed</Message></Error>",
            )
        entry = self.hub.signed(path, parse_qs(urlsplit(self.path).query))
        self._raise_fault(entry.key)
        self._file(entry)

    def _raise_fault(self, key: str, on: str = "") -> None:
        fault = self.hub.take_fault(key, on or self.role, lambda f: f.status != 0)
        if fault:
            headers = (("Retry-After", fault.retry_after),) if fault.retry_after else ()
            raise Problem(fault.status, "", "a fault that the test asked for", headers)

    def _redirect(self, entry: Entry) -> None:
        self._start(
            302,
            0,
            [
                ("Location", self.hub.sign(entry)),
                ("X-Repo-Commit", entry.commit),
                ("Accept-Ranges", "bytes"),
                ("X-Linked-Size", str(entry.size)),
                ("X-Linked-Etag", f'"{entry.sha256}"'),
                ("ETag", f'"{entry.sha256}"'),
            ],
        )

    def _list(self, entries: list[Entry], kind: str) -> None:
        repo, commit = entries[0].repo, entries[0].commit
        if kind == "tree":
            body: object = [
                {
                    "type": "file",
                    "oid": blob_id(e),
                    "size": e.size,
                    "path": e.path,
                    "lfs": {"oid": e.sha256, "size": e.size, "pointerSize": 135},
                }
                for e in entries
            ]
        else:
            siblings = [
                {
                    "rfilename": e.path,
                    "size": e.size,
                    "blobId": blob_id(e),
                    "lfs": {"sha256": e.sha256, "size": e.size, "pointerSize": 135},
                }
                for e in entries
            ]
            gated = "manual" if any(e.gated for e in entries) else False
            body = {
                "id": repo,
                "modelId": repo,
                "sha": commit,
                "private": False,
                "gated": gated,
                "siblings": siblings,
            }
        self._text(200, json.dumps(body), [("Content-Type", "application/json"), ("X-Repo-Commit", commit)])

    def _file(self, entry: Entry) -> None:
        requested = byte_range(self.headers.get("Range", ""), entry.size) or (0, entry.size)
        fault = self.hub.take_fault(entry.key, "cdn", lambda f: not f.status and touches(f, requested))
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
        if position < stop:
            self.close_connection = True
            if fault.cut_at is not None:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)

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
        """Log nothing: `Hub.requests` is the log."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def shutdown_request(self, request: socket.socket | tuple[bytes, socket.socket]) -> None:
        """Close without a normal end if the connection is to be reset; the standard method would end it normally."""
        assert isinstance(request, socket.socket)
        if request.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, len(RESET_ON_CLOSE)) == RESET_ON_CLOSE:
            self.close_request(request)
        else:
            super().shutdown_request(request)


def server(hub: Files, role: str, port: int) -> Server:
    handler = type(f"_{role.capitalize()}Handler", (_Handler,), {"hub": hub, "role": role})
    return Server((hub.address, port), handler)
