"""Search for the placement and context with which a machine finishes the workload soonest.

Candidates combine a cache type, a number of slots, an ubatch and an order of GPUs. The roofline predicts the time of
each; `refine` then checks the best with the ledger. The search is deterministic.

Decision 6: docs/decisions/0006-the-workload-is-the-objective.md.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from llamafleet.memory.context import Context
from llamafleet.memory.placement import Placement, Segment
from llamafleet.planner.estimate import Budgets, kind_of
from llamafleet.planner.partition import SAME_SPEED, cut, fill
from llamafleet.planner.pools import with_pool
from llamafleet.settings.schema import Instance
from llamafleet.settings.workload import Workload

UBATCHES = (512, 256, 1024, 2048, 4096, 8192)  # tokens; llama.cpp's default is first and wins ties
# Handicaps: factors on a candidate's seconds for costs other than time.
ANOTHER_GPU = 1.02  # for each GPU after the first: power, heat, and memory that other instances could use
LATER_KV_TYPE = 1.10  # for each later type in kv_types: the operator lists the types by quality
OTHER_UBATCH = 1.005  # for each doubling or halving of 512: the default is changed only for a gain
KEPT_ORDERS = 8  # GPU orders that other cache types and numbers of slots are tried with
KEPT = 2  # GPU orders, and pairs of cache type and slots, that the other ubatches are tried with


@dataclass(frozen=True)
class Candidate:
    """A context and a placement, with the predicted time of the workload and the RAM that is missing."""

    context: Context
    order: tuple[int, ...]  # positions in the capacity's GPUs, llama.cpp's device 0 first
    placement: Placement  # device numbers are positions in `order`
    seconds: float
    score: float  # seconds multiplied by the handicaps; the lowest is the best
    host_short_bytes: int  # RAM that is missing; 0 if the candidate fits

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The placement's segments; the last segment holds the output."""
        return self.placement.segments

    @property
    def kind(self) -> str:
        """Which weights are on the host (see `kind_of`)."""
        return kind_of(self.segments)


