"""The source of a model: a path, a URL, or a file of the Hugging Face Hub.

`resolve` lists all files of a model with size, sha256 and commit, without a download. `read_header` then reads the GGUF
header by range requests.

Decision 20: docs/decisions/0020-what-comes-from-outside-is-bounded.md.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from urllib.parse import unquote, urlsplit

from llamafleet.hub.choice import best_file, best_projector
from llamafleet.hub.http import Deadline, Web
from llamafleet.hub.listing import file_url, is_modelscope, list_files
from llamafleet.hub.network import Network
from llamafleet.model import gguf
from llamafleet.remote.common import MODEL_FILE_RULE, file_name, is_model_file, whole_number
from llamafleet.sources import Source, SourceError, origin, parse, shown

__all__ = [
    "HttpSource",
    "ModelFiles",
    "RemoteFile",
    "Source",
    "SourceError",
    "parse",
    "quantisations",
    "read_header",
    "read_model",
    "resolve",
    "siblings",
]

_COMMIT = re.compile(r"[0-9A-Za-z._-]{1,64}")
# GGUF files that are not language models: image encoders, importance matrices, vocabularies.
_NO_MODEL = re.compile(r"(?:^|[/._-])(?:mmproj|imatrix|vocab)(?:[/._-]|$)", re.IGNORECASE)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAMED = 6  # files of a repository that a message names
_GATED = (
    "its repository is listed to everybody, so the model is gated: accept its terms on its page and give a token with "
    "hub_token_file or HF_TOKEN"
)
_MISSING = "there is no such repository, or it is private: check owner and name, upper and lower case too"


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
    chosen: str = ""  # of the first file of a repository's model: the source that was chosen
    place: str = (
        ""  # of a path: whose it is, "operator" or "host"; of the host's, `commit` is the time of its last change
    )


@dataclass(frozen=True)
class ModelFiles:
    """A model that can be downloaded: its files in order, and its header."""

    files: tuple[RemoteFile, ...]
    header: gguf.Header
    # On a host that has the files already, from when no sha256 was known of them: their folder there.
    kept_folder: str | None = None
    # Names of files that the host serves, and whose sha256 became known only after it noted them in plan.json.
    noted_without_sum: frozenset[str] = frozenset()
    # Files that llama-server loads beside the model, by their part: "projector", "draft", "adapter-1", ...
    companions: Mapping[str, ModelFiles] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def every(self) -> tuple[ModelFiles, ...]:
        """The model itself and its companions."""
        return (self, *self.companions.values())

    @property
    def bytes_total(self) -> int:
        """Bytes of all files, those of the companions too."""
        return sum(one.header.file_bytes_total for one in self.every)

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
        first = self.files[0]
        changed = f" {first.commit}" if first.place == "host" else ""
        return hashlib.sha256(f"{first.url} {first.size_bytes}{changed}".encode()).hexdigest()

    def _folder(self, identity: str) -> str:
        return f"{self.files[0].name[: -len('.gguf')]}-{identity[:12]}"


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
    network: Network | None = None,
) -> tuple[RemoteFile, ...]:
    """All files of the model, in order. If the source fails, the mirrors are tried. Raises `SourceError`.

    `sha256`: what the settings say, of the first file or of every file in order.
    """
    named = parse(source, endpoint)
    if not named.is_repository:
        _check_name(named, source)
    addresses, problems = [source, *mirrors], []
    deadline = deadline or Deadline()
    for position, address in enumerate(addresses):
        others = [other for n, other in enumerate(addresses) if n != position]
        try:
            with Web(token, origin(endpoint), deadline=deadline, network=network or Network()) as web:
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
    names = tuple(file.name for file in files) if named.is_repository else _shards(named.file)
    if len(names) != len(files):
        raise SourceError(f"{shown(mirror)}: a mirror of {len(files)} files, but the model has {len(names)}")
    return tuple(replace(file, name=file_name(name), failed=failed) for file, name in zip(files, names, strict=True))


def _files(source: Source, endpoint: str, web: Web) -> tuple[RemoteFile, ...]:
    if source.is_repository:
        chosen = _chosen(source, endpoint, web)
        first, *others = _files(chosen, endpoint, web)
        return (replace(first, chosen=_hub_name(chosen)), *others)
    names = _shards(source.file)
    if source.kind == "path":
        return tuple(_local(Path(name)) for name in names)
    if source.kind == "url":
        with Web(deadline=web.deadline, network=web.network) as anonymous:
            return tuple(_plain(anonymous, url) for url in names)
    if is_modelscope(endpoint):
        return _modelscope_files(web, endpoint, source, names)
    first = _hub_file(web, endpoint, source, source.revision, names[0])
    commit = first.commit or source.revision  # otherwise a branch could change between two shards
    return (first, *(_hub_file(web, endpoint, source, commit, name) for name in names[1:]))


def _chosen(source: Source, endpoint: str, web: Web) -> Source:
    """The file of a repository that llama-server would take by itself. Raises `SourceError`."""
    listing = list_files(web, endpoint, source)
    place = f"hf:{source.repo}{f':{source.quant}' if source.quant else ''}"
    if listing.has_preset:
        raise SourceError(
            f"{place}: the repository is a list of presets (preset.ini), not one model: name a file of a model"
        )
    below = f"{source.folder.rstrip('/')}/" if source.folder else ""
    names = [name for name in listing.sizes if name.startswith(below)]
    found = best_file(names, source.quant)
    if found is None:
        of = f" of the quantisation {source.quant}" if source.quant else ""
        there = _named(names, source.quant) or "no GGUF file at all: give the repository of its GGUF files"
        raise SourceError(
            f"{place}: the repository has no model file{of}{f' in {below}' if below else ''}; it has {there}"
        )
    _check_name(replace(source, file=found), f"{place} ({found})")
    return replace(source, file=found, quant="", folder="")


def _hub_name(source: Source) -> str:
    return f"hf:{source.repo}/{source.file}" + (f"@{source.revision}" if source.revision != "main" else "")


def _named(names: Sequence[str], wanted: str) -> str:
    """Some of the files, those with the nearest names first; a split model by its first shard."""
    wanted = wanted.lower()
    likely = sorted(
        (name for name in names if not re.search(r"-(?!00001)\d{5}-of-\d{5}\.gguf$", name)),
        key=lambda name: -difflib.SequenceMatcher(None, wanted, name.lower()).ratio() if wanted else 0,
    )
    more = f" and {len(likely) - _NAMED} more" if len(likely) > _NAMED else ""
    return ", ".join(_short(name) for name in likely[:_NAMED]) + more


def _modelscope_files(web: Web, endpoint: str, source: Source, names: Sequence[str]) -> tuple[RemoteFile, ...]:
    """Files of ModelScope, whose list has the sizes and sums. Raises `SourceError`."""
    listing = list_files(web, endpoint, source)
    for name in names:
        if name not in listing.sizes:
            raise SourceError(
                f"{shown(file_url(endpoint, source, source.revision, name))}: the repository has no such file; it has "
                f"{_named(list(listing.sizes), name) or 'no GGUF file at all'}"
            )
    return tuple(
        RemoteFile(
            name.rpartition("/")[2], file_url(endpoint, source, source.revision, name), listing.sizes[name],
            listing.sums.get(name), token_origin=origin(endpoint),
        )
        for name in names
    )  # fmt: skip


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
    if not size:  # some servers tell it only where the whole file is asked for
        *_, last = web.hops("HEAD", url)
        size = whole_number(last.headers.get("Content-Length")) if last.status_code == 200 else None
    return RemoteFile(file_name(url), url, size or None)


def _hub_file(web: Web, endpoint: str, source: Source, revision: str, name: str) -> RemoteFile:
    """A file of the Hub. Size, sha256 and commit are headers, as huggingface_hub's get_hf_file_metadata reads them.

    A mirror may have none of them and redirect to the Hub, which then has.
    """
    commit, size, etag = None, None, ""
    try:
        for response in web.hops("HEAD", file_url(endpoint, source, revision, name)):
            headers = response.headers
            found = _COMMIT.fullmatch(headers.get("X-Repo-Commit", ""))
            commit = commit or (found[0] if found else None)
            size = size or whole_number(headers.get("X-Linked-Size"))
            linked = headers.get("X-Linked-Etag")
            if linked or response.status_code == 200:
                size = size or whole_number(headers.get("Content-Length"))
                etag = (linked or headers.get("ETag") or "").removeprefix("W/").strip('"')
            if linked:
                break
    except SourceError as error:
        if error.status not in (401, 403, 404):
            raise
        raise _explained(error, web, endpoint, source, name) from error
    return RemoteFile(
        name=name.rpartition("/")[2],
        url=file_url(endpoint, source, commit or revision, name),
        size_bytes=size or None,
        sha256=etag if _SHA256.fullmatch(etag) else None,
        commit=commit,
        token_origin=origin(endpoint),
    )


def _explained(error: SourceError, web: Web, endpoint: str, source: Source, name: str) -> SourceError:
    """The error with what the list of the repository's files tells: whether it is a gated one or a slip of the pen."""
    if error.code in ("GatedRepo", "RepoNotFound", "RevisionNotFound") or (error.status == 401 and web.token):
        return error
    try:
        with Web(web.token, web.token_origin, deadline=web.deadline, network=web.network) as other:
            names = list(list_files(other, endpoint, source).sizes)
    except SourceError as listing:
        reason = f"{error}; its repository cannot be listed either: {_MISSING}"
        return SourceError(reason, error.status) if listing.status in (401, 404) and not error.code else error
    if error.status in (401, 403):
        return SourceError(f"{error}; {_GATED}", error.status) if name in names else error
    there = _named(names, name) or "no GGUF file"
    return SourceError(f"{error}; the repository has {there}", error.status, error.code)


