"""The source of a model: a path, a URL, or a file of the Hugging Face Hub.

`resolve` lists all files of a model with size, sha256 and commit, without a download. `read_header` then reads the GGUF
header by range requests.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from llamafleet.hub.http import SourceError, Web, origin, shown
from llamafleet.model import gguf

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
_HUB = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)/(?P<file>[^@]+?)(?:@(?P<revision>[^@]+))?")
_REPOSITORY = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^@]+))?")
# GGUF files that are not language models: image encoders, importance matrices, vocabularies.
_NO_MODEL = re.compile(r"(?:^|[/._-])(?:mmproj|imatrix|vocab)(?:[/._-]|$)", re.IGNORECASE)
_RESOLVE = re.compile(r"/(?P<repo>[\w.-]+/[\w.-]+)/(?:resolve|blob)/(?P<revision>[^/]+)/(?P<file>.+)")
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


@dataclass(frozen=True)
class ModelFiles:
    """A model that can be downloaded: its files in order, and its header."""

    files: tuple[RemoteFile, ...]
    header: gguf.Header

    @property
    def folder(self) -> str:
        """Name of the model's folder on a host. It depends on the content: a model that changes at its source gets
        another folder, and the files of a running server stay."""
        first = self.files[0]
        identity = first.sha256 or hashlib.sha256(f"{first.url} {first.size_bytes}".encode()).hexdigest()
        return f"{first.name.removesuffix('.gguf')}-{identity[:12]}"


def parse(source: str, endpoint: str = "") -> Source:
    """Split a source into its parts. Raises `SourceError` with the accepted forms."""
    if source.startswith("hf:"):
        match = _HUB.fullmatch(source)
        if not match or any(part in ("", ".", "..") for part in match["file"].split("/")):
            raise SourceError(f"{source}: should be hf:OWNER/REPO/FILE.gguf or hf:OWNER/REPO/FILE.gguf@REVISION")
        return Source("hub", match["file"], match["repo"], match["revision"] or DEFAULT_REVISION)
    if source.startswith(("http://", "https://")):
        parts = urlsplit(source)
        if not parts.hostname:
            raise SourceError(f"{source}: should have a host name")
        match = _RESOLVE.fullmatch(unquote(parts.path))
        if endpoint and match and origin(source) == origin(endpoint):
            return Source("hub", match["file"], match["repo"], unquote(match["revision"]))
        return Source("url", source)
    if re.match(r"[a-z]+:", source):
        raise SourceError(f"{source}: should be a path, an http(s) URL or hf:OWNER/REPO/FILE.gguf")
    return Source("path", source)


def resolve(
    source: str,
    *,
    endpoint: str,
    token: str | None = None,
    mirrors: Sequence[str] = (),
    sha256: str | None = None,
) -> tuple[RemoteFile, ...]:
    """All files of the model, in order. If the source fails, the mirrors are tried. Raises `SourceError`."""
    addresses = [source, *mirrors]
    problems = []
    for position, address in enumerate(addresses):
        others = [other for n, other in enumerate(addresses) if n != position]
        try:
            files = _files(parse(address, endpoint), endpoint, token)
        except SourceError as error:
            problems.append(str(error))
            continue
        return _with_sha256(_with_mirrors(files, others, endpoint), sha256)
    raise SourceError("; ".join(problems))


def _files(source: Source, endpoint: str, token: str | None) -> tuple[RemoteFile, ...]:
    names = _shards(source.file)
    if source.kind == "path":
        return tuple(_local(Path(name)) for name in names)
    if source.kind == "url":
        return tuple(_plain(url) for url in names)
    web = Web(token, origin(endpoint))
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
    if not path.is_file():
        raise SourceError(f"{path}: there is no such file")
    return RemoteFile(path.name, path.absolute().as_uri(), path.stat().st_size)


def _plain(url: str) -> RemoteFile:
    _, size = Web().read(url, 0, 1)
    name = unquote(urlsplit(url).path).rpartition("/")[2]
    if not name or name.startswith("-"):
        raise SourceError(f"{shown(url)}: its last part should be a file name")
    return RemoteFile(name, url, size)


def _hub_url(endpoint: str, source: Source, revision: str, name: str) -> str:
    return f"{endpoint.rstrip('/')}/{source.repo}/resolve/{quote(revision, safe='')}/{quote(name)}"


def _hub_file(web: Web, endpoint: str, source: Source, revision: str, name: str) -> RemoteFile:
    """A file of the Hub. Size, sha256 and commit are headers, as huggingface_hub's get_hf_file_metadata reads them."""
    response = web.ask("HEAD", _hub_url(endpoint, source, revision, name), follow=False)
    response.close()
    headers = response.headers
    commit = headers.get("X-Repo-Commit") or None
    size = headers.get("X-Linked-Size") or headers.get("Content-Length") or ""
    etag = (headers.get("X-Linked-Etag") or headers.get("ETag") or "").removeprefix("W/").strip('"')
    return RemoteFile(
        name=name.rpartition("/")[2],
        url=_hub_url(endpoint, source, commit or revision, name),
        size_bytes=int(size) if size.isdigit() else None,
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


def _with_sha256(files: tuple[RemoteFile, ...], sha256: str | None) -> tuple[RemoteFile, ...]:
    first = files[0]
    if sha256 and first.sha256 and sha256 != first.sha256:
        raise SourceError(
            f"{shown(first.url)}: the Hub's sha256 is {first.sha256}, the settings say {sha256};"
            " correct `sha256`, or name the @REVISION that you mean"
        )
    return (replace(first, sha256=first.sha256 or sha256), *files[1:])


def siblings(source: str, *, endpoint: str, token: str | None = None) -> dict[str, int]:
    """Sizes in bytes, by name, of all GGUF files in the source's Hub repository; empty for other sources."""
    parsed = parse(source, endpoint)
    if parsed.kind != "hub":
        return {}
    url = f"{endpoint.rstrip('/')}/api/models/{parsed.repo}/tree/{quote(parsed.revision, safe='')}?recursive=1"
    with Web(token, origin(endpoint)).ask("GET", url) as response:
        try:
            entries = response.json()
        except ValueError as error:
            raise SourceError(f"{shown(url)}: should be a JSON list of files: {error}") from error
    return {
        entry["path"]: entry["size"]
        for entry in entries
        if isinstance(entry, dict)
        and str(entry.get("path", "")).endswith(".gguf")
        and isinstance(entry.get("size"), int)
    }


def quantisations(source: str, *, endpoint: str, token: str | None = None) -> dict[str, int]:
    """Sizes in bytes, by source, of all models in a Hub repository. `source` is the repository or one of its files.

    A split model is listed once, by its first shard; it is left out if a shard is missing. Raises `SourceError`.
    """
    repository = _REPOSITORY.fullmatch(source)
    parsed = parse(
        f"{source.partition('@')[0]}/*@{repository['revision'] or DEFAULT_REVISION}" if repository else source,
        endpoint,
    )
    if parsed.kind != "hub":
        raise SourceError(f"{source}: should be hf:OWNER/REPO or a file of it, to list its models")
    sizes = siblings(f"hf:{parsed.repo}/{parsed.file}@{parsed.revision}", endpoint=endpoint, token=token)
    models = {}
    for name in sizes:
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


def read_header(files: Sequence[RemoteFile], *, token: str | None = None) -> gguf.Header:
    """The model's header. If an address fails, the mirrors are read. Raises `SourceError` or `GgufError`."""
    problems: list[str] = []
    for address in range(1 + max(len(file.mirrors) for file in files)):
        try:
            return gguf.read_header([_source(file, address, token) for file in files])
        except SourceError as error:
            problems.append(str(error))
    raise SourceError("; ".join(problems))


def _source(file: RemoteFile, address: int, token: str | None) -> gguf.ByteSource:
    """The file at its URL (`address` 0) or at mirror `address`, the last one if it has fewer."""
    url = (file.url, *file.mirrors)[min(address, len(file.mirrors))]
    if url.startswith("file:"):
        return gguf.FileSource(Path(unquote(urlsplit(url).path)))
    return HttpSource(url, file.size_bytes, Web(token, file.token_origin))
