"""One request through curl: its options, its output, its answer.

Part of fetch.py and under its contract: Python 3.8, standard library, what lies beside it.

curl only moves bytes to our pipe: it cannot outlive us and write on, and the retries are ours, since curl's
own `--retry` falls back to the offset it started with. Addresses reach curl by standard input, for a signed
query is a secret too.
"""

from __future__ import annotations

import email.message
import errno
import os
import re
import resource
import select
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from typing import IO
from urllib.parse import urlsplit

import redirects
from fetch_folder import free_bytes, size_of
from fetch_log import MIB, Progress, gib
from fetch_spec import (
    BAD_SPEC,
    MISMATCH,
    NETWORK,
    NO_SPACE,
    NOT_GGUF,
    Failed,
    Spec,
    Wanted,
    shown,
    without_queries,
)  # fmt: skip

CHUNK_BYTES = MIB
HEADERS_LIMIT_BYTES = 2**18  # of all redirects together; real ones have a few thousand
FULL = (errno.ENOSPC, errno.EDQUOT)
MAX_HOPS = redirects.MOST_HOPS


@dataclass
class Answer:
    """What a server said last: curl's exit code and words, the HTTP status (0: none) and the headers."""

    curl_code: int
    curl_text: str
    status: int = 0
    headers: email.message.Message = field(default_factory=email.message.Message)
    redirected: bool = False


def ask_head(spec: Spec, url: str) -> Answer:
    """The answer to one HEAD, redirects not followed."""
    with tempfile.TemporaryFile() as headers, tempfile.TemporaryFile() as errors:
        process = start_curl(spec, url, headers, errors, ["head", "max-time = 60"])
        try:
            assert process.stdout is not None
            process.stdout.read()
            process.wait()
        finally:
            stop(process)
        return read_answer(process.returncode, headers, errors)


def transfer(spec: Spec, wanted: Wanted, url: str, progress: Progress, unnamed: bool = False) -> Answer:
    """One GET, appended to the partial file from where that ends.

    `unnamed`: the server does not say which part it sends, and curl would not take it.
    """
    partial = spec.partial(wanted)
    offset = size_of(partial)
    extra = ["fail"] + ([] if has_token(spec, url) else ["location", f"max-redirs = {MAX_HOPS}"])
    part = f'range = "{offset}-"' if unnamed else f'continue-at = "{offset}"'
    extra += [part] if offset else []
    with tempfile.TemporaryFile() as headers, tempfile.TemporaryFile() as errors:
        process = start_curl(spec, url, headers, errors, extra)
        try:
            with open(partial, "ab") as sink:
                pour(process, sink, spec, wanted, url, progress)
        except OSError as error:
            if error.errno not in FULL:
                raise
            left = f"{spec.directory} has {gib(free_bytes(spec))} free"
            raise Failed(NO_SPACE, f"{partial}: {error.strerror}; {left}") from None
        finally:
            stop(process)
        return read_answer(process.returncode, headers, errors)


def pour(
    process: subprocess.Popen[bytes], sink: IO[bytes], spec: Spec, wanted: Wanted, url: str, progress: Progress
) -> None:
    """curl's output into the partial file; stops at the first byte that cannot belong to it, before the reserve is
    used, and when the time of the whole download is over."""
    assert process.stdout is not None
    fd, size, held = process.stdout.fileno(), sink.tell(), b""
    while True:
        check_time(spec, url, progress)
        if not select.select([fd], [], [], 1.0)[0]:
            progress.add(0, wanted.name)
            continue
        chunk = os.read(fd, CHUNK_BYTES)
        block = held + chunk
        if size == 0 and chunk and len(block) < 4:
            held = block
            continue
        if size == 0 and block and block[:4] != b"GGUF":
            raise Failed(NOT_GGUF, f"{shown(url)} is not a GGUF file: it begins with {block[:24]!r}")
        if wanted.size_bytes is not None and size + len(block) > wanted.size_bytes:
            raise Failed(MISMATCH, f"{shown(url)} sends more than the expected {wanted.size_bytes} bytes")
        check_reserve(spec, wanted, len(block))
        sink.write(block)
        sink.flush()
        size, held = size + len(block), b""
        progress.add(len(block), wanted.name)
        if not chunk:
            process.wait()
            return


