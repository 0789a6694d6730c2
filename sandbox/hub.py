"""A stand-in for the Hugging Face Hub's file service, with faults that a test switches on while it runs.

Two servers listen on 127.0.0.1. The hub answers `/OWNER/REPO/resolve/REVISION/PATH` with a 302 to a signed, expiring
address on the CDN. The CDN has another port and so is another origin: it records a token that a client forwards, and
answers 400, as object stores do. Headers and error codes are those that huggingface_hub reads (`file_download.py` and
`utils/_http.py`). `/plain/OWNER/REPO/PATH` serves the file without a redirect, as an ordinary web server does.

    with Hub() as hub:
        hub.add("acme/tiny-GGUF", "tiny.gguf", path_on_disk)
        hub.fault("acme/tiny-GGUF/tiny.gguf", cut_at=1000)   # the next transfer dies at byte 1000
        ...
        assert [r.range for r in hub.settled() if r.server == "cdn"] == ["", "bytes=1000-"]
"""

from __future__ import annotations

import argparse
import hmac
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from sandbox.hub_data import Entry, Fault, Problem, Request
from sandbox.hub_wire import server


@dataclass
class Hub:
    """The two servers. `root`, if given, has the files OWNER/REPO/PATH, which are served at revision `main`.

    `token` gives access to gated and private repositories; `outsider_token` is valid but gives no access to them; every
    other token is refused like an expired token.
    """

    root: Path | None = None
    address: str = "127.0.0.1"
    port: int = 0
    token: str = "hf_sandbox"
    outsider_token: str = "hf_outsider"
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
        self._servers = [server(self, "hub", self.port), server(self, "cdn", 0)]
        self.url, self.cdn_url = (f"http://{self.address}:{s.server_address[1]}" for s in self._servers)
        for file in sorted(self.root.rglob("*")) if self.root else []:
            parts = file.relative_to(self.root or file).parts
            if file.is_file() and len(parts) > 2:  # OWNER/REPO/PATH
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
        for each, thread in zip(self._servers, self._threads, strict=True):
            each.shutdown()
            thread.join()
            each.server_close()

    def add(
        self,
        repo: str,
        path: str,
        file: Path,
        *,
        gated: bool = False,
        revision: str = "main",
        private: bool = False,
    ) -> Entry:
        """Publish one file. A revision exists when it has a file; it can be requested by its name and by its commit."""
        entry = Entry(repo, path, file, gated, revision)
        self._entries[repo, revision, path] = self._entries[repo, entry.commit, path] = entry
        if private:
            self._private.add(repo)
        return entry

    def fault(self, path: str, *, on: str = "cdn", times: int | None = 1, **what: int | str) -> None:
        """Make `path` ("OWNER/REPO/FILE", "api/models/OWNER/REPO" or "*") fail; `what` has fields of `Fault`."""
        fault = Fault(on, times, **what)  # type: ignore[arg-type]  # a name that Fault lacks raises TypeError
        self._faults.append((path, fault))

    def heal(self) -> None:
        """Remove all faults."""
        self._faults.clear()

    def settled(self, timeout_seconds: float = 10) -> list[Request]:
        """Wait until no request is being served, and return all requests. Raises TimeoutError."""
        with self._idle:
            if not self._idle.wait_for(lambda: self._in_flight == 0, timeout_seconds):
                raise TimeoutError(f"{self._in_flight} requests still being served after {timeout_seconds} s")
            return list(self.requests)

    # Called by the handlers.

    def begin(self, request: Request) -> None:
        with self._idle:
            self.requests.append(request)
            self._in_flight += 1

    def end(self) -> None:
        with self._idle:
            self._in_flight -= 1
            self._idle.notify_all()

    def take_fault(self, key: str, on: str, wanted: Callable[[Fault], bool]) -> Fault | None:
        """The first fault that applies to this request, or None; the fault is counted as used."""
        with self._idle:
            for path, fault in self._faults:
                if path in (key, "*") and fault.on == on and fault.times != 0 and wanted(fault):
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault
        return None

    def find(self, repo: str, revision: str, path: str, token: str | None) -> Entry:
        """The file. Raises the Hub's refusal (Problem), with the checks in the Hub's order."""
        self.files(repo, revision, token)
        entry = self._entries.get((repo, revision, path))
        if entry is None:
            raise Problem(404, "EntryNotFound", "Entry not found")
        if entry.gated and token != self.token:
            status = 401 if token is None else 403
            raise Problem(
                status,
                "GatedRepo",
                f"Access to model {repo} is restricted. "
                "You must have access to it and be authenticated to access it. Please log in.",
            )
        return entry

    def files(self, repo: str, revision: str, token: str | None) -> list[Entry]:
        """All files of a revision; gated files too, since the Hub lists them for everyone. Raises Problem."""
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
        """The file of a CDN address. Raises Problem 403 if its signature is wrong or has expired."""
        expires, signature = query.get("Expires", ["0"])[0], query.get("Signature", [""])[0]
        if not hmac.compare_digest(signature, self._signature(path, expires)):
            raise Problem(403, "", "<Error><Code>SignatureDoesNotMatch</Code></Error>")
        if time.time() > float(expires):
            raise Problem(403, "", "<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>")
        owner, name, commit, rest = path.lstrip("/").split("/", 3)
        return self._entries[f"{owner}/{name}", commit, rest]

    def _signature(self, path: str, expires: str) -> str:
        return hmac.new(self._secret, f"{path}\n{expires}".encode(), "sha256").hexdigest()


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
