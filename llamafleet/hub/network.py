"""The way out to the network that settings name: a proxy, and certificates of a company's own authority.

Jobs on hosts have the same by `llamafleet/remote/network.py`.
"""

from __future__ import annotations

import atexit
import functools
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from llamafleet.remote import network
from llamafleet.sources import SourceError

LARGEST_BYTES = 4 * 2**20  # a bundle of all public authorities has 0.2 MB


@dataclass(frozen=True)
class Network:
    """`proxy`: the address of an HTTP proxy; `no_proxy`: names and networks that are reached without it; `ca_file`: a
    path of this machine, of PEM certificates that are trusted beside the public ones."""

    proxy: str | None = None
    no_proxy: Sequence[str] = ()
    ca_file: str | None = None

    @property
    def is_set(self) -> bool:
        """Whether programs on hosts need to be told anything."""
        return self.proxy is not None or self.ca_file is not None

    def certificates(self) -> str:
        """The certificates of `ca_file`, PEM; empty without one. Raises `SourceError`."""
        import ssl  # it takes a while to load, and few name a file

        if self.ca_file is None:
            return ""
        path = Path(self.ca_file).expanduser()
        try:
            with path.open(encoding="utf-8", errors="replace") as file:
                blocks = "\n".join(_blocks(file.read(LARGEST_BYTES))) + "\n"
            ssl.create_default_context().load_verify_locations(cadata=blocks)
        except (OSError, ValueError) as error:  # an SSLError is an OSError
            reason = "it has no certificate in PEM form"
            if isinstance(error, OSError) and not isinstance(error, ssl.SSLError):
                reason = error.strerror or str(error)
            raise SourceError(f"ca_file: {path}: {reason}: name a file of PEM certificates on your machine") from error
        return blocks

    def is_direct(self, host: str) -> bool:
        """Whether this host is reached without the proxy."""
        return self.proxy is None or network.is_excepted(host, self.no_proxy)

    def environment(self) -> dict[str, str]:
        """This process' environment for programs that read from the network: git and pip. Raises `SourceError`."""
        bundle = _bundle(self.certificates()) if self.ca_file else None
        return {**os.environ, **network.variables(self.proxy, self.no_proxy, bundle)}

    def advice(self, url: str) -> str:
        """What to check where an address cannot be reached."""
        if self.is_direct(urlsplit(url).hostname or ""):
            return "check address and network"
        return f"check the address, and whether the proxy {self.proxy} lets it through"


@functools.cache
def _bundle(certificates: str) -> str:
    """The path of a file with the public certificates and these; it is there until this process ends."""
    handle, path = tempfile.mkstemp(prefix="llamafleet-ca-", suffix=".pem")
    with os.fdopen(handle, "wb") as file:
        file.write(network.bundle(certificates.encode()))
    atexit.register(Path(path).unlink, missing_ok=True)
    return path


def _blocks(text: str) -> Iterator[str]:
    """The certificates of a PEM file, without what stands between them, which may be in any alphabet."""
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    for block in text.split(begin)[1:]:
        body, mark, _ = block.partition(end)
        if mark:
            yield begin + body + end
