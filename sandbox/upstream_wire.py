"""The HTTP server of the upstream stand-in: `git clone`, `git ls-remote` and `git fetch --depth 1 URL SHA` over smart
HTTP, with git's own CGI program."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO

from sandbox.upstream import REPOSITORY, git_environment

CHUNK_BYTES = 1 << 20


@contextmanager
def serve(repository: Path = REPOSITORY, address: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serve `repository` over smart HTTP until the block ends; yields the URL to clone from."""

    class Handler(_GitHandler):
        project_root = repository.resolve().parent

    with _Server((address, port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://{address}:{server.server_address[1]}/{repository.name}"
        finally:
            server.shutdown()
            thread.join()


class _Server(ThreadingHTTPServer):
    request_queue_size = 64  # ten clients connect at once; the default of 5 would refuse some
    daemon_threads = True


class _GitHandler(BaseHTTPRequestHandler):
    """Pass each request to `git http-backend`, git's CGI program (git-http-backend(1))."""

    project_root: Path
    server_version = "sandbox-git"

    def do_GET(self) -> None:
        self._run(b"")

    def do_POST(self) -> None:
        self._run(self._body())

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", "0")))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _environment(self, body: bytes) -> dict[str, str]:
        path, _, query = self.path.partition("?")
        return git_environment() | {
            "GIT_PROJECT_ROOT": str(self.project_root),
            "GIT_HTTP_EXPORT_ALL": "1",
            "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
            "REQUEST_METHOD": self.command,
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(body)),
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
            "REMOTE_ADDR": self.client_address[0],
        }

    def _run(self, body: bytes) -> None:
        command = ["git", "http-backend"]
        # The body is in a file: with a pipe, writing the body could wait until the answer is read.
        with tempfile.TemporaryFile() as stdin:
            stdin.write(body)
            stdin.seek(0)
            environment = self._environment(body)
            with subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, env=environment) as process:
                assert process.stdout is not None
                try:
                    self._answer(process.stdout)
                except (BrokenPipeError, ConnectionResetError):
                    process.terminate()  # the client closed the connection: stop packing

    def _answer(self, answer: IO[bytes]) -> None:
        status, headers = 200, []
        while line := answer.readline().strip():
            name, _, value = line.decode("latin-1").partition(":")
            if name.lower() == "status":
                status = int(value.split()[0])
            else:
                headers.append((name, value.strip()))
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        shutil.copyfileobj(answer, self.wfile, CHUNK_BYTES)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing, to keep the tests' output readable."""
