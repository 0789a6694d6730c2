"""The waves of a rollout: which hosts change together, and in which order.

A model that several hosts serve never goes away as a whole: of its hosts at most half, rounded down, but one at least,
are in one wave. A wave that would need more hosts than that allows is followed by further ones.

Decision 12 of the design: a fleet moves in waves, and the first failure stops it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

USUAL = "1,25%,100%"


class WavesError(ValueError):
    """`--waves` cannot be read; the message says what it should be."""


@dataclass(frozen=True)
class Member:
    """A host that is rolled out, and the names of the models that it serves."""

    name: str
    models: frozenset[str]


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


def waves(members: Sequence[Member], asked: Sequence[Size]) -> tuple[tuple[str, ...], ...]:
    """The hosts' names, wave by wave. What the sizes leave is done in waves as large as the models allow."""
    total, left = len(members), list(members)
    replicas = Counter(model for member in members for model in member.models)
    order = list(asked)
    made: list[tuple[str, ...]] = []
    while left:
        done = total - len(left)
        until = order[0].until(done, total) if order else total
        wave = _wave(left, until - done, replicas)
        made.append(tuple(member.name for member in wave))
        left = [member for member in left if member not in wave]
        if order and total - len(left) >= until:  # else the models allowed fewer: more waves of this size follow
            order.pop(0)
    return tuple(made)


def _wave(left: Sequence[Member], count: int, replicas: Counter[str]) -> list[Member]:
    """At most so many hosts, those first whose models have the most other hosts: they are missed least."""
    away: Counter[str] = Counter()
    wave: list[Member] = []
    for member in sorted(left, key=lambda one: -min((replicas[model] for model in one.models), default=0)):
        if len(wave) < count and (not wave or all(away[model] < most_away(replicas[model]) for model in member.models)):
            wave.append(member)
            away.update(member.models)
    return wave


def most_away(replicas: int) -> int:
    """Hosts of one model that may be away at a time."""
    return max(1, replicas // 2)


def alone(members: Sequence[Member]) -> Iterator[tuple[str, str]]:
    """Host and model where no other host serves the model: it is away while its host changes."""
    replicas = Counter(model for member in members for model in member.models)
    yield from ((one.name, model) for one in members for model in sorted(one.models) if replicas[model] == 1)
