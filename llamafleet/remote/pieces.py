"""The list of a file's pieces, by which a host can tell which of several others sent damaged bytes; and the places of
the server that gives them.

Contract: a module, no program. The list of a file is JSON, {"schema": 1, "sha256": of the whole file, "size_bytes",
"piece_bytes", "pieces": [sha256 of each piece, the last one shorter]}. It is made by a host that has verified the file,
and it is only that host's word: what the file has to be is known from elsewhere. Python 3.8, standard library.

Decision 25: docs/decisions/0025-one-download-for-a-site.md.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import List, Tuple

SERVER = "llamafleet-share.service"  # serves files to the other hosts of the site while a run lasts
BUILDS = "/var/lib/llamafleet/builds"  # archives of releases, while other hosts take them
LISTS = "/run/llamafleet/share"  # the lists of the files that it serves
SERVER_RUN = "/run/llamafleet-share"  # what nginx writes: its RuntimeDirectory
CREDENTIALS = f"/run/credentials/{SERVER}"
MIB = 1 << 20
SCHEMA = 1
PIECE_BYTES = 8 * MIB
# Of a list: a digest with quotes and comma for each piece, and what comes before.
_BYTES_FOR_PIECE, _BYTES_BESIDE = 72, 1024
_DIGEST = re.compile("[0-9a-f]{64}")


def count(size_bytes: int) -> int:
    """How many pieces a file of this size has."""
    return -(-size_bytes // PIECE_BYTES)


def length(number: int, size_bytes: int) -> int:
    """Bytes of one piece."""
    return min(PIECE_BYTES, size_bytes - number * PIECE_BYTES)


def most_bytes(size_bytes: int) -> int:
    """The most that the list of such a file may have."""
    return _BYTES_BESIDE + _BYTES_FOR_PIECE * count(size_bytes)


def of(path: str) -> Tuple[str, List[str]]:
    """The sha256 of a file and those of its pieces, read once. Raises OSError."""
    whole, each = hashlib.sha256(), []
    with open(path, "rb") as file:
        for piece in iter(lambda: file.read(PIECE_BYTES), b""):
            whole.update(piece)
            each.append(hashlib.sha256(piece).hexdigest())
    return whole.hexdigest(), each


def text(sha256: str, size_bytes: int, sums: List[str]) -> str:
    content = {"schema": SCHEMA, "sha256": sha256, "size_bytes": size_bytes, "piece_bytes": PIECE_BYTES, "pieces": sums}
    return json.dumps(content, separators=(",", ":")) + "\n"


def read(data: bytes, sha256: str, size_bytes: int) -> List[str]:
    """The sums of the pieces of a file with this sum and size. Raises ValueError where the list is another."""
    try:
        content = json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    expected = {"schema": SCHEMA, "sha256": sha256, "size_bytes": size_bytes, "piece_bytes": PIECE_BYTES}
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    for key, value in expected.items():
        if type(content.get(key)) is not type(value) or content[key] != value:
            raise ValueError(f"its {key} is {content.get(key)!r:.80}, should be {value!r}")
    sums = content.get("pieces")
    if not isinstance(sums, list) or len(sums) != count(size_bytes):
        raise ValueError(f"it should have {count(size_bytes)} pieces")
    for one in sums:
        if not isinstance(one, str) or not _DIGEST.fullmatch(one):
            raise ValueError(f"{one!r:.80} is no sha256")
    return sums
