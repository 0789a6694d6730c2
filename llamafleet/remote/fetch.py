"""Download a model's files on a host: whole and proven, or not there at all.

Contract. Runs with Python 3.8 or later, the standard library and curl 7.76 or later. Argument: a JSON file,

    {"directory": "/var/lib/llamafleet/models/NAME-SHA12",  where the files end up
     "owner": "llamafleet" | null,                          who owns them; null: whoever runs this
     "files": [{"name": "x.gguf", "urls": ["https://...", mirrors...],
                "size_bytes": int | null, "sha256": hex | null}, ...],
     "curl_config": path | null,     a curl config file (0600) with the Authorization header
     "token_origin": "https://huggingface.co",              the only origin that is shown that header
     "reserve_bytes": int}                                  stays free on the file system
    and optional: "attempts" (in a row without a new byte), "retry_delay_s", "stall_bytes_per_s", "stall_s"

Standard output is the log: one line of text each time, the last one `done ...` or `error: ...`. Exit codes:
0 done, 2 bad spec, 3 no space, 4 size or checksum, 5 not allowed, 6 not found, 7 network, 8 not a GGUF file,
1 another fault of this host, 128 + N stopped by signal N.

A file grows as `.NAME.partial`, is checked, then gets its name; `NAME.verified` beside it records what was
checked, so that the next run neither asks nor reads. Killed at any time, the next run goes on where it was.

curl only moves bytes to our pipe: it cannot outlive us and write on, and the retries are ours, since curl's
own `--retry` falls back to the offset it started with. Addresses reach curl by standard input, for a signed
query is a secret too. Redirects away from an address that is shown the token are read, not followed: curl
before 7.83 takes another port of the same host for the same origin (CVE-2022-27774), and a fresh look at each
attempt renews an expired signature.

Longer than most files here because it travels alone: one file is copied to the host and nothing is imported.
"""

from __future__ import annotations

import email.message
import email.utils
import errno
import fcntl
import hashlib
import json
import os
import pwd
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, NoReturn
from urllib.parse import urljoin, urlsplit

BAD_SPEC, NO_SPACE, MISMATCH, NOT_ALLOWED, NOT_FOUND, NETWORK, NOT_GGUF = 2, 3, 4, 5, 6, 7, 8
GIB = 2**30
MIB = 2**20
CHUNK_BYTES = MIB
FULL = (errno.ENOSPC, errno.EDQUOT)
MAX_HOPS = 5  # redirects followed by ourselves; the Hub needs one, two for a renamed repository
MAX_WAIT_S = 300.0  # longest wait for a server's Retry-After, before the attempt is made (and counted) anyway
PROGRESS_S, PROGRESS_SHARE = 5.0, 0.05
# curl's exit codes that no repetition cures: bad address or option, TLS refused (curl(1), EXIT CODES).
HOPELESS_CURL = {1, 3, 51, 53, 54, 58, 59, 60, 66, 77, 83, 90}
CURL_RANGE_IGNORED = 33
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=-]{0,200}\.gguf")
ADDRESS = re.compile(r"https?://[^\s\"\\\x00-\x20\x7f@]+")


class Failed(Exception):
    """No use trying this address again; `code` is the exit code it stands for."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Stopped(BaseException):
    """A signal ends us; not an Exception, so that nothing on the way takes it for a failed address."""


class Again(Failed):
    """Worth another attempt, after `wait_s` seconds if the server said so."""

    def __init__(self, code: int, text: str, wait_s: float | None = None) -> None:
        super().__init__(code, text)
        self.wait_s = wait_s


@dataclass(frozen=True)
class Wanted:
    """One file: where it comes from and, where known, what it has to be."""

    name: str
    urls: tuple[str, ...]
    size_bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Spec:
    """What to do, checked; the module's docstring says what each key means."""

    directory: Path
    files: tuple[Wanted, ...]
    owner: str | None = None
    curl_config: str | None = None
    token_origin: str = "https://huggingface.co"
    reserve_bytes: int = GIB
    attempts: int = 10  # with the waits doubling from 2 s to 60 s: about five minutes of silence
    retry_delay_s: float = 2.0
    stall_bytes_per_s: int = 1024
    stall_s: int = 60

    def partial(self, wanted: Wanted) -> Path:
        return self.directory / f".{wanted.name}.partial"

    def final(self, wanted: Wanted) -> Path:
        return self.directory / wanted.name

    def sidecar(self, wanted: Wanted) -> Path:
        return self.directory / f"{wanted.name}.verified"


