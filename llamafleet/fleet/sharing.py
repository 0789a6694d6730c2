"""Who of a site fetches one file from whom: one host from its origin, the others from hosts that have it.

A host that has the verified file serves it to the others while the run lasts, to two of them at a time. So the hosts
that have it become three times as many in the time of two transfers: the wall time grows with the logarithm of the
hosts. As long as none has the file one host asks the origin, and the others wait for it.

What a host reports of another one is not proof: it counts for the host that says it, and for all once `REPORTS` say so.

Nothing here has an effect or a clock: the operator's side asks for each host, and tells what came of it.

Decision 25: docs/decisions/0025-one-download-for-a-site.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

# Of a host that has the file: transfers that draw on it at a time. One that has no other source takes two.
PLACES = 4
# Of one transfer. Two are the usual, so that a slow host holds nobody up; more where places are free.
USUAL_SOURCES, MOST_SOURCES = 2, 4
# Hosts that say that a host serves damaged bytes, until nobody draws on it.
REPORTS = 2
# Tries in which a host reached no other one, after which it waits for none: its network lets it reach nobody. Also
# hosts that others waited for in vain, after which nobody waits: else fifty hosts would fail one after another.
TRIES = 2


@dataclass(frozen=True)
class FromOrigin:
    """The host fetches from the file's own addresses."""


@dataclass(frozen=True)
class FromPeers:
    """The host fetches from these hosts, which have the file."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Wait:
    """The host asks again when another host's transfer has ended."""

    hosts: tuple[str, ...]  # those whose transfers run


Step = FromOrigin | FromPeers | Wait


@dataclass(frozen=True)
class Left:
    """What a host says of hosts that it drew on."""

    damaged: frozenset[str] = frozenset()  # bytes were not what their sums say
    unreachable: frozenset[str] = frozenset()  # no connection came about


@dataclass
class Sharing:
    """One file in one site. `holders`: by name of a host that serves the file, how many of its places are taken."""

    holders: dict[str, int] = field(default_factory=dict)
    _transfers: dict[str, Step] = field(default_factory=dict)
    _waiting: set[str] = field(default_factory=set)
    _damaged: dict[str, set[str]] = field(default_factory=dict)  # by host: who says so
    _unreachable: dict[str, set[str]] = field(default_factory=dict)  # by host: those that it did not reach
    _tries: dict[str, int] = field(default_factory=dict)  # by host: transfers in a row that reached nobody
    _mute: set[str] = field(default_factory=set)  # hosts that cannot serve
    _in_vain: int = 0  # hosts that others waited for, and that then had nothing to serve
    _groups: dict[str, set[str]] = field(default_factory=dict)  # hosts that reach each other, as transfers have shown

    def ask(self, host: str) -> Step:
        """What the host, which needs the file, does now."""
        self._waiting.add(host)
        sources = self._sources(host)
        running = self._awaited(host)
        step: Step
        if sources:
            step = FromPeers(sources)
        elif running or any(self._may_draw(host, one) for one in self.holders):
            return Wait(tuple(sorted(running)))
        else:
            step = FromOrigin()
        self._waiting.discard(host)
        self._transfers[host] = step
        for name, places in self._places(step).items():
            self.holders[name] += places
        return step

    def expect(self, host: str) -> None:
        """The host has the file and is about to serve it: others wait for it, until its `ended` is told."""
        self._transfers[host] = FromPeers(())

    def at_origin(self, host: str) -> None:
        """The host asks the origin already."""
        self._transfers[host] = FromOrigin()

    def ended(self, host: str, serves: bool, left: Left | None = None) -> None:
        """The host's transfer has ended; `serves`: it has the file now, and other hosts may draw on it. A host that has
        the file and cannot serve it, or that failed, asks no more or asks again."""
        step = self._transfers.pop(host, None)
        left = left or Left()
        if step is not None:
            for name, places in self._places(step).items():
                if name in self.holders:
                    self.holders[name] -= places
            self._note(host, step, left)
        if serves:
            self.holders.setdefault(host, 0)

    def withdraw(self, host: str) -> None:
        """The host is no longer part of the run: it neither needs the file nor serves it. That others did not reach it
        says nothing about their networks."""
        self.ended(host, serves=False)
        self._waiting.discard(host)
        self.holders.pop(host, None)
        for away in self._unreachable.values():
            away.discard(host)

    def mute(self, host: str) -> None:
        """The host cannot serve, whether or not it has the file: nobody waits for it."""
        self._mute.add(host)

    def tried(self, host: str, reached: Iterable[str], apart: Iterable[str]) -> None:
        """The host has tried which others it reaches."""
        self._join(host, reached)
        self._unreachable.setdefault(host, set()).update(apart)

    def in_vain(self) -> None:
        """A host for which others waited did not get the file from the origin, or cannot serve it."""
        self._in_vain += 1

    def transferring(self) -> frozenset[str]:
        """The hosts whose transfers run."""
        return frozenset(self._transfers)

    def left_out(self) -> tuple[str, ...]:
        """Hosts that nobody draws on any more, because others found damaged bytes there."""
        return tuple(sorted(name for name in self._damaged if len(self._damaged[name]) >= REPORTS))

    def _sources(self, host: str) -> tuple[str, ...]:
        """The hosts that it may draw on now, those with most free places first. A single one has two free."""
        free = {name: PLACES - taken for name, taken in self.holders.items() if self._may_draw(host, name)}
        free = {name: places for name, places in free.items() if places > 0}
        share = sum(free.values()) // max(1, len(self._waiting))
        count = max(USUAL_SOURCES, min(MOST_SOURCES, share))
        best = sorted(free, key=lambda name: (-free[name], name))[:count]
        return () if len(best) == 1 and free[best[0]] < USUAL_SOURCES else tuple(best)

    def _awaited(self, host: str) -> set[str]:
        """Those whose running transfers may give the host a source."""
        if self._tries.get(host, 0) >= TRIES or self._in_vain >= TRIES:
            return set()
        return {one for one in self._transfers if one != host and self._may_draw(host, one)}

    def _may_draw(self, host: str, peer: str) -> bool:
        reports = self._damaged.get(peer, set())
        away, group = self._unreachable.get(host, set()), self._group(peer)
        is_trusted = len(reports) < REPORTS and host not in reports
        # Who does not reach one host of a network reaches none of it, unless it is of that network itself.
        is_reached = peer not in away and (host in group or not group & away)
        return peer not in (host, *self._mute) and is_trusted and is_reached

    def _group(self, host: str) -> set[str]:
        return self._groups.setdefault(host, {host})

    @staticmethod
    def _places(step: Step) -> dict[str, int]:
        names = step.names if isinstance(step, FromPeers) else ()
        return {name: USUAL_SOURCES if len(names) == 1 else 1 for name in names}

    def _note(self, host: str, step: Step, left: Left) -> None:
        """Keep what a transfer showed of the hosts that it was given; of others a host has nothing to say."""
        names = frozenset(step.names) if isinstance(step, FromPeers) else frozenset()
        for peer in names & left.damaged:
            self._damaged.setdefault(peer, set()).add(host)
        away = names & left.unreachable
        self._unreachable.setdefault(host, set()).update(away)
        if names:
            self._tries[host] = self._tries.get(host, 0) + 1 if away == names else 0
            self._join(host, names - away)

    def _join(self, host: str, peers: Iterable[str]) -> None:
        """These reach each other."""
        group = self._group(host).union(*(self._group(peer) for peer in peers))
        self._groups.update((one, group) for one in group)
