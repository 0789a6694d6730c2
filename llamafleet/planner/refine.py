"""Refine a candidate with the ledger: move cuts between GPUs, fill free memory, and check that everything fits.

The search estimates the compute buffers; here they are laid out as llama.cpp does it. A layout takes milliseconds, so
steps are tried with the buffer sizes of the last layout, and only the resulting candidate is laid out again.
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

STEPS = (-1, 1, -3, 3, -8, 8)  # layers by which a cut between GPUs is moved; long steps leave local minima
CHECKS = 16  # layouts by the ledger, at most
TRIES = 16  # times that layers are taken from GPUs that are too full, at most
FILLS = 16  # times that layers or tensors are added to GPUs, at most
SLACK_BYTES = 16 * MIB  # a compute buffer may shrink by this much when less is on the host
HOPELESS_BYTES = 1024 * MIB  # if more RAM is missing, no error of an estimate or a rough layout can explain it
BETTER = 0.9999  # a lower score by a smaller factor is rounding, not a gain


@dataclass(frozen=True)
class Refined:
    """A candidate with its ledger rows, which show whether it fits; staging is counted in the compute bytes."""

    case: Case
    candidate: Candidate
    buffers: Buffers
    rows: tuple[LedgerRow, ...]

    @property
    def gpus_short_bytes(self) -> int:
        """Bytes missing on the fullest GPU; 0 or negative if the candidate fits on all GPUs."""
        return max((-row.free_bytes for row in self.rows[:-1]), default=0)

    @property
    def is_hopeless(self) -> bool:
        """Is more RAM missing than the GPUs could take over?"""
        *gpus, host = (row.free_bytes for row in self.rows)
        return -host > HOPELESS_BYTES + sum(max(0, free) for free in gpus)

    def ledger(self) -> tuple[LedgerRow, ...]:
        """The ledger's rows with staging apart from compute."""
        return self.case.rows(self.candidate.placement)


def refine(search: Search, candidate: Candidate, handicap: float) -> Refined:
    """The candidate with fewer layers on GPUs that are too full, and more on GPUs with free memory."""
    refused: set[tuple[Segment, ...]] = set()

    def improved(refined: Refined) -> Candidate:
        shrunk = _shrunk(search, refined, handicap)
        for slack in (0, SLACK_BYTES):
            better = _filled(search, shrunk, handicap, refused, slack).candidate
            if better.segments != refined.candidate.segments:
                return better
        return refined.candidate

    rough = _checked(_case(search, candidate), _with_cuts_moved(search, candidate, handicap), roughly=True)
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


def with_spilled(search: Search, candidate: Candidate, count: int, handicap: float) -> Refined:
    """The candidate with the experts (FFN) of exactly `count` layers on the host, or of all, where there are fewer.

    They are taken in turn from the GPU that has the most, and given back to the one that has the fewest.
    """
    movable, segments = search.movable, list(candidate.segments)

    def kept(position: int) -> list[int]:
        one = segments[position]
        return [layer for layer in movable if one.lo <= layer < one.keep]

    def spilled(position: int) -> list[int]:
        one = segments[position]
        return [layer for layer in movable if one.keep <= layer < one.hi]

    on_gpus = [position for position, one in enumerate(segments) if one.device is not None]
    for position in on_gpus:
        segments[position] = replace(segments[position], part="")
    while on_gpus and sum(len(spilled(position)) for position in on_gpus) < count:
        most = max(on_gpus, key=lambda position: len(kept(position)))
        if not kept(most):
            break
        segments[most] = replace(segments[most], keep=kept(most)[-1])
    while sum(len(spilled(position)) for position in on_gpus) > count:
        fewest = min((one for one in on_gpus if spilled(one)), key=lambda position: len(kept(position)))
        rest = spilled(fewest)[1:]
        segments[fewest] = replace(segments[fewest], keep=rest[0] if rest else segments[fewest].hi)
    fixed = search.evaluate(candidate.context, candidate.order, tuple(segments), handicap)
    return _checked(_case(search, fixed), fixed)


def _case(search: Search, candidate: Candidate) -> Case:
    capacity = search.capacity.only(candidate.order)
    return Case(search.model, candidate.context, capacity, search.backend, search.extra_bytes, search.correction)


