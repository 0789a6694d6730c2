"""A candidate made as good as the ledger allows: cuts moved, the last room filled, and checked.

The search reckons with stand-ins for what depends on the cuts; here the ledger itself is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from .choose import Candidate, Search
from .ledger import LedgerRow, Placement
from .place import Case
from .predict import Segment

TRIES = 16  # of the check by the ledger, one layer less each time
FILLS = 16  # of the room that is left, one layer or tensor more each time
BETTER = 0.9999  # of the score: what rounding makes is no gain


@dataclass(frozen=True)
class Settled:
    """A candidate after the check by the ledger; the rows tell whether it really fits."""

    candidate: Candidate
    placement: Placement
    rows: tuple[LedgerRow, ...]


def settle(search: Search, one: Candidate, handicap: float) -> Settled:
    """The candidate, with fewer layers on a device that is too full, and more where there is room."""
    one = _shifted(search, one, handicap)
    case = Case(
        search.model, one.context, search.room.only(one.order), search.backend, search.extra_bytes, search.adjustment
    )  # fmt: skip
    settled = _checked(case, one)
    for _ in range(TRIES):
        short = next((n for n, row in enumerate(settled.rows[:-1]) if row.free_bytes < 0), None)
        smaller = None if short is None or search.room.unified else _smaller(search, settled.candidate, short)
        if smaller is None:
            break
        settled = _checked(case, search.weigh(one.context, one.order, smaller, handicap))
    return _filled(search, case, settled, handicap)


def placed(one: Candidate) -> Placement:
    """The candidate as the ledger knows it: device numbers are positions in its row of GPUs."""
    holders: list[int | None] = []
    spilled: set[int] = set()
    partly: dict[int, str] = {}
    for segment in one.segments:
        device = None if segment.device is None else one.order.index(segment.device)
        holders += [device] * (segment.hi - segment.lo)
        if device is not None:
            spilled |= set(range(segment.keep + (1 if segment.part else 0), segment.hi))
            if segment.part:
                partly[segment.keep] = segment.part
    last = one.segments[-1].device
    holders.append(None if last is None else one.order.index(last))
    return Placement(tuple(holders), frozenset(spilled), tuple(sorted(partly.items())))


def _checked(case: Case, one: Candidate) -> Settled:
    placement = placed(one)
    return Settled(one, placement, case.rows(placement))


def _shifted(search: Search, one: Candidate, handicap: float) -> Candidate:
    """Move the cuts between GPUs by single layers as long as that makes the workload faster."""
    if one.kind != "spill" or len(one.order) < 2:
        return one
    budgets, base = search.budgets(one.context, one.order, "spill"), search.costs(one.context)
    better = True
    while better:
        better = False
        ends = [part.hi for part in one.segments]
        ends[-1] += 1  # the output
        for position in range(len(ends) - 1):
            for step in (-1, 1):
                tried = (*ends[:position], ends[position] + step, *ends[position + 1 :])
                pieces = list(pairwise((0, *tried)))
                if any(a >= b or base[b] - base[a] > size for (a, b), size in zip(pieces, budgets, strict=True)):
                    continue
                segments = search.segments(one.order, 0, tried, (one.context, budgets))
                other = search.weigh(one.context, one.order, segments, handicap)
                if other.score < one.score * BETTER:
                    one, ends, better = other, list(tried), True
    return one


def _smaller(search: Search, one: Candidate, position: int) -> tuple[Segment, ...] | None:
    """One layer less on the GPU at that position; None where nothing can go."""
    on_gpus = [part for part in one.segments if part.device is not None]
    tight, first = on_gpus[position], on_gpus[0]
    if one.kind in ("none", "spill") and tight.keep > tight.lo and search.movable:
        keep = tight.keep - 1
        while keep > tight.lo and not search.model.spill_bytes[keep]:
            keep -= 1
        changed = {tight: replace(tight, keep=keep, part="")}
    elif one.kind == "layers" and first.lo < first.hi:
        changed = _moved_front(one.segments[0], first, 1)
    else:
        return None
    return tuple(changed.get(part, part) for part in one.segments)


def _moved_front(host: Segment, first: Segment, step: int) -> dict[Segment, Segment]:
    """So many more front layers on the host, the rest as it was."""
    front = host.hi + step
    return {host: Segment(None, 0, front, front), first: replace(first, lo=front, keep=max(first.keep, front))}


def _filled(search: Search, case: Case, settled: Settled, handicap: float) -> Settled:
    """What room is left takes more layers' experts (FFN), single tensors of one, or a whole front layer."""
    for _ in range(FILLS):
        one = settled.candidate
        for segments in _more(search, one):
            other = search.weigh(one.context, one.order, segments, handicap)
            if other.score >= one.score * BETTER:
                continue
            tried = _checked(case, other)
            if all(row.free_bytes >= 0 for row in tried.rows[:-1]):
                settled = tried
                break
        else:
            break
    return settled


def _more(search: Search, one: Candidate) -> Iterator[tuple[Segment, ...]]:
    """The candidate with a little more on its GPUs, the most first on each."""
    if one.kind == "layers":
        host, first = one.segments[:2]
        grown = {host: Segment(None, 0, host.hi - 1, host.hi - 1), first: replace(first, lo=host.hi - 1)}
        if host.hi == 1:
            yield (grown[first], *one.segments[2:])
        else:
            yield (grown[host], grown[first], *one.segments[2:])
            # Attention and cache of one more layer, and in its stead the feed-forward part of the segment's last.
            if first.keep == first.hi and search.movable:
                yield (grown[host], replace(grown[first], keep=first.hi - 1), *one.segments[2:])
    for position, segment in enumerate(one.segments):
        for change in _kept_more(search, segment):
            yield (*one.segments[:position], change, *one.segments[position + 1 :])


def _kept_more(search: Search, one: Segment) -> Iterator[Segment]:
    model = search.model
    layer = next((n for n in range(one.keep, one.hi) if model.spill_bytes[n]), None)
    if one.device is None or layer is None:
        return
    yield replace(one, keep=layer + 1, part="")
    if not one.part and 0 < model.down_bytes[layer] < model.spill_bytes[layer]:
        for part in sorted(("down", "up"), key=lambda name: model.part_bytes(layer, name)):
            yield replace(one, keep=layer, part=part)
