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
import select
import subprocess
import tempfile
from dataclasses import dataclass, field
from typing import IO
from urllib.parse import urlsplit

from fetch_folder import free_bytes, size_of
from fetch_log import MIB, Progress, gib
from fetch_spec import BAD_SPEC, MISMATCH, NO_SPACE, NOT_GGUF, Failed, Spec, Wanted, shown

CHUNK_BYTES = MIB
FULL = (errno.ENOSPC, errno.EDQUOT)
MAX_HOPS = 5  # redirects followed; the Hub needs one, two for a renamed repository


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


def transfer(spec: Spec, wanted: Wanted, url: str, progress: Progress) -> Answer:
    """One GET, appended to the partial file from where that ends."""
    partial = spec.partial(wanted)
    offset = size_of(partial)
    extra = ["fail"] + ([] if has_token(spec, url) else ["location", f"max-redirs = {MAX_HOPS}"])
    extra += [f'continue-at = "{offset}"'] if offset else []
    with tempfile.TemporaryFile() as headers, tempfile.TemporaryFile() as errors:
        process = start_curl(spec, url, headers, errors, extra)
        try:
            with open(partial, "ab") as sink:
                pour(process, sink, wanted, url, progress)
        except OSError as error:
            if error.errno not in FULL:
                raise
            left = f"{spec.directory} has {gib(free_bytes(spec))} free"
            raise Failed(NO_SPACE, f"{partial}: {error.strerror}; {left}") from None
        finally:
            stop(process)
        return read_answer(process.returncode, headers, errors)


def pour(process: subprocess.Popen[bytes], sink: IO[bytes], wanted: Wanted, url: str, progress: Progress) -> None:
    """curl's output into the partial file; stops at the first byte that cannot belong to it."""
    assert process.stdout is not None
    fd, size, held = process.stdout.fileno(), sink.tell(), b""
    while True:
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
        sink.write(block)
        sink.flush()
        size, held = size + len(block), b""
        progress.add(len(block), wanted.name)
        if not chunk:
            process.wait()
            return


def start_curl(
    spec: Spec, url: str, headers: IO[bytes], errors: IO[bytes], extra: list[str]
) -> subprocess.Popen[bytes]:
    """curl under way, its body on standard output; `extra` are lines of curl's config language."""
    argv = ["curl", "--disable", "--config", "-"]  # --disable: no ~/.curlrc
    if has_token(spec, url):
        argv += ["--config", str(spec.curl_config)]
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=errors, pass_fds=[headers.fileno()], bufsize=0)
    except FileNotFoundError:
        raise Failed(BAD_SPEC, "curl is not installed on this host: install the package curl, then run again") from None
    assert process.stdin is not None
    try:
        process.stdin.write("\n".join([*options(spec, url, headers.fileno()), *extra]).encode())
        process.stdin.close()
    except BrokenPipeError:
        pass  # curl is gone already; its exit code and words say why
    return process


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
    """What curl left: exit code, its last words without queries, and the last block of headers."""
    errors.seek(0)
    words = re.sub(r"\?\S*", "", errors.read().decode("utf-8", "replace")).strip().splitlines()
    headers.seek(0)
    blocks = re.split(r"\r?\n\r?\n", headers.read().decode("latin-1"))
    blocks = [block for block in blocks if re.match(r"HTTP/\S+ [2-9]\d\d", block)]  # no 1xx
    answer = Answer(code, words[-1] if words else f"curl exit code {code}", redirected=len(blocks) > 1)
    if blocks:
        first, _, rest = blocks[-1].partition("\n")
        answer.status = int(first.split()[1])
        answer.headers = email.message_from_string(rest.replace("\r", ""))
    return answer


def has_token(spec: Spec, url: str) -> bool:
    """Whether this address is shown the Authorization header."""
    return spec.curl_config is not None and origin_of(url) == origin_of(spec.token_origin)


def origin_of(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return parts.scheme, (parts.hostname or "").lower(), port
