"""A file from other hosts of the site, several at once.

Part of fetch.py and under its contract: Python 3.8, standard library, what lies beside it.

Each peer is asked for its list of pieces (`GET /SHA256.pieces`) and for pieces (`GET /SHA256`, with a range). Peers
with one list are used together; the checked sum of the whole file is the spec's. Pieces are appended in order, so that
the partial file is always the beginning of the file.

A peer is left, with a line for the operator's side: `told: left damaged NAME: WHY` where it brought other bytes than it
listed, or listed another file; `told: left unreachable NAME: WHY` where it brought nothing; `told: left gone NAME: WHY`
where it brought some, and then no more.

Decision 25: docs/decisions/0025-one-download-for-a-site.md.
"""

from __future__ import annotations

import hashlib
import ssl
import threading
import time
from functools import partial
from typing import Dict, Iterator, List, Optional, Union

import pieces
from fetch_curl import FULL, check_reserve
from fetch_folder import discard, free_bytes, size_of, verify
from fetch_log import Progress, gib, say
from fetch_source import Away, Damaged, Source
from fetch_spec import ASK_AGAIN, BAD_SPEC, MISMATCH, NO_SPACE, Failed, Peers, Spec, Wanted
from fetch_window import Window

# Seconds until all peers have given their lists.
LISTS_S = 15.0


class Transfer:
    """The pieces of one file on their way from sources with one list, each in a thread of its own."""

    def __init__(self, wanted: Wanted, sums: List[str], first: int, sources: List[Source]) -> None:
        self.wanted, self.sums = wanted, sums
        self.window = Window(first, len(sums), len(sources))
        self.news = threading.Condition()
        self.left: Dict[str, Exception] = {}
        self.brought: Dict[str, int] = {}  # pieces by source
        self.is_over = False
        self.sources = {source.peer.name: source for source in sources}
        self.threads = [threading.Thread(target=self._work, args=(source,), daemon=True) for source in sources]

    def needs(self, number: int) -> bool:
        with self.news:
            return not self.is_over and self.window.is_wanted(number)

    def __enter__(self) -> Transfer:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Threads that wait for bytes end with their connection, within STALL_S; nobody waits for them."""
        with self.news:
            self.is_over = True
            self.news.notify_all()

    def written(self, until: float) -> Iterator[bytes]:
        """The pieces in order, as they come. Ends early where every source was left and when `until` has come."""
        while not self.window.is_done():
            with self.news:
                ready = self.window.leave()
                is_over = len(self.left) == len(self.sources) or time.monotonic() >= until
                if not ready and not is_over:
                    self.news.wait(1.0)
                self.news.notify_all()
            yield from (data for _, data in ready)
            if is_over:
                return

    def _work(self, source: Source) -> None:
        """Bring pieces until there is none left to bring. One broken connection is opened again: it may be old."""
        name, broken = source.peer.name, 0
        while True:
            number = self._next(name)
            if number is None:
                return source.close()
            try:
                data = source.piece(self.wanted, number, self.sums[number], partial(self.needs, number))
            except (Damaged, Away) as error:
                source.close()
                broken += 1
                with self.news:
                    self.window.give_back(name, number)
                    if isinstance(error, Damaged) or broken > 1:
                        self.left[name] = error
                    self.news.notify_all()
                if name in self.left:
                    return None
                continue
            broken = 0
            with self.news:
                if data is not None:
                    self.window.bring(number, data)
                    self.brought[name] = self.brought.get(name, 0) + 1
                self.window.give_back(name, number)
                self.news.notify_all()

    def _next(self, name: str) -> Optional[int]:
        """The next piece of this source; waits for one. None: there is none."""
        with self.news:
            while not self.is_over and not self.window.is_done():
                number = self.window.take(name, time.monotonic())
                if number is not None:
                    return number
                self.news.wait(0.5)
        return None


def from_peers(spec: Spec, wanted: Wanted, progress: Progress) -> str:
    """The file at its partial name, checked; returns its sha256. Raises Failed: with ASK_AGAIN where its peers did not
    bring all of it, and what they brought is kept."""
    assert spec.peers is not None
    until = time.monotonic() + spec.peers.seconds
    path = spec.partial(wanted)
    for sums, sources in groups(spec.peers, wanted):
        names = ", ".join(source.peer.name for source in sources)
        say(f"fetching {gib(wanted.size_bytes or 0)} ({wanted.name}) from {names}")
        draw(spec, wanted, progress, sums, sources, until)
        if size_of(path) != wanted.size_bytes:
            continue
        say(f"verifying {gib(size_of(path))} ({wanted.name})")
        try:
            return verify(path, wanted, names)
        except Failed as failure:
            discard(spec, wanted, progress)
            if failure.code != MISMATCH:
                raise
            # Each piece was as listed: it is the list that is wrong, and who gave it.
            for source in sources:
                leave("damaged", source.peer.name, f"by its list of pieces {failure}")
    size = size_of(path)
    raise Failed(ASK_AGAIN, f"{wanted.name}: byte {size} of {wanted.size_bytes}, and its peers bring no more now")


def groups(peers: Peers, wanted: Wanted) -> List[tuple[List[str], List[Source]]]:
    """The peers that have the file, by the list of pieces that they give: first the list that most of them give."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=peers.certificate)
    except (ssl.SSLError, ValueError) as error:
        raise Failed(BAD_SPEC, f"the peers' certificate cannot be read: {error}") from None
    sources = [Source(peer, context, peers.token) for peer in peers.hosts]
    answers = lists(sources, wanted)
    found: Dict[str, tuple[List[str], List[Source]]] = {}
    for source in sources:
        answer = answers.get(source.peer.name, Away(f"it gave no list of pieces in {LISTS_S:.0f} s"))
        if isinstance(answer, Exception):
            leave("damaged" if isinstance(answer, Damaged) else "unreachable", source.peer.name, str(answer))
        else:
            found.setdefault("".join(answer), (answer, []))[1].append(source)
    return sorted(found.values(), key=lambda group: -len(group[1]))