def _with_mirrors(files: tuple[RemoteFile, ...], others: Sequence[str], endpoint: str) -> tuple[RemoteFile, ...]:
    """The files with their mirrors; every mirror must have as many shards as the model."""
    mirrors: list[list[str]] = [[] for _ in files]
    for other in others:
        source = parse(other, endpoint)
        if source.is_repository:  # it could not be listed, and so gives no address
            continue
        names = _shards(source.file)
        if len(names) != len(files):
            raise SourceError(f"{other}: a mirror of {len(names)} files, but the model has {len(files)}")
        for urls, name in zip(mirrors, names, strict=True):
            is_hub, is_path = source.kind == "hub", source.kind == "path"
            url = file_url(endpoint, source, source.revision, name) if is_hub else name
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
    source: str,
    *,
    endpoint: str,
    token: str | None = None,
    deadline: Deadline | None = None,
    network: Network | None = None,
) -> dict[str, int]:
    """Sizes in bytes, by name, of all GGUF files in the source's Hub repository; empty for other sources.

    Raises `SourceError`.
    """
    parsed = parse(source, endpoint)
    return _listed(parsed, endpoint, token, deadline, network) if parsed.kind == "hub" else {}


def _listed(
    repository: Source, endpoint: str, token: str | None, deadline: Deadline | None, network: Network | None
) -> dict[str, int]:
    with Web(token, origin(endpoint), deadline=deadline or Deadline(), network=network or Network()) as web:
        return list_files(web, endpoint, repository).sizes


