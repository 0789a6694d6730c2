"""A host without a network: connections are carried into its network namespace, and out of it, one address at a time.

`Relay(listen, connect)` accepts connections at `listen` and carries each to `connect`. Both are an address, a port and
a network namespace: the path of its file, such as /proc/PID/ns/net. It ends with `close`, or with this process.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import threading
from dataclasses import dataclass, field
from typing import Any

HERE = f"/proc/{os.getpid()}/ns/net"
CLONE_NEWNET = 0x40000000  # linux/sched.h
CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class End:
    """An address in a network namespace."""

    address: str
    port: int
    namespace: str = HERE


@dataclass
class Relay:
    """See above. Raises OSError where nothing can listen there."""

    listen: End
    connect: End
    _socket: Any = field(init=False)

    def __post_init__(self) -> None:
        made: list[socket.socket | OSError] = []
        thread = threading.Thread(target=lambda: made.append(_listening(self.listen)))
        thread.start()  # a thread of its own: it does not come back from the namespace
        thread.join()
        if isinstance(made[0], OSError):
            raise made[0]
        self._socket = made[0]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Accept no more connections."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            _enter(self.connect.namespace)
            with socket.create_connection((self.connect.address, self.connect.port), CONNECT_SECONDS) as server:
                server.settimeout(None)
                join(client, server)


def _listening(end: End) -> socket.socket | OSError:
    try:
        _enter(end.namespace)
        return socket.create_server((end.address, end.port), backlog=64)
    except OSError as error:
        return error


def _enter(namespace: str) -> None:
    """Move this thread into a network namespace: setns(2). Raises OSError."""
    handle = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(handle, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), namespace)
    finally:
        os.close(handle)


def join(one: Any, other: Any) -> None:
    """Carry bytes both ways between two connected sockets, until both have ended."""
    back = threading.Thread(target=_pump, args=(other, one), daemon=True)
    back.start()
    _pump(one, other)
    back.join()


def _pump(one: Any, other: Any) -> None:
    with contextlib.suppress(OSError, ValueError):
        while data := one.recv(1 << 16):
            other.sendall(data)
    with contextlib.suppress(OSError, ValueError):
        other.shutdown(socket.SHUT_WR)
