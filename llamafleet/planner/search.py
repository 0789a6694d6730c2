"""The choice: of all ways to spread a model over a machine, the one that does the workload soonest.

Candidates are made for each cache type, number of slots, ubatch and row of GPUs, weighed by the roofline, and the
best is then refined and checked with the ledger itself. Everything is deterministic.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from llamafleet.memory.context import Context
from llamafleet.memory.placement import Placement, Segment
from llamafleet.planner.estimate import Budgets, kind_of
from llamafleet.planner.partition import SAME_SPEED, cut, fill
from llamafleet.settings.schema import Instance
from llamafleet.settings.workload import Workload

UBATCHES = (512, 256, 1024, 2048, 4096, 8192)  # llama.cpp's default first: it wins ties
# How much sooner the workload must be done for what costs something that time does not show.
ANOTHER_GPU = 1.02  # power, heat and the capacity of other instances
LATER_KV_TYPE = 1.10  # the operator's order of types is one of quality
OTHER_UBATCH = 1.005  # for each doubling or halving of 512: nothing is changed for nothing
KEPT_ROWS = 8  # rows of GPUs that other cache types and numbers of slots are tried with
KEPT = 2  # rows of GPUs, and pairs of cache type and slots, that the other ubatches are tried with


@dataclass(frozen=True)
class Candidate:
    """One way to serve: what, where, and how long the workload takes."""

    context: Context
    order: tuple[int, ...]  # GPUs of the host, llama.cpp's device 0 first
    placement: Placement  # device numbers are positions in `order`
    seconds: float
    score: float  # seconds, with a handicap for what costs something else
    host_short_bytes: int  # RAM that is missing

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The placement's; the last one holds the output."""
        return self.placement.segments

    @property
    def kind(self) -> str:
        """What is on the host."""
        return kind_of(self.segments)