@dataclass
class Answer:
    """What a server said last: curl's exit code and words, the HTTP status (0: none) and the headers."""

    curl_code: int
    curl_text: str
    status: int = 0
    headers: email.message.Message = field(default_factory=email.message.Message)
    redirected: bool = False


@dataclass
class Progress:
    """Counts the bytes of all files together and says so now and then. `total` 0: not known."""

    total: int
    present: int = 0
    began: float = field(default_factory=time.monotonic)
    moved: int = 0
    said_at: float = 0.0
    said_share: float = 0.0

    def add(self, count: int, name: str) -> None:
        self.present += count
        self.moved += count
        share = min(1.0, self.present / self.total) if self.total else 0.0
        now = time.monotonic()
        if now - self.said_at < PROGRESS_S and share - self.said_share < PROGRESS_SHARE:
            return
        self.said_at, self.said_share = now, share
        speed = self.moved / max(now - self.began, 0.001)
        if not self.total:
            say(f"progress {gib(self.present)} so far, {speed / MIB:.0f} MiB/s ({name})")
            return
        left = duration(max(self.total - self.present, 0) / max(speed, 1.0))
        of = f"{self.present / GIB:.1f} of {gib(self.total)}"
        say(f"progress {100 * share:.0f} % {of}, {speed / MIB:.0f} MiB/s, {left} left ({name})")


def say(line: str) -> None:
    print(line, flush=True)


def gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB // 10 else f"{count} bytes"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def shown(url: str) -> str:
    """The address without its query, which may be a signature."""
    return url.split("?", 1)[0].split("#", 1)[0]


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


# --- the spec


def refuse(path: str, want: str, got: object) -> NoReturn:
    raise Failed(BAD_SPEC, f"spec: {path} should be {want}, but is {got!r}")


def read_spec(path: str) -> Spec:
    """The checked spec. Raises Failed with BAD_SPEC, naming the key at fault."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Failed(BAD_SPEC, f"spec {path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        refuse("the whole", "a JSON object", type(data).__name__)
    known = set(Spec.__dataclass_fields__)
    for key in sorted(set(data) - known):
        raise Failed(BAD_SPEC, f"spec: unknown key {key!r}; known are {', '.join(sorted(known))}")
    check_scalars(data)
    if not isinstance(data.get("files"), list) or not data["files"]:
        refuse("files", "a list of at least one file", data.get("files"))
    files = tuple(read_file_entry(entry, f"files[{index}]") for index, entry in enumerate(data["files"]))
    names = [wanted.name for wanted in files]
    if len(set(names)) != len(names):
        refuse("files", "files of different names", names)
    return Spec(**{**data, "directory": Path(data["directory"]), "files": files})


def check_scalars(data: dict[str, Any]) -> None:
    directory = data.get("directory")
    if not isinstance(directory, str) or not directory.startswith("/") or ".." in directory.split("/"):
        refuse("directory", "an absolute path without '..'", directory)
    for key in ("reserve_bytes", "attempts", "stall_bytes_per_s", "stall_s", "retry_delay_s"):
        value = data.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < (key == "attempts"):
            refuse(key, "a number, not negative (attempts: at least 1)", value)
    origin = data.get("token_origin", Spec.token_origin)
    if not isinstance(origin, str) or not ADDRESS.fullmatch(origin):
        refuse("token_origin", "an origin such as https://huggingface.co", origin)
    owner, config = data.get("owner"), data.get("curl_config")
    try:
        if owner is not None:
            pwd.getpwnam(owner)
    except (KeyError, TypeError):
        refuse("owner", "a user of this host, or null", owner)
    if config is not None and (not isinstance(config, str) or not Path(config).is_file()):
        refuse("curl_config", "the path of a file, or null", config)
    if config is not None and Path(config).stat().st_mode & 0o077:
        refuse(
            "curl_config",
            f"readable by its owner only ({config}: chmod 0600)",
            oct(Path(config).stat().st_mode),
        )


def read_file_entry(entry: object, path: str) -> Wanted:
    if not isinstance(entry, dict) or set(entry) - {"name", "urls", "size_bytes", "sha256"}:
        refuse(path, "an object of name, urls, size_bytes and sha256", entry)
    name, urls, size, digest = (entry.get(key) for key in ("name", "urls", "size_bytes", "sha256"))
    if not isinstance(name, str) or not NAME.fullmatch(name):
        refuse(f"{path}.name", "a plain file name that ends in .gguf", name)
    if not isinstance(urls, list) or not urls:
        refuse(f"{path}.urls", "a list of at least one address", urls)
    for url in urls:
        if not isinstance(url, str) or not ADDRESS.fullmatch(url):
            refuse(f"{path}.urls", "http(s) addresses without blanks, quotes or passwords", shown(str(url)))
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        refuse(f"{path}.size_bytes", "a count of bytes, or null", size)
    if digest is not None and (not isinstance(digest, str) or not re.fullmatch(r"[0-9a-fA-F]{64}", digest)):
        refuse(f"{path}.sha256", "64 hex digits, or null", digest)
    return Wanted(name, tuple(urls), size, digest.lower() if digest else None)


# --- curl


def origin_of(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    return (
        parts.scheme,
        (parts.hostname or "").lower(),
        parts.port or (443 if parts.scheme == "https" else 80),
    )


def has_token(spec: Spec, url: str) -> bool:
    return spec.curl_config is not None and origin_of(url) == origin_of(spec.token_origin)


def start_curl(
    spec: Spec, url: str, headers: IO[bytes], errors: IO[bytes], extra: list[str]
) -> subprocess.Popen[bytes]:
    """curl under way, its body on standard output; `extra` are lines of curl's config language."""
    protocols = "=https" if url.startswith("https:") else "=http,https"
    lines = [
        f'url = "{url}"', "globoff", "silent", "show-error", "suppress-connect-headers",
        f'proto = "{protocols}"', f'proto-redir = "{protocols}"', 'user-agent = "llamafleet"',
        "connect-timeout = 30", f"speed-limit = {spec.stall_bytes_per_s}", f"speed-time = {spec.stall_s}",
        f'dump-header = "/dev/fd/{headers.fileno()}"', *extra,
    ]  # fmt: skip
    argv = ["curl", "--disable", "--config", "-"]  # --disable: no ~/.curlrc
    if has_token(spec, url):
        argv += ["--config", str(spec.curl_config)]
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            pass_fds=[headers.fileno()],
            bufsize=0,
        )
    except FileNotFoundError:
        raise Failed(
            BAD_SPEC, "curl is not installed on this host: install the package curl, then run again"
        ) from None
    assert process.stdin is not None
    try:
        process.stdin.write("\n".join(lines).encode())
        process.stdin.close()
    except BrokenPipeError:
        pass  # curl is gone already; its exit code and words say why
    return process


