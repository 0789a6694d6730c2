"""The files of a repository, as a hub lists them: the Hugging Face Hub and its mirrors, and ModelScope.

What ModelScope answers is as its own client reads it (modelscope/hub/api.py: get_model_files).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlsplit

from llamafleet.hub.choice import PRESET
from llamafleet.hub.http import Web
from llamafleet.sources import DEFAULT_REVISION, Source, SourceError, shown

# A list of a repository's files, all pages together. A file takes some 300 bytes; large repositories have 2000 files.
LISTING_LIMIT_BYTES = 16 * 1024**2
LISTING_PAGES = 50
LISTED_FILES = 5000  # GGUF files of a repository
_LARGEST_FILE = 2**63 - 1
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MODELSCOPE = re.compile(r"(?:[\w-]+\.)*modelscope\.(?:cn|ai)")


@dataclass
class Listing:
    """The GGUF files of a repository, in the hub's order: sizes in bytes, and sums where they are told, by name."""

    sizes: dict[str, int] = field(default_factory=dict)
    sums: dict[str, str] = field(default_factory=dict)
    has_preset: bool = False


def is_modelscope(endpoint: str) -> bool:
    """Whether the endpoint is ModelScope, which has other addresses than the Hugging Face Hub."""
    return _MODELSCOPE.fullmatch(urlsplit(endpoint).hostname or "") is not None


def file_url(endpoint: str, source: Source, revision: str, name: str) -> str:
    """The address of a repository's file."""
    base = f"{endpoint.rstrip('/')}/models" if is_modelscope(endpoint) else endpoint.rstrip("/")
    return f"{base}/{source.repo}/resolve/{quote(_revision(endpoint, revision), safe='')}/{quote(name)}"


def list_files(web: Web, endpoint: str, source: Source) -> Listing:
    """The GGUF files of the source's repository. Raises `SourceError`."""
    revision = quote(_revision(endpoint, source.revision), safe="")
    if is_modelscope(endpoint):
        path = f"api/v1/models/{source.repo}/repo/files?Revision={revision}&Recursive=true"
    else:
        path = f"api/models/{source.repo}/tree/{revision}?recursive=1"
    url = f"{endpoint.rstrip('/')}/{path}"
    found, left = Listing(), LISTING_LIMIT_BYTES
    for _ in range(LISTING_PAGES):
        body, following = web.page(url, left)
        left -= len(body)
        for name, size, sha256 in _entries(body, url):
            _add(found, name, size, sha256, url)
        if following is None:
            return found
        url = following
    raise SourceError(f"{shown(url)}: lists files on more than {LISTING_PAGES} pages, which are not read")


def _revision(endpoint: str, revision: str) -> str:
    """ModelScope's default branch has another name."""
    return "master" if is_modelscope(endpoint) and revision == DEFAULT_REVISION else revision


def _add(found: Listing, name: str, size: object, sha256: object, url: str) -> None:
    """Add a file of the list; an entry of another form is left out."""
    found.has_preset |= name == PRESET
    if not name.lower().endswith(".gguf") or not isinstance(size, int) or isinstance(size, bool):
        return
    if not 0 <= size <= _LARGEST_FILE:
        return
    if name in found.sizes or len(found.sizes) == LISTED_FILES:
        short = name if len(name) <= 250 else name[:247] + "..."
        why = "twice" if name in found.sizes else f"after {LISTED_FILES} others, which are not read"
        raise SourceError(f"{shown(url)}: lists {short!r} {why}")
    found.sizes[name] = size
    if isinstance(sha256, str) and _SHA256.fullmatch(sha256):
        found.sums[name] = sha256


def _entries(body: bytes, url: str) -> Iterator[tuple[str, Any, Any]]:
    """Name, size and sha256 of a page's entries, as far as they have them."""
    try:
        entries = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{shown(url)}: should be a JSON list of files: {str(error)[:100]}") from error
    if isinstance(entries, dict):  # ModelScope's
        data = entries.get("Data")
        entries = data.get("Files") if isinstance(data, dict) else entries
    if not isinstance(entries, list):
        raise SourceError(f"{shown(url)}: should be a JSON list of files, is of type {type(entries).__name__}")
    for entry in entries:
        if not isinstance(entry, dict):
            continue
        lfs = entry.get("lfs")
        name = entry.get("path", entry.get("Path"))
        sha256 = lfs.get("oid") if isinstance(lfs, dict) else entry.get("Sha256")
        if isinstance(name, str):
            yield name, entry.get("size", entry.get("Size")), sha256
