"""The forms of a model's source: a path, an address, a file or a repository of a hub, a link as a browser has it.

`parse` takes a source apart and reads nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from llamafleet.remote.common import ADDRESS_RULE, file_name, is_address

DEFAULT_REVISION = "main"
FORMS = "hf:OWNER/REPO/FILE.gguf, hf:OWNER/REPO:QUANTISATION or hf:OWNER/REPO, each with @REVISION where wanted"
_PART = r"[A-Za-z0-9_][\w.-]*"
_REPO = rf"hf:(?P<repo>{_PART}/{_PART})"
_REVISION = r"(?:@(?P<revision>[^@]+))?"
_FILE = re.compile(rf"{_REPO}/(?P<file>[^@]+?){_REVISION}", re.ASCII)
# llama.cpp searches names for the quantisation as for a regular expression: no more than its plain characters.
_REPOSITORY = re.compile(rf"{_REPO}(?::(?P<quant>\w[\w.-]*))?{_REVISION}", re.ASCII)
# The path of a page or of a download, still quoted: a revision such as refs%2Fpr%2F1 is one part of it.
_LINK = re.compile(
    rf"(?:/models)?/(?P<repo>{_PART}/{_PART})"
    r"(?:/(?P<page>resolve|blob|raw|tree|file/view)/(?P<revision>[^/]+)(?:/(?P<file>.*?))?|/(?:files|summary))?/?",
    re.ASCII,
)
# Names of the Hugging Face Hub; the last one is what people write in messages.
_HUB = ("huggingface.co", "www.huggingface.co", "hf.co")
_OTHER_HUBS = re.compile(r"(?:www\.)?(?:modelscope\.(?:cn|ai)|hf-mirror\.com)")


class SourceError(Exception):
    """A source cannot be read; the message has the URL (without its query), the HTTP status and the next step.

    `status` and `code` are the HTTP status and the hub's own word for it (X-Error-Code), where a server answered so.
    """

    def __init__(self, text: str, status: int | None = None, code: str = "") -> None:
        super().__init__(text)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Source:
    """The parts of a model's source. `kind`: "path", "url" or "hub"; `file`: the path, the URL or the file name.

    Of a repository (`kind` "hub", no `file`) one file is chosen, of the quantisation `quant` and below `folder` where
    these are given.
    """

    kind: str
    file: str
    repo: str = ""
    revision: str = DEFAULT_REVISION
    quant: str = ""
    folder: str = ""

    @property
    def is_repository(self) -> bool:
        """Whether the source names a repository, and leaves the file open."""
        return self.kind == "hub" and not self.file


def parse(source: str, endpoint: str = "") -> Source:
    """Split a source into its parts. `endpoint`: the hub that is used. Raises `SourceError` with the accepted forms."""
    if source.startswith("hf:"):
        return _hub(source)
    if source.startswith(("http://", "https://")):
        if not is_address(source):
            raise SourceError(f"{shown(source)}: should be {ADDRESS_RULE}")
        return _link(source, endpoint) or Source("url", source)
    if re.match(r"[a-z]+:", source):
        raise SourceError(f"{_short(source)}: should be a path, an http(s) URL or hf:OWNER/REPO/FILE.gguf")
    return Source("path", source)


def goes_to_hosts_as(source: str) -> str | None:
    """The name that a host gives the file of a source, whatever hub is used; None where that is chosen later, of a
    repository."""
    named = parse(source, _hub_of(source))
    return None if named.is_repository else named.file.rpartition("/")[2] if named.kind == "hub" else file_name(source)


def _hub_of(source: str) -> str:
    """The endpoint of a link to a known hub; empty for other sources."""
    parts = urlsplit(source)
    is_known = parts.hostname in _HUB or _OTHER_HUBS.fullmatch(parts.hostname or "") is not None
    return f"{parts.scheme}://{parts.netloc}" if is_known else ""


def _hub(source: str) -> Source:
    match = _REPOSITORY.fullmatch(source)
    if match and not match["repo"].lower().endswith(".gguf"):
        return Source("hub", "", match["repo"], match["revision"] or DEFAULT_REVISION, match["quant"] or "")
    match = _FILE.fullmatch(source)
    if not match or any(part in ("", ".", "..") for part in match["file"].split("/")):
        raise SourceError(f"{_short(source)}: should be {FORMS}")
    return Source("hub", match["file"], match["repo"], match["revision"] or DEFAULT_REVISION)


def _link(source: str, endpoint: str) -> Source | None:
    """The file or repository that a link of a hub leads to; None for an address of another server.

    Raises `SourceError` for a page of a hub that is not the one in use.
    """
    parts = urlsplit(source)
    inside = _inside(parts, endpoint)
    match = _LINK.fullmatch(inside)
    if match is None:
        return None
    page, revision = match["page"] or "repository", unquote(match["revision"] or DEFAULT_REVISION)
    rest = unquote(match["file"] or "")
    shown_file = parse_qs(parts.query).get("show_file_info", [""])[0]
    ours = bool(endpoint) and origin(source) == origin(endpoint)
    hub = parts.hostname in _HUB and (urlsplit(endpoint).hostname in _HUB or page != "resolve")
    if not ours and not hub:
        if page not in ("resolve", "raw") and _OTHER_HUBS.fullmatch(parts.hostname or ""):
            raise SourceError(
                f'{shown(source)}: is a page of another hub: set hub_endpoint = "{parts.scheme}://{parts.netloc}", or '
                "give the address of the file itself"
            )
        return None
    if any(part in (".", "..") for part in rest.split("/")):
        raise SourceError(f"{shown(source)}: should be {FORMS}, or a link to a file of the hub")
    if rest and page != "tree":
        return Source("hub", rest, match["repo"], revision)
    if shown_file:
        return Source("hub", shown_file, match["repo"], revision)
    return Source("hub", "", match["repo"], revision, folder=rest) if page in ("repository", "tree") else None


def _inside(parts: SplitResult, endpoint: str) -> str:
    """The quoted path of a link, without the one that the endpoint itself has."""
    base = urlsplit(endpoint).path.rstrip("/")
    return parts.path.removeprefix(base) if base and parts.path.startswith(base + "/") else parts.path


def origin(url: str) -> str:
    """Scheme, host and port of an address that `is_address` accepts: a token is sent to one origin only."""
    parts = urlsplit(url)
    port = parts.port or {"https": 443, "http": 80}.get(parts.scheme, 0)
    return f"{parts.scheme}://{parts.hostname}:{port}"


SHOWN_CHARACTERS = 250  # of an address in a message


def shown(url: str) -> str:
    """The URL for messages, without query and user: a signature and a password are secrets. It may be no URL at all."""
    plain = re.split(r"[?#]", url, maxsplit=1)[0]
    plain = re.sub(r"^([a-z]+://)[^/]*@", r"\1", plain)
    return plain if len(plain) <= SHOWN_CHARACTERS else plain[: SHOWN_CHARACTERS - 3] + "..."


def _short(text: str) -> str:
    return text if len(text) <= 250 else text[:247] + "..."
