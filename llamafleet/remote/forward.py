"""Hand the connections of a server that starts on demand on to it, or turn them away where it has not started.

Contract: `forward.py SOCKET SECONDS`, the main process of llamafleet-demand-NAME.service, which systemd starts at the
first connection, after llama-server-NAME.service. Descriptor 3 is the listening socket (sd_listen_fds(3)); SOCKET is
the path of the server's own. Where the server listens there, systemd-socket-proxyd passes all bytes, until there was no
connection for SECONDS or the server has ended; then this ends too, and systemd stops the server (BindsTo=). Where it
does not, everybody who waits or comes within PAUSE_SECONDS gets 503 with Retry-After; the next connection then starts
it anew. With tls-certificate and tls-key in $CREDENTIALS_DIRECTORY that answer is encrypted. Exit 0, or the status of
systemd-socket-proxyd. Needs no rights. Python 3.8, standard library, systemd 246.

Decision 22: docs/decisions/0022-a-server-starts-when-it-is-asked.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import ssl
import sys
import threading
import time
from typing import List, Optional

LISTENER = 3
# Older distributions have no /usr/lib for what belongs to systemd.
PROXIES = ("/usr/lib/systemd/systemd-socket-proxyd", "/lib/systemd/systemd-socket-proxyd")
MOST_CONNECTIONS = 4096
LOOK_SECONDS = 0.5  # between two looks whether the server is there

# Of those who are turned away: how long, and for how long each; the most of a request that is read, so that the client
# reads the answer; and how many at once.
PAUSE_SECONDS, CLIENT_SECONDS = 5.0, 5.0
HEAD_BYTES, REQUEST_BYTES = 64 << 10, 64 << 20
MOST_AT_ONCE = 32
WHY = "the model cannot be started now: others are at work, or its start has failed"


def main(argv: List[str]) -> int:
    path, seconds = argv[0], int(argv[1])
    if os.environ.get("LISTEN_FDS") != "1":
        print("systemd has opened no socket for it: systemctl status llamafleet-demand-*.socket says why", flush=True)
        return 1
    listener = socket.socket(fileno=LISTENER)
    with contextlib.suppress(OSError):  # of a program that held connections back and was killed
        listener.setsockopt(socket.SOL_SOCKET, 27, 0)  # SO_DETACH_FILTER
    if not listens(path):
        turn_away(listener, context())
        return 0
    proxy = start_proxy(path, seconds)
    touch(listener)
    return watch(proxy, path)


def listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(CLIENT_SECONDS)
        try:
            sock.connect(path)
        except OSError:
            return False
    return True


# --- connections that are handed on -------------------------------------------------------------------


def start_proxy(path: str, seconds: int) -> int:
    """The process of systemd-socket-proxyd, which has our listening socket."""
    program = next((one for one in PROXIES if os.path.exists(one)), PROXIES[0])
    child = os.fork()
    if child:
        return child
    try:
        os.set_inheritable(LISTENER, True)
        environment = {**os.environ, "LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
        options = [f"--exit-idle-time={seconds}s", f"--connections-max={MOST_CONNECTIONS}"]
        os.execve(program, [program, *options, path], environment)  # noqa: S606 -- its arguments are words
    finally:
        os._exit(127)


def touch(listener: socket.socket) -> None:
    """Connect once: the proxy counts the time without connections from the end of one on, not from its start
    (connection_release in systemd's src/socket-proxy/socket-proxyd.c)."""
    address = listener.getsockname()
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address[0], address[0])  # noqa: S104 -- compared with
    with contextlib.suppress(OSError), socket.socket(listener.family) as sock:
        sock.settimeout(CLIENT_SECONDS)
        sock.connect((host, *address[1:]))


def watch(proxy: int, path: str) -> int:
    """Wait until the proxy ends, or end it once the server's socket is gone: systemd removes that with the server."""
    while True:
        ended, status = os.waitpid(proxy, os.WNOHANG)
        if ended:
            return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 1
        if not os.path.exists(path):
            os.kill(proxy, signal.SIGTERM)
            os.waitpid(proxy, 0)
            return 0
        time.sleep(LOOK_SECONDS)


# --- connections that are turned away -----------------------------------------------------------------


def context() -> Optional[ssl.SSLContext]:
    """What encrypts the answer; None for a server without TLS."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY", "")
    if not os.path.exists(f"{folder}/tls-key"):
        return None
    found = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    found.load_cert_chain(f"{folder}/tls-certificate", f"{folder}/tls-key")
    return found


def turn_away(listener: socket.socket, tls: Optional[ssl.SSLContext], seconds: float = PAUSE_SECONDS) -> int:
    """Answer everybody who waits, or who comes within `seconds`, with 503; how many there were."""
    over, number = time.monotonic() + seconds, 0
    free = threading.BoundedSemaphore(MOST_AT_ONCE)
    threads = []

    def serve(client: socket.socket) -> None:
        with free, contextlib.suppress(OSError):
            refuse(client, tls)

    while time.monotonic() < over:
        listener.settimeout(max(0.01, over - time.monotonic()))
        try:
            client, _ = listener.accept()
        except OSError:
            continue
        number += 1
        threads.append(threading.Thread(target=serve, args=(client,)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return number


def refuse(client: socket.socket, tls: Optional[ssl.SSLContext]) -> None:
    """Read one request and answer it with 503; raises OSError where the client goes."""
    over = time.monotonic() + CLIENT_SECONDS
    with client:
        client.settimeout(CLIENT_SECONDS)
        sock = tls.wrap_socket(client, server_side=True) if tls else client
        with sock:
            request = sock.recv(HEAD_BYTES)
            while b"\r\n\r\n" not in request and len(request) < HEAD_BYTES and time.monotonic() < over:
                request += sock.recv(HEAD_BYTES) or b"\r\n\r\n"
            head, _, body = request.partition(b"\r\n\r\n")
            length = re.search(rb"^content-length: *([0-9]{1,9})\r?$", head, re.IGNORECASE | re.MULTILINE)
            left = min(int(length.group(1)) if length else 0, REQUEST_BYTES) - len(body)
            while left > 0 and time.monotonic() < over:
                part = sock.recv(min(left, 1 << 20))
                left = left - len(part) if part else 0
            sock.sendall(answer())
            with contextlib.suppress(OSError):  # what it still sends would otherwise cut the answer off
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(1 << 16) and time.monotonic() < over:
                    pass


def answer() -> bytes:
    """In the form of llama-server's own errors."""
    body = json.dumps({"error": {"code": 503, "message": WHY, "type": "unavailable_error"}}).encode()
    return (
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json; charset=utf-8\r\n"
        b"Retry-After: %d\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % (PAUSE_SECONDS, len(body))
    ) + body


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
