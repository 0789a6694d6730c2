"""The hosts of a site that need one file, or have it, in this run: in which order they fetch it, and from whom.

pyinfra runs an operation on all hosts at once, each in a greenlet of this process. So what one host has done is known
here at once, and the others wait here until they have a source.

Decision 25: docs/decisions/0025-one-download-for-a-site.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from gevent.event import Event

from llamafleet.fleet.sharing import FromOrigin, FromPeers, Left, Sharing, Wait
from llamafleet.host import answers

# Of the first transfer from peers; each further one gets twice as long, because it reads again what is there.
FIRST_SECONDS = 60.0
# Between two looks whether the hosts that are waited for are still part of the run.
LOOK_SECONDS = 1.0
ASK_AGAIN = 9  # the exit code of llamafleet/remote/fetch.py where its peers bring no more
_LEFT = re.compile(r"told: left (damaged|unreachable|gone) ([!-~]{1,253}): (.*)")


@dataclass(frozen=True)
class Outcome:
    """How a transfer ended: the file is there; or other sources are to be asked; or neither, which is said already."""

    is_there: bool
    asks_again: bool = False
    left: tuple[tuple[str, str, str], ...] = ()  # kind, host and reason, of hosts that served no more

    @classmethod
    def of(cls, seen: answers.Job) -> Outcome:
        """Of a job of `fetch.py` that has ended."""
        left = tuple(match.groups() for line in seen.tail if (match := _LEFT.fullmatch(line)))
        is_ended = seen.state == "ended"
        return cls(is_ended and seen.exit_code == 0, is_ended and seen.exit_code == ASK_AGAIN, left)  # type: ignore[arg-type]

    def of_kind(self, kind: str) -> frozenset[str]:
        return frozenset(name for found, name, _ in self.left if found == kind)


class Actions(Protocol):
    """What a host does for its file. All may raise, and then the host is out."""

    def from_origin(self) -> Outcome: ...

    def from_peers(self, names: tuple[str, ...], seconds: float) -> Outcome: ...

    def serve(self) -> bool:
        """Whether the other hosts may draw on it now."""

    def say(self, text: str) -> None: ...


@dataclass
class Shared:
    """One file in one site, in this run. `is_active`: whether a host is still part of the run."""

    is_active: Callable[[str], bool]
    sharing: Sharing = field(default_factory=Sharing)
    needing: set[str] = field(default_factory=set)
    begun: set[str] = field(default_factory=set)  # hosts that ask the origin since an earlier run
    news: Event = field(default_factory=Event)

    def note(self, needing: Iterable[str], having: Iterable[str]) -> None:
        """Before the first host begins: who needs the file, and who has it verified."""
        self.needing |= set(needing)
        for host in having:
            self.sharing.expect(host)

    def fetch(self, host: str, actions: Actions) -> bool:
        """The file on a host that needs it; whether it is there. Serves it to others that need it, then."""
        try:
            return self._fetch(host, actions)
        finally:
            self.needing.discard(host)
            if host not in self.sharing.holders:
                self.sharing.withdraw(host)
            self._tell()

    def expect(self, host: str) -> None:
        """The host has the file, and is about to serve it to those that need it, until its `end`."""
        self.sharing.expect(host)

    def begin(self, host: str) -> None:
        """A job of an earlier run asks the origin on that host already: it goes on, whoever else asks."""
        self.begun.add(host)
        self.sharing.at_origin(host)

    def end(self, host: str) -> None:
        """Nothing is awaited of the host any more; what it serves by now, it serves."""
        self.sharing.ended(host, serves=False)
        self._tell()

    def offer(self, host: str, actions: Actions) -> None:
        """Serve the file from a host that has it, if others need it that have no source yet."""
        is_wanted, serves = bool(self.needing - self.sharing.transferring()), False
        try:
            serves = is_wanted and actions.serve()
        finally:
            if is_wanted and not serves:
                self.sharing.in_vain()
            self.sharing.ended(host, serves)
            self._tell()

    def _fetch(self, host: str, actions: Actions) -> bool:
        seconds = FIRST_SECONDS
        for step in self._steps(host, actions):
            if isinstance(step, FromPeers):
                outcome = actions.from_peers(step.names, seconds)
                seconds *= 2
            else:
                outcome = self._from_origin(actions)
            for kind, name, why in outcome.left:
                actions.say(f"left {name}, which {_WORDS[kind]}: {why}")
            left = Left(damaged=outcome.of_kind("damaged"), unreachable=outcome.of_kind("unreachable"))
            self.sharing.ended(host, serves=False, left=left)
            self._tell()  # its sources have places again
            if outcome.is_there:
                self.needing.discard(host)
                self.sharing.expect(host)
                self.offer(host, actions)
            if not outcome.asks_again:
                return outcome.is_there
        return False

    def _from_origin(self, actions: Actions) -> Outcome:
        is_there = False
        try:
            outcome = actions.from_origin()
            is_there = outcome.is_there
            return outcome
        finally:
            if not is_there:
                self.sharing.in_vain()

    def _steps(self, host: str, actions: Actions) -> Iterator[FromOrigin | FromPeers]:
        """What the host does next, again and again; waits as long as it has to."""
        waits_for: tuple[str, ...] = ()
        if host in self.begun:
            self.begun.discard(host)
            yield FromOrigin()
        while True:
            self.news.clear()
            step = self.sharing.ask(host)
            if not isinstance(step, Wait):
                waits_for = ()
                yield step
                continue
            if step.hosts and step.hosts != waits_for:
                actions.say(f"waiting for {', '.join(step.hosts[:3])}{' ...' if step.hosts[3:] else ''}")
                waits_for = step.hosts
            self.news.wait(LOOK_SECONDS)
            for other in (*step.hosts, *self.sharing.holders):
                if not self.is_active(other):
                    self.sharing.withdraw(other)

    def _tell(self) -> None:
        self.news.set()


_WORDS = {
    "damaged": "served other bytes than it should",
    "unreachable": "could not be reached",
    "gone": "served no more",
}
