"""The source of a model: a path, a URL, or a file of the Hugging Face Hub.

`resolve` lists all files of a model with size, sha256 and commit, without a download. `read_header` then reads the GGUF
header by range requests.

Decision 20: docs/decisions/0020-what-comes-from-outside-is-bounded.md.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from llamafleet.hub.http import Deadline, SourceError, Web, origin, shown
from llamafleet.model import gguf
from llamafleet.remote.common import (
    ADDRESS_RULE,
    MODEL_FILE_RULE,
    file_name,
    is_address,
    is_model_file,
    whole_number,
)

__all__ = [
    "HttpSource",
    "ModelFiles",
    "RemoteFile",
    "Source",
    "SourceError",
    "parse",
    "quantisations",
    "read_header",
    "resolve",
    "siblings",
]

DEFAULT_REVISION = "main"
# A list of a repository's files, all pages together. A file takes some 300 bytes; large repositories have 2000 files.
LISTING_LIMIT_BYTES = 16 * 1024**2
LISTING_PAGES = 50
LISTED_FILES = 5000  # GGUF files of a repository
_LARGEST_FILE = 2**63 - 1
_REPO = r"hf:(?P<repo>[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*)"
_REVISION = r"(?:@(?P<revision>[^@]+))?"
_HUB = re.compile(rf"{_REPO}/(?P<file>[^@]+?){_REVISION}", re.ASCII)
_REPOSITORY = re.compile(rf"{_REPO}{_REVISION}", re.ASCII)
_COMMIT = re.compile(r"[0-9A-Za-z._-]{1,64}")
# GGUF files that are not language models: image encoders, importance matrices, vocabularies.
_NO_MODEL = re.compile(r"(?:^|[/._-])(?:mmproj|imatrix|vocab)(?:[/._-]|$)", re.IGNORECASE)
_RESOLVE = re.compile(r"/(?P<repo>[\w.-]+/[\w.-]+)/(?:resolve|blob)/(?P<revision>[^/]+)/(?P<file>.+)", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Source:
    """The parts of a model's source. `kind`: "path", "url" or "hub"; `file`: the path, the URL or the file name."""

    kind: str
    file: str
    repo: str = ""
    revision: str = DEFAULT_REVISION


@dataclass(frozen=True)
class RemoteFile:
    """A file of a model, with all that a download needs. `token_origin`: the only origin that gets the token."""

    name: str
    url: str
    size_bytes: int | None
    sha256: str | None = None
    commit: str | None = None
    mirrors: tuple[str, ...] = ()
    token_origin: str | None = None
    failed: str = ""  # of a mirror's file: why it is not the source's


@dataclass(frozen=True)
class ModelFiles:
    """A model that can be downloaded: its files in order, and its header."""

    files: tuple[RemoteFile, ...]
    header: gguf.Header
    # On a host that has the files already, from when no sha256 was known of them: their folder there.
    kept_folder: str | None = None
    # Names of files that the host serves, and whose sha256 became known only after it noted them in plan.json.
    noted_without_sum: frozenset[str] = frozenset()

    @property
    def folder(self) -> str:
        """Name of the model's folder on a host. It depends on the content: a model that changes at its source gets
        another folder, and the files of a running server stay."""
        return self.kept_folder or self._folder(self.files[0].sha256 or self._address_hash)

    @property
    def folder_without_sum(self) -> str:
        """The name that the folder gets where no sha256 is known of the first file: by its address and size."""
        return self._folder(self._address_hash)

    @property
    def recorded(self) -> list[tuple[str, int | None, str | None]]:
        """Name, size and sha256 of each file, as plan.json has them."""
        return [
            (file.name, file.size_bytes, None if file.name in self.noted_without_sum else file.sha256)
            for file in self.files
        ]

    @property
    def without_sum(self) -> tuple[RemoteFile, ...]:
        """The files whose sha256 neither the settings nor the Hub tells."""
        return tuple(file for file in self.files if file.sha256 is None)

    @property
    def _address_hash(self) -> str:
        return hashlib.sha256(f"{self.files[0].url} {self.files[0].size_bytes}".encode()).hexdigest()

    def _folder(self, identity: str) -> str:
        return f"{self.files[0].name[: -len('.gguf')]}-{identity[:12]}"


