"""The waves of a rollout: which hosts change together, and in which order.

A model that several hosts serve never goes away as a whole: of the hosts that serve it at most half, rounded down, but
one at least, are in one wave. The last host that serves a model comes after those that will serve it too. A wave that
would need more hosts than that allows is followed by further ones.

Decision 12: docs/decisions/0012-a-fleet-moves-in-waves.md.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

USUAL = "1,25%,100%"


class WavesError(ValueError):
    """`--waves` cannot be read; the message says what it should be."""


@dataclass(frozen=True)
class Member:
    """A host that is rolled out, with names of models."""

    name: str
    models: frozenset[str]  # it serves them now, and does not while it changes
    gains: frozenset[str] = frozenset()  # it serves them afterwards only
    loses: frozenset[str] = frozenset()  # of `models`, those that it does not serve afterwards


@dataclass(frozen=True)
class Size:
    """How many hosts are done when a wave ends: a number of further hosts, or a share of all."""

    hosts: int | None = None
    share: Fraction = Fraction(0)

    def until(self, done: int, total: int) -> int:
        """Hosts of `total` that are done after this wave, where `done` are before it: one more at least."""
        wanted = done + self.hosts if self.hosts is not None else -(-self.share * total // 1)
        return min(total, max(done + 1, int(wanted)))


def sizes(text: str) -> tuple[Size, ...]:
    """The sizes in a text such as "1,25%,100%": a number of hosts, or the percent of all that are done afterwards.

    Raises `WavesError`.
    """
    found: list[Size] = []
    reached = Fraction(0)
    for word in (one.strip() for one in text.split(",")):
        match = re.fullmatch(r"([0-9]{1,6})(%?)", word)
        number = int(match[1]) if match else 0
        if match is None or not number or (match[2] and number > 100):
            raise WavesError(f"--waves {text}: {word!r} should be a number of hosts from 1, or 1% to 100%")
        share = Fraction(number, 100) if match[2] else Fraction(0)
        if match[2] and share <= reached:
            raise WavesError(f"--waves {text}: {word} should be more than the share before it: shares are of all hosts")
        reached = max(reached, share)
        found.append(Size(share=share) if match[2] else Size(hosts=number))
    return tuple(found)


def waves(
    members: Sequence[Member], asked: Sequence[Size], serving: Mapping[str, int] | None = None
) -> tuple[tuple[str, ...], ...]:
    """The hosts' names, wave by wave. What the sizes leave is done in waves as large as the models allow.

    `serving`: by model, how many hosts serve it now, also those that are not rolled out; without it, the members alone.
    """
    now = Counter(replicas(members) if serving is None else serving)
    total, left, order = len(members), list(members), list(asked)
    made: list[tuple[str, ...]] = []
    while left:
        done = total - len(left)
        until = order[0].until(done, total) if order else total
        wave = _wave(left, until - done, now)
        made.append(tuple(member.name for member in wave))
        left = [member for member in left if member not in wave]
        now.update(model for member in wave for model in member.gains)
        now.subtract(model for member in wave for model in member.loses)
        if order and total - len(left) >= until:  # else the models allowed fewer: more waves of this size follow
            order.pop(0)
    return tuple(made)


def replicas(members: Sequence[Member]) -> Counter[str]:
    """By model, how many of these hosts serve it now."""
    return Counter(model for member in members for model in member.models)


def _wave(left: Sequence[Member], count: int, serving: Counter[str]) -> list[Member]:
    """At most so many hosts, those first whose models have the most other hosts: they are missed least."""
    coming = Counter(model for member in left for model in member.gains)
    away: Counter[str] = Counter()
    wave: list[Member] = []
    order = sorted(left, key=lambda one: _missed(one, serving))
    for member in order:
        if len(wave) < count and all(_can_go(model, away, serving, coming) for model in member.models):
            wave.append(member)
            away.update(member.models)
    return wave or _that_exchange(order)


def _missed(member: Member, serving: Counter[str]) -> tuple[bool, int]:
    """How much the host is missed: one that serves nothing yet least."""
    is_new = bool(member.gains and not member.models)
    return not is_new, -min((serving[model] for model in member.models), default=0)


def _can_go(model: str, away: Counter[str], serving: Counter[str], coming: Counter[str]) -> bool:
    """May one more host of the model be in a wave from which so many of the model are already?"""
    is_last = serving[model] - away[model] <= 1
    return away[model] < most_away(serving[model]) and not (is_last and coming[model])


def _that_exchange(order: Sequence[Member]) -> list[Member]:
    """The first host, where each waits for another one; with those that take over models from it, and so on: within one
    run a model leaves its host after it serves on the other one."""
    wave = [order[0]]
    for member in wave:
        wave += [one for one in order if one not in wave and one.gains & member.loses]
    return wave


def most_away(serving: int) -> int:
    """Hosts of one model that may be away at a time."""
    return max(1, serving // 2)


def alone(members: Sequence[Member], serving: Mapping[str, int] | None = None) -> Iterator[tuple[str, str]]:
    """Host and model where no other host serves the model before: it is away while its host changes."""
    now = replicas(members) if serving is None else serving
    coming = {model for member in members for model in member.gains}
    for member in members:
        yield from ((member.name, one) for one in sorted(member.models - coming) if now.get(one, 0) <= 1)
