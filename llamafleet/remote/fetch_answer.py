"""What a server's answer means: the next address, the file's size and checksum, whether to try again.

Part of fetch.py and under its contract: Python 3.8, standard library, what lies beside it.

Redirects away from an address that is shown the token are read, not followed: curl before 7.83 takes another
port of the same host for the same origin (CVE-2022-27774), and a fresh look at each attempt renews an expired
signature.
"""

from __future__ import annotations

import email.utils
import re
import signal
import time
from dataclasses import replace

import redirects
from common import is_address, whole_number
from fetch_curl import MAX_HOPS, Answer, ask_head, has_token
from fetch_log import say
from fetch_spec import (
    NETWORK,
    NOT_ALLOWED,
    NOT_FOUND,
    Again,
    Failed,
    Nameless,
    Spec,
    Wanted,
    shown,
    without_queries,
)  # fmt: skip

MAX_WAIT_S = 300.0  # longest wait for a server's Retry-After, before the attempt is made (and counted) anyway
# curl's exit codes that no repetition cures: bad address or option, TLS refused (curl(1), EXIT CODES), endless headers.
HOPELESS_CURL = {1, 3, 51, 53, 54, 58, 59, 60, 66, 77, 83, 90, -signal.SIGXFSZ}
UNTRUSTED_CURL = {51, 60}  # another name in the certificate, an unknown authority
NAMELESS_CURL = {5, 6}  # the proxy's name, the server's


def resolve(spec: Spec, url: str) -> str:
    """The address to GET: redirects are walked by hand as long as the token would go along."""
    for _ in range(MAX_HOPS):
        if not has_token(spec, url):
            return url
        answer = ask_head(spec, url)
        target = next_hop(url, answer)
        if target is None:
            judge(spec, url, answer)
            return url
        url = target
    raise Failed(NETWORK, f"{shown(url)}: more than {MAX_HOPS} redirects")


def learn(spec: Spec, wanted: Wanted) -> Wanted:
    """`wanted` with the size and checksum that its server names, where the spec leaves them open.

    The Hub answers HEAD with X-Linked-Size and X-Linked-ETag (the sha256 of a file in large-file storage)."""
    url: str | None = wanted.urls[0]
    size, digest = wanted.size_bytes, wanted.sha256
    for _ in range(MAX_HOPS):
        if url is None or (size is not None and digest is not None):
            break
        answer = ask_head(spec, url)
        etag = answer.headers.get("X-Linked-ETag", "").strip('W/"').lower()
        length = answer.headers.get("X-Linked-Size") or (
            answer.headers.get("Content-Length") if answer.status == 200 else None
        )
        if digest is None and re.fullmatch(r"[0-9a-f]{64}", etag):
            digest = etag
        size = size or whole_number(length) or None
        url = next_hop(url, answer)
    if digest is None:
        say(f"note: no sha256 is known for {wanted.name}, as the settings allow: only its size and its first bytes are "
            "checked")  # fmt: skip
    return replace(wanted, size_bytes=size, sha256=digest)


def next_hop(url: str, answer: Answer) -> str | None:
    location = answer.headers.get("Location")
    if answer.status not in redirects.STATUSES or not location:
        return None
    found = redirects.target(url, location)
    if not is_address(found) or redirects.is_downgrade(url, found):
        raise Failed(NETWORK, f"{shown(url)} redirects to {shown(found)}, which is not a safe address; not followed")
    return found


def judge(spec: Spec, url: str, answer: Answer, redirected: bool = False) -> None:
    """Raises Failed or Again unless the answer is a success."""
    place, status = shown(url), answer.status
    if status in (401, 403) and (redirected or answer.redirected):
        hint = "signed address expired, or this host's clock is wrong"
        raise Again(NOT_ALLOWED, f"{place}: the storage behind it answered {status} ({hint})")
    if status == 407 or re.search(r"(?:code|error:?|response) 407", answer.curl_text):
        raise Failed(NETWORK, f"{place}: the proxy asks for a name and a password, which is not supported: set another")
    if status in (401, 403):
        raise Failed(NOT_ALLOWED, f"{place} answered {status}{said(answer)}; {way_in(spec, url, answer)}")
    if status in (404, 410):
        raise Failed(NOT_FOUND, f"{place} answered {status}{said(answer)}; check repository, file name and revision")
    if status in (408, 429) or status >= 500:
        raise Again(NETWORK, f"{place} answered {status}", retry_after_s(answer))
    if status >= 400:
        raise Failed(NETWORK, f"{place} answered {status}{said(answer)}")
    if answer.curl_code in UNTRUSTED_CURL:
        step = "if a company's own authority made the certificate, name that with ca_file"
        raise Failed(NETWORK, f"{place}: {answer.curl_text}: {step}")
    if answer.curl_code in HOPELESS_CURL:
        raise Failed(NETWORK, f"{place}: {answer.curl_text}")
    if answer.curl_code in NAMELESS_CURL:
        step = "check this host's DNS (/etc/resolv.conf, /etc/hosts)"
        raise Nameless(NETWORK, f"{place}: {answer.curl_text}: {step}")
    if answer.curl_code or status >= 300:
        raise Again(NETWORK, f"{place}: {answer.curl_text if answer.curl_code else f'HTTP {status}'}")


def retry_after_s(answer: Answer) -> float | None:
    """Seconds that the server asks for: a number or a date (RFC 9110, 10.2.3)."""
    text = answer.headers.get("Retry-After", "").strip()[:64]
    seconds = whole_number(text)
    if seconds is not None:
        return min(float(seconds), MAX_WAIT_S)
    try:
        return min(max(email.utils.parsedate_to_datetime(text).timestamp() - time.time(), 0.0), MAX_WAIT_S)
    except (TypeError, ValueError, IndexError, OverflowError, OSError):  # dates that no calendar has
        return None


def said(answer: Answer) -> str:
    """The Hub's own reason, from its X-Error-Message header."""
    text = answer.headers.get("X-Error-Message") or answer.headers.get("X-Error-Code")
    return f" ({without_queries(text)[:200]})" if text else ""


def way_in(spec: Spec, url: str, answer: Answer) -> str:
    """What helps where an address may not be read. The Hub answers 401 for a repository that is not there, too."""
    page, code = shown(url).split("/resolve/")[0], answer.headers.get("X-Error-Code", "")
    if code == "RepoNotFound":
        return (
            "there is no such repository, or it is private: check owner and name; for a private one set hub_token_file"
        )
    if has_token(spec, url):
        return f"the token is not enough: accept the licence on {page} as the token's account"
    if code == "GatedRepo":
        return f"no token was sent: accept the licence on {page}, set hub_token_file, run again"
    sent = "no token was sent"
    return f"{sent}: check the address; for a gated model accept the licence on {page}, set hub_token_file, run again"