class Search(Budgets):
    """All candidates for one model on one host, within its budgets."""

    def candidates(self, tried: Sequence[tuple[Context, float]]) -> list[Candidate]:
        """The best first. A context comes with its handicap.

        All rows of GPUs are tried with the first cache type, number of slots and ubatch; the others with the better
        rows, and other ubatches with the best only, since what is on the GPUs changes little with them.
        """
        groups: dict[tuple[str, int], list[tuple[Context, float]]] = {}
        for context, handicap in tried:
            groups.setdefault((context.kv_type, context.slots), []).append((context, handicap))
        rows_of_gpus, firsts = self.orders(), []
        for of_group in groups.values():
            firsts.append(sorted(self._of(*of_group[0], rows_of_gpus), key=_rank))
            rows_of_gpus = list(dict.fromkeys(one.order for one in firsts[0]))[:KEPT_ROWS] or rows_of_gpus
        found = [one for rows in firsts for one in rows]
        best = sorted(zip(firsts, groups.values(), strict=True), key=lambda group: _rank(group[0][0]))
        for rows, of_group in best[:KEPT]:
            orders = list(dict.fromkeys(one.order for one in rows))[:KEPT]
            for context, handicap in of_group[1:]:
                found += self._of(context, handicap, orders)
        # What does not fit with one ubatch may with a smaller one: such groups are not to be lost.
        for rows, of_group in best[KEPT:]:
            if rows[0].host_short_bytes:
                found += self._of(*min(of_group, key=lambda one: one[0].ubatch_tokens), [rows[0].order])
        return sorted(found, key=_rank)

    def _of(self, context: Context, handicap: float, orders: Sequence[tuple[int, ...]]) -> Iterator[Candidate]:
        found = {layout: None for row in orders for layout in self._layouts(context, row)}
        for order, segments in found or (self._nowhere(),):
            yield self.weigh(context, order, segments, handicap)

    def _nowhere(self) -> tuple[tuple[int, ...], tuple[Segment, ...]]:
        """What no GPU holds: on the CPU, or, where there is one memory, on its GPU."""
        layers = self.model.layers
        device = 0 if self.capacity.unified else None
        return ((0,) if self.capacity.unified else ()), (Segment(device, 0, layers, layers),)

    def weigh(
        self, context: Context, order: tuple[int, ...], segments: tuple[Segment, ...], handicap: float
    ) -> Candidate:
        """A candidate with its time and what RAM it lacks."""
        seconds = self.roofline.workload(order, segments, context)
        score = seconds * handicap * ANOTHER_GPU ** max(0, len(order) - 1)
        placement = Placement(segments)
        return Candidate(context, order, placement, seconds, score, self.host_short(context, order, segments))

    def orders(self) -> list[tuple[int, ...]]:
        """Rows of GPUs worth a try: the fastest one, two, ..., and the largest, each behind its best PCIe link.

        The first device gets all that op-offload copies from the host (ggml-backend.cpp, the first backend that
        wants an operation), so it is the one that copies and multiplies fastest.
        """
        rates, sizes = self.roofline.rates.gpus, self.capacity.gpu_bytes
        devices = range(len(sizes))
        fastest = sorted(devices, key=lambda n: (-rates[n].bytes_per_s, -sizes[n], n))
        largest = sorted(devices, key=lambda n: (-sizes[n], -rates[n].bytes_per_s, n))
        rows: dict[tuple[int, ...], None] = {}
        for count in range(1, len(sizes) + 1):
            for row in (fastest[:count], largest[:count]):
                ordered = sorted(row, key=lambda n: (-rates[n].link_bytes_per_s, -rates[n].flops, n))
                rows[tuple(ordered)] = None
                if rates[row[0]].bytes_per_s > SAME_SPEED * rates[row[-1]].bytes_per_s:
                    # Or the fastest last, where the output is: it is read for every token.
                    quick = max(ordered, key=lambda n: rates[n].bytes_per_s)
                    rows[(*(n for n in ordered if n != quick), quick)] = None
        return list(rows)

    def _layouts(
        self, context: Context, order: tuple[int, ...]
    ) -> Iterator[tuple[tuple[int, ...], tuple[Segment, ...]]]:
        if not order:
            return
        in_bus_order = tuple(sorted(order))
        if whole := self._resident(context, in_bus_order):
            yield in_bus_order, whole  # nothing is copied from the host: no GPU need be first
            return
        if self.capacity.unified:
            return  # nothing is gained by moving it within one memory
        some = False
        for spilled in self._spilled(context, order) if self.movable else ():
            some = True
            yield order, spilled
        if self.movable and not some and (both := self._fronted(context, order, kept=False)):
            yield order, both
        if not self.model.is_moe and (fronted := self._fronted(context, order, kept=True)):
            yield order, fronted

    def _resident(self, context: Context, order: tuple[int, ...]) -> tuple[Segment, ...] | None:
        budgets, whole = self.budgets(context, order, "none"), self.whole(context)
        if sum(budgets) < whole[-1]:
            return None
        speeds = [self.roofline.rates.gpus[device].bytes_per_s for device in order]
        ends = fill(whole, 0, budgets, speeds)
        return self.segments(0, ends, None) if ends else None

    def _spilled(self, context: Context, order: tuple[int, ...]) -> Iterator[tuple[Segment, ...]]:
        """Attention and cache of all layers on GPUs, and experts (FFN) of as many as they hold."""
        budgets = self.budgets(context, order, "spill")
        greedy = self._front_kept(context, budgets)
        if greedy:
            yield self.segments(0, greedy, (context, budgets))
        speeds = [self.roofline.rates.gpus[device].bytes_per_s for device in order]
        fastest = max(range(len(order)), key=lambda position: speeds[position])
        around = self._around(context, fastest, budgets)
        if around and around != greedy:
            yield self.segments(0, around, (context, budgets))

    def _around(self, context: Context, middle: int, budgets: Sequence[float]) -> tuple[int, ...] | None:
        """Where the cuts are if every GPU but one, the fastest, has only layers with all their experts (FFN)."""
        base, whole = self.costs(context), self.whole(context)
        start, stop = 0, len(whole) - 1
        ends = [0] * len(budgets)
        for position in range(middle):
            start = ends[position] = bisect_right(whole, whole[start] + budgets[position], start) - 1
        for position in range(len(budgets) - 1, middle, -1):
            ends[position] = stop
            stop = bisect_left(whole, whole[stop] - budgets[position], 0, stop)
        ends[middle] = stop
        rising = all(a < b for a, b in pairwise((0, *ends)))
        return tuple(ends) if rising and base[stop] - base[start] <= budgets[middle] else None

    def _front_kept(self, context: Context, budgets: Sequence[float]) -> tuple[int, ...] | None:
        """Where the cuts are if as many front layers as possible keep their experts (FFN)."""
        base, whole = self.costs(context), self.whole(context)
        edges = [*self.movable, self.model.layers]

        def kept(count: int) -> tuple[int, ...] | None:  # where the cuts are if so many keep theirs
            edge = edges[count]
            inside = whole[edge] - base[edge]
            return cut([*whole[: edge + 1], *(cost + inside for cost in base[edge + 1 :])], 0, budgets)

        best = kept(0)
        low, high = 0, len(self.movable)
        while best and low < high:
            middle = (low + high + 1) // 2
            ends = kept(middle)
            best, low, high = (ends, middle, high) if ends else (best, low, middle - 1)
        return best

    def _fronted(self, context: Context, order: tuple[int, ...], *, kept: bool) -> tuple[Segment, ...] | None:
        """The fewest whole front layers on the CPU; `kept`: the others keep their experts (FFN) on the GPUs."""
        sums = self.whole(context) if kept else self.costs(context)
        budgets = self.budgets(context, order, "layers")
        best: tuple[int, tuple[int, ...]] | None = None
        low, high = 1, self.model.layers
        while low <= high:
            front = (low + high) // 2
            ends = cut(sums, front, budgets)
            best, low, high = ((front, ends), low, front - 1) if ends else (best, front + 1, high)
        if best is None:
            return None
        return self.segments(*best, None if kept else (context, budgets))

    def segments(
        self,
        front: int,
        ends: tuple[int, ...],
        spilling: tuple[Context, Sequence[float]] | None,
    ) -> tuple[Segment, ...]:
        """Pieces as segments; `spilling`: of each piece the front layers keep experts as far as its budget goes."""
        layers, start = self.model.layers, front
        pieces = [Segment(None, 0, front, front)] if front else []
        for position, end in enumerate(ends):
            hi = min(end, layers)
            keep = hi
            if spilling:
                context, budgets = spilling
                base, spill = self.costs(context), self.roofline.spill
                left = budgets[position] - (base[end] - base[start])
                keep = start
                while keep < hi and spill[keep + 1] - spill[start] <= left:
                    keep += 1
            pieces.append(Segment(position, start, hi, keep))
            start = hi
        return tuple(pieces)


