"""Read parts of a file over HTTP.

This module follows redirects itself: the Hub redirects to a signed URL of another origin, which must not get the token.
It waits for a busy server, for a limited time. All that servers send is limited, in time and in bytes. Messages never
show the query of a URL, because a signature is a secret.

Decision 20: docs/decisions/0020-what-comes-from-outside-is-bounded.md.
"""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit, urlunsplit

from llamafleet.hub.network import Network
from llamafleet.remote import redirects
from llamafleet.remote.common import ADDRESS_RULE, is_address, keeps_secrets, whole_number
from llamafleet.sources import SourceError, origin, shown

if TYPE_CHECKING:  # importing it takes a quarter of the start of `llamafleet plan`; a model on disk does not need it
    import requests

    from llamafleet.hub.wire import Session

TIMEOUT_SECONDS = (10.0, 60.0)  # to connect; between two parts of a body
# For all that is asked about one model. The largest header that is read has 64 MiB: ten minutes are enough for it at
# 1 Mbit/s, or for the 1024 shards of a model one after another.
TOTAL_SECONDS = 600.0
REDIRECTS = redirects.MOST_HOPS
ATTEMPTS = 4
WAIT_LIMIT_SECONDS = 60.0  # longest Retry-After that is waited for; a longer one is an error
RANGELESS_LIMIT_BYTES = 64 * 1024**2  # most that is read from a server without Range requests
_BUSY = (429, 500, 502, 503, 504)
_REDIRECT = redirects.STATUSES
_SERVED = (200, 206, 416)

_NEXT_STEP: Mapping[int, str] = {
    401: "there is no such repository, or it may be read with a token only: check owner and name, upper and lower case"
    " too; for a gated model accept its terms on its page; give the token with hub_token_file or HF_TOKEN",
    403: "the token's account has no access: request access on the model's page, or use another token",
    404: "check owner, repository, revision and file name, upper and lower case too; private models need a token",
    407: "the proxy asks for a name and a password, which is not supported: name another one with `proxy`",
    429: "the server is busy: try again later, or give a token, which gives a higher limit",
}
_GATED = "accept the model's terms on its page and give a token with hub_token_file or HF_TOKEN"
# The Hub answers 401 for a repository that is not there, too, so as not to tell which private ones there are. A gated
# one has another code.
_NO_REPOSITORY = (
    "there is no such repository, or it may be read with a token only, as a private one: check owner and name, upper"
    " and lower case too; for a private one give a token with hub_token_file or HF_TOKEN"
)
_BAD_TOKEN = "the token (hub_token_file or HF_TOKEN) is not accepted: make a new one on the Hub's page of settings"  # noqa: S105


class Deadline:
    """The time for everything that one reading asks of servers: `seconds` from now."""

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds = TOTAL_SECONDS if seconds is None else seconds
        self._end = time.monotonic() + self.seconds

    def left(self) -> float:
        """Seconds until it is over, not below 0."""
        return max(0.0, self._end - time.monotonic())

    def check(self, url: str) -> None:
        """Raise `SourceError` if it is over."""
        if not self.left():
            raise SourceError(
                f"{shown(url)}: reading took longer than {self.seconds:.0f} s: check the network, or set mirrors"
            )