def _shrunk(search: Search, refined: Refined, handicap: float) -> Refined:
    """Take layers off each GPU that is too full until the rest fits, or until no layer can be taken."""
    for _ in range(TRIES):
        short = next((n for n, row in enumerate(refined.rows[:-1]) if row.free_bytes < 0), None)
        smaller = None
        if short is not None and not search.capacity.unified:
            smaller = _with_less_on(search, refined.candidate, short, -refined.rows[short].free_bytes)
        if smaller is None:
            break
        old = refined.candidate
        refined = _with_last_buffers(refined, search.evaluate(old.context, old.order, smaller, handicap))
    return refined


def fits(search: Search, context: Context, *, certain: bool) -> bool:
    """Does the model fit with this context and one of the smaller ubatches? `certain`: check with the ledger, not only
    with the estimate."""
    context, capacity = replace(context, flash_attention=search.flash_attention), search.capacity
    sizes = [ubatch for ubatch in UBATCHES[:2] if ubatch <= context.tokens]
    if context.takes_whole_inputs:
        sizes = [context.tokens]
    weighted_contexts = [(replace(context, ubatch_tokens=ubatch).pooled(context.pooling), 1.0) for ubatch in sizes]
    needed = search.base_costs(replace(context, ubatch_tokens=1))[-1] + search.roofline.spill[-1]
    if not weighted_contexts or needed > sum(capacity.gpu_bytes) + capacity.host_bytes + capacity.swap_bytes:
        return False  # weights and KV cache alone are too large
    best = search.candidates(weighted_contexts)[0]
    if not certain or best.host_short_bytes > HOPELESS_BYTES:
        return not best.host_short_bytes
    return all(row.free_bytes >= 0 for row in refine(search, best, 1.0).rows)


def _checked(case: Case, candidate: Candidate, *, roughly: bool = False) -> Refined:
    buffers = case.buffers(candidate.placement, roughly=roughly)
    return Refined(case, candidate, buffers, case.rows(candidate.placement, buffers))


def _with_last_buffers(refined: Refined, candidate: Candidate) -> Refined:
    """The candidate with the last compute-buffer sizes: they hardly change while the same kind of tensors is on the
    host. With another kind, the buffers are laid out again."""
    if candidate.kind != refined.candidate.kind:
        return _checked(refined.case, candidate)
    return replace(refined, candidate=candidate, rows=refined.case.rows(candidate.placement, refined.buffers))


def _with_cuts_moved(search: Search, candidate: Candidate, handicap: float) -> Candidate:
    """Move the cuts between GPUs by a few layers as long as that makes the workload faster."""
    if candidate.kind != "spill" or len(candidate.order) < 2:
        return candidate
    budgets, base = search.budgets(candidate.context, candidate.order, "spill"), search.base_costs(candidate.context)
    better = True
    while better:
        better = False
        ends = [segment.hi for segment in candidate.segments]
        ends[-1] += 1  # the output matrix
        for position in range(len(ends) - 1):
            for step in STEPS:
                new_ends = (*ends[:position], ends[position] + step, *ends[position + 1 :])
                pieces = list(pairwise((0, *new_ends)))
                if any(a >= b for a, b in pieces):
                    continue
                if any(base[b] - base[a] > size for (a, b), size in zip(pieces, budgets, strict=True)):
                    continue
                segments = search.segments(0, new_ends, (candidate.context, budgets))
                other = search.evaluate(candidate.context, candidate.order, segments, handicap)
                if other.score < candidate.score * BETTER:
                    candidate, ends, better = other, list(new_ends), True
    return candidate


def _with_less_on(search: Search, candidate: Candidate, position: int, missing: int) -> tuple[Segment, ...] | None:
    """Move layers off the GPU at `position` until `missing` bytes are free; None if nothing can move."""
    on_gpus = [segment for segment in candidate.segments if segment.device is not None]
    full, first = on_gpus[position], on_gpus[0]
    spill, base = search.roofline.spill, search.base_costs(candidate.context)
    partly = _partly_kept_bytes(search, full)
    # Each of several GPUs keeps a layer: fewer GPUs are another candidate.
    last = first.hi - 1 if len(on_gpus) > 1 else first.hi
    if (candidate.kind in ("none", "spill") or position) and (partly or spill[full.keep] > spill[full.lo]):
        keep = full.keep if partly else full.keep - 1
        while keep > full.lo and partly + spill[full.keep] - spill[keep] < missing:
            keep -= 1
        changed = {full: replace(full, keep=keep, part="")}
    elif candidate.kind == "layers" and first.lo < last:
        front = first.lo + 1
        while front < last and base[front] - base[first.lo] < missing:
            front += 1
        host = candidate.segments[0]
        changed = {
            host: Segment(None, 0, front, front),
            first: replace(first, lo=front, keep=max(first.keep, front)),
        }
    else:
        return None
    return tuple(changed.get(segment, segment) for segment in candidate.segments)