def check_time(spec: Spec, url: str, progress: Progress) -> None:
    """Raises Failed where all files together have taken longer than the spec allows."""
    if time.monotonic() - progress.began > spec.seconds:
        raise Failed(NETWORK, f"{shown(url)}: the download took longer than {spec.seconds:.0f} s")


def check_reserve(spec: Spec, wanted: Wanted, count: int) -> None:
    """Raises Failed where `count` more bytes would use the reserve: no size was told, or others write there too."""
    free = free_bytes(spec)
    if spec.reserve_bytes and free - count < spec.reserve_bytes:
        raise Failed(
            NO_SPACE,
            f"{spec.partial(wanted)}: stopped at byte {size_of(spec.partial(wanted))}: {gib(free)} are free, of which "
            f"{gib(spec.reserve_bytes)} stay free; free some space and run again, or delete that file",
        )


def start_curl(
    spec: Spec, url: str, headers: IO[bytes], errors: IO[bytes], extra: list[str]
) -> subprocess.Popen[bytes]:
    """curl under way, its body on standard output; `extra` are lines of curl's config language."""
    argv = ["curl", "--disable", "--config", "-"]  # --disable: no ~/.curlrc
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(
            argv, stdin=pipe, stdout=pipe, stderr=errors, pass_fds=[headers.fileno()], bufsize=0,
            preexec_fn=limit_headers,  # noqa: PLW1509 -- this program has no threads
        )  # fmt: skip
    except FileNotFoundError:
        raise Failed(BAD_SPEC, "curl is not installed on this host: install the package curl, then run again") from None
    assert process.stdin is not None
    try:
        secret = [spec.secret] if has_token(spec, url) else []
        process.stdin.write("\n".join([*options(spec, url, headers.fileno()), *extra, *secret]).encode())
        process.stdin.close()
    except BrokenPipeError:
        pass  # curl is gone already; its exit code and words say why
    return process


def limit_headers() -> None:
    """In curl's process: the file of its headers cannot grow for ever. The body goes through a pipe."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (HEADERS_LIMIT_BYTES, HEADERS_LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def options(spec: Spec, url: str, headers_fd: int) -> list[str]:
    """What every request has in common, as lines of curl's config language."""
    protocols = "=https" if url.startswith("https:") else "=http,https"
    return [
        f'url = "{url}"', "globoff", "silent", "show-error", "suppress-connect-headers",
        f'proto = "{protocols}"', f'proto-redir = "{protocols}"', 'user-agent = "llamafleet"',
        "connect-timeout = 30", f"speed-limit = {spec.stall_bytes_per_s}", f"speed-time = {spec.stall_s}",
        f'dump-header = "/dev/fd/{headers_fd}"',
    ]  # fmt: skip


def stop(process: subprocess.Popen[bytes]) -> None:
    """No curl is left, whatever happened."""
    if process.poll() is None:
        process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def read_answer(code: int, headers: IO[bytes], errors: IO[bytes]) -> Answer:
    """What curl left: exit code, its first error without queries, and the last block of headers."""
    errors.seek(0)
    lines = without_queries(errors.read().decode("utf-8", "replace")).strip().splitlines()
    words = [line for line in lines if line.startswith("curl: ")] or lines
    if code == -signal.SIGXFSZ:
        words = [f"its headers are longer than {HEADERS_LIMIT_BYTES} bytes"]
    headers.seek(0)
    blocks = re.split(r"\r?\n\r?\n", headers.read().decode("latin-1"))
    blocks = [block for block in blocks if re.match(r"HTTP/\S+ [2-9][0-9][0-9]", block)]  # no 1xx
    answer = Answer(code, words[0][:300] if words else f"curl exit code {code}", redirected=len(blocks) > 1)
    if blocks:
        first, _, rest = blocks[-1].partition("\n")
        answer.status = int(first.split()[1][:3])
        answer.headers = email.message_from_string(rest.replace("\r", ""))
    return answer


def has_token(spec: Spec, url: str) -> bool:
    """Whether this address is shown the Authorization header."""
    return spec.curl_config is not None and origin_of(url) == origin_of(spec.token_origin)


def origin_of(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return parts.scheme, (parts.hostname or "").lower(), port