def parse(source: str, endpoint: str = "") -> Source:
    """Split a source into its parts. Raises `SourceError` with the accepted forms."""
    if source.startswith("hf:"):
        match = _HUB.fullmatch(source)
        if not match or any(part in ("", ".", "..") for part in match["file"].split("/")):
            raise SourceError(
                f"{_short(source)}: should be hf:OWNER/REPO/FILE.gguf or hf:OWNER/REPO/FILE.gguf@REVISION"
            )
        return Source("hub", match["file"], match["repo"], match["revision"] or DEFAULT_REVISION)
    if source.startswith(("http://", "https://")):
        if not is_address(source):
            raise SourceError(f"{shown(source)}: should be {ADDRESS_RULE}")
        match = _RESOLVE.fullmatch(unquote(urlsplit(source).path))
        if endpoint and match and origin(source) == origin(endpoint):
            return Source("hub", match["file"], match["repo"], unquote(match["revision"]))
        return Source("url", source)
    if re.match(r"[a-z]+:", source):
        raise SourceError(f"{_short(source)}: should be a path, an http(s) URL or hf:OWNER/REPO/FILE.gguf")
    return Source("path", source)


def _short(text: str) -> str:
    return text if len(text) <= 250 else text[:247] + "..."


def resolve(
    source: str,
    *,
    endpoint: str,
    token: str | None = None,
    mirrors: Sequence[str] = (),
    sha256: Sequence[str] = (),
    deadline: Deadline | None = None,
) -> tuple[RemoteFile, ...]:
    """All files of the model, in order. If the source fails, the mirrors are tried. Raises `SourceError`.

    `sha256`: what the settings say, of the first file or of every file in order.
    """
    named = parse(source, endpoint)
    _check_name(named, source)
    addresses, problems = [source, *mirrors], []
    deadline = deadline or Deadline()
    for position, address in enumerate(addresses):
        others = [other for n, other in enumerate(addresses) if n != position]
        try:
            with Web(token, origin(endpoint), deadline=deadline) as web:
                files = _files(parse(address, endpoint), endpoint, web)
        except SourceError as error:
            problems.append(str(error))
            continue
        if position:  # a mirror may give its file any name; on the host it has the source's
            files = _renamed(files, named, address, "; ".join(problems))
        return _with_sha256(_with_mirrors(files, others, endpoint), sha256)
    raise SourceError("; ".join(problems))


def _check_name(named: Source, source: str) -> None:
    """Raise `SourceError` unless a host may give the model's file its name. A path is planned, and goes to no host."""
    if named.kind != "path" and not is_model_file(name := file_name(named.file)):
        raise SourceError(
            f"{shown(source)}: its file name {_short(name)!r} should have {MODEL_FILE_RULE};"
            " name another file, or serve a copy under such a name"
        )


def _renamed(files: tuple[RemoteFile, ...], named: Source, mirror: str, failed: str) -> tuple[RemoteFile, ...]:
    names = _shards(named.file)
    if len(names) != len(files):
        raise SourceError(f"{shown(mirror)}: a mirror of {len(files)} files, but the model has {len(names)}")
    return tuple(replace(file, name=file_name(name), failed=failed) for file, name in zip(files, names, strict=True))


def _files(source: Source, endpoint: str, web: Web) -> tuple[RemoteFile, ...]:
    names = _shards(source.file)
    if source.kind == "path":
        return tuple(_local(Path(name)) for name in names)
    if source.kind == "url":
        with Web(deadline=web.deadline) as anonymous:
            return tuple(_plain(anonymous, url) for url in names)
    first = _hub_file(web, endpoint, source, source.revision, names[0])
    commit = first.commit or source.revision  # otherwise a branch could change between two shards
    return (first, *(_hub_file(web, endpoint, source, commit, name) for name in names[1:]))


def _shards(file: str) -> tuple[str, ...]:
    """The names or URLs of all shards of a model. `file` must be its first shard, or its only file."""
    path, mark, query = file.partition("?")
    try:
        names = gguf.shard_names(path)
    except gguf.GgufError as error:
        raise SourceError(str(error)) from error
    if path != names[0]:
        raise SourceError(
            f"{shown(file) if '://' in file else file}: should name the first shard, {names[0].rpartition('/')[2]}"
        )
    return tuple(name + mark + query for name in names)