@dataclass
class Web:
    """An HTTP client that sends `token` to `token_origin` only, by https or to this machine.

    To be closed. All that it does ends at the deadline, with `SourceError`.
    """

    token: str | None = None
    token_origin: str | None = None
    sleep: Callable[[float], None] = time.sleep
    deadline: Deadline = field(default_factory=Deadline)
    network: Network = field(default_factory=Network)
    _session: Session | None = None
    _redirected: dict[str, str] = field(default_factory=dict)  # by URL, its redirects' last URL, signed for some time

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def ask(
        self, method: str, url: str, headers: Mapping[str, str] | None = None, *, follow: bool = True
    ) -> requests.Response:
        """The response, without its body; a busy server is asked up to `ATTEMPTS` times. Raises `SourceError`.

        Without `follow`, a redirect to another origin is not followed but returned.
        """
        from llamafleet.hub.wire import FAILURES

        problem, status = "", None
        for attempt in range(ATTEMPTS):
            try:
                response = self._follow(method, url, dict(headers or {}), follow)
            except FAILURES as error:
                self.deadline.check(url)
                problem, status = f"{shown(url)}: cannot be reached ({_kind(error)}); {self._advice(url, error)}", None
                if isinstance(error, ValueError):  # of what no repetition changes
                    break
                wait = 2.0**attempt
            else:
                if response.status_code not in _BUSY:
                    return self._checked(response, url)
                problem, status = _problem(response, url), response.status_code
                wait = _retry_after(response, 2.0**attempt)
                response.close()
            if attempt + 1 == ATTEMPTS or wait > min(WAIT_LIMIT_SECONDS, self.deadline.left()):
                break
            self.sleep(wait)
        raise SourceError(problem, status)

    def hops(self, method: str, url: str) -> Iterator[requests.Response]:
        """The response, and those at the other origins that it redirects to, one after another, without bodies.

        Raises `SourceError`.
        """
        for _ in range(REDIRECTS):
            response = self.ask(method, url, follow=False)
            response.close()
            yield response
            if response.status_code not in _REDIRECT:
                return
            url = _target(url, response)
        raise SourceError(f"{shown(url)}: more than {REDIRECTS} redirects")

    def _advice(self, url: str, error: BaseException) -> str:
        if _kind(error) == "SSLCertVerificationError":
            return "if a company's own authority made its certificate, name that with ca_file"
        return self.network.advice(url)

    def _follow(self, method: str, url: str, headers: dict[str, str], follow: bool) -> requests.Response:
        if not is_address(url):
            raise SourceError(f"{shown(url)}: should be {ADDRESS_RULE}")
        for _ in range(REDIRECTS):
            response = self._request(method, url, headers)
            if response.status_code not in _REDIRECT:
                return response
            target = _target(url, response)
            if not follow and origin(target) != origin(url):
                return response
            response.close()
            url = target
        raise SourceError(f"{shown(url)}: more than {REDIRECTS} redirects")

    def _request(self, method: str, url: str, headers: Mapping[str, str]) -> requests.Response:
        """One request; raises what the wire's `FAILURES` are."""
        self.deadline.check(url)
        if self._session is None:
            from llamafleet.hub.wire import Session

            self._session = Session(self.deadline.left, self.network)
        sent_headers = dict(headers)
        if self.token and origin(url) == self.token_origin and keeps_secrets(url):
            sent_headers["Authorization"] = f"Bearer {self.token}"
        connect, silence = (max(0.01, min(seconds, self.deadline.left())) for seconds in TIMEOUT_SECONDS)
        response = self._session.request(
            method, url, headers=sent_headers, stream=True, allow_redirects=False, timeout=(connect, silence)
        )
        self.deadline.check(url)  # at the deadline an answer looks as if the server had ended it
        return response

    @staticmethod
    def _checked(response: requests.Response, url: str) -> requests.Response:
        if response.status_code in _SERVED or response.status_code in _REDIRECT:
            return response
        response.close()
        raise SourceError(_problem(response, url), response.status_code, response.headers.get("X-Error-Code", "")[:100])

    def _get(self, url: str, headers: Mapping[str, str]) -> requests.Response:
        """The response to GET. Redirects that an earlier call followed are skipped: each takes one more round trip."""
        if target := self._redirected.pop(url, None):
            try:
                response = self.ask("GET", target, headers)
            except SourceError:  # the signed URL has expired
                return self.ask("GET", url, headers)
            self._redirected[url] = target
            return response
        response = self.ask("GET", url, headers)
        if origin(response.url) != origin(url):
            self._redirected[url] = response.url
        return response

    def read(self, url: str, offset: int, length: int) -> tuple[bytes, int | None]:
        """Up to `length` bytes from `offset`, fewer at the file's end, and the file's size if the server sends it.

        Raises `SourceError`.
        """
        from llamafleet.hub.wire import FAILURES

        problem = ""
        for attempt in range(ATTEMPTS):
            response = self._get(url, {"Range": f"bytes={offset}-{offset + length - 1}"})
            try:
                with response:
                    part = _part(response, url, offset, length)
                self.deadline.check(url)
                return part
            except FAILURES as error:
                self.deadline.check(url)
                problem = f"{shown(url)}: the transfer ended too early, after byte {offset}: {_kind(error)}"
                self.sleep(min(2.0**attempt, self.deadline.left()))
        raise SourceError(f"{problem}, {ATTEMPTS} times; try again later or set mirrors")

    def page(self, url: str, limit_bytes: int) -> tuple[bytes, str | None]:
        """A whole body of at most `limit_bytes`, and the address of the next page of a list, of the same origin.

        Raises `SourceError`.
        """
        from llamafleet.hub.wire import FAILURES

        with self.ask("GET", url) as response:
            try:
                body = _take(response, url, limit_bytes + 1)
            except FAILURES as error:
                self.deadline.check(url)
                raise SourceError(f"{shown(url)}: the transfer ended too early: {_kind(error)}") from error
            self.deadline.check(url)
            if len(body) > limit_bytes:
                raise SourceError(f"{shown(url)}: sends a list of more than {limit_bytes} bytes, which is not read")
            return body, _next_page(url, response.headers.get("Link", ""))


def _target(url: str, response: requests.Response) -> str:
    """The address that a redirect names. Raises `SourceError` for one that no program of ours can read."""
    location = response.headers.get("Location", "")
    target = redirects.target(url, location)
    if not location or not is_address(target):
        response.close()
        raise SourceError(f"{shown(url)}: redirects to {shown(location)!r}, which is not {ADDRESS_RULE}")
    if redirects.is_downgrade(url, target):
        response.close()
        raise SourceError(
            f"{shown(url)}: redirects from https to http, which is refused because others could change the file"
        )
    return target


