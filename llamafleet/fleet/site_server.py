"""What a host of a site serves to the others: the values of nginx's configuration.

The configuration names each file by its SHA-256. A file that is not there yet gives 404, so one configuration has all
files of a run from its beginning.

Decision 25: docs/decisions/0025-one-download-for-a-site.md.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from llamafleet.remote.pieces import CREDENTIALS, LISTS, SERVER_RUN

TEMPLATE = "site-nginx.conf.j2"
# nginx reads variables, quotes and blanks in a path, and knows no way to write a dollar.
_PATH = re.compile(r"/[A-Za-z0-9_./+=-]+")
_DIGEST, _TOKEN = re.compile("[0-9a-f]{64}"), re.compile("[A-Za-z0-9_-]{32,128}")


@dataclass(frozen=True)
class SharedFile:
    """A file of this host by its SHA-256; `path` where it lies or will lie."""

    sha256: str
    path: str


def values(
    address: str, port: int, token: str, allowed: Iterable[str], files: Iterable[SharedFile]
) -> dict[str, Any]:  # fmt: skip
    """The template's values. `allowed`: addresses of the other hosts. Raises ValueError for what has no place in it."""
    by_digest = {file.sha256: file for file in files}  # instances may share a file
    for file in by_digest.values():
        if not _DIGEST.fullmatch(file.sha256) or not _PATH.fullmatch(file.path) or ".." in file.path.split("/"):
            raise ValueError(f"{file.path!r} ({file.sha256!r}) cannot be served under that name")
    if not _TOKEN.fullmatch(token):
        raise ValueError("the run's token should have 32 to 128 letters, digits, - and _")
    return {
        "listen": f"{_written(address)}:{port}",
        "allowed": sorted({str(ipaddress.ip_address(one)) for one in allowed}),
        "token": token,
        "files": list(by_digest.values()),
        "lists": LISTS,
        "run": SERVER_RUN,
        "certificate": f"{CREDENTIALS}/certificate",
        "key": f"{CREDENTIALS}/key",
    }


def _written(address: str) -> str:
    """An address as addresses with ports have it. Raises ValueError."""
    found = ipaddress.ip_address(address)
    return f"[{found}]" if found.version == 6 else str(found)
