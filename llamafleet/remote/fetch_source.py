"""One host of the site that is asked for a file: its connection, its list of pieces, its pieces.

Part of fetch.py and under its contract: Python 3.8, standard library, what lies beside it. By TLS with the certificate
that the spec names, and with its token; without proxy, redirect or another name than the peer's address.

Decision 25: docs/decisions/0025-one-download-for-a-site.md.
"""

from __future__ import annotations

import hashlib
import http.client
import ssl
import time
from dataclasses import dataclass, field
from typing import Callable, List, Optional

import pieces
from fetch_spec import Peer, Wanted

# A peer of the same site answers in milliseconds: after so many seconds without a byte it is left.
STALL_S = 10.0
# Seconds for one piece: a peer that needs longer brings less than a slow line from the origin would.
PIECE_S = 60.0
BLOCK_BYTES = 256 * 1024
# What http.client raises where an answer does not come, or cannot be read.
BROKEN = (OSError, http.client.HTTPException, ValueError)


class Damaged(Exception):
    """A peer's bytes are not what they should be."""


class Away(Exception):
    """A peer does not answer, or not with what was asked for."""


@dataclass
class Source:
    """A peer with a connection, in its own thread."""

    peer: Peer
    context: ssl.SSLContext
    token: str = field(repr=False)
    connection: Optional[http.client.HTTPSConnection] = None

    def get(self, path: str, first: int, count: int) -> http.client.HTTPResponse:
        """The answer to a request; with a count, of that many bytes from `first`. Raises Away."""
        headers = {"Authorization": f"Bearer {self.token}", "User-Agent": "llamafleet"}
        if count:
            headers["Range"] = f"bytes={first}-{first + count - 1}"
        if self.connection is None:
            self.connection = http.client.HTTPSConnection(
                self.peer.address, self.peer.port, timeout=STALL_S, context=self.context
            )
        try:
            self.connection.request("GET", path, headers=headers)
            answer = self.connection.getresponse()
        except BROKEN as error:
            raise Away(str(error) or type(error).__name__) from None
        if answer.status != (206 if count else 200):
            raise Away(f"it answered {answer.status}")
        if count and answer.length != count:
            raise Away(f"it sends {answer.length} bytes for a range of {count}")
        return answer

    def listed(self, wanted: Wanted) -> List[str]:
        """The sums of the file's pieces. Raises Away and Damaged."""
        assert wanted.sha256 is not None
        assert wanted.size_bytes is not None
        most = pieces.most_bytes(wanted.size_bytes)
        answer = self.get(f"/{wanted.sha256}.pieces", 0, 0)
        try:
            data = answer.read(most + 1)
        except BROKEN as error:
            raise Away(str(error) or type(error).__name__) from None
        if len(data) > most:
            raise Damaged(f"its list of pieces has more than {most} bytes")
        try:
            return pieces.read(data, wanted.sha256, wanted.size_bytes)
        except ValueError as error:
            raise Damaged(f"its list of pieces: {error}") from None

    def piece(self, wanted: Wanted, number: int, expected: str, is_needed: Callable[[], bool]) -> Optional[bytes]:
        """The bytes of a piece that should have this sha256; None where it is not needed any more. Raises Away and
        Damaged."""
        end = time.monotonic() + PIECE_S
        assert wanted.size_bytes is not None
        count = pieces.length(number, wanted.size_bytes)
        answer = self.get(f"/{wanted.sha256}", number * pieces.PIECE_BYTES, count)
        data, digest = bytearray(), hashlib.sha256()
        try:
            while len(data) < count:
                block = answer.read(min(BLOCK_BYTES, count - len(data)))
                if not block:
                    raise Away(f"it ended at byte {number * pieces.PIECE_BYTES + len(data)}")
                data += block
                digest.update(block)
                if not is_needed():
                    self.close()
                    return None
                if time.monotonic() > end:
                    raise Away(f"it brought {len(data)} bytes in {PIECE_S:.0f} s")
        except BROKEN as error:
            raise Away(str(error) or type(error).__name__) from None
        if digest.hexdigest() != expected:
            raise Damaged(f"bytes {number * pieces.PIECE_BYTES} to {number * pieces.PIECE_BYTES + count - 1} are not "
                          "those that it listed")  # fmt: skip
        return bytes(data)

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None
