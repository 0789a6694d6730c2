"""The checked spec of fetch.py, and the errors with which it can fail.

Part of fetch.py and under its contract: Python 3.8, standard library, what lies beside it.
"""

from __future__ import annotations

import ipaddress
import json
import os
import pwd
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from common import ADDRESS_RULE, MODEL_FILE_RULE, is_address, is_model_file, keeps_secrets

BAD_SPEC, NO_SPACE, MISMATCH, NOT_ALLOWED, NOT_FOUND, NETWORK, NOT_GGUF, ASK_AGAIN = 2, 3, 4, 5, 6, 7, 8, 9
SPEC_LIMIT_BYTES = 16 * 2**20  # 1024 shards with ten addresses each have less
SECRET_LIMIT_BYTES = 64 * 2**10
# Of a build that a host of the site has made (build.py).
ARCHIVE = re.compile(r"[0-9a-f]{16}-[0-9a-f]{64}\.tar")
LARGEST = 2**63 - 1  # of a signed file offset
MOST_PEERS = 16  # each has a thread and some pieces in memory


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
    unverified: bool = False  # the operator said that it may do without a known sha256


@dataclass(frozen=True)
class Peer:
    """A host of the site that serves the files."""

    name: str
    address: str
    port: int


@dataclass(frozen=True)
class Peers:
    """The hosts that are asked, and by what they know us and we know them."""

    hosts: tuple[Peer, ...]
    seconds: float
    token: str = field(repr=False)
    certificate: str


@dataclass(frozen=True)
class Spec:
    """What to do, checked; fetch.py's docstring says what each key means."""

    directory: Path
    files: tuple[Wanted, ...]
    store: str | None = None
    owner: str | None = None
    curl_config: str | None = None
    token_origin: str = "https://huggingface.co"  # noqa: S105 -- an address, not a token
    reserve_bytes: int = 2**30
    attempts: int = 10  # with the waits doubling from 2 s to 60 s: about five minutes of silence
    retry_delay_s: float = 2.0
    stall_bytes_per_s: int = 1024
    stall_s: int = 60
    seconds: float = 7 * 86400.0
    peers: Peers | None = None
    secret: str = field(default="", repr=False)  # what `curl_config` says

    def partial(self, wanted: Wanted) -> Path:
        return self.directory / f".{wanted.name}.partial"

    def final(self, wanted: Wanted) -> Path:
        return self.directory / wanted.name

    def sidecar(self, wanted: Wanted) -> Path:
        return self.directory / f"{wanted.name}.verified"


def shown(url: str) -> str:
    """The address for messages: without its query, which may be a signature, and not longer than a line or two."""
    plain = url.split("?", 1)[0].split("#", 1)[0]
    return plain if len(plain) <= 250 else plain[:247] + "..."


def without_queries(text: str) -> str:
    """A text of others for messages: what may be the query of an address is cut off."""
    return re.sub(r"\?\S*", "", text)


def refuse(path: str, want: str, got: object) -> NoReturn:
    """Say what a key should be; of its value only what is short and has no query."""
    text = repr(got) if isinstance(got, (str, int, float, type(None))) and not is_huge(got) else type(got).__name__
    raise Failed(BAD_SPEC, f"spec: {path} should be {want}, but is {without_queries(text)[:200]}")


def is_huge(value: object) -> bool:
    """Whether it is a number of more digits than Python prints."""
    return isinstance(value, int) and abs(value) > LARGEST