def read_answer(code: int, headers: IO[bytes], errors: IO[bytes]) -> Answer:
    """What curl left: exit code, its last words without queries, and the last block of headers."""
    errors.seek(0)
    words = re.sub(r"\?\S*", "", errors.read().decode("utf-8", "replace")).strip().splitlines()
    headers.seek(0)
    blocks = re.split(r"\r?\n\r?\n", headers.read().decode("latin-1"))
    blocks = [block for block in blocks if re.match(r"HTTP/\S+ [2-9]\d\d|HTTP/\S+ 3\d\d", block)]  # no 1xx
    answer = Answer(code, words[-1] if words else f"curl exit code {code}", redirected=len(blocks) > 1)
    if blocks:
        first, _, rest = blocks[-1].partition("\n")
        answer.status = int(first.split()[1])
        answer.headers = email.message_from_string(rest.replace("\r", ""))
    return answer


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


def next_hop(url: str, answer: Answer) -> str | None:
    location = answer.headers.get("Location")
    if not 300 <= answer.status < 400 or not location:
        return None
    target = urljoin(url, location)
    if not ADDRESS.fullmatch(target) or (url.startswith("https:") and not target.startswith("https:")):
        raise Failed(
            NETWORK, f"{shown(url)} redirects to {shown(target)}, which is not a safe address; not followed"
        )
    return target


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
        if size is None and length and length.isdigit() and int(length) > 0:
            size = int(length)
        url = next_hop(url, answer)
    if digest is None:
        say(f"note: no sha256 is known for {wanted.name}: only its size and its first bytes can be checked")
    return replace(wanted, size_bytes=size, sha256=digest)


def stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def retry_after_s(answer: Answer) -> float | None:
    """Seconds that the server asks for: a number or a date (RFC 9110, 10.2.3)."""
    text = answer.headers.get("Retry-After", "").strip()
    if text.isdigit():
        return min(float(text), MAX_WAIT_S)
    try:
        return min(max(email.utils.parsedate_to_datetime(text).timestamp() - time.time(), 0.0), MAX_WAIT_S)
    except (TypeError, ValueError):
        return None


