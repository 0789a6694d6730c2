"""Let the running replies of a server end before it is stopped, while new connections wait.

Contract: a module of switch.py, starting.py and switch_back.py. `Draining(names, seconds, overdue)` notes the servers
that run, by their installed plan.json; `with draining.begun():` is a block in which they may be stopped, once: it is
entered when no slot is at work, or when the seconds are over. `overdue` says what becomes of replies that run on then:
"cut"; "wait", for PATIENT_SECONDS in all; or "stop", which raises `Overdue`, and the server takes connections again.
`let_in(name)` lets a server that goes on take connections again. Nothing else is raised: where a server, a plan.json or
the kernel does not answer, nothing is waited for, and a line says so. Root with all capabilities, for the waiting of
new connections; Linux 5.6, else they are served meanwhile. The standard library, Python 3.8; common.py, gate_server.py
and gate_spec.py beside it.

llama-server drops its running replies on SIGTERM (ctx_server.terminate in tools/server/server.cpp), and has no way to
refuse new ones. So a filter is attached to its listening socket, which drops what begins a connection: the kernel of
the client tries again after 1, 3 and 7 s, and so on, and reaches the next server. Connections that are open stay, with
the requests that come over them. The filter ends with the old server's socket.

Decision 21: docs/decisions/0021-new-connections-wait-while-replies-end.md.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import select
import signal
import socket
import ssl
import struct
import subprocess
import time
from http.client import HTTPConnection, HTTPException
from typing import Iterator, NamedTuple, Optional, Sequence, Tuple  # the contract is Python 3.8
from urllib.parse import urlsplit

import gate_server
from common import demand_units, is_on_demand, plan_path, show, unit_of
from gate_spec import Unreadable, read_spec

# How often a server is asked, how long it may take to answer, and how long it must be idle: a reply's last bytes are
# sent after its slot is free.
PAUSE_SECONDS, ANSWER_SECONDS, IDLE_SECONDS = 0.1, 3.0, 0.2
SHOWN_SECONDS = 5.0  # between lines of progress
PATIENT_SECONDS = 12 * 3600.0  # half of what a job that switches may take
CUT, WAIT, STOP = "cut", "wait", "stop"
# The kernel's, the same on all of our architectures: options of a socket, and numbers of system calls.
SO_ATTACH_FILTER, SO_DETACH_FILTER = 26, 27
PIDFD_OPEN, PIDFD_GETFD = 434, 438
# Source ports by which we ask ourselves meanwhile, from a random one on.
OWN_PORTS = 64
NOBODY = 65534
ANSWER_BYTES = 1 << 20
LISTEN = "0A"  # TCP_LISTEN
BUSY = re.compile(rb"^llamacpp:requests_(?:processing|deferred) (\d{1,9})$", re.MULTILINE)


class Server(NamedTuple):
    """A server that runs, and how it is asked."""

    name: str
    url: str
    key: Optional[str]
    context: Optional[ssl.SSLContext]
    listener: Optional[socket.socket]  # the socket that clients reach; None where the kernel does not give it
    first_port: int  # of OWN_PORTS
    path: Optional[str] = None  # of its own socket, if it starts on demand: clients reach another process's


class Overdue(Exception):
    """Replies still run after the time that they had, and are not to be cut; the text is for the operator."""


class Draining:
    """The servers of these instances that run, and the seconds that their running replies get to end."""

    def __init__(self, names: Sequence[str] = (), seconds: float = 0.0, overdue: str = CUT) -> None:
        self.seconds = PATIENT_SECONDS if overdue == WAIT and seconds > 0 else seconds
        self.may_cut = overdue == CUT
        self.servers = [one for one in map(running, names) if one] if seconds > 0 else []

    @contextlib.contextmanager
    def begun(self) -> Iterator[None]:
        """A block in which the servers are stopped, after their running replies have ended, or after the seconds."""
        servers, self.servers = self.servers, []
        try:
            for server in servers:
                hold(server)
            if servers and not wait(servers, self.seconds, cut=self.may_cut) and not self.may_cut:
                raise Overdue(_overdue(servers, self.seconds))
            yield
        except BaseException:
            for server in servers:
                release(server)
            raise
        finally:
            for server in servers:
                if server.listener:
                    server.listener.close()


def running(name: str) -> Optional[Server]:
    """The instance's server as its installed plan.json says; None where none runs, or where it cannot be asked."""
    try:
        pid = pid_of(name)
        if not pid:
            return None
        spec = read_spec(plan_path(name))
        gate_server.trust(spec)
        context = gate_server.trusted(spec["url"])
        first = random.randrange(33000, 60000 - OWN_PORTS)  # noqa: S311 -- no secret
        key, listener = gate_server.first_key(spec), listener_of(door_of(name) or pid)
        return Server(name, spec["url"], key, context, listener, first, spec["socket"])
    except (Unreadable, OSError, ValueError) as error:
        print(f"{unit_of(name)} is stopped without waiting for its replies: {error}", flush=True)
        return None


