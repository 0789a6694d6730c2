"""A real HAProxy on loopback with what llamafleet writes for it, before stand-ins for llama-server."""

import contextlib
import csv
import http.client
import http.server
import json
import re
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
from dataclasses import replace

import pytest

from llamafleet.cli.arguments import default_data
from llamafleet.fleet import haproxy
from llamafleet.fleet.gateway import Secret, Server, sha256
from llamafleet.remote import common
from llamafleet.settings.schema import Settings
from sandbox.oracle import free_port
from tasks.lib.templates import render

CLIENT_KEY, SERVER_KEY = "a-client-s-own-key-0001", "the-servers-own-key-0001"
WAIT_SECONDS = 20.0

needs_haproxy = pytest.mark.skipif(not shutil.which("haproxy"), reason="HAProxy is not installed")


class Handler(http.server.BaseHTTPRequestHandler):
    """llama-server as a gateway sees it: its key, its health, whole replies and streams."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.server.key and self.headers.get("Authorization") != f"Bearer {self.server.key}":
            return self.reply(401, {})
        return self.reply(self.server.health, {})

    def do_POST(self):
        server = self.server
        text = self.rfile.read(int(self.headers["Content-Length"])) if self.headers["Content-Length"] else b"{}"
        with server.lock:
            server.seen.append((self.path, dict(self.headers), len(text)))
        if server.health != 200:
            return self.reply(server.health, {"error": {"code": 503, "message": "Loading model"}})
        asked = json.loads(text) if text[:1] == b"{" else {}
        if asked.get("stream"):
            return self.stream(asked["tokens"], asked["pause"])
        server.gate.wait(WAIT_SECONDS)
        return self.reply(200, {"server": server.name, "path": self.path})

    def stream(self, tokens, pause):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number in range(tokens):
            text = f"data: {number}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(text), text))
            time.sleep(pause)
        self.wfile.write(b"0\r\n\r\n")

    def reply(self, status, body):
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(text)


class StandIn(http.server.ThreadingHTTPServer):
    """`gate` is closed to keep replies waiting, `health` is its status, `seen` what clients asked."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, name, key=SERVER_KEY, context=None, port=0):
        super().__init__(("127.0.0.1", port or free_port()), Handler)
        if context:
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.name, self.key, self.health, self.seen = name, key, 200, []
        self.lock, self.gate = threading.Lock(), threading.Event()
        self.gate.set()

    def handle_error(self, *_):
        pass

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.gate.set()
        self.shutdown()
        self.server_close()


def server(stand_in, model="tiny", **changes):
    """The gateway's view of a stand-in."""
    made = Server(
        model=model, host=stand_in.name, instance=model, address="127.0.0.1", port=stand_in.server_port, slots=2,
        context_tokens=4096, serves="chat", on_demand=False, load_seconds=60,
        keys=(sha256(stand_in.key),) if stand_in.key else (),
    )  # fmt: skip
    return replace(made, **changes)


def settings(**changes):
    return Settings.from_data({**default_data(), "gateway_port": free_port(), "gateway_stats_port": free_port(),
                               **changes})  # fmt: skip


class Gateway:
    """HAProxy with these servers, in a folder of the test's; its runtime API is `llamafleet/remote/gateway_admin.py`."""

    def __init__(self, folder, settings, servers, access=None, secrets=None):
        self.folder, self.settings, self.process = folder, settings, None
        self.access = access or haproxy.Access(client_keys=(CLIENT_KEY,), of_servers=secrets or known(servers))
        self.log = folder / "haproxy.log"
        self.run = folder / "run"
        self.run.mkdir()
        self.write(servers)

    def write(self, servers):
        """The files, with the paths of the test in place of a host's, and without a user to change to."""
        self.files = haproxy.files(render, self.settings, servers, self.access)
        place = self.folder / "gateway" / self.files.digest
        place.mkdir(parents=True, exist_ok=True)
        for name, text in {**self.files.texts, **self.files.secrets}.items():
            (place / name).write_text(self.local(text))
        link = self.folder / "gateway" / "current"
        link.unlink(missing_ok=True)
        link.symlink_to(self.files.digest)
        return place / "haproxy.cfg"

    def local(self, text):
        text = text.replace(common.GATEWAY_RUN, str(self.run)).replace(common.GATEWAY, str(self.folder / "gateway"))
        text = re.sub(r"^ +(user|group|default-bind) .*\n", "", text, flags=re.M)
        return text.replace(" user root group root", "")

    @property
    def config(self):
        return self.folder / "gateway" / "current" / "haproxy.cfg"

    @property
    def url(self):
        scheme = "https" if self.access.certificate_and_key else "http"
        return f"{scheme}://127.0.0.1:{self.settings.gateway_port}"

    def __enter__(self):
        with self.log.open("w") as log:
            self.process = subprocess.Popen(["haproxy", "-W", "-f", str(self.config)], stdout=log, stderr=log)
        until(lambda: self.status("/health") == 200 or self.process.poll() is not None)
        assert self.process.poll() is None, self.log.read_text()
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(WAIT_SECONDS)

    def status(self, path):
        try:
            return self.ask(path)[0]
        except OSError:
            return 0

    def ask(self, path, body=None, key=CLIENT_KEY, **headers):
        """Status, headers and JSON of a request; a dictionary or bytes as its body."""
        named = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {}),
                 **{name.replace("_", "-"): value for name, value in headers.items()}}  # fmt: skip
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        request = urllib.request.Request(self.url + path, data, named)
        context = ssl._create_unverified_context() if self.url.startswith("https") else None
        try:
            with urllib.request.urlopen(request, timeout=60, context=context) as answer:
                return answer.status, dict(answer.headers), json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers), json.loads(error.read() or b"{}")

    def connection(self):
        return http.client.HTTPConnection("127.0.0.1", self.settings.gateway_port, timeout=60)

    def admin(self, command):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.run / "admin.sock"))
            connection.sendall(command.encode() + b"\n")
            return b"".join(iter(lambda: connection.recv(65536), b"")).decode()

    def is_idle(self):
        """Whether no request is counted at a server: HAProxy counts one for a moment after its answer."""
        rows = csv.DictReader(self.admin("show stat").removeprefix("# ").splitlines())
        return all(row["scur"] == "0" for row in rows if row["type"] == "2")

    def homes(self, sessions):
        """By session, the server that answers it; each is asked when the one before is not counted any more."""
        found = {}
        for session in sessions:
            status, _, body = self.ask("/tiny/v1/completions", {}, X_Session_Id=str(session))
            assert status == 200, body
            found[session] = body["server"]
            until(self.is_idle)
        return found

    def reload(self):
        """Until another process takes new connections. HAProxy's master hears no signal in its first moments."""
        old, asked = self.process_number(), 0.0

        def is_new():
            nonlocal asked
            if time.monotonic() - asked > 3:
                self.process.send_signal(signal.SIGUSR2)
                asked = time.monotonic()
            return self.process_number() not in (0, old)

        until(is_new)

    def process_number(self):
        """Of the process that takes new connections; 0 while there is none."""
        try:
            return int(re.search(r"^Pid: (\d+)", self.admin("show info"), re.M)[1])
        except OSError:
            return 0


def known(servers):
    """What an operator's machine knows of these stand-ins, which all have the one key."""
    return {(one.host, one.instance): Secret((SERVER_KEY,) if one.keys else ()) for one in servers}


def until(condition, seconds=WAIT_SECONDS):
    """Wait until it holds, and return what it says."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)
    return value