def _partly_kept_bytes(search: Search, segment: Segment) -> int:
    """Bytes on the GPU of the layer whose experts (FFN) are divided between GPU and host; 0 if there is none."""
    if not segment.part:
        return 0
    return search.model.spill_bytes[segment.keep] - search.model.part_bytes(segment.keep, segment.part)


def _filled(
    search: Search, refined: Refined, handicap: float, refused: Collection[tuple[Segment, ...]], slack: int
) -> Refined:
    """Fill free GPU memory with further layers' experts (FFN), a part of one layer's, or whole front layers.

    A GPU may be overfull by `slack` bytes with the last buffer sizes.
    """
    for _ in range(FILLS):
        old = refined.candidate
        for segments in _with_more_on_gpus(search, refined, slack):
            other = search.evaluate(old.context, old.order, segments, handicap)
            if segments in refused or other.score >= old.score * BETTER:
                continue
            filled = _with_last_buffers(refined, other)
            if filled.gpus_short_bytes <= slack:
                refined = filled
                break
        else:
            break
    return refined


def _with_more_on_gpus(search: Search, refined: Refined, slack: int) -> Iterator[tuple[Segment, ...]]:
    """Segments with more on one GPU, as far as it may fit; for each GPU the largest addition first."""
    candidate, rows = refined.candidate, iter(refined.rows)
    if candidate.kind == "layers":
        yield from _with_fewer_front_layers(search, candidate, refined.rows[0].free_bytes + slack)
    for position, segment in enumerate(candidate.segments):
        if segment.device is None:
            continue
        for larger in _with_more_kept(search, segment, next(rows).free_bytes + slack):
            yield (*candidate.segments[:position], larger, *candidate.segments[position + 1 :])


def _with_fewer_front_layers(search: Search, candidate: Candidate, free_bytes: int) -> Iterator[tuple[Segment, ...]]:
    """Move front layers from the host to the first GPU, as many as `free_bytes` hold."""
    if free_bytes < 0:
        return
    host, first, *others = candidate.segments
    base, spill = search.base_costs(candidate.context), search.roofline.spill
    costs = [base[n] + (spill[n] if first.keep == first.hi else 0) for n in range(host.hi + 1)]
    front = next(n for n in range(host.hi + 1) if costs[host.hi] - costs[n] <= free_bytes)
    for shorter in dict.fromkeys((front, min(front + 1, host.hi))):
        grown = replace(first, lo=shorter, keep=first.keep if first.keep == first.hi else shorter)
        if shorter < host.hi:
            yield (*([Segment(None, 0, shorter, shorter)] if shorter else []), grown, *others)
    # Or attention and KV cache of one more layer, in exchange for the FFN of the segment's last layer.
    if (
        first.keep == first.hi
        and spill[first.hi] > spill[first.hi - 1]
        and base[host.hi] - base[host.hi - 1] <= free_bytes
    ):
        grown = replace(first, lo=host.hi - 1, keep=first.hi - 1)
        yield (*([Segment(None, 0, grown.lo, grown.lo)] if grown.lo else []), grown, *others)


def _with_more_kept(search: Search, segment: Segment, free_bytes: int) -> Iterator[Segment]:
    """The segment with experts (FFN) of more layers on its GPU, as many as `free_bytes` hold."""
    model, spill = search.model, search.roofline.spill
    layer = next((n for n in range(segment.keep, segment.hi) if model.spill_bytes[n]), None)
    if layer is None:
        return
    kept_bytes = spill[layer] + _partly_kept_bytes(search, segment)
    # With all experts (FFN) on the GPU nothing is staged there.
    if spill[segment.hi] - kept_bytes <= free_bytes + search.buffers.staging("spill"):
        yield replace(segment, keep=segment.hi, part="")
    keep = max((n for n in range(layer + 1, segment.hi) if spill[n] - kept_bytes <= free_bytes), default=layer)
    for more in dict.fromkeys((keep, keep - 1)):
        if more > layer:
            yield replace(segment, keep=more, part="")
    if not segment.part and 0 < model.down_bytes[layer] < model.spill_bytes[layer]:
        for part in sorted(("down", "up"), key=lambda name: model.part_bytes(layer, name)):
            if model.spill_bytes[layer] - model.part_bytes(layer, part) <= free_bytes:
                yield replace(segment, keep=layer, part=part)
