"""SSH servers for simulated hosts: one process, an address of loopback for each host, answers from memory.

    with Servers({"127.20.0.1": answer, ...}) as servers: ...        servers.port("127.20.0.1")

`answer` takes the words of a command and gives what it prints, or None for a program that the host does not know. The
servers take every user and key: nobody but this machine reaches them.
"""

from __future__ import annotations

import contextlib
import re
import selectors
import shlex
import socket
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

import paramiko

Answer = Callable[[list[str]], str | None]
WAIT_SECONDS = 30.0  # for a channel of a client that has connected
# A word of a command as `shlex.quote` writes it, and its parts: quoted, and plain.
_WORD = re.compile(r"""(?:[^\s'"]+|'[^']*'|"[^"]*")+""")
_PART = re.compile(r"""'([^']*)'|"([^"]*)"|([^\s'"]+)""")
UNKNOWN = 127  # exit status of a shell where there is no such program


class _Transport(paramiko.Transport):
    # paramiko looks so often whether an idle connection is still wanted: a thousand of them would fill a processor.
    _active_check_timeout = WAIT_SECONDS


class _Session(paramiko.ServerInterface):
    """One client of one host."""

    def __init__(self, host: _Host) -> None:
        self.host = host

    def check_auth_none(self, username: str) -> int:
        return paramiko.AUTH_SUCCESSFUL

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        return paramiko.AUTH_SUCCESSFUL

    def get_allowed_auths(self, username: str) -> str:
        return "publickey,none"

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        threading.Thread(target=self._run, args=(channel, command.decode()), daemon=True).start()
        return True

    def _run(self, channel: paramiko.Channel, command: str) -> None:
        words = words_of(command)
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):  # the client is gone
            while channel.recv(1 << 16):  # to its end, which comes when the client knows that the command began
                pass
            printed = self.host.answer(words)
            if printed is None:
                channel.sendall_stderr(f"the simulated host does not know: {shlex.join(words)[:500]}\n".encode())
            else:
                channel.sendall(printed.encode())
            channel.send_exit_status(UNKNOWN if printed is None else 0)
            channel.close()


def words_of(command: str) -> list[str]:
    """The words of a command, without the shells and the `timeout` that pyinfra and this project put before it."""
    words = _split(command)
    while len(words) == 3 and words[:2] == ["sh", "-c"]:
        words = _split(words[2])
    if words[:2] == ["timeout", "-k"]:
        words = words[4:]
    return words


def _split(command: str) -> list[str]:
    """As `shlex.split` of what `shlex.join` made, which looks at each character alone: of a run over a thousand hosts
    that would be a third."""
    return ["".join(map("".join, _PART.findall(word))) for word in _WORD.findall(command)]


class _Host:
    def __init__(self, address: str, answer: Answer) -> None:
        self.address, self._answer, self.asked = address, answer, Counter[str]()

    def answer(self, words: list[str]) -> str | None:
        self.asked[next((word.rpartition("/")[2] for word in words if word.endswith(".py")), words[0])] += 1
        return self._answer(words)


class Servers:
    """The servers of all hosts, from the beginning to the end of the block."""

    def __init__(self, answers: Mapping[str, Answer]) -> None:
        self.key, self._ports = paramiko.ECDSAKey.generate(), dict[str, int]()
        self.hosts = {address: _Host(address, answer) for address, answer in answers.items()}
        self._listening = selectors.DefaultSelector()
        self._clients: list[socket.socket] = []
        self._stop, self._stopping = socket.socketpair()

    def __enter__(self) -> Servers:
        self._listening.register(self._stop, selectors.EVENT_READ)
        try:
            for address, host in self.hosts.items():
                made = socket.create_server((address, 0), backlog=16)
                self._ports[address] = made.getsockname()[1]
                self._listening.register(made, selectors.EVENT_READ, host)
        except OSError:
            self._close()
            raise
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.close()
        self._thread.join()
        self._close()

    def _close(self) -> None:
        for key in list(self._listening.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._listening.close()
        for client in self._clients:
            with contextlib.suppress(OSError):  # it has ended
                client.shutdown(socket.SHUT_RDWR)  # which ends its transport, too
            client.close()

    def _accept(self) -> None:
        while True:
            for key, _ in self._listening.select():
                if key.data is None:
                    return
                client, _ = key.fileobj.accept()  # type: ignore[union-attr]
                self._serve(client, key.data)

    def _serve(self, client: socket.socket, host: _Host) -> None:
        self._clients.append(client)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        transport = _Transport(client)
        transport.add_server_key(self.key)
        # With an event it returns at once: the handshake is the transport's own thread's.
        transport.start_server(event=threading.Event(), server=_Session(host))

    def port(self, address: str) -> int:
        """The port of the host at this address."""
        return self._ports[address]

    @property
    def asked(self) -> Counter[str]:
        """How often each program was run, on all hosts together."""
        return sum((host.asked for host in self.hosts.values()), Counter[str]())

    def write_known_hosts(self, path: Path) -> None:
        """The file in which clients look up the hosts' keys."""
        key = f"{self.key.get_name()} {self.key.get_base64()}"
        path.write_text("".join(f"[{address}]:{port} {key}\n" for address, port in self._ports.items()))
