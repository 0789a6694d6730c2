"""Download a model's files on a host: each appears whole and checked, or not at all.

Contract. Runs with Python 3.8 or later, the standard library and curl 7.76 or later. Argument: a JSON file,

    {"directory": "/var/lib/llamafleet/models/NAME-SHA12",  where the files end up; pieces.BUILDS for KEY-DIGEST.tar
     "store": "/mnt/models/NAME-SHA12" | null,              optional: a folder on another disk, to which `directory`
                                                            becomes a link, unless it is there already
     "owner": "llamafleet" | null,                          who owns them; null: whoever runs this
     "files": [{"name": "x.gguf", "urls": ["https://...", mirrors...],      file:///PATH: a file of this host; []: the
                                                            operator has sent it, as the partial file
                "size_bytes": int | null, "sha256": hex | null,
                "unverified": bool}, ...],                  true: no sha256 is needed
     "curl_config": path | null,     a curl config file (0600) with the Authorization header, /dev/stdin too
     "token_origin": "https://huggingface.co",              the only origin that is shown that header: https or loopback
     "reserve_bytes": int}                                  stays free on the file system
    and optional: "attempts" (in a row without progress), "retry_delay_s", "stall_bytes_per_s", "stall_s", "seconds"
    (all files together), and
     "peers": {"hosts": [{"name": "h2", "address": an IP address, "port": int}, ...], "seconds": for each file,
               "access": path}     hosts of the site that have the files, and a file (0600) with the run's token and
                                   certificate as {"token", "certificate"}. They alone are asked then, and no address
                                   of a file; fetch_peers.py has what is said of them

Standard output is the log: one line of text each time, the last one `done ...` or `error: ...`. Exit codes:
0 done, 2 bad spec, 3 no space, 4 size or checksum, 5 not allowed, 6 not found, 7 network, 8 not a GGUF file,
9 the peers bring no more, so that others have to be asked, 1 another fault of this host, 128 + N stopped by signal N.

A file grows as `.NAME.partial`, is checked, then gets its name; `NAME.verified` beside it records what was
checked, so that the next run neither asks nor reads. Killed at any time, the next run goes on where it was.

Its parts lie beside it on a host and are imported by their bare names: common (rules for names and addresses),
redirects, fetch_spec (what is asked), fetch_log, fetch_folder (what is on the disk), fetch_local (files of this host),
fetch_curl (one request), fetch_answer (what an answer means), fetch_peers, fetch_window and pieces (other hosts of the
site). This file has the order: one file after another, from
an address until it brings nothing new, then from the next address.

Decision 9: docs/decisions/0009-nothing-half-done-has-its-final-name.md.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Iterator  # the contract is Python 3.8, whose own Iterator is typing's

from fetch_answer import judge, learn, resolve
from fetch_curl import FULL, check_time, transfer
from fetch_folder import adopt, check_space, discard, is_known, make_folder, put_in_place, size_of, take_lock, verify
from fetch_local import is_local, needs_no_space, take
from fetch_log import Progress, gib, say
from fetch_peers import from_peers
from fetch_spec import (
    BAD_SPEC,
    MISMATCH,
    NETWORK,
    NO_SPACE,
    NOT_FOUND,
    NOT_GGUF,
    Again,
    Failed,
    Nameless,
    Spec,
    Wanted,
    read_spec,
    shown,
)

CURL_RANGE_IGNORED = 33  # the server cannot continue (curl(1), EXIT CODES)
NAMELESS_ATTEMPTS = 3  # at a name that is unknown before the first byte: 12 s, where a server gets six minutes
LONGEST_DELAY_S = 60.0  # between attempts, where the server names no time


class Stopped(BaseException):
    """A signal arrived. Not an Exception, so that no handler takes it for a failed address."""


def main(argv: list[str]) -> int:
    """The exit code of the contract above."""
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


def on_signal(number: int, frame: object) -> None:
    raise Stopped(number)


def fetch(spec: Spec) -> None:
    """All files of the spec. Raises Failed."""
    make_folder(spec)
    with take_lock(spec):
        missing = list(find_missing(spec))
        check_space(spec, [wanted for wanted in missing if not needs_no_space(spec, wanted)])
        sizes = [wanted.size_bytes for wanted in missing]
        total = 0 if None in sizes else sum(size or 0 for size in sizes)
        progress = Progress(total, sum(size_of(spec.partial(wanted)) for wanted in missing))
        for wanted in missing:
            fetch_file(spec, wanted, progress)
    total = sum(size_of(spec.final(wanted)) for wanted in spec.files)
    say(f"done {len(spec.files)} files, {gib(total)} in {spec.directory} ({len(missing)} fetched)")


def find_missing(spec: Spec) -> Iterator[Wanted]:
    """The files that are not there yet, with size and checksum from their servers where the spec leaves them open."""
    for wanted in spec.files:
        if is_known(spec, wanted):
            continue
        is_asked = bool(wanted.urls) and not is_local(wanted.urls[0]) and spec.peers is None
        known = learn(spec, wanted) if is_asked and None in (wanted.size_bytes, wanted.sha256) else wanted
        if not adopt(spec, known):
            yield known


def fetch_file(spec: Spec, wanted: Wanted, progress: Progress) -> None:
    """The file from the first address that delivers it. Raises Failed with the first address' code."""
    failures: list[Failed] = []
    if spec.peers is not None:
        return put_in_place(spec, wanted, from_peers(spec, wanted, progress))
    if not wanted.urls:
        return take_sent(spec, wanted, progress)
    for url in wanted.urls:
        try:
            return fetch_from(spec, wanted, url, progress)
        except Failed as failure:
            if failure.code in (NO_SPACE, BAD_SPEC):
                raise
            failures.append(failure)
            say(f"failed: {failure}")
            if wanted.sha256 is None or not size_of(spec.partial(wanted)):
                discard(spec, wanted, progress)  # without a sha256 nothing shows that two addresses' bytes were mixed
    steps = {
        MISMATCH: "; the bad bytes are deleted: check size and sha256 in the settings, then run again",
        NOT_GGUF: "; a login or error page? open the address, correct it, then run again",
        NETWORK: "; what is there is kept: check the network from this host, then run again to continue",
    }
    text = "; then ".join(str(failure) for failure in failures)
    raise Failed(failures[0].code, text + steps.get(failures[0].code, ""))