def _next_page(url: str, link: str) -> str | None:
    """The next page by a Link header (RFC 8288). Raises `SourceError` for one elsewhere."""
    found = re.search(r'<([^<>]*)>;[ ]*rel="?next"?', link)
    if not found:
        return None
    target = redirects.target(url, found[1])
    if is_address(target) and origin(target) != origin(url) and urlsplit(target).path == urlsplit(url).path:
        # A mirror that passes on the list of the hub behind it: it has the next page too.
        target = urlunsplit(urlsplit(url)._replace(query=urlsplit(target).query))
    if not is_address(target) or origin(target) != origin(url):
        raise SourceError(f"{shown(url)}: its list goes on at {shown(target)!r}, which is no address of this server")
    return target


def _kind(error: BaseException) -> str:
    """The name of the error that others were made of; texts may have the query of a URL."""
    inner: object = error
    while isinstance(inner, BaseException):
        error, inner = inner, getattr(inner, "reason", None) or (inner.args[-1] if inner.args else None)
    return type(error).__name__


def _part(response: requests.Response, url: str, offset: int, length: int) -> tuple[bytes, int | None]:
    first, size = _content_range(response)
    if response.status_code == 416:  # Range Not Satisfiable: the file ends before the offset
        return b"", size
    if response.status_code == 206 and first == offset:  # Partial Content
        return _take(response, url, length), size
    start = b""
    if response.status_code == 206:
        if response.headers.get("Content-Range") or "multipart" in response.headers.get("Content-Type", ""):
            found = response.headers.get("Content-Range", "")[:100] or "several ranges"
            raise SourceError(f"{shown(url)}: requested bytes from {offset}, the server sent {found!r}")
        # Some mirrors leave Content-Range out. What is no longer than the part that was asked for is that part.
        declared = whole_number(response.headers.get("Content-Length"))
        if declared is not None and declared <= length:
            return _take(response, url, length), None
        if declared is None and len(start := _take(response, url, length + 1)) <= length:
            return start, None
    if offset + length > RANGELESS_LIMIT_BYTES:
        raise SourceError(
            f"{shown(url)}: the server does not support Range requests and the header is longer than"
            f" {RANGELESS_LIMIT_BYTES} bytes; use another server, or download the file and give its path"
        )
    rest = _take(response, url, max(0, offset + length - len(start)))
    return (start + rest)[offset : offset + length], whole_number(response.headers.get("Content-Length"))


def _content_range(response: requests.Response) -> tuple[int | None, int | None]:
    """The first byte of a part and the size of the whole file, as far as the server gives them (RFC 9110, 14.4)."""
    value = response.headers.get("Content-Range", "")
    found = re.fullmatch(r"bytes (?:([0-9]{1,19})-[0-9]{1,19}|\*)/([0-9]{1,19}|\*)", value.strip())
    return (whole_number(found[1]), whole_number(found[2])) if found else (None, None)


def _take(response: requests.Response, url: str, length: int) -> bytes:
    """The first `length` bytes of the body at most, even if the server sends more. Raises `SourceError`."""
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        raise SourceError(
            f"{shown(url)}: the server sends a compressed body ({encoding[:20]}), although a plain one was asked for;"
            " use another server"
        )
    body = bytearray()
    while len(body) < length:
        chunk = response.raw.read(min(1 << 20, length - len(body)), decode_content=False)
        if not chunk:
            break
        body += chunk
    return bytes(body)


def _retry_after(response: requests.Response, default: float) -> float:
    """Seconds to wait by the header Retry-After, a number or a date (RFC 9110, 10.2.3); `default` without one."""
    text = response.headers.get("Retry-After", "").strip()[:64]
    seconds = whole_number(text)
    if seconds is not None:
        return float(seconds)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, IndexError, OverflowError, OSError):  # no date, or one that no calendar has
        return default


def _problem(response: requests.Response, url: str) -> str:
    """The message for a response with an error status."""
    code = response.headers.get("X-Error-Code", "")[:100]
    code = f", {code}" if code else ""
    next_step = _NEXT_STEP.get(response.status_code, "try again later or set mirrors")
    if response.status_code == 401 and code == ", GatedRepo":
        next_step = _GATED
    elif response.status_code == 401 and "Authorization" in response.request.headers:
        next_step = _BAD_TOKEN
    elif response.status_code == 401 and code == ", RepoNotFound":
        next_step = _NO_REPOSITORY
    wait = response.headers.get("Retry-After", "").strip()[:64]
    unit = " s" if wait.isdigit() else ""
    wait = f" (asks to wait {'until ' if wait and not unit else ''}{wait}{unit})" if wait else ""
    return f"{shown(url)}: HTTP {response.status_code}{code}{wait}: {next_step}"
