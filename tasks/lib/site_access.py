"""What the hosts of a site know each other by in one run: their addresses, a certificate and a token.

Both are made anew for each run and kept in its memory alone.

Decision 25: docs/decisions/0025-one-download-for-a-site.md.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

# A run's certificate: hosts' clocks may differ by a day, and no download takes longer than a week.
EARLIER, LATER = datetime.timedelta(days=1), datetime.timedelta(days=8)


@dataclass(frozen=True)
class Access:
    """A site in this run: `addresses` are IP addresses by host."""

    addresses: Mapping[str, str]
    port: int
    token: str = field(repr=False)
    certificate: str = field(repr=False)
    key: str = field(repr=False)

    @classmethod
    def made(cls, addresses: Mapping[str, str], port: int) -> Access:
        """Raises ValueError where an address is none."""
        certificate, key = self_signed(sorted(set(addresses.values())))
        return cls(addresses, port, secrets.token_urlsafe(32), certificate, key)

    def others(self, host: str) -> tuple[str, ...]:
        """The addresses from which the other hosts come."""
        found = {address for name, address in self.addresses.items() if name != host}
        # Hosts on one machine have addresses of its loopback, and all come from the first of them.
        here = {"127.0.0.1"} if ipaddress.ip_address(self.addresses[host]).is_loopback else set()
        return tuple(sorted(found | here))

    def for_clients(self) -> str:
        """The file with which `llamafleet/remote/fetch.py` asks its peers."""
        return json.dumps({"token": self.token, "certificate": self.certificate})

    def for_server(self, configuration: str) -> str:
        """The file with which `llamafleet/remote/share.py` starts the server."""
        return json.dumps({"nginx.conf": configuration, "certificate": self.certificate, "key": self.key})


def self_signed(addresses: list[str]) -> tuple[str, str]:
    """A certificate for servers at these addresses that nobody else signs, and its key, as PEM."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hosts of a llamafleet run")])
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(one)) for one in addresses])
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now - EARLIER).not_valid_after(now + LATER)
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return made.public_bytes(Encoding.PEM).decode(), private.decode()


def resolved(name: str) -> str | None:
    """The IP address of a name or address, as this machine knows it; None where it knows none, or where it is this
    machine's own and so leads other hosts elsewhere."""
    try:
        found = ipaddress.ip_address(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except (OSError, ValueError, UnicodeError):
        return None
    # Hosts on one machine, such as containers, have addresses of its loopback of their own.
    return None if str(found) in ("127.0.0.1", "::1") or found.is_link_local else str(found)