def judge(spec: Spec, url: str, answer: Answer, redirected: bool = False) -> None:
    """Raises Failed or Again unless the answer is a success."""
    place, status = shown(url), answer.status
    if status in (401, 403) and (redirected or answer.redirected):
        hint = "signed address expired, or this host's clock is wrong"
        raise Again(NOT_ALLOWED, f"{place}: the storage behind it answered {status} ({hint})")
    if status in (401, 403):
        raise Failed(NOT_ALLOWED, f"{place} answered {status}{said(answer)}; {way_in(spec, url)}")
    if status in (404, 410):
        raise Failed(
            NOT_FOUND, f"{place} answered {status}{said(answer)}; check repository, file name and revision"
        )
    if status in (408, 429) or status >= 500:
        raise Again(NETWORK, f"{place} answered {status}", retry_after_s(answer))
    if status >= 400:
        raise Failed(NETWORK, f"{place} answered {status}{said(answer)}")
    if answer.curl_code in HOPELESS_CURL:
        raise Failed(NETWORK, f"{place}: {answer.curl_text}")
    if answer.curl_code or status >= 300:
        raise Again(NETWORK, f"{place}: {answer.curl_text if answer.curl_code else f'HTTP {status}'}")


def said(answer: Answer) -> str:
    """The Hub's own reason, from its X-Error-Message header."""
    text = answer.headers.get("X-Error-Message") or answer.headers.get("X-Error-Code")
    return f" ({text[:200]})" if text else ""


def way_in(spec: Spec, url: str) -> str:
    page = shown(url).split("/resolve/")[0]
    if has_token(spec, url):
        return f"the token is not enough: accept the licence on {page} as the token's account"
    sent = "no token was sent"
    return f"{sent}: accept the licence on the model page {page}, set hub_token_file, then run again"


# --- one file


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
            raise Failed(NO_SPACE, f"{partial}: {error.strerror}; {free_text(spec)}") from None
        finally:
            stop(process)
        return read_answer(process.returncode, headers, errors)


def pour(
    process: subprocess.Popen[bytes], sink: IO[bytes], wanted: Wanted, url: str, progress: Progress
) -> None:
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


def attempt(spec: Spec, wanted: Wanted, url: str, progress: Progress) -> None:
    """One try at the rest of the file. Returns once the server has sent all it has."""
    partial = spec.partial(wanted)
    target = resolve(spec, url)
    answer = transfer(spec, wanted, target, progress)
    size = size_of(partial)
    if answer.status == 416 and answer.headers.get("Content-Range", "").endswith(f"*/{size}"):
        return  # nothing is left after the partial file: it is all there is
    if answer.status == 416 or answer.curl_code == CURL_RANGE_IGNORED:
        discard(spec, wanted, progress)
        raise Again(NETWORK, f"{shown(url)} does not continue at byte {size}; starting again from 0", 0.0)
    judge(spec, url, answer, redirected=target != url)
    endless = not (answer.headers.get("Content-Length") or answer.headers.get("Transfer-Encoding"))
    if wanted.size_bytes is not None and size < wanted.size_bytes and endless:
        raise Again(NETWORK, f"{shown(url)} ended at byte {size} of {wanted.size_bytes}")


def download(spec: Spec, wanted: Wanted, url: str, progress: Progress) -> None:
    """Attempts until the partial file is all there, or `attempts` in a row brought nothing new."""
    partial = spec.partial(wanted)
    best, idle = (
        size_of(partial),
        0,
    )  # the furthest byte seen: a server that restarts and cuts makes no progress
    while wanted.size_bytes is None or size_of(partial) != wanted.size_bytes:
        if wanted.size_bytes is not None and size_of(partial) > wanted.size_bytes:
            say(f"{partial} has {size_of(partial)} bytes, not {wanted.size_bytes}: starting again")
            discard(spec, wanted, progress)
        try:
            return attempt(spec, wanted, url, progress)
        except Again as again:
            size = size_of(partial)
            idle, best = (0, size) if size > best else (idle + 1, best)
            if idle >= spec.attempts:
                raise Failed(
                    again.code, f"{again}; gave up after {idle} attempts without progress at byte {size}"
                ) from None
            wait = spec.retry_delay_s * 2 ** min(idle, 5) if again.wait_s is None else again.wait_s
            wait = min(wait, max(60.0, again.wait_s or 0.0))
            say(
                f"retry in {wait:.1f} s from byte {size}: {again} "
                f"(attempt {idle + 1} of {spec.attempts} without progress)"
            )
            time.sleep(wait)