class Search(Budgets):
    """All candidates for one model on one host, within its budgets."""

    def candidates(self, weighted_contexts: Sequence[tuple[Context, float]]) -> list[Candidate]:
        """Candidates for these contexts, the best first; each context comes with its handicap.

        All GPU orders are tried with the first cache type, number of slots and ubatch. Other cache types and numbers of
        slots are tried with the better orders only, other ubatches with the best only: they change little of what is
        on the GPUs.
        """
        groups: dict[tuple[str, int], list[tuple[Context, float]]] = {}
        for context, handicap in weighted_contexts:
            groups.setdefault((context.kv_type, context.slots), []).append((context, handicap))
        orders, of_first_ubatch = self.orders(), []
        for contexts_of_group in groups.values():
            of_first_ubatch.append(sorted(self._candidates_of(*contexts_of_group[0], orders), key=_rank))
            orders = _orders(of_first_ubatch[0])[:KEPT_ORDERS] or orders
        candidates = [candidate for of_group in of_first_ubatch for candidate in of_group]
        best = sorted(zip(of_first_ubatch, groups.values(), strict=True), key=lambda group: _rank(group[0][0]))
        for of_group, contexts_of_group in best[:KEPT]:
            for context, handicap in contexts_of_group[1:]:
                candidates += self._candidates_of(context, handicap, _orders(of_group)[:KEPT])
        # A group that does not fit with its first ubatch may fit with the smallest.
        for of_group, contexts_of_group in best[KEPT:]:
            if of_group[0].host_short_bytes:
                smallest = min(contexts_of_group, key=lambda pair: pair[0].ubatch_tokens)
                candidates += self._candidates_of(*smallest, [of_group[0].order])
        return sorted(candidates, key=_rank)

    def _candidates_of(
        self, context: Context, handicap: float, orders: Sequence[tuple[int, ...]]
    ) -> Iterator[Candidate]:
        layouts = {layout: None for order in orders for layout in self._layouts(context, order)}
        for order, segments in layouts or (self._fallback(),):
            # The CPU has kernels for all heads: without a GPU in use, flash attention is on.
            here = context if order else replace(context, flash_attention=True)
            yield self.evaluate(here, order, segments, handicap)

    def _fallback(self) -> tuple[tuple[int, ...], tuple[Segment, ...]]:
        """The layout of a model that no GPUs hold: all layers on the CPU, or on the GPU of a unified memory."""
        layers = self.model.layers
        device = 0 if self.capacity.unified else None
        return ((0,) if self.capacity.unified else ()), (Segment(device, 0, layers, layers),)

    def evaluate(
        self, context: Context, order: tuple[int, ...], segments: tuple[Segment, ...], handicap: float
    ) -> Candidate:
        """The candidate with its predicted time, its score and the RAM that is missing."""
        seconds = self.roofline.workload(order, segments, context)
        score = seconds * handicap * ANOTHER_GPU ** max(0, len(order) - 1)
        placement = Placement(segments)
        return Candidate(context, order, placement, seconds, score, self.host_short_bytes(context, order, segments))

    def orders(self) -> list[tuple[int, ...]]:
        """GPU orders worth a try: the fastest GPU, the fastest two, ..., and the largest likewise.

        Within an order the GPU with the best PCIe link comes first: op-offload copies all weights from the host to
        the first device (ggml/src/ggml-backend.cpp, the first backend that wants an operation).
        """
        rates, sizes = self.roofline.rates.gpus, self.capacity.gpu_bytes
        # A CUDA process sees one MIG instance at most, and no GPU beside it (NVIDIA's MIG user guide).
        slices = sorted((n for n, gpu in enumerate(self.capacity.gpus) if gpu.mig), key=lambda n: (-sizes[n], n))
        devices = [device for device in range(len(sizes)) if device not in slices]
        fastest = sorted(devices, key=lambda n: (-rates[n].bytes_per_s, -sizes[n], n))
        largest = sorted(devices, key=lambda n: (-sizes[n], -rates[n].bytes_per_s, n))
        orders: dict[tuple[int, ...], None] = {}
        for count in range(1, len(devices) + 1):
            for gpus in (fastest[:count], largest[:count]):
                by_link = sorted(gpus, key=lambda n: (-rates[n].link_bytes_per_s, -rates[n].flops, n))
                orders[tuple(by_link)] = None
                if rates[gpus[0]].bytes_per_s > SAME_SPEED * rates[gpus[-1]].bytes_per_s:
                    # Or the fastest GPU last: it holds the output, which is read for every token.
                    quickest = max(by_link, key=lambda n: rates[n].bytes_per_s)
                    orders[(*(n for n in by_link if n != quickest), quickest)] = None
        return [*orders, *((device,) for device in slices)]

    def _layouts(
        self, context: Context, order: tuple[int, ...]
    ) -> Iterator[tuple[tuple[int, ...], tuple[Segment, ...]]]:
        """Ways to divide the model over the GPUs in this order, with the order to use (bus order if all fits)."""
        if not order:
            return
        in_bus_order = tuple(sorted(order))
        if resident := self._all_on_gpus(context, in_bus_order):
            yield in_bus_order, resident  # nothing is copied from the host, so no GPU needs to be first
            return
        if self.capacity.unified:
            return  # GPU and CPU share one memory: moving weights frees nothing
        some = False
        for spilled in self._spilled(context, order) if self.movable else ():
            some = True
            yield order, spilled
        if self.movable and not some and (segments := self._front_on_cpu(context, order, kept=False)):
            yield order, segments
        if not self.model.is_moe and (segments := self._front_on_cpu(context, order, kept=True)):
            yield order, segments

    def _all_on_gpus(self, context: Context, order: tuple[int, ...]) -> tuple[Segment, ...] | None:
        budgets, costs = self.budgets(context, order, "none"), self.full_costs(context)
        if sum(budgets) < costs[-1]:
            return None
        speeds = [self.roofline.rates.gpus[device].bytes_per_s for device in order]
        ends = fill(costs, 0, budgets, speeds)
        return self.segments(0, ends, None) if ends else None

    def _spilled(self, context: Context, order: tuple[int, ...]) -> Iterator[tuple[Segment, ...]]:
        """Attention and KV cache of all layers on GPUs, with the experts (FFN) of as many layers as fit."""
        budgets = self.budgets(context, order, "spill")
        front_kept = self._cuts_with_front_kept(context, budgets)
        if front_kept:
            yield self.segments(0, front_kept, (context, budgets))
        speeds = [self.roofline.rates.gpus[device].bytes_per_s for device in order]
        fastest = max(range(len(order)), key=lambda position: speeds[position])
        others_kept = self._cuts_with_others_kept(context, fastest, budgets)
        if others_kept and others_kept != front_kept:
            yield self.segments(0, others_kept, (context, budgets))

    def _cuts_with_others_kept(self, context: Context, middle: int, budgets: Sequence[float]) -> tuple[int, ...] | None:
        """The ends of the GPUs' pieces if all GPUs but `middle`, the fastest, have only layers with all their experts
        (FFN)."""
        base, costs = self.base_costs(context), self.full_costs(context)
        start, stop = 0, len(costs) - 1
        ends = [0] * len(budgets)
        for position in range(middle):
            start = ends[position] = bisect_right(costs, costs[start] + budgets[position], start) - 1
        for position in range(len(budgets) - 1, middle, -1):
            ends[position] = stop
            stop = bisect_left(costs, costs[stop] - budgets[position], 0, stop)
        ends[middle] = stop
        rising = all(a < b for a, b in pairwise((0, *ends)))
        return tuple(ends) if rising and base[stop] - base[start] <= budgets[middle] else None

    def _cuts_with_front_kept(self, context: Context, budgets: Sequence[float]) -> tuple[int, ...] | None:
        """The ends of the GPUs' pieces if as many front layers as possible keep their experts (FFN)."""
        base, costs = self.base_costs(context), self.full_costs(context)
        edges = [*self.movable, self.model.layers]

        def cuts(count: int) -> tuple[int, ...] | None:  # with the experts (FFN) of the first `count` such layers
            edge = edges[count]
            kept_bytes = costs[edge] - base[edge]
            return cut([*costs[: edge + 1], *(cost + kept_bytes for cost in base[edge + 1 :])], 0, budgets)

        best = cuts(0)
        low, high = 0, len(self.movable)
        while best and low < high:
            middle = (low + high + 1) // 2
            ends = cuts(middle)
            best, low, high = (ends, middle, high) if ends else (best, low, middle - 1)
        return best

    def _front_on_cpu(self, context: Context, order: tuple[int, ...], *, kept: bool) -> tuple[Segment, ...] | None:
        """As few whole front layers on the CPU as fit; `kept`: the others keep their experts (FFN) on the GPUs."""
        sums = self.full_costs(context) if kept else self.base_costs(context)
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
        """Segments from the ends of the GPUs' pieces; layers before `front` are on the CPU.

        With `spilling`, the front layers of each piece keep their experts (FFN) as far as the GPU's budget allows.
        """
        layers, start = self.model.layers, front
        pieces = [Segment(None, 0, front, front)] if front else []
        for position, end in enumerate(ends):
            hi = min(end, layers)
            keep = hi
            if spilling:
                context, budgets = spilling
                base, spill = self.base_costs(context), self.roofline.spill
                free_bytes = budgets[position] - (base[end] - base[start])
                keep = start
                while keep < hi and spill[keep + 1] - spill[start] <= free_bytes:
                    keep += 1
            pieces.append(Segment(position, start, hi, keep))
            start = hi
        return tuple(pieces)


