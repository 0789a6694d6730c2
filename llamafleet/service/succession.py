"""In what order instances of a host are switched, and which of them only together.

What leaves, leaves after what replaces it has passed the gate. Where both have no place on the host at once, because
they want one port or one memory, they are switched together: all are stopped, the new ones start, and all old ones come
back where a new one fails.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llamafleet.host.installed import InstalledInstance, Listener
from llamafleet.planner.result import Plan
from llamafleet.remote.common import unit_of
from llamafleet.service.changes import Changes
from llamafleet.service.desired import Desired

# Of a row of the ledger in plan.json: what makes its used bytes.
PARTS = ("weights", "kv", "compute", "staging", "overhead")


@dataclass(frozen=True)
class Handover:
    """Instances that are switched together, and those that are stopped for them and leave afterwards."""

    names: tuple[str, ...]
    leaving: tuple[str, ...] = ()


def handovers(desired: Desired, changes: Changes) -> tuple[Handover, ...]:
    """The switches of a host in their order: one for each instance, or for several that need each other's place. An
    instance that is as planned has one too: until then the memory check may plan it anew."""
    order = [serving.name for serving in desired.servings]
    groups: list[set[str]] = [{name} for name in (*order, *changes.removed)]
    for name, other in _needs(desired, changes):
        joined = [group for group in groups if name in group or other in group]
        groups = [group for group in groups if group not in joined] + [set().union(*joined)]
    found = []
    for name in order:
        [group] = [group for group in groups if name in group]
        names = tuple(one for one in order if one in group)
        if names[0] == name:
            found.append(Handover(names, tuple(one for one in changes.removed if one in group)))
    return tuple(found)


def _needs(desired: Desired, changes: Changes) -> Iterator[tuple[str, str]]:
    """Pairs of an instance to install and an installed one that must give something up for it."""
    installed = desired.installed.instances
    giving = [name for name in (*changes.services, *changes.removed) if name in installed]
    ports = {name: set(_ports(name, installed[name], desired.installed.listeners)) for name in giving}
    for serving in desired.servings:
        if serving.name not in changes.services:
            continue
        for name in giving:
            if name != serving.name and serving.instance.port in ports[name]:
                yield serving.name, name
    yield from _memory_needs(desired, changes, giving)


def _ports(name: str, instance: InstalledInstance, listeners: Iterable[Listener]) -> Iterator[int]:
    """Where the installed instance listens, or will once it is started."""
    words = list(instance.record.gate.argv) if instance.record and instance.record.gate else list(instance.argv)
    if "--port" in words[:-1] and (port := words[words.index("--port") + 1]).isdecimal():
        yield int(port)
    yield from (listener.port for listener in listeners if listener.unit == unit_of(name))


def _memory_needs(desired: Desired, changes: Changes, giving: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Instances that do not fit beside the installed ones as they are, with those that give up memory."""
    installed = desired.installed.instances
    # What starts on demand makes room by itself (room.py on the host).
    plans = {serving.name: serving.plan for serving in desired.servings if serving.plan.demand is None}
    giving = [name for name in giving if not installed[name].is_on_demand]
    new = {name: _planned(plan) for name, plan in plans.items()}
    old = {name: _recorded(desired.installed.instances[name]) for name in giving}
    capacity = _capacity(plans.values())
    names = {*new, *old}
    for name in (one for one in plans if one in changes.services):
        for device, size in new[name].items():
            others = sum(max(new.get(one, {}).get(device, 0), (old.get(one) or {}).get(device, 0))
                         for one in names if one != name)  # fmt: skip
            unknown = [one for one in giving if old[one] is None and one not in plans and one != name]
            if others + size <= capacity[device] and not unknown:
                continue
            for one in giving:
                gives = (old[one] or {}).get(device, 0) > new.get(one, {}).get(device, 0)
                if one != name and (gives or one in unknown):
                    yield name, one


def _planned(plan: Plan) -> dict[str, int]:
    return {row.device: row.used_bytes for row in plan.ledger}


def _capacity(plans: Iterable[Plan]) -> dict[str, int]:
    """By device, the bytes of all plans together and what they leave free, besides the reserve."""
    used: dict[str, int] = {}
    free: dict[str, int] = {}
    for plan in plans:
        for row in plan.ledger:
            used[row.device] = used.get(row.device, 0) + row.used_bytes
            free[row.device] = min(free.get(row.device, row.free_bytes), row.free_bytes)
    return {device: size + max(0, free[device]) for device, size in used.items()}


def _recorded(instance: InstalledInstance) -> Mapping[str, int] | None:
    """The bytes by device of an installed plan; None where its record cannot be used."""
    raw: Any = instance.record.raw.get("plan") if instance.record else None
    try:
        return {row["device"]: sum(int(row[f"{part}_bytes"]) for part in PARTS) for row in raw["ledger"]}
    except (KeyError, TypeError, ValueError):
        return None


# --- over hosts -----------------------------------------------------------------------------------

Place = tuple[str, str]  # a host and an instance of it


def kept(
    successors: Mapping[Place, Sequence[Place]], passed: Iterable[Place], together: Mapping[Place, frozenset[Place]]
) -> dict[Place, Place]:
    """Of the instances that leave those that must stay, with a successor on another host that does not serve.

    `successors`: by instance that leaves, those on other hosts that are to serve in its place. `passed` are those that
    serve. `together`: by instance that was switched, those that leave for it on its own host; it is taken back where
    one of them must stay, and then serves no more.
    """
    serving, staying = set(passed), dict[Place, Place]()
    while True:
        more = {
            place: missing[0]
            for place, ones in successors.items()
            if place not in staying and (missing := [one for one in ones if one not in serving])
        }
        if not more:
            return staying
        staying |= more
        serving -= {place for place, leaving in together.items() if not leaving.isdisjoint(staying)}
