"""The checked spec of fetch.py, and the errors with which it can fail.

Part of fetch.py and under its contract: Python 3.8, standard library, what lies beside it.
"""

from __future__ import annotations

import json
import pwd
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

BAD_SPEC, NO_SPACE, MISMATCH, NOT_ALLOWED, NOT_FOUND, NETWORK, NOT_GGUF = 2, 3, 4, 5, 6, 7, 8
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=-]{0,200}\.gguf")
ADDRESS = re.compile(r"https?://[^\s\"\\\x00-\x20\x7f@]+")


class Failed(Exception):
    """No use trying this address again; `code` is the exit code it stands for."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Again(Failed):
    """Worth another attempt, after `wait_s` seconds if the server said so."""

    def __init__(self, code: int, text: str, wait_s: float | None = None) -> None:
        super().__init__(code, text)
        self.wait_s = wait_s


class Nameless(Again):
    """The server's name cannot be resolved: a moment's trouble in the middle, but a wrong host at the start."""


@dataclass(frozen=True)
class Wanted:
    """One file: where it comes from and, where known, what it has to be."""

    name: str
    urls: tuple[str, ...]
    size_bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Spec:
    """What to do, checked; fetch.py's docstring says what each key means."""

    directory: Path
    files: tuple[Wanted, ...]
    owner: str | None = None
    curl_config: str | None = None
    token_origin: str = "https://huggingface.co"  # noqa: S105 -- an address, not a token
    reserve_bytes: int = 2**30
    attempts: int = 10  # with the waits doubling from 2 s to 60 s: about five minutes of silence
    retry_delay_s: float = 2.0
    stall_bytes_per_s: int = 1024
    stall_s: int = 60

    def partial(self, wanted: Wanted) -> Path:
        return self.directory / f".{wanted.name}.partial"

    def final(self, wanted: Wanted) -> Path:
        return self.directory / wanted.name

    def sidecar(self, wanted: Wanted) -> Path:
        return self.directory / f"{wanted.name}.verified"


def is_address(text: object) -> bool:
    """May curl and `urlsplit` have it? The latter raises on a bad port or a bracket that is not closed."""
    if not isinstance(text, str) or not ADDRESS.fullmatch(text):
        return False
    try:
        urlsplit(text).port  # noqa: B018 -- reading it is the check: from 0 to 65535, or ValueError
    except ValueError:
        return False
    return True


def shown(url: str) -> str:
    """The address without its query, which may be a signature."""
    return url.split("?", 1)[0].split("#", 1)[0]


def refuse(path: str, want: str, got: object) -> NoReturn:
    raise Failed(BAD_SPEC, f"spec: {path} should be {want}, but is {got!r}")


def read_spec(path: str) -> Spec:
    """The checked spec. Raises Failed with BAD_SPEC, naming the key at fault."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Failed(BAD_SPEC, f"spec {path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        refuse("the whole", "a JSON object", type(data).__name__)
    known = set(Spec.__dataclass_fields__)
    for key in sorted(set(data) - known):
        raise Failed(BAD_SPEC, f"spec: unknown key {key!r}; known are {', '.join(sorted(known))}")
    check_scalars(data)
    if not isinstance(data.get("files"), list) or not data["files"]:
        refuse("files", "a list of at least one file", data.get("files"))
    files = tuple(read_file_entry(entry, f"files[{index}]") for index, entry in enumerate(data["files"]))
    names = [wanted.name for wanted in files]
    if len(set(names)) != len(names):
        refuse("files", "files of different names", names)
    return Spec(**{**data, "directory": Path(data["directory"]), "files": files})


def check_scalars(data: dict[str, Any]) -> None:
    directory = data.get("directory")
    if not isinstance(directory, str) or not directory.startswith("/") or ".." in directory.split("/"):
        refuse("directory", "an absolute path without '..'", directory)
    for key in ("reserve_bytes", "attempts", "stall_bytes_per_s", "stall_s", "retry_delay_s"):
        value = data.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < (key == "attempts"):
            refuse(key, "a number, not negative (attempts: at least 1)", value)
    origin = data.get("token_origin", Spec.token_origin)
    if not is_address(origin):
        refuse("token_origin", "an origin such as https://huggingface.co", origin)
    owner, config = data.get("owner"), data.get("curl_config")
    try:
        if owner is not None:
            pwd.getpwnam(owner)
    except (KeyError, TypeError):
        refuse("owner", "a user of this host, or null", owner)
    if config is not None and (not isinstance(config, str) or not Path(config).is_file()):
        refuse("curl_config", "the path of a file, or null", config)
    if config is not None and Path(config).stat().st_mode & 0o077:
        refuse(
            "curl_config",
            f"readable by its owner only ({config}: chmod 0600)",
            oct(Path(config).stat().st_mode),
        )


def read_file_entry(entry: object, path: str) -> Wanted:
    if not isinstance(entry, dict) or set(entry) - {"name", "urls", "size_bytes", "sha256"}:
        refuse(path, "an object of name, urls, size_bytes and sha256", entry)
    name, urls, size, digest = (entry.get(key) for key in ("name", "urls", "size_bytes", "sha256"))
    if not isinstance(name, str) or not NAME.fullmatch(name):
        refuse(f"{path}.name", "a plain file name that ends in .gguf", name)
    if not isinstance(urls, list) or not urls:
        refuse(f"{path}.urls", "a list of at least one address", urls)
    for url in urls:
        if not is_address(url):
            refuse(f"{path}.urls", "http(s) addresses without blanks, quotes or passwords", shown(str(url)))
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        refuse(f"{path}.size_bytes", "a count of bytes, or null", size)
    if digest is not None and (not isinstance(digest, str) or not re.fullmatch(r"[0-9a-fA-F]{64}", digest)):
        refuse(f"{path}.sha256", "64 hex digits, or null", digest)
    return Wanted(name, tuple(urls), size, digest.lower() if digest else None)
