"""Read pieces of a file over HTTP, politely and without leaking the token.

Redirects are followed here, by hand: the Hub answers with a signed address on another origin, which
must not see the token. Waits for a busy server are bounded. Signed queries never reach a message.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

if TYPE_CHECKING:  # a quarter of the time that `llamafleet plan` takes to start; a model on disk needs none of it
    import requests

TIMEOUT_SECONDS = (10, 60)  # to connect; between two reads
REDIRECTS = 8
ATTEMPTS = 4
WAIT_LIMIT_SECONDS = 60.0  # for one Retry-After; a server that asks for more is reported instead
RANGELESS_LIMIT_BYTES = 64 * 1024**2  # read from the start at most, where a server knows no ranges
_BUSY = (429, 500, 502, 503, 504)
_REDIRECT = (301, 302, 303, 307, 308)
_SERVED = (200, 206, 416)

_NEXT_STEP: Mapping[int, str] = {
    401: "accept the model's terms on its page and give a token with hub_token_file or HF_TOKEN",
    403: "the token's account has no access: ask for it on the model's page, or use another token",
    404: "check owner, repository, revision and file name, capitals too; private ones need a token",
    429: "the server is busy: try again later, or give a token, which has a higher limit",
}


class SourceError(Exception):
    """A source cannot be read; the message names the URL (without query), the status and the next step."""


def origin(url: str) -> str:
    """Scheme, host and port, the unit of trust for a token."""
    parts = urlsplit(url)
    port = parts.port or {"https": 443, "http": 80}.get(parts.scheme, 0)
    return f"{parts.scheme}://{parts.hostname}:{port}"


def shown(url: str) -> str:
    """The URL for messages: signed queries and passwords are secrets."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"


def _session() -> requests.Session:
    import requests

    session = requests.Session()
    session.auth = lambda request: request  # else requests takes passwords from ~/.netrc
    session.headers["Accept-Encoding"] = "identity"  # compressed bytes would not be the file's
    return session


@dataclass
class Web:
    """An HTTP client that shows `token` to `token_origin` only."""

    token: str | None = None
    token_origin: str | None = None
    sleep: Callable[[float], None] = time.sleep
    session: requests.Session = field(default_factory=_session)
    _moved: dict[str, str] = field(default_factory=dict)  # where a URL's redirects led, signed for a while

    def ask(
        self, method: str, url: str, headers: Mapping[str, str] | None = None, *, follow: bool = True
    ) -> requests.Response:
        """The answer, busy servers waited for; its body is not read yet. Raises `SourceError`.

        Without `follow`, a redirect to another origin is the answer.
        """
        last = ""
        for attempt in range(ATTEMPTS):
            try:
                answer = self._follow(method, url, dict(headers or {}), follow)
            except OSError as error:  # requests' own errors among them
                last = f"{shown(url)}: cannot be reached ({type(error).__name__}); check address and network"
                wait = 2.0**attempt
            else:
                if answer.status_code not in _BUSY:
                    return self._checked(answer, url)
                last = _problem(answer, url)
                wait = _retry_after(answer, 2.0**attempt)
                answer.close()
            if attempt + 1 == ATTEMPTS or wait > WAIT_LIMIT_SECONDS:
                break
            self.sleep(wait)
        raise SourceError(last)

    def _follow(self, method: str, url: str, headers: dict[str, str], follow: bool) -> requests.Response:
        for _ in range(REDIRECTS):
            sent = dict(headers)
            if self.token and origin(url) == self.token_origin:
                sent["Authorization"] = f"Bearer {self.token}"
            answer = self.session.request(
                method, url, headers=sent, stream=True, allow_redirects=False, timeout=TIMEOUT_SECONDS
            )
            target = urljoin(url, answer.headers.get("Location", ""))
            if answer.status_code not in _REDIRECT or (not follow and origin(target) != origin(url)):
                return answer
            answer.close()
            if urlsplit(target).scheme not in ("http", "https"):
                raise SourceError(f"{shown(url)}: redirects to {shown(target)}, which is no web address")
            if urlsplit(url).scheme == "https" and urlsplit(target).scheme == "http":
                raise SourceError(f"{shown(url)}: redirects from https to plain http, which is not followed")
            url = target
        raise SourceError(f"{shown(url)}: more than {REDIRECTS} redirects")

    @staticmethod
    def _checked(answer: requests.Response, url: str) -> requests.Response:
        if answer.status_code in _SERVED or answer.status_code in _REDIRECT:
            return answer
        answer.close()
        raise SourceError(_problem(answer, url))

    def _located(self, url: str, headers: Mapping[str, str]) -> requests.Response:
        """The answer from where the redirects led last time: each would cost a turn to the other end."""
        if target := self._moved.pop(url, None):
            try:
                answer = self.ask("GET", target, headers)
            except SourceError:  # the signed address has expired
                return self.ask("GET", url, headers)
            self._moved[url] = target
            return answer
        answer = self.ask("GET", url, headers)
        if origin(answer.url) != origin(url):
            self._moved[url] = answer.url
        return answer

    def read(self, url: str, offset: int, length: int) -> tuple[bytes, int | None]:
        """Bytes of the file from `offset`, fewer at its end, and the file's size if the server tells."""
        last = ""
        for attempt in range(ATTEMPTS):
            answer = self._located(url, {"Range": f"bytes={offset}-{offset + length - 1}"})
            try:
                with answer:
                    return _piece(answer, url, offset, length)
            except OSError as error:  # requests' own errors among them
                last = f"{shown(url)}: the transfer broke off at byte {offset} or later: {type(error).__name__}"
                self.sleep(2.0**attempt)
        raise SourceError(f"{last}, {ATTEMPTS} times; try again later or give mirrors")


def _piece(answer: requests.Response, url: str, offset: int, length: int) -> tuple[bytes, int | None]:
    range_told = answer.headers.get("Content-Range", "")
    total = re.search(r"/(\d+)$", range_told)
    size = int(total[1]) if total else None
    if answer.status_code == 416:  # Range Not Satisfiable: the file ends before the offset
        return b"", size
    if answer.status_code == 206:  # Partial Content
        if not range_told.startswith(f"bytes {offset}-"):
            raise SourceError(f"{shown(url)}: asked for bytes from {offset}, was given {range_told or 'no range'!r}")
        return _take(answer, length), size
    told = answer.headers.get("Content-Length", "")
    if offset + length > RANGELESS_LIMIT_BYTES:
        raise SourceError(
            f"{shown(url)}: the server knows no Range requests and the header goes on past byte"
            f" {RANGELESS_LIMIT_BYTES}; use a server that does, or download the file and give its path"
        )
    return _take(answer, offset + length)[offset:], int(told) if told.isdigit() else None


def _take(answer: requests.Response, length: int) -> bytes:
    """At most `length` bytes of the body, whatever the server sends."""
    body = bytearray()
    for chunk in answer.iter_content(1 << 20):
        body += chunk
        if len(body) >= length:
            break
    return bytes(body[:length])


def _retry_after(answer: requests.Response, default: float) -> float:
    told = answer.headers.get("Retry-After", "").strip()
    return float(told) if told.isdigit() else default


def _problem(answer: requests.Response, url: str) -> str:
    code = answer.headers.get("X-Error-Code", "")
    told = f", {code}" if code else ""
    step = _NEXT_STEP.get(answer.status_code, "try again later or give mirrors")
    wait = answer.headers.get("Retry-After", "")
    asked = f" (asks to wait {wait} s)" if wait else ""
    return f"{shown(url)}: HTTP {answer.status_code}{told}{asked}: {step}"