def _local(path: Path) -> RemoteFile:
    try:
        if path.is_file():
            return RemoteFile(path.name, path.absolute().as_uri(), path.stat().st_size)
    except (OSError, ValueError) as error:  # a name that is too long, or has a zero byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise SourceError(f"{_short(str(path))!r}: cannot be read: {reason}") from error
    if path.is_dir():
        files = sorted(file.name for file in path.glob("*.gguf"))
        has = f"it has {', '.join(files[:3])}" if files else "it has no .gguf file"
        raise SourceError(f"{path}: is a folder: name the model's GGUF file in it ({has})")
    raise SourceError(f"{path}: there is no such file")


def _plain(web: Web, url: str) -> RemoteFile:
    _, size = web.read(url, 0, 1)
    return RemoteFile(file_name(url), url, size or None)


def _hub_url(endpoint: str, source: Source, revision: str, name: str) -> str:
    return f"{endpoint.rstrip('/')}/{source.repo}/resolve/{quote(revision, safe='')}/{quote(name)}"


def _hub_file(web: Web, endpoint: str, source: Source, revision: str, name: str) -> RemoteFile:
    """A file of the Hub. Size, sha256 and commit are headers, as huggingface_hub's get_hf_file_metadata reads them."""
    response = web.ask("HEAD", _hub_url(endpoint, source, revision, name), follow=False)
    response.close()
    headers = response.headers
    commit = found[0] if (found := _COMMIT.fullmatch(headers.get("X-Repo-Commit", ""))) else None
    size = whole_number(headers.get("X-Linked-Size")) or whole_number(headers.get("Content-Length"))
    etag = (headers.get("X-Linked-Etag") or headers.get("ETag") or "").removeprefix("W/").strip('"')
    return RemoteFile(
        name=name.rpartition("/")[2],
        url=_hub_url(endpoint, source, commit or revision, name),
        size_bytes=size or None,
        sha256=etag if _SHA256.fullmatch(etag) else None,
        commit=commit,
        token_origin=origin(endpoint),
    )


def _with_mirrors(files: tuple[RemoteFile, ...], others: Sequence[str], endpoint: str) -> tuple[RemoteFile, ...]:
    """The files with their mirrors; every mirror must have as many shards as the model."""
    mirrors: list[list[str]] = [[] for _ in files]
    for other in others:
        source = parse(other, endpoint)
        names = _shards(source.file)
        if len(names) != len(files):
            raise SourceError(f"{other}: a mirror of {len(names)} files, but the model has {len(files)}")
        for urls, name in zip(mirrors, names, strict=True):
            is_hub, is_path = source.kind == "hub", source.kind == "path"
            url = _hub_url(endpoint, source, source.revision, name) if is_hub else name
            urls.append(Path(name).absolute().as_uri() if is_path else url)
    return tuple(replace(file, mirrors=tuple(urls)) for file, urls in zip(files, mirrors, strict=True))


def _with_sha256(files: tuple[RemoteFile, ...], sums: Sequence[str]) -> tuple[RemoteFile, ...]:
    """The files with the sums of the settings, of the first file or of all. Raises `SourceError` where they differ from
    the Hub's."""
    if len(sums) not in (0, 1, len(files)):
        raise SourceError(
            f"{shown(files[0].url)}: sha256: {len(sums)} are given, the model has {len(files)} files: give one for each"
        )
    return (*map(_checked_sum, files, sums), *files[len(sums) :])


def _checked_sum(file: RemoteFile, sha256: str) -> RemoteFile:
    if file.sha256 and sha256 != file.sha256:
        raise SourceError(
            f"{shown(file.url)}: the Hub's sha256 is {file.sha256}, the settings say {sha256};"
            " correct `sha256`, or name the @REVISION that you mean"
        )
    return replace(file, sha256=sha256)


def siblings(
    source: str, *, endpoint: str, token: str | None = None, deadline: Deadline | None = None
) -> dict[str, int]:
    """Sizes in bytes, by name, of all GGUF files in the source's Hub repository; empty for other sources.

    Raises `SourceError`.
    """
    parsed = parse(source, endpoint)
    return _listed(parsed, endpoint, token, deadline) if parsed.kind == "hub" else {}