def discard(spec: Spec, wanted: Wanted, progress: Progress) -> None:
    progress.present -= size_of(spec.partial(wanted))
    if spec.partial(wanted).exists():
        spec.partial(wanted).unlink()


def verify(path: Path, wanted: Wanted, source: str) -> str:
    """The file's sha256, after size, first bytes and checksum were found right. Raises Failed."""
    size = size_of(path)
    if wanted.size_bytes is not None and size != wanted.size_bytes:
        raise Failed(
            MISMATCH, f"{wanted.name} from {source}: expected {wanted.size_bytes} bytes, found {size}"
        )
    digest, done, said_at = hashlib.sha256(), 0, time.monotonic()
    with open(path, "rb") as stream:
        for block in iter(lambda: stream.read(4 * MIB), b""):
            if done == 0 and block[:4] != b"GGUF":
                raise Failed(
                    NOT_GGUF, f"{wanted.name} from {source} is not a GGUF file: it begins with {block[:24]!r}"
                )
            digest.update(block)
            done += len(block)
            if time.monotonic() - said_at >= PROGRESS_S:
                said_at = time.monotonic()
                say(f"verifying {100 * done / size:.0f} % of {gib(size)} ({wanted.name})")
    if done == 0:
        raise Failed(NOT_GGUF, f"{wanted.name} from {source} is empty")
    found = digest.hexdigest()
    if wanted.sha256 is not None and found != wanted.sha256:
        raise Failed(MISMATCH, f"{wanted.name} from {source}: expected sha256 {wanted.sha256}, found {found}")
    return found


def fetch_from(spec: Spec, wanted: Wanted, url: str, progress: Progress) -> None:
    """The file from one address, checked and put in place; a bad partial file does not stay."""
    partial = spec.partial(wanted)
    resumed = size_of(partial) > 0
    try:
        download(spec, wanted, url, progress)
        say(f"verifying {gib(size_of(partial))} ({wanted.name})")
        digest = verify(partial, wanted, shown(url))
    except Failed as failure:
        if failure.code not in (MISMATCH, NOT_GGUF):
            raise
        discard(spec, wanted, progress)
        if not resumed:
            raise
        # The bytes from before may be at fault (a power cut, another mirror): this address gets a clean try.
        say(f"{failure}; it was begun by an earlier attempt: deleted, once more from byte 0")
        return fetch_from(spec, wanted, url, progress)
    put_in_place(spec, wanted, digest)


def fetch_file(spec: Spec, wanted: Wanted, progress: Progress) -> None:
    """The file from the first address that delivers it. Raises Failed with the first address' code."""
    failures: list[Failed] = []
    for url in wanted.urls:
        try:
            return fetch_from(spec, wanted, url, progress)
        except Failed as failure:
            if failure.code in (NO_SPACE, BAD_SPEC):
                raise
            failures.append(failure)
            say(f"failed: {failure}")
            if wanted.sha256 is None:
                discard(spec, wanted, progress)  # nothing would show that two addresses' bytes were mixed
    steps = {
        MISMATCH: "; the bad bytes are deleted: check size and sha256 in the settings, then run again",
        NOT_GGUF: "; a login or error page? open the address, correct it, then run again",
        NETWORK: "; what is there is kept: check the network from this host, then run again to continue",
    }
    text = "; then ".join(str(failure) for failure in failures)
    raise Failed(failures[0].code, text + steps.get(failures[0].code, ""))


# --- the folder


def hand_over(spec: Spec, path: Path, mode: int) -> None:
    os.chmod(path, mode)
    if spec.owner is not None:
        user = pwd.getpwnam(spec.owner)
        os.chown(path, user.pw_uid, user.pw_gid)


def sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def put_in_place(spec: Spec, wanted: Wanted, digest: str) -> None:
    partial, final = spec.partial(wanted), spec.final(wanted)
    hand_over(spec, partial, 0o644)
    sync(partial)
    os.replace(partial, final)
    sync(spec.directory)
    record(spec, wanted, digest)


def record(spec: Spec, wanted: Wanted, digest: str) -> None:
    """The sidecar: what was checked, and the stat by which the next run knows the file again."""
    found = spec.final(wanted).stat()
    draft = spec.directory / f".{wanted.name}.verified.new"
    content = {"size_bytes": found.st_size, "sha256": digest, "mtime_ns": found.st_mtime_ns}
    draft.write_text(json.dumps(content) + "\n", encoding="utf-8")
    hand_over(spec, draft, 0o644)
    sync(draft)
    os.replace(draft, spec.sidecar(wanted))


