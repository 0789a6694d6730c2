"""Leave repeated layers and devices out of the graph: they need no more memory than the ones that they repeat.

`shorten` leaves out layers, `fold` devices. Tests compare the sizes with those of the complete graph.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

# Length of a row of layers that is compared, and how many of its layers are compared by their weights' types too.
# Three layers would do, except for hybrid models: their attention comes every fourth layer, so a row must hold a
# whole cycle and the start of the next.
NEIGHBOURS = (5, 3)
NO_NEIGHBOURS = (1, 1)  # layers compared alone: exact for three of five models, in a third of the time
ALIKE = 2  # of equal neighbouring devices this many are kept, and the last device


def shorten(kinds: Sequence[Hashable], types: Sequence[Hashable], neighbours: tuple[int, int]) -> tuple[int, ...]:
    """Positions of the layers to keep: every row of neighbouring layers of the model occurs among them.

    `kinds`, `types`: of each layer, and of its weights. `neighbours`: lengths of the rows, see NEIGHBOURS.
    """
    far, near = neighbours
    rows = numbered([(tuple(kinds[n : n + far]), tuple(types[n : n + near])) for n in range(len(kinds))])
    last = {row: n for n, row in enumerate(rows)}
    kept: list[int] = []
    seen: set[int] = set()
    position = 0
    while position < len(rows):
        position = _farthest_equal(rows, position, last, seen)
        kept.append(position)
        seen.add(rows[position])
        position += 1
    return tuple(kept)


def _farthest_equal(rows: Sequence[int], start: int, last: Mapping[int, int], seen: set[int]) -> int:
    """The farthest position with the row of `start`, if each row in between was seen or also occurs later."""
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
    """Map each device to a representative with equal layers; numbers of representatives have no gaps.

    `shares`: the layers of each device. Identical inner neighbours get one representative.
    """
    numbers: list[int] = []
    for device, share in enumerate(shares):
        before = shares[max(0, device - ALIKE) : device]
        is_inside = 0 < device < len(shares) - 1
        if is_inside and len(before) == ALIKE and all(other == share for other in before):
            numbers.append(numbers[-1])
        else:
            numbers.append(numbers[-1] + 1 if numbers else 0)
    return tuple(numbers)


def numbered(kinds: Sequence[Hashable]) -> list[int]:
    """Equal numbers for equal kinds; numbers are quicker to compare than kinds."""
    numbers = {kind: number for number, kind in enumerate(kinds)}
    return [numbers[kind] for kind in kinds]
