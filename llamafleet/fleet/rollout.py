"""What a rollout does with the hosts of an inventory, and its texts: the waves with every change, and where and why it
ended.

Decision 12: docs/decisions/0012-a-fleet-moves-in-waves.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llamafleet.fleet import waves
from llamafleet.fleet.waves import Member, Size
from llamafleet.printable import one_line
from llamafleet.service.changes import Changes
from llamafleet.service.desired import Desired
from llamafleet.service.tune import Wish, wishes
from llamafleet.settings.copies import model_of


@dataclass(frozen=True)
class HostState:
    """A host that was read: the models that it serves now, and what a run would do there."""

    serving: frozenset[str]
    member: Member
    to_do: tuple[str, ...]  # a phrase for each change; empty: the host is as planned

    @classmethod
    def of(cls, name: str, desired: Desired, changes: Changes, wanted: Collection[str]) -> HostState:
        """`wanted`: the names of the models in the host's data, which copies have with a number."""

        def models(names: Collection[str]) -> frozenset[str]:
            return frozenset(model_of(one, wanted) for one in names)

        serving = models([one for one, instance in desired.installed.instances.items() if instance.serves])
        staying = models([one.name for one in desired.servings])
        # What is measured may be stopped for it, and another plan may win.
        measured = [wish for wish in wishes(desired, as_set=True) if wish.is_measured]
        switching = models([*changes.services, *(wish.name for wish in measured)])
        removed = models(changes.removed) - staying
        member = Member(name, serving & (switching | removed), switching - serving, serving & removed)
        return cls(serving, member, (*changes.to_do(), *map(_of_wish, measured)))


def _of_wish(wish: Wish) -> str:
    return f"measure {wish.name}: {wish.why}"


@dataclass(frozen=True)
class Rollout:
    """The waves of hosts that change, and the hosts for which nothing is to be done."""

    waves: tuple[tuple[str, ...], ...]
    to_do: Mapping[str, tuple[str, ...]]  # by host that changes
    as_planned: tuple[str, ...]
    alone: tuple[tuple[str, str], ...]  # host and model that no other host serves
    # By host, what is done to its gateway and its monitoring once the waves are done; None where nobody asked.
    afterwards: Mapping[str, tuple[str, ...]] | None = None

    @classmethod
    def of(cls, hosts: Mapping[str, HostState], sizes: Sequence[Size]) -> Rollout:
        changing = [one.member for one in hosts.values() if one.to_do]
        serving = Counter(model for one in hosts.values() for model in one.serving)
        return cls(
            waves=waves.waves(changing, sizes, serving),
            to_do={name: one.to_do for name, one in hosts.items() if one.to_do},
            as_planned=tuple(name for name, one in hosts.items() if not one.to_do),
            alone=tuple(waves.alone(changing, serving)),
        )

    @property
    def hosts(self) -> tuple[str, ...]:
        return tuple(name for names in (*self.waves, self.as_planned) for name in names)

    def lines(self) -> Iterator[str]:
        """The waves with every change, for people."""
        if not self.waves and not self.afterwards:
            yield f"nothing to do: all {len(self.as_planned)} hosts are as planned"
            return
        for number, names in enumerate(self.waves, 1):
            yield self.title(number)
            for name in names:
                yield from (one_line(f"    {name}: {phrase}") for phrase in self.to_do[name])
        if self.afterwards:
            yield "after the waves"
            for name, phrases in self.afterwards.items():
                yield from (one_line(f"    {name}: {phrase}") for phrase in phrases)
        for name, model in self.alone:
            yield f"note: {model} is served by {name} alone: it is away while {name} switches"
        if self.as_planned:
            yield f"as planned, and left alone: {', '.join(self.as_planned)}"

    def title(self, number: int) -> str:
        """The name of the wave of this number, from 1 on, with its hosts."""
        return f"wave {number} of {len(self.waves)}: {', '.join(self.waves[number - 1])}"

    def to_json(self) -> dict[str, Any]:
        return {
            "waves": [{name: list(self.to_do[name]) for name in names} for names in self.waves],
            "as_planned": list(self.as_planned),
            "alone": [{"host": name, "model": model} for name, model in self.alone],
            **({} if self.afterwards is None else {"afterwards": {n: list(one) for n, one in self.afterwards.items()}}),
        }


@dataclass(frozen=True)
class End:
    """How a rollout ended: after its last wave, or in the wave in which hosts failed."""

    rollout: Rollout
    wave: int  # the last one that began, from 1 on
    failed: Mapping[str, str] = field(default_factory=dict)  # by host, why
    was_executed: bool = True  # False: the last wave ended before anything was changed

    @property
    def done(self) -> tuple[str, ...]:
        """The hosts that this rollout made as planned."""
        count = self.wave if self.was_executed else self.wave - 1
        return tuple(name for names in self.rollout.waves[:count] for name in names if name not in self.failed)

    @property
    def untouched(self) -> tuple[str, ...]:
        """The hosts that change, and on which nothing was changed."""
        every = [name for names in self.rollout.waves for name in names]
        return tuple(name for name in every if name not in self.done and name not in self.failed)

    def lines(self, again: str) -> Iterator[str]:
        """What became of the hosts, for people; `again` is the command that goes on."""
        if not self.failed:
            yield f"rolled out: {', '.join(self.done)}"
            return
        yield f"the rollout stopped in {self.rollout.title(self.wave)}"
        yield from (one_line(f"    {name} failed: {why}") for name, why in sorted(self.failed.items()))
        yield f"done: {', '.join(self.done) or 'no host'}"
        yield f"not touched: {', '.join(self.untouched) or 'no host'}"
        yield (
            f"to go on, mend what failed on {', '.join(sorted(self.failed))}, or take the change back in the inventory."
            f" Then run again; what is as planned is left alone: {again}"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            **self.rollout.to_json(),
            "done": list(self.done),
            "failed": dict(self.failed),
            "untouched": list(self.untouched),
        }
