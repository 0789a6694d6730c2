"""Five hosts of a site fetch one file, with the real programs: fetch.py, nginx as configured, an origin with a slow line.

Why together: that one copy leaves the origin and that faults cost seconds is promised of all parts at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import gevent
import pieces
import pytest

from llamafleet.fleet import site_server
from llamafleet.fleet.site_server import SharedFile
from llamafleet.host.answers import Job
from sandbox import programs
from tasks.lib import sites
from tasks.lib.site_access import Access
from tasks.lib.sites import Outcome, Shared
from tasks.lib.templates import render
from tests.serving import Server, serving

NGINX = programs.find("nginx")
pytestmark = pytest.mark.skipif(not NGINX, reason="no nginx here: python -m sandbox.programs")
PROGRAM = Path(__file__).parents[2] / "llamafleet" / "remote" / "fetch.py"
BODY = b"GGUF" + random.Random(11).randbytes(20 * 2**20)
SHA = hashlib.sha256(BODY).hexdigest()
ORIGIN_BYTES_PER_S = 20e6
HUB_TOKEN = "hf_thisIsASecretThatNobodyMaySee"


class Origin(Server):
    """One line for all who ask; counts what it sent."""

    def __init__(self):
        super().__init__(Sending)
        self.sent, self.line, self.tokens = 0, threading.Lock(), []


class Sending(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()

    def do_GET(self):
        self.server.tokens.append(self.headers.get("Authorization"))
        first = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(BODY) - first))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(BODY) - 1}/{len(BODY)}")
        self.end_headers()
        with contextlib.suppress(OSError):
            for at in range(first, len(BODY), 1 << 18):
                with self.server.line:
                    time.sleep((1 << 18) / ORIGIN_BYTES_PER_S)
                    self.server.sent += len(BODY[at : at + (1 << 18)])
                self.wfile.write(BODY[at : at + (1 << 18)])


class Host:
    """A host of the site in a folder, at an address of its own."""

    def __init__(self, site, name):
        self.site, self.name, self.folder, self.told = site, name, site.folder / name, []
        self.file, self.server = self.folder / "models/x.gguf", None
        for made in (self.folder / "share", self.folder / "run"):
            made.mkdir(parents=True)

    def from_origin(self):
        token = self.written("token", f'header = "Authorization: Bearer {HUB_TOKEN}"\n')
        return self.fetch(curl_config=token, token_origin=self.site.origin.url)

    def from_peers(self, names, seconds):
        hosts = [
            {"name": one, "address": self.site.access.addresses[one], "port": self.site.access.port} for one in names
        ]
        access = self.written("access", self.site.access.for_clients())
        return self.fetch(peers={"hosts": hosts, "access": access, "seconds": seconds})

    def written(self, name, text):
        path = self.folder / name
        path.touch(mode=0o600)
        path.write_text(text)
        return str(path)

    def fetch(self, **more):
        entry = {"name": "x.gguf", "urls": [f"{self.site.origin.url}/x.gguf"], "size_bytes": len(BODY), "sha256": SHA}
        spec = self.written(
            "spec", json.dumps({"directory": str(self.file.parent), "reserve_bytes": 0, "files": [entry], **more})
        )
        code = self.folder / "code"
        code.unlink(missing_ok=True)
        with (self.folder / "log").open("w") as log:
            # Its exit code in a file: gevent, where it is at work in this process, may take it before subprocess does.
            words = ["sh", "-c", '"$@"; echo $? >"$0.new" && mv "$0.new" "$0"', code, sys.executable, PROGRAM, spec]
            process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
            try:
                while not code.exists():
                    gevent.sleep(0.05)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        lines = (self.folder / "log").read_text().splitlines()
        return Outcome.of(Job("ended", int(code.read_text()), lines[-1], lines, ""))

    def serve(self):
        """As share.py does, without systemd."""
        digest, sums = pieces.of(str(self.file))
        (self.folder / "share" / f"{SHA}.pieces").write_text(pieces.text(digest, len(BODY), sums))
        access = self.site.access
        values = site_server.values(access.addresses[self.name], access.port, access.token, access.others(self.name),
                                    [SharedFile(SHA, str(self.file))])  # fmt: skip
        text = render(site_server.TEMPLATE, values)
        for there, here in ((pieces.LISTS, "share"), (pieces.CREDENTIALS, "."), (pieces.SERVER_RUN, "run")):
            text = text.replace(f"{there}/", f"{self.folder}/{here}/")
        for name, content in json.loads(access.for_server(text)).items():
            self.written(name, content)
        self.server = subprocess.Popen(
            [NGINX, "-c", self.folder / "nginx.conf", "-g", "user root;"], stderr=subprocess.DEVNULL
        )
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection((access.addresses[self.name], access.port), 1):
                break
            gevent.sleep(0.05)
        self.site.serving(self)
        return True

    def say(self, text):
        self.told.append(text)

    def stop(self):
        if self.server is not None:
            self.server.terminate()
            self.server.wait(20)
            self.server = None


class Site:
    def __init__(self, folder, origin, count=5):
        self.folder, self.origin, self.serving = folder, origin, lambda host: None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        names = [f"h{number}" for number in range(count)]
        self.access = Access.made({name: f"127.0.3.{number + 1}" for number, name in enumerate(names)}, port)
        self.hosts = {name: Host(self, name) for name in names}
        self.shared = Shared(lambda name: True)

    def run(self):
        """All hosts at once, until all have the file."""
        self.shared.note(self.hosts, ())
        fetching = [gevent.spawn(self.shared.fetch, name, host) for name, host in self.hosts.items()]
        try:
            gevent.joinall(fetching, timeout=300, raise_error=True)
        finally:
            gevent.killall(fetching)
        assert [one.value for one in fetching] == [True] * len(self.hosts), [host.told for host in self.hosts.values()]
        assert all(host.file.read_bytes() == BODY for host in self.hosts.values())

    @property
    def copies(self):
        return self.origin.sent / len(BODY)


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.setattr(sites, "LOOK_SECONDS", 0.1)
    with serving(Origin()) as origin:
        made = Site(tmp_path, origin)
        try:
            yield made
        finally:
            for host in made.hosts.values():
                host.stop()


def test_one_copy_leaves_the_origin(site):
    site.run()
    assert site.copies == 1.0
    assert set(site.origin.tokens) == {f"Bearer {HUB_TOKEN}"}
    assert all(HUB_TOKEN not in (host.folder / "spec").read_text() for host in site.hosts.values())


def test_a_host_that_serves_damaged_bytes_is_left_and_named_and_no_file_is_wrong(site):
    def rot(host):
        if host.name == "h0":
            body = bytearray(BODY)
            body[9 << 20] ^= 1
            host.file.with_name("rotten").write_bytes(body)
            text = (
                (host.folder / "nginx.conf").read_text().replace(f"{host.file};", f"{host.file.with_name('rotten')};")
            )
            (host.folder / "nginx.conf").write_text(text)
            host.server.send_signal(1)
            gevent.sleep(0.5)

    site.serving = rot
    site.run()
    assert "left h0, which served other bytes than it should: bytes 8388608 to 16777215" in " ".join(
        line for host in site.hosts.values() for line in host.told
    )
    assert 1.0 < site.copies <= 3.0
