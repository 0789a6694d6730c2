"""Less to lay out: layers and devices that only repeat what others do take no more memory than those.

`shorten` leaves layers out, `fold` devices. That both are right is held by tests against whole layouts.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

# Layers in a row, and of these the ones whose weights' types count: what such a row takes does not depend on what is
# before and behind it. Three do, but for hybrids, whose attention comes every fourth layer: they need to be seen over
# a whole cycle and into the next.
NEIGHBOURS = (5, 3)
NO_NEIGHBOURS = (1, 1)  # as if each layer stood alone: right for three layouts of five, and a third of the work
ALIKE = 2  # neighbouring devices of a kind that are laid out, and the last one


def shorten(signs: Sequence[Hashable], types: Sequence[Hashable], neighbours: tuple[int, int]) -> tuple[int, ...]:
    """Positions of a shorter row of layers in which all rows of so many stand that stand in the whole one."""
    far, near = neighbours
    rows = numbered([(tuple(signs[n : n + far]), tuple(types[n : n + near])) for n in range(len(signs))])
    last = {row: n for n, row in enumerate(rows)}
    kept: list[int] = []
    seen: set[int] = set()
    position = 0
    while position < len(rows):
        position = _leap(rows, position, last, seen)
        kept.append(position)
        seen.add(rows[position])
        position += 1
    return tuple(kept)


def _leap(rows: Sequence[int], start: int, last: Mapping[int, int], seen: set[int]) -> int:
    """The farthest position that goes on as `start` does, with nothing between that is neither seen nor to come."""
    best, limit = start, len(rows)
    for n in range(start, len(rows)):
        if n > limit:
            break
        if rows[n] == rows[start]:
            best = n
        if rows[n] not in seen:
            limit = min(limit, last[rows[n]])
    return best


def fold(shares: Sequence[Hashable]) -> tuple[int, ...]:
    """Of each device, given what each has, the number of the one that it is laid out as; such numbers have no gaps."""
    numbers: list[int] = []
    for device, share in enumerate(shares):
        before = shares[max(0, device - ALIKE) : device]
        is_inside = 0 < device < len(shares) - 1
        if is_inside and len(before) == ALIKE and all(one == share for one in before):
            numbers.append(numbers[-1])
        else:
            numbers.append(numbers[-1] + 1 if numbers else 0)
    return tuple(numbers)


def numbered(kinds: Sequence[Hashable]) -> list[int]:
    """A small number for each kind: quick to compare."""
    numbers = {kind: number for number, kind in enumerate(kinds)}
    return [numbers[kind] for kind in kinds]