def take_sent(spec: Spec, wanted: Wanted, progress: Progress) -> None:
    """The file that the operator has sent, checked and put in place."""
    partial = spec.partial(wanted)
    say(f"verifying {gib(size_of(partial))} ({wanted.name})")
    try:
        digest = verify(partial, wanted, "your machine") if partial.exists() else None
    except Failed as failure:
        discard(spec, wanted, progress)
        raise Failed(failure.code, f"{failure}; what was sent is deleted: run again to send it anew") from None
    if digest is None:
        raise Failed(NOT_FOUND, f"{partial} is not there: run again to send it")
    put_in_place(spec, wanted, digest)


def fetch_from(spec: Spec, wanted: Wanted, url: str, progress: Progress) -> None:
    """The file from one address, checked and put in place; a bad partial file does not stay."""
    partial = spec.partial(wanted)
    resumed = size_of(partial) > 0
    try:
        (take if is_local(url) else download)(spec, wanted, url, progress)
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


def download(spec: Spec, wanted: Wanted, url: str, progress: Progress) -> None:
    """Attempts until the partial file is all there, or `attempts` in a row brought no progress.

    Progress is what a connection must bring that is not ended as stalled: a byte now and then is none."""
    partial = spec.partial(wanted)
    best, idle = size_of(partial), 0  # the furthest byte seen: a server that restarts and cuts makes no progress
    least = max(1, spec.stall_bytes_per_s * spec.stall_s)
    while wanted.size_bytes is None or size_of(partial) != wanted.size_bytes:
        if wanted.size_bytes is not None and size_of(partial) > wanted.size_bytes:
            say(f"{partial} has {size_of(partial)} bytes, not {wanted.size_bytes}: starting again")
            discard(spec, wanted, progress)
        try:
            return attempt(spec, wanted, url, progress)
        except Again as again:
            size = size_of(partial)
            idle, best = (0, size) if size >= best + least else (idle + 1, best)
            at_start = isinstance(again, Nameless) and not progress.moved
            attempts = min(NAMELESS_ATTEMPTS, spec.attempts) if at_start else spec.attempts
            if idle >= attempts:
                gave_up = f"{again}; gave up after {idle} attempts without progress at byte {size}"
                raise Failed(again.code, gave_up) from None
            doubling = min(spec.retry_delay_s * 2 ** min(idle, 5), LONGEST_DELAY_S)
            wait = doubling if again.wait_s is None else again.wait_s
            left = f"attempt {idle + 1} of {attempts} without progress"
            say(f"retry in {wait:.1f} s from byte {size}: {again} ({left})")
            check_time(spec, url, progress)
            time.sleep(wait)


def attempt(spec: Spec, wanted: Wanted, url: str, progress: Progress) -> None:
    """One try at the rest of the file. Returns once the server has sent all it has."""
    partial = spec.partial(wanted)
    target = resolve(spec, url)
    answer = transfer(spec, wanted, target, progress)
    if answer.curl_code == CURL_RANGE_IGNORED and answer.status == 206 and wanted.sha256:
        # Partial Content without Content-Range, as some mirrors send it: the sum shows whether it was the rest.
        answer = transfer(spec, wanted, target, progress, unnamed=True)
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