def read_spec(path: str) -> Spec:
    """The checked spec. Raises Failed with BAD_SPEC, naming the key at fault."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(SPEC_LIMIT_BYTES + 1)
        if len(text) > SPEC_LIMIT_BYTES:
            raise ValueError(f"it has more than {SPEC_LIMIT_BYTES} bytes")
        data = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise Failed(BAD_SPEC, f"spec {path} cannot be read: {str(error)[:200]}") from None
    if not isinstance(data, dict):
        refuse("the whole", "a JSON object", data)
    known = set(Spec.__dataclass_fields__) - {"secret"}
    for key in sorted(set(data) - known):
        raise Failed(BAD_SPEC, f"spec: unknown key {key[:80]!r}; known are {', '.join(sorted(known))}")
    check_scalars(data)
    if not isinstance(data.get("files"), list) or not data["files"]:
        refuse("files", "a list of at least one file", data.get("files"))
    files = tuple(read_file_entry(entry, f"files[{index}]") for index, entry in enumerate(data["files"]))
    names = [wanted.name for wanted in files]
    if len(set(names)) != len(names):
        refuse("files", "files of different names", max(names, key=names.count))
    secret = read_secret(data.get("curl_config"), data.get("token_origin", Spec.token_origin))
    peers = read_peers(data["peers"], files) if data.get("peers") is not None else None
    return Spec(**{**data, "directory": Path(data["directory"]), "files": files, "secret": secret, "peers": peers})


def read_peers(data: object, files: tuple[Wanted, ...]) -> Peers:
    """The checked peers, with what the file `access` has. Raises Failed."""
    if not isinstance(data, dict) or set(data) != {"hosts", "access", "seconds"}:
        refuse("peers", "an object of hosts, access and seconds", data)
    hosts, seconds = data["hosts"], data["seconds"]
    if not isinstance(hosts, list) or not 0 < len(hosts) <= MOST_PEERS:
        refuse("peers.hosts", f"a list of 1 to {MOST_PEERS} hosts", hosts)
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds <= LARGEST:
        refuse("peers.seconds", "a number above 0", seconds)
    unknown = [wanted.name for wanted in files if None in (wanted.size_bytes, wanted.sha256)]
    if unknown:
        refuse("files", "files of known size and sha256, since peers are not believed", unknown[0])
    found = tuple(read_peer(entry, f"peers.hosts[{index}]") for index, entry in enumerate(hosts))
    if len({peer.name for peer in found}) != len(found):
        refuse("peers.hosts", "hosts of different names", found[0].name)
    try:
        access = json.loads(read_private(data["access"], "peers.access"))
        token, certificate = access["token"], access["certificate"]
        is_sound = re.fullmatch(r"[A-Za-z0-9_-]{32,128}", token) is not None and isinstance(certificate, str)
    except (ValueError, TypeError, KeyError, RecursionError):
        is_sound = False
    if not is_sound:
        raise Failed(
            BAD_SPEC, f"spec: the file of peers.access, {data['access']}, should have a token and a certificate"
        )
    return Peers(found, float(seconds), token, certificate)


def read_peer(entry: object, path: str) -> Peer:
    if not isinstance(entry, dict) or set(entry) != {"name", "address", "port"}:
        refuse(path, "an object of name, address and port", entry)
    name, address, port = entry["name"], entry["address"], entry["port"]
    if not isinstance(name, str) or not re.fullmatch(r"[!-~]{1,253}", name):
        refuse(f"{path}.name", "1 to 253 printable characters without blanks", name)
    if not isinstance(address, str) or not is_ip_address(address):
        refuse(f"{path}.address", "an IP address", address)
    if isinstance(port, bool) or not isinstance(port, int) or not 0 < port < 65536:
        refuse(f"{path}.port", "a port from 1 to 65535", port)
    return Peer(name, address, port)


def is_ip_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def read_secret(path: object, origin: str) -> str:
    """The curl config with the token, from a file that its owner alone may read; empty where there is none."""
    if path is None:
        return ""
    if not keeps_secrets(origin):
        refuse("token_origin", "an https address, since others could read the token on its way", origin)
    return read_private(path, "curl_config")


def read_private(path: object, key: str) -> str:
    """The text of a file that its owner alone may read. Raises Failed."""
    if not isinstance(path, str):
        refuse(key, "the path of a file, or null", path)
    try:
        with open(path, encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                refuse(key, "the path of a file, or null", path)
            if mode & 0o077:
                refuse(key, f"readable by its owner only ({path}: chmod 0600)", oct(mode))
            return file.read(SECRET_LIMIT_BYTES)
    except (OSError, ValueError):
        refuse(key, "the path of a readable file, or null", path)


def check_scalars(data: dict[str, Any]) -> None:
    for key in ("directory", *(["store"] if data.get("store") is not None else [])):
        path = data.get(key)
        parts = path.split("/") if isinstance(path, str) and "\0" not in path else [".."]
        if parts[0] or ".." in parts:
            refuse(key, "an absolute path without '..'", path)
    for key in ("reserve_bytes", "attempts", "stall_bytes_per_s", "stall_s", "retry_delay_s", "seconds"):
        value = data.get(key, 1)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not (key == "attempts") <= value <= LARGEST:  # not a number (NaN) fails both
            refuse(key, f"a number from 0 (attempts: 1) to {LARGEST}", value)
    origin = data.get("token_origin", Spec.token_origin)
    if not is_address(origin):
        refuse("token_origin", "an origin such as https://huggingface.co", origin)
    owner = data.get("owner")
    try:
        if owner is not None:
            pwd.getpwnam(owner)
    except (KeyError, TypeError, ValueError):
        refuse("owner", "a user of this host, or null", owner)


def is_file(url: object) -> bool:
    """Whether it is the address of a file of this host."""
    return isinstance(url, str) and re.fullmatch(r"file:///[^\x00?#]+", url) is not None


def read_file_entry(entry: object, path: str) -> Wanted:
    if not isinstance(entry, dict) or set(entry) - {"name", "urls", "size_bytes", "sha256", "unverified"}:
        refuse(path, "an object of name, urls, size_bytes, sha256 and unverified", entry)
    name, urls, size, digest = (entry.get(key) for key in ("name", "urls", "size_bytes", "sha256"))
    if not isinstance(name, str) or not (is_model_file(name) or ARCHIVE.fullmatch(name)):
        refuse(f"{path}.name", f"a file name of {MODEL_FILE_RULE}", name)
    if not isinstance(urls, list) or not (urls or digest):
        refuse(f"{path}.urls", "a list of at least one address", urls)
    for url in urls:
        if not is_address(url) and not is_file(url):
            refuse(f"{path}.urls", ADDRESS_RULE, shown(url) if isinstance(url, str) else url)
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or not 0 < size <= LARGEST):
        refuse(f"{path}.size_bytes", "a count of bytes, or null", size)
    if digest is not None and (not isinstance(digest, str) or not re.fullmatch(r"[0-9a-fA-F]{64}", digest)):
        refuse(f"{path}.sha256", "64 hex digits, or null", digest)
    unverified = entry.get("unverified", False)
    if digest is None and unverified is not True:
        refuse(f"{path}.sha256", "64 hex digits; or say that the file is `unverified`: true", digest)
    return Wanted(name, tuple(urls), size, digest.lower() if digest else None, unverified is True)