def _listed(repository: Source, endpoint: str, token: str | None, deadline: Deadline | None) -> dict[str, int]:
    revision = quote(repository.revision, safe="")
    url = f"{endpoint.rstrip('/')}/api/models/{repository.repo}/tree/{revision}?recursive=1"
    sizes: dict[str, int] = {}
    left = LISTING_LIMIT_BYTES
    with Web(token, origin(endpoint), deadline=deadline or Deadline()) as web:
        for _ in range(LISTING_PAGES):
            body, following = web.page(url, left)
            left -= len(body)
            for name, size in _sizes(body, url):
                if name in sizes or len(sizes) == LISTED_FILES:
                    why = "twice" if name in sizes else f"after {LISTED_FILES} others, which are not read"
                    raise SourceError(f"{shown(url)}: lists {_short(name)!r} {why}")
                sizes[name] = size
            if following is None:
                return sizes
            url = following
    raise SourceError(f"{shown(url)}: lists files on more than {LISTING_PAGES} pages, which are not read")


def _sizes(body: bytes, url: str) -> Iterator[tuple[str, int]]:
    """Names and sizes of a page's GGUF files; entries of another form are left out."""
    try:
        entries = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{shown(url)}: should be a JSON list of files: {str(error)[:100]}") from error
    if not isinstance(entries, list):
        raise SourceError(f"{shown(url)}: should be a JSON list of files, is of type {type(entries).__name__}")
    for entry in entries:
        name, size = (entry.get("path"), entry.get("size")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(size, int) or isinstance(size, bool):
            continue
        if name.lower().endswith(".gguf") and 0 <= size <= _LARGEST_FILE:
            yield name, size


def quantisations(source: str, *, endpoint: str, token: str | None = None) -> dict[str, int]:
    """Sizes in bytes, by source, of all models in a Hub repository. `source` is the repository or one of its files.

    A split model is listed once, by its first shard; it is left out if a shard is missing. So is what no host may store
    under its name. Raises `SourceError`.
    """
    repository = _REPOSITORY.fullmatch(source)
    parsed = (
        Source("hub", "", repository["repo"], repository["revision"] or DEFAULT_REVISION)
        if repository
        else parse(source, endpoint)
    )
    if parsed.kind != "hub":
        raise SourceError(f"{shown(source)}: should be hf:OWNER/REPO or a file of it, to list its models")
    sizes = _listed(parsed, endpoint, token, None)
    models = {}
    for name in sizes:
        if not is_model_file(file_name(name)) or "@" in name:
            continue
        try:
            shards = gguf.shard_names(name)
        except gguf.GgufError:
            continue
        if name == shards[0] and all(shard in sizes for shard in shards) and not _NO_MODEL.search(name):
            models[name] = sum(sizes[shard] for shard in shards)
    revision = "" if parsed.revision == DEFAULT_REVISION else f"@{parsed.revision}"
    return {f"hf:{parsed.repo}/{name}{revision}": size for name, size in sorted(models.items())}


@dataclass
class HttpSource:
    """A file on a web server, as a `gguf.ByteSource`."""

    url: str
    size: int | None = None
    web: Web = field(default_factory=Web)

    @property
    def name(self) -> str:
        """The URL for messages, without its query."""
        return shown(self.url)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes from `offset`, by a range request. Raises `SourceError`."""
        part, size = self.web.read(self.url, offset, length)
        self.size = self.size if self.size is not None else size
        return part


def read_header(
    files: Sequence[RemoteFile], *, token: str | None = None, deadline: Deadline | None = None
) -> gguf.Header:
    """The model's header. If an address fails, the mirrors are read. Raises `SourceError` or `GgufError`."""
    problems: list[str] = []
    deadline = deadline or Deadline()
    for address in range(1 + max(len(file.mirrors) for file in files)):
        try:
            with Web(token, files[0].token_origin, deadline=deadline) as web:
                return gguf.read_header([_source(file, address, web) for file in files])
        except SourceError as error:
            problems.append(str(error))
    raise SourceError("; ".join(problems))


def _source(file: RemoteFile, address: int, web: Web) -> gguf.ByteSource:
    """The file at its URL (`address` 0) or at mirror `address`, the last one if it has fewer."""
    url = (file.url, *file.mirrors)[min(address, len(file.mirrors))]
    if url.startswith("file:"):
        return gguf.FileSource(Path(unquote(urlsplit(url).path)))
    return HttpSource(url, file.size_bytes, web)