def projector_of(source: str, *, endpoint: str, token: str | None = None, network: Network | None = None) -> str:
    """The source of the projector that llama-server -hf would take beside this file of a Hub repository.

    Raises `SourceError` where there is none.
    """
    named = parse(source, endpoint)
    if named.kind != "hub" or named.is_repository:
        raise SourceError(f"{shown(source)}: projector: auto needs a model of the Hub: name the projector's file")
    names = list(_listed(named, endpoint, token, None, network))
    found = best_projector(names, named.file)
    if found is None:
        raise SourceError(f"{shown(source)}: projector: auto: its repository has no projector (mmproj): name its file")
    return _hub_name(replace(named, file=found))


def quantisations(
    source: str, *, endpoint: str, token: str | None = None, network: Network | None = None
) -> dict[str, int]:
    """Sizes in bytes, by source, of all models in a Hub repository. `source` is the repository or one of its files.

    A split model is listed once, by its first shard; it is left out if a shard is missing. So is what no host may store
    under its name. Raises `SourceError`.
    """
    parsed = parse(source, endpoint)
    if parsed.kind != "hub":
        raise SourceError(f"{shown(source)}: should be hf:OWNER/REPO or a file of it, to list its models")
    sizes = _listed(parsed, endpoint, token, None, network)
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
    return {_hub_name(replace(parsed, file=name)): size for name, size in sorted(models.items())}


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
    files: Sequence[RemoteFile],
    *,
    token: str | None = None,
    deadline: Deadline | None = None,
    network: Network | None = None,
) -> gguf.Header:
    """The model's header. If an address fails, the mirrors are read. Raises `SourceError` or `GgufError`."""
    problems: list[str] = []
    deadline = deadline or Deadline()
    for address in range(1 + max(len(file.mirrors) for file in files)):
        try:
            with Web(token, files[0].token_origin, deadline=deadline, network=network or Network()) as web:
                return gguf.read_header([_source(file, address, web) for file in files])
        except SourceError as error:
            problems.append(str(error))
    raise SourceError("; ".join(problems))


def read_model(
    source: str, *, endpoint: str, token: str | None, mirrors: Sequence[str], sha256: Sequence[str], network: Network
) -> ModelFiles:
    """A model's files, without a download, and its header. Raises `SourceError` or `GgufError`."""
    files = resolve(source, endpoint=endpoint, token=token, mirrors=mirrors, sha256=sha256, network=network)
    return ModelFiles(files, read_header(files, token=token, network=network))


def _source(file: RemoteFile, address: int, web: Web) -> gguf.ByteSource:
    """The file at its URL (`address` 0) or at mirror `address`, the last one if it has fewer."""
    url = (file.url, *file.mirrors)[min(address, len(file.mirrors))]
    if url.startswith("file:"):
        return gguf.FileSource(Path(unquote(urlsplit(url).path)))
    return HttpSource(url, file.size_bytes, web)
