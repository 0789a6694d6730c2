"""A small HTTP server for tests, usually in llama-server's place: what it answers is each test's own."""

import contextlib
import http.server
import json
import socketserver
import threading


class Handler(http.server.BaseHTTPRequestHandler):
    """Notes every request, and answers what the server says: an object as JSON, a text as it is, or nothing."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "null")
        self.server.asked.append((self.path, body))
        answer = self.server.respond(self.path, body, self.headers)
        if answer is None:
            return
        status, told = answer
        self.send_response(status)
        self.end_headers()
        self.wfile.write(told.encode() if isinstance(told, str) else json.dumps(told).encode())

    do_POST = do_GET


class Server(http.server.ThreadingHTTPServer):
    """On a loopback port of its own. A test's subclass says in `respond(path, body, headers)` what it answers: a status
    and an object or text, or None for no answer."""

    def __init__(self, handler=Handler):
        super().__init__(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.asked = []  # (path, body)

    @property
    def paths(self):
        """What was asked for, in order."""
        return [path for path, _ in self.asked]


@contextlib.contextmanager
def serving(server):
    """The server, answering until the end of the block."""
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Raw(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, script):
        super().__init__(("127.0.0.1", 0), _RawHandler)
        self.script, self.stopping = script, threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.asked = []  # the first line of each request

    def shutdown(self):
        self.stopping.set()
        super().shutdown()


class _RawHandler(socketserver.StreamRequestHandler):
    timeout = 30

    def handle(self):
        lines = list(iter(lambda: self.rfile.readline().strip(), b""))
        self.server.asked.append(lines[0].decode("latin-1") if lines else "")
        with contextlib.suppress(OSError):  # the client has had enough
            for piece in self.server.script(b"\n".join(lines).decode("latin-1")):
                if isinstance(piece, bytes):
                    self.wfile.write(piece)
                elif self.server.stopping.wait(piece):
                    return


def raw(script):
    """A server whose answer to each connection's first request are the pieces of `script(its lines)`: bytes, or
    pauses in seconds. For what no server sends that knows HTTP. To be used as `with serving(raw(script)) as server:`."""
    return _Raw(script)


def dripping(start=b"", pause=0.05):
    """A script: these bytes, then one byte after another, for ever."""

    def script(_):
        yield start
        while True:
            yield b"a"
            yield pause

    return script


def flood(start=b"", block=b"a" * 65536, limit=2**31):
    """A script: these bytes, then blocks of bytes, as many as the client takes."""

    def script(_):
        yield start
        for _ in range(limit // len(block)):
            yield block

    return script