def is_known(spec: Spec, wanted: Wanted) -> bool:
    """Whether the sidecar vouches for the file as it is, and for what is wanted now."""
    try:
        noted = json.loads(spec.sidecar(wanted).read_text(encoding="utf-8"))
        found = spec.final(wanted).stat()
        same = (noted["size_bytes"], noted["mtime_ns"]) == (found.st_size, found.st_mtime_ns)
        size, digest = wanted.size_bytes or found.st_size, wanted.sha256 or noted["sha256"]
        return bool(same and size == found.st_size and digest == noted["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def adopt(spec: Spec, wanted: Wanted) -> bool:
    """Whether a file of that name, put there by someone else, is the one; another one is set aside."""
    final = spec.final(wanted)
    if not final.exists():
        return False
    say(f"verifying {gib(size_of(final))} ({wanted.name}), found without a matching record")
    try:
        digest = verify(final, wanted, str(final))
    except Failed as failure:
        aside = spec.directory / f".{wanted.name}.rejected"
        os.replace(final, aside)
        say(f"{failure}; set aside as {aside}: delete it when it is not needed")
        return False
    hand_over(spec, final, 0o644)
    record(spec, wanted, digest)
    return True


def free_text(spec: Spec) -> str:
    left = os.statvfs(spec.directory)
    return f"{spec.directory} has {gib(left.f_bavail * left.f_frsize)} free"


def check_space(spec: Spec, missing: list[Wanted]) -> None:
    """Raises Failed unless all that is missing of all files fits beside the reserve."""
    needed = sum(max((wanted.size_bytes or 0) - size_of(spec.partial(wanted)), 0) for wanted in missing)
    left = os.statvfs(spec.directory)
    free = left.f_bavail * left.f_frsize
    lacking = needed + spec.reserve_bytes - free
    if needed and lacking > 0:
        raise Failed(
            NO_SPACE,
            f"{spec.directory}: {gib(needed)} are needed beside a reserve of {gib(spec.reserve_bytes)}, "
            f"{gib(free)} are free, {gib(lacking)} are missing ({lacking} bytes): "
            "free that much or choose a smaller quantisation",
        )


def take_lock(spec: Spec) -> IO[str]:
    """The folder's lock, held as long as the returned file is open; says who has it while it waits."""
    handle = open(spec.directory / ".fetch.lock", "a+", encoding="utf-8")  # noqa: SIM115 - open until we end
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.seek(0)
        say(f"waiting: another download (pid {handle.read().strip() or 'unknown'}) holds {handle.name}")
        fcntl.flock(handle, fcntl.LOCK_EX)
    handle.seek(0)
    handle.truncate()
    handle.write(f"{os.getpid()}\n")
    handle.flush()
    return handle


def fetch(spec: Spec) -> None:
    """All files of the spec. Raises Failed."""
    os.makedirs(spec.directory, mode=0o755, exist_ok=True)
    hand_over(spec, spec.directory, 0o755)
    with take_lock(spec):
        missing = []
        for wanted in spec.files:
            if is_known(spec, wanted):
                continue
            known = learn(spec, wanted) if None in (wanted.size_bytes, wanted.sha256) else wanted
            if not adopt(spec, known):
                missing.append(known)
        check_space(spec, missing)
        sizes = [wanted.size_bytes for wanted in missing]
        total = 0 if None in sizes else sum(size or 0 for size in sizes)
        progress = Progress(total, sum(size_of(spec.partial(wanted)) for wanted in missing))
        for wanted in missing:
            fetch_file(spec, wanted, progress)
    total = sum(size_of(spec.final(wanted)) for wanted in spec.files)
    say(f"done {len(spec.files)} files, {gib(total)} in {spec.directory} ({len(missing)} fetched)")


def on_signal(number: int, frame: object) -> None:
    raise Stopped(number)


def main(argv: list[str]) -> int:
    os.umask(0o022)
    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    try:
        if len(argv) != 1:
            raise Failed(BAD_SPEC, "usage: fetch.py SPEC.json")
        fetch(read_spec(argv[0]))
    except Failed as failure:
        say(f"error: {failure}")
        return failure.code
    except Stopped as stopped:
        number = int(stopped.args[0])
        say(f"error: stopped by signal {number}; what is there is kept: run again to continue")
        return 128 + number
    except OSError as error:
        say(f"error: {error.filename or 'this host'}: {error.strerror}; correct that, then run again")
        return NO_SPACE if error.errno in FULL else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