def pid_of(name: str) -> int:
    """The process of the instance's server; 0 where none serves, or where systemd does not answer."""
    return _main_pid(unit_of(name))


def door_of(name: str) -> int:
    """The process that clients reach, of a server that starts on demand; 0 where there is none."""
    return _main_pid(demand_units(name)[1]) if is_on_demand(name) else 0


def _main_pid(unit: str) -> int:
    try:
        shown = show(unit, "ActiveState", "MainPID", seconds=30.0)
    except (OSError, subprocess.SubprocessError):
        return 0
    return int(shown.get("MainPID") or 0) if shown.get("ActiveState") == "active" else 0


# --- new connections ------------------------------------------------------------------------------


def listener_of(pid: int) -> Optional[socket.socket]:
    """The socket at which the process listens, as one of ours; None where the kernel does not give it."""
    try:
        import ctypes  # where memory may not be made executable, some versions fail here

        system_call = ctypes.CDLL(None).syscall
    except (ImportError, MemoryError, OSError):
        return None
    handle = system_call(PIDFD_OPEN, pid, 0)
    if handle < 0:
        return None
    try:
        inodes = set(_listening(pid))
        for number in os.listdir(f"/proc/{pid}/fd"):
            if os.readlink(f"/proc/{pid}/fd/{number}") in inodes:
                copy = system_call(PIDFD_GETFD, handle, int(number), 0)
                return socket.socket(fileno=copy) if copy >= 0 else None
    except OSError:
        pass
    finally:
        os.close(handle)
    return None


def _listening(pid: int) -> Iterator[str]:
    """What /proc/PID/fd calls the listening sockets of the process's network."""
    return (f"socket:[{inode}]" for state, inode, _ in sockets(pid) if state == LISTEN)


def sockets(pid: int) -> Iterator[Tuple[str, str, int]]:
    """State and inode of the TCP sockets of the process's network, and what nobody has read or accepted of them yet:
    of a socket that listens, connections."""
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/net/{table}") as file:
            for line in file:
                words = line.split()
                if len(words) > 9 and words[0] != "sl":
                    yield words[3], words[9], int(words[4].partition(":")[2], 16)


def hold(server: Server) -> None:
    """Let the kernel drop what begins a connection, but for our own source ports."""
    if server.listener is None:
        print(f"{unit_of(server.name)} takes new requests until it is stopped: the kernel gives no way to hold them",
              flush=True)  # fmt: skip
        return
    import ctypes

    # A socket filter sees the packet from the TCP header on, which begins with the source port.
    program = [
        (0x28, 0, 0, 0),  # ldh [0]
        (0x35, 0, 2, server.first_port),  # jge first, else drop
        (0x35, 1, 0, server.first_port + OWN_PORTS),  # jge first + OWN_PORTS: drop
        (0x06, 0, 0, 0xFFFFFFFF),  # ret: take
        (0x06, 0, 0, 0),  # ret: drop
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in program))
    with contextlib.suppress(OSError):
        server.listener.setsockopt(
            socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", len(program), ctypes.addressof(code))
        )


def release(server: Server) -> None:
    if server.listener is not None:
        _detach(server.listener)


def _detach(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has no filter
        listener.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)


def let_in(name: str) -> None:
    """Let the instance's server take connections again, if it was held when a switch was cut off."""
    pid = door_of(name) or pid_of(name)
    listener = listener_of(pid) if pid else None
    if listener is not None:
        with listener:
            _detach(listener)


# --- running replies ------------------------------------------------------------------------------


def _overdue(servers: Sequence[Server], seconds: float) -> str:
    what = ", ".join(unit_of(server.name) for server in servers)
    return (
        f'requests are still running on {what} after {seconds:.0f} s, and drain_overdue is not "{CUT}": '
        "run again when there are fewer, or with a longer drain_seconds"
    )


