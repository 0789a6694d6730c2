"""Connections with a deadline, on requests and urllib3.

`requests` limits how long a server may be silent, not how long an answer may take: a byte now and then keeps it waiting
for ever. Here every connection of a session is shut down at the session's deadline, whatever it is doing: a TLS
handshake, headers, a body. What waits for it then fails. (Connections by a SOCKS proxy have requests' limit alone.)

A module of its own, because importing requests takes a quarter of the start of `llamafleet plan`.
"""

from __future__ import annotations

import contextlib
import ssl
import threading
import weakref
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError

from llamafleet.hub.network import Network

# All that a request or the reading of its body may raise; requests' errors are OSErrors. A ValueError is of an address
# or a header that requests or urllib3 do not understand, UnicodeError among them.
FAILURES = (OSError, HTTPError, ValueError)


class Session(requests.Session):
    """A session whose connections end at a deadline. It follows no redirect and reads no password.

    `seconds_left`: until the deadline; `network`: the proxy and the certificates. Without a proxy there those of the
    environment are used. Raises `SourceError` for unusable certificates.
    """

    def __init__(self, seconds_left: Callable[[], float], network: Network) -> None:
        super().__init__()
        self._network = network
        self._seconds_left = seconds_left
        self._connecting: dict[object, Any] = {}  # by connection, a socket that is not connected by TLS yet
        self._connected: weakref.WeakSet[Any] = weakref.WeakSet()  # sockets that somebody may read from
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self.auth = _no_password
        self.headers["Accept-Encoding"] = "identity"  # a compressed body would not be the file's bytes
        for scheme in ("http://", "https://"):
            self.mount(scheme, _Adapter(self, _trusting(network.certificates())))

    def request(self, method: Any, url: Any, *args: Any, **options: Any) -> requests.Response:
        """As requests does it, by the network's proxy. Where that is not used, an empty one keeps the environment's
        away."""
        if self._network.proxy is not None:
            proxy = "" if self._network.is_direct(urlsplit(url).hostname or "") else self._network.proxy
            options["proxies"] = {"http": proxy, "https": proxy}
        return super().request(method, url, *args, **options)

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """None: requests would read the whole body of a redirect, of any length, even where it follows none."""
        return None

    def connecting(self, connection: object, sock: Any) -> None:
        """End this connection at the deadline. TLS takes the socket's descriptor over: until then we have a second."""
        with self._lock:
            self._connecting[connection] = sock.dup()
        if self._timer is None:
            self._timer = threading.Timer(self._seconds_left(), self._end)
            self._timer.daemon = True
            self._timer.start()

    def connected(self, connection: object, sock: Any) -> None:
        """From now on it is this socket that is to be ended; None where the connection failed."""
        with self._lock:
            if (second := self._connecting.pop(connection, None)) is not None:
                second.close()
            if sock is not None:
                self._connected.add(sock)

    def close(self) -> None:
        """End all connections and the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        super().close()

    def _end(self) -> None:
        with self._lock:
            for sock in [*self._connecting.values(), *self._connected]:
                with contextlib.suppress(OSError):  # it has ended already
                    sock.shutdown(2)  # SHUT_RDWR: whoever reads or writes there wakes up


def _no_password(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Otherwise requests reads passwords from ~/.netrc."""
    return request


class _Adapter(HTTPAdapter):
    """Makes pools whose connections are watched, also those by a proxy."""

    def __init__(self, session: Session, context: ssl.SSLContext | None) -> None:
        self._pools = _pools(session)
        self._context: dict[str, Any] = {} if context is None else {"ssl_context": context}
        super().__init__()

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        options |= self._context
        super().init_poolmanager(*args, **options)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        context = self._context | ({"proxy_ssl_context": self._context["ssl_context"]} if self._context else {})
        manager = super().proxy_manager_for(proxy, **options, **context)
        if not proxy.lower().startswith("socks"):  # its connections are of another kind
            manager.pool_classes_by_scheme = self._pools
        return manager


def _trusting(certificates: str) -> ssl.SSLContext | None:
    """A context that trusts these beside the public ones; None where there are none."""
    if not certificates:
        return None
    context = ssl.create_default_context()
    context.load_verify_locations(requests.utils.DEFAULT_CA_BUNDLE_PATH)
    context.load_verify_locations(cadata=certificates)
    return context


def _pools(session: Session) -> dict[str, type[HTTPConnectionPool]]:
    class Watched:
        """A connection of urllib3, which the session ends at its deadline."""

        sock: Any

        def _new_conn(self) -> Any:
            sock = super()._new_conn()  # type: ignore[misc]
            session.connecting(self, sock)
            return sock

        def connect(self) -> None:
            try:
                super().connect()  # type: ignore[misc]
            finally:
                session.connected(self, self.sock)

    class Plain(Watched, HTTPConnection):
        pass

    class Encrypted(Watched, HTTPSConnection):
        pass

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class EncryptedPool(HTTPSConnectionPool):
        ConnectionCls = Encrypted

    return {"http": PlainPool, "https": EncryptedPool}
