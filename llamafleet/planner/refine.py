"""A candidate made as good as the ledger allows: cuts moved, the last room filled, and checked.

The search reckons with a sketch of what the compute buffers take; here they are laid out, as seldom as can be, since
that takes milliseconds: steps are guessed with the buffers of the last layout, and where they lead is checked.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from llamafleet.memory.capacity import Case
from llamafleet.memory.context import Context
from llamafleet.memory.ledger import Buffers, LedgerRow
from llamafleet.memory.placement import Segment
from llamafleet.planner.search import UBATCHES, Candidate, Search
from llamafleet.units import MIB

STEPS = (-1, 1, -3, 3, -8, 8)  # layers by which a cut between GPUs is moved: the longer ones leave valleys
CHECKS = 16  # by the ledger
TRIES = 16  # some layers less each time
FILLS = 16  # some layers or tensors more each time
SLACK_BYTES = 16 * MIB  # by which a compute buffer may shrink with less on the host
HOPELESS_BYTES = 1024 * MIB  # of RAM missing: no error of a sketch or rough layout is as large
BETTER = 0.9999  # of the score: what rounding makes is no gain


@dataclass(frozen=True)
class Refined:
    """A candidate after the check by the ledger; the rows tell whether it really fits, staging among compute."""

    case: Case
    candidate: Candidate
    buffers: Buffers
    rows: tuple[LedgerRow, ...]

    @property
    def gpus_short_bytes(self) -> int:
        """What the fullest GPU lacks; nothing or less: they hold it."""
        return max((-row.free_bytes for row in self.rows[:-1]), default=0)

    @property
    def is_hopeless(self) -> bool:
        """Does RAM lack more than GPUs could take over?"""
        *gpus, host = (row.free_bytes for row in self.rows)
        return -host > HOPELESS_BYTES + sum(max(0, free) for free in gpus)

    def ledger(self) -> tuple[LedgerRow, ...]:
        """The rows with staging told apart."""
        return self.case.rows(self.candidate.placement)


def refine(search: Search, one: Candidate, handicap: float) -> Refined:
    """The candidate, with fewer layers on a device that is too full, and more where there is room."""
    refused: set[tuple[Segment, ...]] = set()

    def improved(refined: Refined) -> Candidate:
        held = _held(search, refined, handicap)
        for slack in (0, SLACK_BYTES):
            better = _filled(search, held, handicap, refused, slack).candidate
            if better.segments != refined.candidate.segments:
                return better
        return refined.candidate

    rough = _checked(_case(search, one), _shifted(search, one, handicap), roughly=True)
    if rough.is_hopeless:
        return rough
    refined = _checked(rough.case, improved(rough))
    for _ in range(CHECKS):
        if refined.gpus_short_bytes > 0:
            refused.add(refined.candidate.segments)
        better = improved(refined)
        if better.segments == refined.candidate.segments:
            break
        checked = _checked(refined.case, better)
        if checked.gpus_short_bytes <= 0 or refined.gpus_short_bytes > 0:
            refined = checked
        else:
            refused.add(better.segments)
    return refined


def _case(search: Search, one: Candidate) -> Case:
    capacity = search.capacity.only(one.order)
    return Case(search.model, one.context, capacity, search.backend, search.extra_bytes, search.correction)


def _held(search: Search, refined: Refined, handicap: float) -> Refined:
    """With so many layers less on each device that is too full that the rest fits, where that can be."""
    for _ in range(TRIES):
        short = next((n for n, row in enumerate(refined.rows[:-1]) if row.free_bytes < 0), None)
        smaller = None
        if short is not None and not search.capacity.unified:
            smaller = _smaller(search, refined.candidate, short, -refined.rows[short].free_bytes)
        if smaller is None:
            break
        one = refined.candidate
        refined = _guessed(refined, search.weigh(one.context, one.order, smaller, handicap))
    return refined


def fits(search: Search, tokens: int, slots: int, kv_type: str, *, certain: bool) -> bool:
    """Would the model be served with so many tokens for each of so many slots? `certain`: not by the sketch alone."""
    tried = [(Context(tokens, slots, kv_type, ubatch), 1.0) for ubatch in UBATCHES[:2] if ubatch <= tokens]
    capacity = search.capacity
    everything = search.costs(Context(tokens, slots, kv_type, 1))[-1] + search.roofline.spill[-1]
    if not tried or everything > sum(capacity.gpu_bytes) + capacity.host_bytes + capacity.swap_bytes:
        return False  # weights and caches alone: no need to look closer
    best = search.candidates(tried)[0]
    if not certain or best.host_short_bytes > HOPELESS_BYTES:
        return not best.host_short_bytes
    return all(row.free_bytes >= 0 for row in refine(search, best, 1.0).rows)


def _checked(case: Case, one: Candidate, *, roughly: bool = False) -> Refined:
    buffers = case.buffers(one.placement, roughly=roughly)
    return Refined(case, one, buffers, case.rows(one.placement, buffers))


def _guessed(refined: Refined, one: Candidate) -> Refined:
    """As if it computed in the same buffers, which differ little as long as the same kind of things is on the host."""
    if one.kind != refined.candidate.kind:
        return _checked(refined.case, one)
    return replace(refined, candidate=one, rows=refined.case.rows(one.placement, refined.buffers))


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
            for step in STEPS:
                tried = (*ends[:position], ends[position] + step, *ends[position + 1 :])
                pieces = list(pairwise((0, *tried)))
                if any(a >= b for a, b in pieces):
                    continue
                if any(base[b] - base[a] > size for (a, b), size in zip(pieces, budgets, strict=True)):
                    continue
                segments = search.segments(0, tried, (one.context, budgets))
                other = search.weigh(one.context, one.order, segments, handicap)
                if other.score < one.score * BETTER:
                    one, ends, better = other, list(tried), True
    return one


def _smaller(search: Search, one: Candidate, position: int, missing: int) -> tuple[Segment, ...] | None:
    """So many layers less on the GPU at that position that the missing bytes are there; None where nothing can go."""
    on_gpus = [part for part in one.segments if part.device is not None]
    tight, first = on_gpus[position], on_gpus[0]
    spill, base = search.roofline.spill, search.costs(one.context)
    partly = _partly_kept(search, tight)
    last = first.hi - 1 if len(on_gpus) > 1 else first.hi  # a GPU without a layer is another row of GPUs
    if (one.kind in ("none", "spill") or position) and (partly or spill[tight.keep] > spill[tight.lo]):
        keep = tight.keep if partly else tight.keep - 1
        while keep > tight.lo and partly + spill[tight.keep] - spill[keep] < missing:
            keep -= 1
        changed = {tight: replace(tight, keep=keep, part="")}
    elif one.kind == "layers" and first.lo < last:
        front = first.lo + 1
        while front < last and base[front] - base[first.lo] < missing:
            front += 1
        host = one.segments[0]
        changed = {
            host: Segment(None, 0, front, front),
            first: replace(first, lo=front, keep=max(first.keep, front)),
        }
    else:
        return None
    return tuple(changed.get(part, part) for part in one.segments)


def _partly_kept(search: Search, one: Segment) -> int:
    """Bytes of the layer of which only a part is on the host that are on the GPU."""
    return search.model.spill_bytes[one.keep] - search.model.part_bytes(one.keep, one.part) if one.part else 0


def _filled(
    search: Search, refined: Refined, handicap: float, refused: Collection[tuple[Segment, ...]], slack: int
) -> Refined:
    """What room is left takes more layers' experts (FFN), single tensors of one, or whole front layers.

    `slack`: bytes by which it may be too much, if the buffers are the same.
    """
    for _ in range(FILLS):
        one = refined.candidate
        for segments in _more(search, refined, slack):
            other = search.weigh(one.context, one.order, segments, handicap)
            if segments in refused or other.score >= one.score * BETTER:
                continue
            tried = _guessed(refined, other)
            if tried.gpus_short_bytes <= slack:
                refined = tried
                break
        else:
            break
    return refined


def _more(search: Search, refined: Refined, slack: int) -> Iterator[tuple[Segment, ...]]:
    """The candidate with as much more on its GPUs as may fit, the most first on each."""
    one, rows = refined.candidate, iter(refined.rows)
    if one.kind == "layers":
        yield from _less_front(search, one, refined.rows[0].free_bytes + slack)
    for position, segment in enumerate(one.segments):
        if segment.device is None:
            continue
        for change in _kept_more(search, segment, next(rows).free_bytes + slack):
            yield (*one.segments[:position], change, *one.segments[position + 1 :])


def _less_front(search: Search, one: Candidate, free_bytes: int) -> Iterator[tuple[Segment, ...]]:
    if free_bytes < 0:
        return
    host, first, *others = one.segments
    base, spill = search.costs(one.context), search.roofline.spill
    whole = [base[n] + (spill[n] if first.keep == first.hi else 0) for n in range(host.hi + 1)]
    front = next(n for n in range(host.hi + 1) if whole[host.hi] - whole[n] <= free_bytes)
    for shorter in dict.fromkeys((front, min(front + 1, host.hi))):
        grown = replace(first, lo=shorter, keep=first.keep if first.keep == first.hi else shorter)
        if shorter < host.hi:
            yield (*([Segment(None, 0, shorter, shorter)] if shorter else []), grown, *others)
    # Attention and cache of one more layer, and in its stead the feed-forward part of the segment's last.
    if (
        first.keep == first.hi
        and spill[first.hi] > spill[first.hi - 1]
        and base[host.hi] - base[host.hi - 1] <= free_bytes
    ):
        grown = replace(first, lo=host.hi - 1, keep=first.hi - 1)
        yield (*([Segment(None, 0, grown.lo, grown.lo)] if grown.lo else []), grown, *others)


def _kept_more(search: Search, one: Segment, free_bytes: int) -> Iterator[Segment]:
    model, spill = search.model, search.roofline.spill
    layer = next((n for n in range(one.keep, one.hi) if model.spill_bytes[n]), None)
    if layer is None:
        return
    here = spill[layer] + _partly_kept(search, one)
    if spill[one.hi] - here <= free_bytes + search.sketch.staging(
        "spill"
    ):  # nothing is copied any more if all is there
        yield replace(one, keep=one.hi, part="")
    keep = max((n for n in range(layer + 1, one.hi) if spill[n] - here <= free_bytes), default=layer)
    for more in dict.fromkeys((keep, keep - 1)):
        if more > layer:
            yield replace(one, keep=more, part="")
    if not one.part and 0 < model.down_bytes[layer] < model.spill_bytes[layer]:
        for part in sorted(("down", "up"), key=lambda name: model.part_bytes(layer, name)):
            if model.spill_bytes[layer] - model.part_bytes(layer, part) <= free_bytes:
                yield replace(one, keep=layer, part=part)
