"""Read parts of a file over HTTP.

This module follows redirects itself: the Hub redirects to a signed URL of another origin, which must not get the token.
It waits for a busy server, for a limited time. Messages never show the query of a URL, because a signature is a secret.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

if TYPE_CHECKING:  # importing it takes a quarter of the start of `llamafleet plan`; a model on disk does not need it
    import requests

TIMEOUT_SECONDS = (10, 60)  # to connect; between two parts of a body
REDIRECTS = 8
ATTEMPTS = 4
WAIT_LIMIT_SECONDS = 60.0  # longest Retry-After that is waited for; a longer one is an error
RANGELESS_LIMIT_BYTES = 64 * 1024**2  # most that is read from a server without Range requests
_BUSY = (429, 500, 502, 503, 504)
_REDIRECT = (301, 302, 303, 307, 308)
_SERVED = (200, 206, 416)

_NEXT_STEP: Mapping[int, str] = {
    401: "accept the model's terms on its page and give a token with hub_token_file or HF_TOKEN",
    403: "the token's account has no access: request access on the model's page, or use another token",
    404: "check owner, repository, revision and file name, upper and lower case too; private models need a token",
    429: "the server is busy: try again later, or give a token, which gives a higher limit",
}


class SourceError(Exception):
    """A source cannot be read; the message has the URL (without its query), the HTTP status and the next step."""


def origin(url: str) -> str:
    """Scheme, host and port of a URL: a token is sent to one origin only."""
    parts = urlsplit(url)
    port = parts.port or {"https": 443, "http": 80}.get(parts.scheme, 0)
    return f"{parts.scheme}://{parts.hostname}:{port}"


def shown(url: str) -> str:
    """The URL for messages, without query and user: a signature and a password are secrets."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"


def _session() -> requests.Session:
    import requests

    session = requests.Session()
    session.auth = lambda request: request  # otherwise requests reads passwords from ~/.netrc
    session.headers["Accept-Encoding"] = "identity"  # a compressed body would not be the file's bytes
    return session


@dataclass
class Web:
    """An HTTP client that sends `token` to `token_origin` only."""

    token: str | None = None
    token_origin: str | None = None
    sleep: Callable[[float], None] = time.sleep
    session: requests.Session = field(default_factory=_session)
    _redirected: dict[str, str] = field(default_factory=dict)  # by URL, its redirects' last URL, signed for some time

    def ask(
        self, method: str, url: str, headers: Mapping[str, str] | None = None, *, follow: bool = True
    ) -> requests.Response:
        """The response, without its body; a busy server is asked up to `ATTEMPTS` times. Raises `SourceError`.

        Without `follow`, a redirect to another origin is not followed but returned.
        """
        problem = ""
        for attempt in range(ATTEMPTS):
            try:
                response = self._follow(method, url, dict(headers or {}), follow)
            except OSError as error:  # requests' errors are OSErrors too
                problem = f"{shown(url)}: cannot be reached ({type(error).__name__}); check address and network"
                wait = 2.0**attempt
            else:
                if response.status_code not in _BUSY:
                    return self._checked(response, url)
                problem = _problem(response, url)
                wait = _retry_after(response, 2.0**attempt)
                response.close()
            if attempt + 1 == ATTEMPTS or wait > WAIT_LIMIT_SECONDS:
                break
            self.sleep(wait)
        raise SourceError(problem)

    def _follow(self, method: str, url: str, headers: dict[str, str], follow: bool) -> requests.Response:
        for _ in range(REDIRECTS):
            sent_headers = dict(headers)
            if self.token and origin(url) == self.token_origin:
                sent_headers["Authorization"] = f"Bearer {self.token}"
            response = self.session.request(
                method, url, headers=sent_headers, stream=True, allow_redirects=False, timeout=TIMEOUT_SECONDS
            )
            target = urljoin(url, response.headers.get("Location", ""))
            if response.status_code not in _REDIRECT or (not follow and origin(target) != origin(url)):
                return response
            response.close()
            if urlsplit(target).scheme not in ("http", "https"):
                raise SourceError(f"{shown(url)}: redirects to {shown(target)}, which is not an http(s) address")
            if urlsplit(url).scheme == "https" and urlsplit(target).scheme == "http":
                raise SourceError(
                    f"{shown(url)}: redirects from https to http, which is refused because others could change the file"
                )
            url = target
        raise SourceError(f"{shown(url)}: more than {REDIRECTS} redirects")

    @staticmethod
    def _checked(response: requests.Response, url: str) -> requests.Response:
        if response.status_code in _SERVED or response.status_code in _REDIRECT:
            return response
        response.close()
        raise SourceError(_problem(response, url))

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
        problem = ""
        for attempt in range(ATTEMPTS):
            response = self._get(url, {"Range": f"bytes={offset}-{offset + length - 1}"})
            try:
                with response:
                    return _part(response, url, offset, length)
            except OSError as error:  # requests' errors are OSErrors too
                problem = f"{shown(url)}: the transfer ended too early, after byte {offset}: {type(error).__name__}"
                self.sleep(2.0**attempt)
        raise SourceError(f"{problem}, {ATTEMPTS} times; try again later or set mirrors")


def _part(response: requests.Response, url: str, offset: int, length: int) -> tuple[bytes, int | None]:
    content_range = response.headers.get("Content-Range", "")
    total = re.search(r"/(\d+)$", content_range)
    size = int(total[1]) if total else None
    if response.status_code == 416:  # Range Not Satisfiable: the file ends before the offset
        return b"", size
    if response.status_code == 206:  # Partial Content
        if not content_range.startswith(f"bytes {offset}-"):
            raise SourceError(
                f"{shown(url)}: requested bytes from {offset}, the server sent {content_range or 'no range'!r}"
            )
        return _take(response, length), size
    content_length = response.headers.get("Content-Length", "")
    if offset + length > RANGELESS_LIMIT_BYTES:
        raise SourceError(
            f"{shown(url)}: the server does not support Range requests and the header is longer than"
            f" {RANGELESS_LIMIT_BYTES} bytes; use another server, or download the file and give its path"
        )
    return _take(response, offset + length)[offset:], int(content_length) if content_length.isdigit() else None


def _take(response: requests.Response, length: int) -> bytes:
    """The first `length` bytes of the body at most, even if the server sends more."""
    body = bytearray()
    for chunk in response.iter_content(1 << 20):
        body += chunk
        if len(body) >= length:
            break
    return bytes(body[:length])


def _retry_after(response: requests.Response, default: float) -> float:
    seconds = response.headers.get("Retry-After", "").strip()
    return float(seconds) if seconds.isdigit() else default


def _problem(response: requests.Response, url: str) -> str:
    """The message for a response with an error status."""
    code = response.headers.get("X-Error-Code", "")
    code = f", {code}" if code else ""
    next_step = _NEXT_STEP.get(response.status_code, "try again later or set mirrors")
    wait = response.headers.get("Retry-After", "")
    wait = f" (asks to wait {wait} s)" if wait else ""
    return f"{shown(url)}: HTTP {response.status_code}{code}{wait}: {next_step}"