def wait(servers: Sequence[Server], seconds: float, certain: bool = False, cut: bool = True) -> bool:
    """Wait until no server is at work, `seconds` at most; whether none is. The answers are read by a child without
    root's rights. `certain`: a server that does not answer is at work. `cut`: they are stopped afterwards all the same,
    which is printed."""
    "x".encode("idna")  # loads what sockets need: nobody may not be able to read Python's own files
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _as_nobody(servers, writer, certain)
    os.close(writer)
    over, shown = time.monotonic() + seconds, 0.0
    what = ", ".join(unit_of(server.name) for server in servers)
    try:
        for number in _counts(reader, over):
            left = over - time.monotonic()
            if number and time.monotonic() - shown > SHOWN_SECONDS:
                shown = time.monotonic()
                print(f"{what}: waiting for {number} running requests, {left:.0f} s at most", flush=True)
            if number <= 0:
                return number == 0 or not certain
        if cut and not certain:
            print(f"{what}: stopped after {seconds:.0f} s although requests are running", flush=True)
        return False
    finally:
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _counts(reader: int, over: float) -> Iterator[int]:
    """What the child counts, until the time is over; -1 where it has ended."""
    rest = b""
    while time.monotonic() < over:
        ready, _, _ = select.select([reader], [], [], max(0.0, over - time.monotonic()))
        if not ready:
            return
        part = os.read(reader, 4096)
        if not part:
            yield -1
            return
        *lines, rest = (rest + part)[-4096:].split(b"\n")
        for line in lines:
            yield int(line) if line.isdigit() and len(line) < 10 else 0


def _as_nobody(servers: Sequence[Server], writer: int, certain: bool) -> None:
    """The child's work; it never returns."""
    try:
        for one in (signal.SIGTERM, signal.SIGINT):
            signal.signal(one, signal.SIG_DFL)
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        asking = [Asking(server) for server in servers]
        last_at_work = time.monotonic()
        while True:
            number = sum(one.requests() or int(certain and one.is_silent) for one in asking)
            if number:
                last_at_work = time.monotonic()
                os.write(writer, b"%d\n" % min(number, 10**8))
            elif time.monotonic() - last_at_work >= IDLE_SECONDS:
                os.write(writer, b"0\n")
                break
            time.sleep(PAUSE_SECONDS)
    except BaseException:  # the parent sees the end, and goes on
        pass
    finally:
        os._exit(0)


class Asking:
    """Asks one server over a connection that is kept, by source ports that the filter lets in."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.connection: Optional[HTTPConnection] = None
        self.next_port = server.first_port
        self.is_silent = False

    def requests(self) -> int:
        """Requests that slots work at or that wait for a slot; 0 where the server does not say."""
        for _ in range(0 if self.is_silent else 2):  # the server closes a connection after some requests
            try:
                return self._asked()
            except (OSError, ValueError, HTTPException):
                self._close()
        self.is_silent = True
        return 0

    def _asked(self) -> int:
        connection = self.connection = self.connection or self._connected()
        headers = {"Authorization": f"Bearer {self.server.key}"} if self.server.key else {}
        connection.request("GET", "/metrics", headers=headers)
        answer = connection.getresponse()
        text = answer.read(ANSWER_BYTES)
        if answer.will_close or answer.length:
            self._close()
        return sum(map(int, BUSY.findall(text))) if answer.status == 200 else 0

    def _connected(self) -> HTTPConnection:
        parts = urlsplit(self.server.url)
        host = parts.hostname or ""
        connection = HTTPConnection(host, parts.port)
        if self.server.path:
            sock = gate_server.unix_connection(self.server.path, ANSWER_SECONDS)
        else:
            sock = self._socket((host, parts.port or 0))
        connection.sock = self.server.context.wrap_socket(sock) if self.server.context else sock
        return connection

    def _socket(self, address: Tuple[str, int]) -> socket.socket:
        family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
        for _ in range(OWN_PORTS):
            port = self.next_port
            self.next_port = self.server.first_port + (port + 1 - self.server.first_port) % OWN_PORTS
            sock = socket.socket(family, socket.SOCK_STREAM)
            sock.settimeout(ANSWER_SECONDS)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("", port))
                sock.connect(address)
                return sock
            except OSError as error:
                sock.close()
                if error.errno not in (errno.EADDRINUSE, errno.EADDRNOTAVAIL):
                    raise
        raise OSError(errno.EADDRINUSE, "no source port is free")

    def _close(self) -> None:
        if self.connection is not None:
            self.connection.close()
        self.connection = None
