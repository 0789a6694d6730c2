"""The way out to the network that settings name: variables for programs that read from it.

Contract: a module, no program. It imports the standard library alone, since the operator's side imports it too; nothing
here changes the host. Python 3.8.

curl, git, pip and, by libcurl, dnf take all from the environment; apt takes the proxy from there, and certificates from
a file that $APT_CONFIG names. What a host's own settings of apt or dnf say of a proxy comes first.
"""

from __future__ import annotations

import ipaddress
from typing import Dict, List, Optional, Sequence

# Reached without a proxy, whatever the settings say.
LOCAL = ("localhost", "127.0.0.1", "::1")
# Where distributions have the public authorities' certificates: Debian and Arch, RHEL and Fedora, SUSE.
BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt",
           "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem", "/etc/ssl/ca-bundle.pem",
           "/var/lib/ca-certificates/ca-bundle.pem", "/etc/ssl/cert.pem")  # fmt: skip
# The variables by which programs find certificates, OpenSSL's own among them.
BUNDLE_VARIABLES = ("CURL_CA_BUNDLE", "SSL_CERT_FILE", "GIT_SSL_CAINFO", "GIT_PROXY_SSL_CAINFO", "PIP_CERT",
                    "REQUESTS_CA_BUNDLE")  # fmt: skip


def variables(proxy: Optional[str], no_proxy: Sequence[str], bundle: Optional[str]) -> Dict[str, str]:
    """The variables by name; `bundle` is a file with all trusted certificates. Empty where nothing is set."""
    found: Dict[str, str] = {}
    if proxy:
        found.update({name: proxy for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")})
        found.update({name: ",".join([*LOCAL, *no_proxy]) for name in ("no_proxy", "NO_PROXY")})
    if bundle:
        found.update({name: bundle for name in BUNDLE_VARIABLES})
    return found


def is_excepted(host: str, no_proxy: Sequence[str]) -> bool:
    """Whether a host is reached without the proxy: this machine, a name or a domain of the list, or in a network."""
    host = host.lower().rstrip(".")
    address = _address(host)
    if host == "localhost" or (address is not None and address.is_loopback):
        return True
    for one in no_proxy:
        if address is None and (host == one.lower().lstrip(".") or host.endswith("." + one.lower().lstrip("."))):
            return True
        if address is not None and _contains(one, address):
            return True
    return False


def _address(host: str) -> "Optional[ipaddress.IPv4Address | ipaddress.IPv6Address]":
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None


def _contains(network: str, address: "ipaddress.IPv4Address | ipaddress.IPv6Address") -> bool:
    try:
        return address in ipaddress.ip_network(network, strict=False)
    except ValueError:
        return False


def bundle(own: bytes, bundles: Sequence[str] = BUNDLES) -> bytes:
    """The public authorities' certificates of this machine, where it has them, and those that are `own`."""
    parts: List[bytes] = []
    for path in bundles:
        try:
            with open(path, "rb") as file:
                parts.append(file.read())
        except OSError:
            continue
        break
    return b"\n".join([*parts, own.strip() + b"\n"])


def apt_settings(path: str) -> str:
    """apt's settings that name the file of the trusted certificates."""
    return f'Acquire::https::CAInfo "{path}";\n'