def _rank(candidate: Candidate) -> tuple[int, float]:
    return candidate.host_short_bytes, candidate.score


def _orders(candidates: Sequence[Candidate]) -> list[tuple[int, ...]]:
    """The different GPU orders of these candidates, in the candidates' order."""
    return list(dict.fromkeys(candidate.order for candidate in candidates))


def contexts(
    instance: Instance,
    tokens: int,
    work: Workload,
    *,
    flash_attention: bool = True,
    trained: int = 0,
    least_ubatch: int = 0,
    pooling: str = "",
    whole_inputs: bool = False,
) -> list[tuple[Context, float]]:
    """Every context worth a try with its handicap, the preferred first; values that the instance sets are kept.

    `trained`: tokens that the model was trained for; 0 if they are not known. `least_ubatch`: tokens that must be in
    one ubatch. `pooling`: as of `Context`; `whole_inputs`: each must fit into one ubatch.
    """
    weighted_contexts = []
    for position, kv_type in enumerate(instance.kv_types):
        for slots in _slots(instance, work):
            for ubatch in _ubatches(instance, tokens, work, tokens if whole_inputs else least_ubatch):
                handicap = LATER_KV_TYPE**position * OTHER_UBATCH ** abs(_doublings(ubatch))
                asked = Context(tokens, slots, kv_type, ubatch, flash_attention, batch_size=instance.batch_tokens or 0,
                                op_offload=instance.op_offload, repack=instance.repack is not False)  # fmt: skip
                context = with_pool(asked, instance, trained)
                if whole_inputs and instance.ubatch_tokens is None:
                    context = replace(context, ubatch_tokens=context.tokens)
                weighted_contexts.append((context.pooled(pooling), handicap))
    return weighted_contexts


def _slots(instance: Instance, work: Workload) -> list[int]:
    if instance.slots is not None:
        return [instance.slots]
    counts = [work.concurrency]
    while counts[-1] > 1:
        counts.append(-(-counts[-1] // 2))
    return counts


def _ubatches(instance: Instance, tokens: int, work: Workload, least: int) -> list[int]:
    if instance.ubatch_tokens is not None:
        return [instance.ubatch_tokens]
    # A larger ubatch than the smallest that holds the whole prompt is of no use.
    largest = min(tokens, next((size for size in sorted(UBATCHES) if size >= work.prompt_tokens), UBATCHES[-1]))
    if instance.batch_tokens is not None:
        largest = min(largest, instance.batch_tokens)
    return [size for size in UBATCHES if least <= size <= largest] or [max(256, least)]


def _doublings(ubatch: int) -> int:
    return ubatch.bit_length() - UBATCHES[0].bit_length()
