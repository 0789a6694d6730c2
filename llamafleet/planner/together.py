"""Which models that start on demand may be up at the same time: those whose ledgers fit together.

Each is planned for what the models that start with the host leave, as if it were the only one. The host adds up what
those need that are up (llamafleet/remote/room.py); the sets are named here for people.

Decision 22: docs/decisions/0022-a-server-starts-when-it-is-asked.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

from llamafleet.memory.demand import Demand, fit
from llamafleet.planner.result import Plan, Refusal

# Of a host with more of them only the pairs are named.
MOST_FOR_SETS = 12


def beside(name: str, demands: Mapping[str, Demand]) -> list[tuple[str, ...]]:
    """The largest sets of other models that may be up with this one; an empty set where none may."""
    others = [one for one in demands if one != name]
    most = len(others) if len(others) < MOST_FOR_SETS else 1
    found: list[tuple[str, ...]] = []
    for size in range(most, -1, -1):
        for names in itertools.combinations(others, size):
            is_part = any(set(names) <= set(larger) for larger in found)
            if not is_part and fit([demands[one] for one in (name, *names)]):
                found.append(names)
    return found


def with_sentences(results: Sequence[Plan | Refusal]) -> tuple[Plan | Refusal, ...]:
    """The same, and of each plan that starts on demand a sentence about which others may be up beside it."""
    demands = {one.instance: one.demand for one in results if isinstance(one, Plan) and one.demand is not None}
    return tuple(
        replace(one, why=(*one.why, sentence(beside(one.instance, demands)))) if one.instance in demands else one
        for one in results
    )


def sentence(sets: Sequence[Sequence[str]]) -> str:
    """For `why`."""
    if not any(sets):
        return "started on demand: no other model that starts on demand may be up with it"
    return f"started on demand: there may be up with it {', or '.join(' and '.join(names) for names in sets if names)}"
