"""The reasons for a plan, as sentences for the operator with the numbers of the alternatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from llamafleet.host.machine import Machine
from llamafleet.memory.capacity import Capacity
from llamafleet.memory.flash_attention import lacking
from llamafleet.memory.ledger import LedgerRow
from llamafleet.memory.placement import Placement
from llamafleet.memory.weights import LAYER_INPUTS, Model
from llamafleet.model.architecture import Cache
from llamafleet.planner import vectors
from llamafleet.planner.pools import in_words, running_out
from llamafleet.planner.search import LATER_KV_TYPE, Candidate
from llamafleet.planner.unplannable import without_kernel
from llamafleet.settings.schema import Instance
from llamafleet.settings.workload import Workload
from llamafleet.units import MIB


@dataclass(frozen=True)
class Decision:
    """The chosen candidate, all candidates, and the inputs that they were made from."""

    machine: Machine
    backend: str
    instance: Instance
    model: Model
    capacity: Capacity
    work: Workload
    chosen: Candidate
    candidates: Sequence[Candidate]
    laid_out: Callable[[Candidate], tuple[Candidate, bool]]  # a candidate as the ledger has it, and whether it fits
    placement: Placement
    rows: Sequence[LedgerRow]
    threads: int
    links: Sequence[float]  # bytes per second to each GPU of the host
    cpus: str  # CPUs that the server may run on; empty: all
    numa_nodes: str  # NUMA nodes that its memory is spread over; empty: the kernel decides

    def seconds(self, other: Candidate) -> str:
        """The time of a candidate that was not chosen; where it is shorter than the chosen one's, with the reason.

        The search estimates buffers, and the chosen candidate was laid out: what seems faster is laid out too.
        """
        if other.seconds >= self.chosen.seconds:
            return f"{other.seconds:.1f} s"
        laid_out, fits = self.laid_out(other)
        if not fits:
            return f"{other.seconds:.1f} s by the estimate (but it does not fit once its buffers are laid out)"
        faster = laid_out.seconds < self.chosen.seconds
        return f"{laid_out.seconds:.1f} s{' (too close for the estimate that chooses)' if faster else ''}"

    def best(self, **values: object) -> Candidate | None:
        """The best candidate that fits and has these attribute values; None if there is none."""
        for candidate in self.candidates:
            has_values = all(_value(candidate, key) == value for key, value in values.items())
            if has_values and not candidate.host_short_bytes:
                return candidate
        return None


def why(decision: Decision) -> Iterator[str]:
    """Sentences, the most important first."""
    yield _where(decision.model, decision.placement)
    yield from _spill(decision)
    yield from _gpus(decision)
    yield from _flash_attention(decision)
    yield from _mapped(decision)
    yield from _context(decision)
    yield from _ubatch(decision)
    yield from _processors(decision)
    yield _workload(decision)
    yield from _warnings(decision)


def _value(candidate: Candidate, key: str) -> object:
    return getattr(candidate, key) if hasattr(candidate, key) else getattr(candidate.context, key)


def _where(model: Model, placement: Placement) -> str:
    count = placement.gpu_layers
    if not count:
        return f"no GPU is used: all {model.layers} layers run on the CPU"
    if None in placement.layer_devices:
        return f"{count} of {model.layers + 1} layers (output included) are on GPUs; the first layers are on the CPU"
    if model.shape.cache is Cache.NONE:
        return f"all {model.layers} layers are on GPUs"
    return f"the attention and KV cache of all {model.layers} layers and the output are on GPUs"


def _spill(decision: Decision) -> Iterator[str]:
    model, placement, chosen = decision.model, decision.placement, decision.chosen
    tensors = "experts" if model.is_moe else "feed-forward weights"
    having = frozenset(layer for layer, size in enumerate(model.spill_bytes) if size)
    if spilled := placement.spilled & having:
        on_gpus = {layer for layer, device in enumerate(placement.layer_devices[:-1]) if device is not None}
        kept = len((on_gpus & having) - set(placement.moved))
        yield (
            f"{tensors} of {len(spilled)} layers ({_ranges(spilled)}) are on the CPU,"
            f" {tensors} of {kept} of {len(having)} layers on GPUs: as many as fit without using the reserve"
        )
    for layer, part in placement.partly:
        on_cpu, on_gpu = ("down", "up and gate") if part == "down" else ("up and gate", "down")
        yield f"layer {layer} is divided: {on_gpu} on its GPU, {on_cpu} on the CPU, because only that part fits"
    if model.is_moe or chosen.kind not in ("spill", "layers"):
        return
    other_kind = "layers" if chosen.kind == "spill" else "spill"
    other = decision.best(kind=other_kind, order=chosen.order, context=chosen.context)
    if other:
        names = {"spill": "feed-forward weights alone", "layers": "whole layers"}
        yield (
            f"{names[chosen.kind]} go to the CPU: the workload takes {chosen.seconds:.1f} s; with"
            f" {names[other_kind]} on the CPU it takes {decision.seconds(other)}"
            f" ({decision.work.live_tokens} tokens in the KV cache)"
        )


def _gpus(decision: Decision) -> Iterator[str]:
    capacity, chosen = decision.capacity, decision.chosen
    if decision.instance.gpus is not None:
        left = " and ".join(f"GPU{gpu.index}" for gpu in capacity.gpus)
        yield f"it may use {left} alone: gpus says so" if left else "it uses no GPU: gpus says so"
    if len(capacity.gpus) < 2 or not chosen.order:
        return
    names = [f"GPU{gpu.index}" for gpu in capacity.gpus]
    unused = [device for device in range(len(capacity.gpus)) if device not in chosen.order]
    slices = [device for device in unused if capacity.gpus[device].mig]
    if slices:
        yield (
            f"MIG instances that are left to other models: {', '.join(names[device] for device in slices)}: a process"
            " sees one of them at most"
        )
    unused = [device for device in unused if device not in slices]
    if unused:
        unused_names = ", ".join(f"{names[device]} ({capacity.gpus[device].name})" for device in unused)
        with_more = [
            candidate
            for candidate in decision.candidates
            if set(chosen.order) < set(candidate.order)
            and candidate.context == chosen.context
            and not candidate.host_short_bytes
        ]
        best = min(with_more, key=lambda candidate: candidate.seconds, default=None)
        yield (
            f"not used: {unused_names}: the workload takes {chosen.seconds:.1f} s without"
            + (f", {decision.seconds(best)} with more GPUs" if best else "")
        )
    if list(chosen.order) != sorted(chosen.order):
        first, last = chosen.order[0], chosen.order[-1]
        links = [decision.links[device] for device in chosen.order]
        if decision.links[first] == max(links) > min(links):
            yield (
                f"{names[first]} comes first: it has the fastest PCIe link, and weights in RAM are copied to the first"
                " GPU while a prompt is read"
            )
        else:
            yield f"{names[last]} comes last: it is the fastest GPU, and the output matrix is read for every token"


def _flash_attention(decision: Decision) -> Iterator[str]:
    if head := None if decision.chosen.context.flash_attention else lacking(decision.model.shape, decision.backend):
        fact = without_kernel(decision.backend, head)
        yield f"flash attention is off: {fact}; with it, the CPU would compute the attention of layers on GPUs"


def _context(decision: Decision) -> Iterator[str]:
    context, instance, chosen = decision.chosen.context, decision.instance, decision.chosen
    if context.pooling:
        yield from vectors.why(context, decision.model.shape)
    else:
        yield f"KV cache {context.kv_type}: {in_words(context)}"
    yield from running_out(context, decision.work)
    for kv_type in instance.kv_types:
        other = decision.best(kv_type=kv_type) if kv_type != context.kv_type else None
        if other:
            later = instance.kv_types.index(kv_type) > instance.kv_types.index(context.kv_type)
            verdict = f"not {LATER_KV_TYPE - 1:.0%} faster" if later else f"at least {LATER_KV_TYPE - 1:.0%} slower"
            yield f"with KV cache {kv_type} the workload takes {decision.seconds(other)}: {verdict}"
        elif kv_type != context.kv_type:
            yield f"with KV cache {kv_type} the model does not fit"
    at_once = decision.work.concurrency
    if instance.slots is not None and instance.slots > at_once and not context.unified:
        requests = "one request" if at_once == 1 else f"{at_once} requests"
        yield (
            f"slots is {instance.slots}, and the workload has {requests} at a time (concurrency): each slot takes a"
            " whole context of KV cache"
        )
    if instance.slots is None and decision.work.concurrency > 1:
        concurrency = decision.work.concurrency
        others = [decision.best(slots=slots) for slots in range(1, concurrency + 1) if slots != context.slots]
        seconds = ", ".join(f"{other.context.slots}: {decision.seconds(other)}" for other in others if other)
        yield (
            f"{context.slots} slot(s) for {concurrency} concurrent requests: the requests take {chosen.seconds:.1f} s"
            + (f" (with other numbers of slots: {seconds})" if seconds else "")
        )


def _ubatch(decision: Decision) -> Iterator[str]:
    chosen, instance = decision.chosen, decision.instance
    size = chosen.context.ubatch_tokens
    if instance.ubatch_tokens is not None:
        yield f"ubatch {size}: set by ubatch_tokens"
        return
    if vectors.needs_whole_inputs(decision.model.shape, chosen.context.pooling):
        return  # told with the inputs
    sizes = sorted({candidate.context.ubatch_tokens for candidate in decision.candidates} - {size})
    others = [decision.best(ubatch_tokens=other_size) for other_size in sizes]
    seconds = ", ".join(f"{other.context.ubatch_tokens}: {decision.seconds(other)}" for other in others if other)
    yield (
        f"ubatch {size}: the workload takes {chosen.seconds:.1f} s"
        + (f" (with other ubatches: {seconds})" if seconds else "")
    )


def _processors(decision: Decision) -> Iterator[str]:
    yield f"{decision.threads} threads: " + (
        "set by threads" if decision.instance.threads else "one for each physical (performance) core; more are slower"
    )
    if decision.cpus:
        usual = "the performance cores: every step waits for its slowest thread"
        yield f"runs only on CPUs {decision.cpus}, {'set by cpus' if decision.instance.cpus else usual}"
    if decision.numa_nodes:
        yield f"memory is spread over NUMA nodes {decision.numa_nodes}: threads on all nodes read the weights"


def _workload(decision: Decision) -> str:
    work = decision.work
    concurrent = f", {work.concurrency} requests at once" if work.concurrency > 1 else ""
    name = f"the workload (profile {profile})" if (profile := decision.instance.profile) else "the workload"
    if decision.chosen.context.pooling:
        return f"{name}: each request is an input of {work.prompt_tokens} tokens{concurrent}"
    return (
        f"{name}: each request reads {work.prompt_tokens} tokens and writes {work.reply_tokens}{concurrent},"
        f" with {work.live_tokens} tokens in the KV cache"
    )


def _mapped(decision: Decision) -> Iterator[str]:
    if size := 0 if decision.capacity.unified else decision.model.mapped_bytes:
        yield (
            f"{LAYER_INPUTS} ({size // MIB} MiB) is read from the file as it is needed (--lazy-mode auto, above 4 GiB):"
            " it is page cache, not RAM"
        )


def _warnings(decision: Decision) -> Iterator[str]:
    machine, model = decision.machine, decision.model
    name = model.shape.architecture.name
    if not model.shape.architecture.verified and model.shape.cache is Cache.NONE:
        yield f"{name!r} was not compared with llama.cpp: it keeps no cache, its compute buffers are an upper bound"
    elif not model.shape.architecture.verified:
        yield f"{name!r} was not compared with llama.cpp: its KV cache and compute buffers are upper bounds"
    elif not model.shape.cache_is_exact:
        yield f"the attention windows of {name!r} are not known: its KV cache is an upper bound"
    elif not model.compute.is_exact:
        yield f"the compute graph of this {name!r} is not known: its compute buffers are an upper bound"
    planned, available = decision.rows[-1].used_bytes, machine.memory.available_bytes
    if planned > available:
        yield (
            f"warning: {planned // MIB} MiB of RAM are planned, {available // MIB} MiB are available now;"
            " other processes, or the running llama-server, must free memory first"
        )
    if decision.capacity.unified:
        yield "GPU and CPU share one memory: the GPU's bytes are subtracted from the host's capacity"


def _ranges(layers: frozenset[int]) -> str:
    """Layer numbers as text, consecutive numbers as a range: "3 to 7, 12"."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in runs)
