"""Divide a sequence of layers into one consecutive piece for each device."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

BALANCE_STEPS = 12  # halvings of the fill level: afterwards equal devices differ by less than one layer
SAME_SPEED = 1.1  # GPUs whose bandwidths differ by a smaller factor count as equally fast


def cut(sums: Sequence[float], start: int, budgets: Sequence[float]) -> tuple[int, ...] | None:
    """Fill each device in turn with as many layers as its budget allows; returns the end of each piece.

    `sums[n]` is the cost of the first n positions; the first piece begins at `start`. Every device gets at least one
    position. None if the devices together cannot hold all positions.
    """
    positions = len(sums) - 1
    ends = []
    for devices_left, budget in zip(range(len(budgets) - 1, -1, -1), budgets, strict=True):
        end = bisect_right(sums, sums[start] + budget, start, positions - devices_left + 1) - 1
        if end <= start:
            return None
        ends.append(end)
        start = end
    return tuple(ends) if start == positions else None


def fill(
    sums: Sequence[float], start: int, budgets: Sequence[float], speeds: Sequence[float]
) -> tuple[int, ...] | None:
    """As `cut`, but faster devices are filled first; the slowest devices share the remaining layers evenly."""
    if cut(sums, start, budgets) is None:
        return None
    slow = min(speeds) * SAME_SPEED

    def at(level: float) -> tuple[int, ...] | None:
        lowered = [size * level if speed <= slow else size for size, speed in zip(budgets, speeds, strict=True)]
        return cut(sums, start, lowered)

    low, high = 0.0, 1.0
    for _ in range(BALANCE_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if at(middle) else (middle, high)
    return at(high)
