"""How a row of layers is cut into one piece for each device."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

BALANCE_STEPS = 12  # halvings of the fill level: the devices' fills then differ by less than a layer
SAME_SPEED = 1.1  # GPUs whose bandwidth differs by less are one kind


def cut(sums: Sequence[float], start: int, budgets: Sequence[float]) -> tuple[int, ...] | None:
    """Cut a row of layers into one piece for each device, each as full as it can be, in order.

    `sums[n]`: cost of the first n positions. The answer is where each piece ends, the first beginning at `start`;
    None if the devices do not hold them. Every device gets one position at least.
    """
    positions = len(sums) - 1
    ends = []
    for waiting, budget in zip(range(len(budgets) - 1, -1, -1), budgets, strict=True):
        end = bisect_right(sums, sums[start] + budget, start, positions - waiting + 1) - 1
        if end <= start:
            return None
        ends.append(end)
        start = end
    return tuple(ends) if start == positions else None


def fill(
    sums: Sequence[float], start: int, budgets: Sequence[float], speeds: Sequence[float]
) -> tuple[int, ...] | None:
    """As `cut`, but the slowest devices get as little as the faster ones leave, evenly; equal ones share evenly."""
    if cut(sums, start, budgets) is None:
        return None
    slow = min(speeds) * SAME_SPEED

    def at(level: float) -> tuple[int, ...] | None:
        tried = [size * level if speed <= slow else size for size, speed in zip(budgets, speeds, strict=True)]
        return cut(sums, start, tried)

    low, high = 0.0, 1.0
    for _ in range(BALANCE_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if at(middle) else (middle, high)
    return at(high)