def lists(sources: List[Source], wanted: Wanted) -> Dict[str, Union[List[str], Exception]]:
    """By peer, its list of pieces or why there is none; without those that gave no answer in time."""
    answers: Dict[str, Union[List[str], Exception]] = {}

    def ask(source: Source) -> None:
        try:
            answers[source.peer.name] = source.listed(wanted)
        except (Away, Damaged) as error:
            answers[source.peer.name] = error

    threads = [threading.Thread(target=ask, args=(source,), daemon=True) for source in sources]
    for thread in threads:
        thread.start()
    end = time.monotonic() + LISTS_S
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    return dict(answers)


def draw(
    spec: Spec, wanted: Wanted, progress: Progress, sums: List[str], sources: List[Source], until: float
) -> None:  # fmt: skip
    """Append the missing pieces to the partial file, as far as the sources bring them. Raises Failed where there is no
    space."""
    path = spec.partial(wanted)
    transfer = Transfer(wanted, sums, keep_sound(spec, wanted, sums, progress), sources)
    try:
        with transfer, open(path, "ab") as sink:
            for data in transfer.written(until):
                check_reserve(spec, wanted, len(data))
                sink.write(data)
                sink.flush()
                progress.add(len(data), wanted.name)
    except OSError as error:
        if error.errno not in FULL:
            raise
        left = f"{spec.directory} has {gib(free_bytes(spec))} free"
        raise Failed(NO_SPACE, f"{path}: {error.strerror}; {left}") from None
    is_late = not transfer.window.is_done() and not transfer.left
    for name in transfer.sources:
        failure = transfer.left.get(name)
        if isinstance(failure, Damaged):
            leave("damaged", name, str(failure))
        elif failure is not None:
            leave("gone" if transfer.brought.get(name) else "unreachable", name, str(failure))
        elif is_late and not transfer.brought.get(name):
            leave("unreachable", name, "it brought no piece")


def keep_sound(spec: Spec, wanted: Wanted, sums: List[str], progress: Progress) -> int:
    """Cut the partial file, which an earlier attempt began, before its first piece that is not whole and as listed;
    returns how many pieces stay."""
    path, kept = spec.partial(wanted), 0
    if not path.exists():
        return 0
    before = size_of(path)
    with open(path, "r+b") as file:
        while kept < len(sums):
            data = file.read(pieces.PIECE_BYTES)
            if hashlib.sha256(data).hexdigest() != sums[kept]:
                break
            kept += 1
        length = min(kept * pieces.PIECE_BYTES, wanted.size_bytes or 0)
        file.truncate(length)
    progress.present -= before - length
    return kept


def leave(kind: str, name: str, why: str) -> None:
    """Say that a peer is left, for the operator's side to read."""
    say(f"told: left {kind} {name}: {why[:300]}")