def _rank(one: Candidate) -> tuple[int, float]:
    return one.host_short_bytes, one.score


def contexts(instance: Instance, tokens: int, work: Workload) -> list[tuple[Context, float]]:
    """Every context worth a try, the preferred first, each with its handicap. Numbers that were given stay."""
    found = []
    for position, kv_type in enumerate(instance.kv_types):
        for slots in _slots(instance, work):
            for ubatch in _ubatches(instance, tokens, work):
                handicap = LATER_KV_TYPE**position * OTHER_UBATCH ** abs(_doublings(ubatch))
                found.append((Context(tokens, slots, kv_type, ubatch), handicap))
    return found


def _slots(instance: Instance, work: Workload) -> list[int]:
    if instance.slots is not None:
        return [instance.slots]
    counts = [work.concurrency]
    while counts[-1] > 1:
        counts.append(-(-counts[-1] // 2))
    return counts


def _ubatches(instance: Instance, tokens: int, work: Workload) -> list[int]:
    if instance.ubatch_tokens is not None:
        return [instance.ubatch_tokens]
    # The smallest that takes the whole prompt at once is the largest of use.
    largest = min(tokens, next((size for size in sorted(UBATCHES) if size >= work.prompt_tokens), UBATCHES[-1]))
    return [size for size in UBATCHES if size <= largest] or [256]


def _doublings(ubatch: int) -> int:
    return ubatch.bit_length() - UBATCHES[0].bit_length()
