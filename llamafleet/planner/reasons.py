"""Why a plan is as it is, in plain words and with the numbers of what was not taken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llamafleet.host.machine import Machine
from llamafleet.memory.capacity import Capacity
from llamafleet.memory.ledger import LedgerRow
from llamafleet.memory.placement import Placement
from llamafleet.memory.weights import Model
from llamafleet.planner.search import LATER_KV_TYPE, Candidate
from llamafleet.settings.schema import Instance
from llamafleet.settings.workload import Workload
from llamafleet.units import MIB


@dataclass(frozen=True)
class Decision:
    """The chosen one, all that were weighed, and what they were weighed for."""

    machine: Machine
    instance: Instance
    model: Model
    capacity: Capacity
    work: Workload
    chosen: Candidate
    weighed: Sequence[Candidate]
    placement: Placement
    rows: Sequence[LedgerRow]
    threads: int
    links: Sequence[float]  # bytes per second to each GPU of the host
    cpus: str  # that the server is kept on
    numa_nodes: str  # that its memory is spread over

    def best(self, **same: object) -> Candidate | None:
        """The best that fits of those with these values."""
        fitting = (one for one in self.weighed if not one.host_short_bytes)
        return next((one for one in fitting if all(_value(one, key) == value for key, value in same.items())), None)


def why(decision: Decision) -> Iterator[str]:
    """Sentences, the most important first."""
    yield _where(decision.model, decision.placement)
    yield from _spill(decision)
    yield from _gpus(decision)
    yield from _context(decision)
    yield from _ubatch(decision)
    yield from _processors(decision)
    yield _workload(decision)
    yield from _warnings(decision)


def _value(one: Candidate, key: str) -> object:
    return getattr(one, key) if hasattr(one, key) else getattr(one.context, key)


def _where(model: Model, placement: Placement) -> str:
    held = placement.gpu_layers
    if not held:
        return f"no GPU is used: all {model.layers} layers run on the CPU"
    if None in placement.layer_devices:
        return f"{held} of {model.layers + 1} layers (output included) are on GPUs; the first on the CPU"
    return f"the attention and KV cache of all {model.layers} layers and the output are on GPUs"


def _spill(decision: Decision) -> Iterator[str]:
    model, placement, chosen = decision.model, decision.placement, decision.chosen
    what = "experts" if model.is_moe else "feed-forward weights"
    if placement.spilled:
        kept = placement.gpu_layers - 1 - len(placement.spilled) - len(placement.partly)
        yield (
            f"{what} of {len(placement.spilled)} layers ({_ranges(placement.spilled)}) are on the CPU,"
            f" of {kept} of {model.layers} on GPUs: as many as fit under the reserve"
        )
    for layer, part in placement.partly:
        there, here = ("down", "up and gate") if part == "down" else ("up and gate", "down")
        yield f"layer {layer} is shared: {here} on its GPU, {there} on the CPU: only that part fits"
    if model.is_moe or chosen.kind not in ("spill", "layers"):
        return
    other_kind = "layers" if chosen.kind == "spill" else "spill"
    other = decision.best(kind=other_kind, order=chosen.order, context=chosen.context)
    if other:
        names = {"spill": "feed-forward weights alone", "layers": "whole layers"}
        yield (
            f"{names[chosen.kind]} go to the CPU: the workload takes {chosen.seconds:.1f} s, with"
            f" {names[other_kind]} {other.seconds:.1f} s, with {decision.work.live_tokens} tokens in the cache"
        )


def _gpus(decision: Decision) -> Iterator[str]:
    capacity, chosen = decision.capacity, decision.chosen
    if len(capacity.gpus) < 2 or not chosen.order:
        return
    names = [f"GPU{gpu.index}" for gpu in capacity.gpus]
    left = [device for device in range(len(capacity.gpus)) if device not in chosen.order]
    if left:
        told = ", ".join(f"{names[device]} ({capacity.gpus[device].name})" for device in left)
        rows: dict[tuple[int, ...], Candidate] = {}
        for one in decision.weighed:
            if set(chosen.order) < set(one.order) and one.context == chosen.context and not one.host_short_bytes:
                rows.setdefault(one.order, one)
        best = min(rows.values(), key=lambda one: one.seconds, default=None)
        reason = f": the workload takes {chosen.seconds:.1f} s without"
        yield f"not used: {told}{reason}" + (f", {best.seconds:.1f} s with more GPUs" if best else "")
    if list(chosen.order) != sorted(chosen.order):
        first, last = chosen.order[0], chosen.order[-1]
        links = [decision.links[device] for device in chosen.order]
        if decision.links[first] == max(links) > min(links):
            yield f"{names[first]} comes first: weights in RAM are copied to the first to read, and its link is best"
        else:
            yield f"{names[last]} comes last: it is the fastest, and the output is read for every token"


def _context(decision: Decision) -> Iterator[str]:
    context, instance, chosen = decision.chosen.context, decision.instance, decision.chosen
    yield f"KV cache {context.kv_type}: {context.tokens} tokens for each of {context.slots} slot(s)"
    for kv_type in instance.kv_types:
        other = decision.best(kv_type=kv_type) if kv_type != context.kv_type else None
        if other:
            later = instance.kv_types.index(kv_type) > instance.kv_types.index(context.kv_type)
            verdict = f"not {LATER_KV_TYPE - 1:.0%} sooner" if later else "a tenth later or more"
            yield f"with KV cache {kv_type} the workload takes {other.seconds:.1f} s: {verdict}"
        elif kv_type != context.kv_type:
            yield f"with KV cache {kv_type} it does not fit"
    if instance.slots is None and decision.work.concurrency > 1:
        at_once = decision.work.concurrency
        found = [decision.best(slots=slots) for slots in range(1, at_once + 1) if slots != context.slots]
        told = ", ".join(f"{one.context.slots}: {one.seconds:.1f} s" for one in found if one)
        yield (
            f"{context.slots} slot(s) for {at_once} requests at once: they take {chosen.seconds:.1f} s"
            + (f" ({told})" if told else "")
        )


def _ubatch(decision: Decision) -> Iterator[str]:
    chosen, instance = decision.chosen, decision.instance
    size = chosen.context.ubatch_tokens
    if instance.ubatch_tokens is not None:
        yield f"ubatch {size}: as asked"
        return
    sizes = sorted({one.context.ubatch_tokens for one in decision.weighed} - {size})
    others = [decision.best(ubatch_tokens=other) for other in sizes]
    told = ", ".join(f"{one.context.ubatch_tokens}: {one.seconds:.1f} s" for one in others if one)
    yield f"ubatch {size}: the workload takes {chosen.seconds:.1f} s" + (f" ({told})" if told else "")


def _processors(decision: Decision) -> Iterator[str]:
    yield f"{decision.threads} threads: " + (
        "as asked" if decision.instance.threads else "one for each physical (performance) core; more are slower"
    )
    if decision.cpus:
        yield f"kept on CPUs {decision.cpus}, the performance cores: every step waits for its slowest thread"
    if decision.numa_nodes:
        yield f"memory is spread over NUMA nodes {decision.numa_nodes}: threads of all of them read the weights"


def _workload(decision: Decision) -> str:
    work = decision.work
    at_once = f", {work.concurrency} at once" if work.concurrency > 1 else ""
    return (
        f"the workload: {work.prompt_tokens} tokens read and {work.reply_tokens} written a request{at_once},"
        f" {work.live_tokens} in the cache"
    )


def _warnings(decision: Decision) -> Iterator[str]:
    machine, model = decision.machine, decision.model
    name = model.shape.architecture.name
    if not model.shape.architecture.verified:
        yield f"{name!r} was not held against llama.cpp: its KV cache and compute buffers are upper bounds"
    elif not model.shape.cache_is_exact:
        yield f"the attention windows of {name!r} are not known: its KV cache is an upper bound"
    elif not model.compute.is_exact:
        yield f"what this {name!r} computes is not known: its compute buffers are an upper bound"
    for gpu in machine.gpus:
        if gpu.problem:
            yield f"GPU{gpu.index} ({gpu.name}) is not used: {gpu.problem}"
    planned, available = decision.rows[-1].used_bytes, machine.memory.available_bytes
    if planned > available:
        yield (
            f"warning: {planned // MIB} MiB of RAM are planned, {available // MIB} MiB are available now;"
            " what runs beside, or our own running server, must leave first"
        )
    if decision.capacity.unified:
        yield "GPU and CPU share one memory: what the GPU holds is taken from the host's capacity"


def _ranges(layers: frozenset[int]) -> str:
    """ "3 to 7, 12": runs of layers."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in runs)
