"""Which settings a host can carry: machine, models and settings in, a plan or a refusal out.

Everything here is a pure function: the same inputs give the same plan. Capacity is total memory
less what other processes hold on the GPUs; for RAM it is the total less the reserve, not what
happens to be available now, so that our own running server cannot shrink the second plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

from llamafleet.host import vulkan
from llamafleet.host.backends import TRAITS
from llamafleet.host.machine import Machine
from llamafleet.host.speeds import NOT_MEASURED, Measurements, rates
from llamafleet.memory.capacity import Capacity
from llamafleet.memory.checkpoints import checkpoint_bytes
from llamafleet.memory.context import Context
from llamafleet.memory.kv_cache import takes_cache_of
from llamafleet.memory.ledger import NO_CORRECTION, Correction
from llamafleet.memory.placement import HOST
from llamafleet.memory.weights import Model
from llamafleet.model.architectures import ARCHITECTURES, PROJECTOR, RELEASE, nearest
from llamafleet.model.gguf import Header
from llamafleet.model.shape import Shape
from llamafleet.planner import processors
from llamafleet.planner.backend import capacity_of, environment, gpus_for, resolve_backend
from llamafleet.planner.flags import planned
from llamafleet.planner.reasons import Decision, why
from llamafleet.planner.refine import HOPELESS_BYTES, Refined, fits, refine
from llamafleet.planner.result import Plan, Refusal
from llamafleet.planner.roofline import Prediction, Roofline
from llamafleet.planner.search import Candidate, Search, contexts
from llamafleet.planner.suggestions import suggestions
from llamafleet.settings.schema import Instance, Settings
from llamafleet.settings.workload import Workload
from llamafleet.units import MIB

CELLS = 256  # of a KV cache, which llama.cpp pads to this
MOST_CHECKPOINTS = 32  # of a slot: llama.cpp's own limit (common/common.h:635)
DEFAULT_CONTEXT_LIMIT = 32768  # tokens, where the operator names no context (inventory/group_data/all.py)
SKETCH_ERROR_BYTES = 32 * MIB  # of host memory, by which the sketch is too high here and there
NEARLY = 2  # such candidates are looked at first
REFINED_AT_MOST = 6  # candidates checked against the ledger before a model is refused


def plan_host(
    machine: Machine,
    requests: Sequence[tuple[Instance, Header]],
    settings: Settings,
    corrections: Mapping[str, Correction] = MappingProxyType({}),
    measurements: Measurements = NOT_MEASURED,
) -> tuple[Plan | Refusal, ...]:
    """A plan or refusal for each instance; they share the host by priority, equal ones in the order given.

    `corrections`, by instance name: what the binary said of earlier plans. `measurements`: of this host.
    """
    backend = resolve_backend(machine, settings)
    if isinstance(backend, Refusal):
        return tuple(replace(backend, instance=instance.name) for instance, _ in requests)
    gpus = gpus_for(machine, backend, settings)
    if backend != "cpu" and not gpus:
        refusal = Refusal(
            f"backend is {backend!r} but {machine.hostname} has no GPU that it could use",
            suggestions=(*vulkan.advice(machine), 'set backend = "auto" or "cpu"'),
        )
        return tuple(replace(refusal, instance=instance.name) for instance, _ in requests)
    capacity = capacity_of(machine, gpus, settings)
    answers: dict[int, Plan | Refusal] = {}
    for position, (instance, header) in sorted(enumerate(requests), key=lambda one: (-one[1][0].priority, one[0])):
        correction = corrections.get(instance.name, NO_CORRECTION)
        answer = _plan_one(machine, backend, capacity, instance, header, correction, measurements, len(requests) == 1)
        if isinstance(answer, Plan):
            capacity = capacity.without(answer.ledger)
        answers[position] = answer
    return tuple(answers[position] for position in range(len(requests)))


def _plan_one(
    machine: Machine,
    backend: str,
    capacity: Capacity,
    instance: Instance,
    header: Header,
    correction: Correction,
    measured: Measurements,
    alone: bool,
) -> Plan | Refusal:
    if header.architecture == PROJECTOR:
        reason = f"{header.name} is a projector ({PROJECTOR}), which llama-server loads beside a model"
        return Refusal(reason, instance=instance.name, suggestions=("name the model's main GGUF file",))
    if header.architecture not in ARCHITECTURES:
        near = nearest(header.architecture)
        return Refusal(
            f"{header.name}: llama.cpp {RELEASE} does not know the architecture {header.architecture!r}"
            f"{f' (the nearest it knows is {near!r})' if near else ''}: the model would not load",
            instance=instance.name,
            suggestions=("name a GGUF of an architecture that llama.cpp supports, or use a newer llamafleet",),
        )
    shape = Shape.of(header)
    if shape.layers < 1 or shape.embedding < 1:
        reason = f"{header.name} ({header.architecture}) is no language model: its header gives no layers"
        return Refusal(reason, instance=instance.name, suggestions=("name the model's main GGUF file",))
    trained = shape.context_tokens
    tokens = instance.context_tokens or min(trained or DEFAULT_CONTEXT_LIMIT, DEFAULT_CONTEXT_LIMIT)
    # llama-server gives whole cells of 256 (GGML_PAD of n_ctx_seq, llama-context.cpp): ask for what it gives.
    padded = -(-tokens // CELLS) * CELLS
    tokens = min(padded, max(tokens, trained)) if trained else padded
    if trained and tokens > trained:
        return Refusal(
            f"{instance.name}: {tokens} tokens of context asked, {header.name} was trained for {trained}"
            " and llama-server caps a slot there",
            instance=instance.name,
            suggestions=(f"set context_tokens to {trained} or less",),
        )
    usable = tuple(kv_type for kv_type in instance.kv_types if takes_cache_of(shape, kv_type))
    if not usable:
        return Refusal(
            f"{instance.name}: llama-server has no KV cache of {', '.join(instance.kv_types)} for {header.name}",
            instance=instance.name,
            suggestions=("allow kv_types f16: blocks of a quantised type must divide the heads' size",),
        )
    instance = replace(instance, kv_types=usable)
    case = _Asked(machine, backend, capacity, instance, Model.of(header), tokens, correction, measured, alone)
    return _choose(case)


@dataclass(frozen=True)
class _Asked:
    """One instance, and everything that its plan depends on."""

    machine: Machine
    backend: str
    capacity: Capacity
    instance: Instance
    model: Model
    context_tokens: int
    correction: Correction
    measured: Measurements
    alone: bool  # no other model is served by this host

    @property
    def work(self) -> Workload:
        return Workload.of(self.instance, self.context_tokens)

    @property
    def threads(self) -> int:
        return processors.threads(self.machine.cpu, self.instance)

    def checkpoints(self, context: Context) -> int:
        """How many of each slot may take the RAM that the settings give them all."""
        each = checkpoint_bytes(self.model.shape, context) * context.slots
        return min(MOST_CHECKPOINTS, self.instance.context_checkpoints_mib * MIB // each) if each else MOST_CHECKPOINTS

    def checkpoints_bytes(self, tried: Sequence[Context]) -> int:
        """RAM that so many take at most, all slots together, whichever context is chosen; 0 where none are made."""
        shape, differing = self.model.shape, {(one.kv_type, one.slots): one for one in tried}.values()
        return max(self.checkpoints(one) * one.slots * checkpoint_bytes(shape, one) for one in differing)

    def search(self, tried: Sequence[Context]) -> Search:
        reached = rates(self.machine.cpu, self.capacity.gpus, self.threads, self.measured)
        roofline = Roofline(self.model, self.work, reached, op_offload=TRAITS[self.backend].op_offload)
        extra = self.instance.prompt_cache_mib * MIB + self.checkpoints_bytes(tried)
        return Search(self.model, self.capacity, self.backend, extra, self.correction, roofline)


def _choose(asked: _Asked) -> Plan | Refusal:
    tried = contexts(asked.instance, asked.context_tokens, asked.work)
    handicaps = dict(tried)
    search = asked.search(list(handicaps))
    weighed = search.candidates(tried)
    plans: list[tuple[float, int, Plan]] = []
    refused: Refined | None = None
    for number_, candidate in enumerate(_worth_refining(weighed)):
        refined = refine(search, candidate, handicaps[candidate.context])
        if any(row.free_bytes < 0 for row in refined.rows):
            refused = refused or refined
            if candidate.host_short_bytes > HOPELESS_BYTES:
                break
            continue
        plan = _plan(asked, search, refined, weighed)
        trial = asked.measured.trials.get(plan.argv)
        seconds = _measured_seconds(asked.work, trial) if trial else refined.candidate.score
        plans.append((seconds, number_, replace(plan, predicted=_measured(plan.predicted, trial))))
        if not asked.measured.trials:
            break
    if plans:
        return min(plans, key=lambda one: one[:2])[2]
    assert refused is not None, "there is a candidate at least, and it was refused"
    return _refuse(asked, search, refused)


def _worth_refining(weighed: Sequence[Candidate]) -> list[Candidate]:
    """The best, each once; before them what would be better and lacks, by the sketch, so little RAM that only the
    ledger can tell."""
    near = [one for one in weighed if 0 < one.host_short_bytes <= SKETCH_ERROR_BYTES and one.score < weighed[0].score]
    near = sorted(near, key=lambda one: one.score)[:NEARLY]
    return [*near, *(one for one in weighed[:REFINED_AT_MOST] if one not in near)]


def _measured(guess: Prediction, trial: tuple[float, float] | None) -> Prediction:
    return Prediction.of_trial(*trial) if trial else guess


def _measured_seconds(work: Workload, trial: tuple[float, float]) -> float:
    decode, prefill = trial
    return work.concurrency * (work.prompt_tokens / prefill + work.reply_tokens / decode)


def _plan(asked: _Asked, search: Search, refined: Refined, weighed: Sequence[Candidate]) -> Plan:
    chosen, placement, rows = refined.candidate, refined.candidate.placement, refined.ledger()
    gpus = tuple(asked.capacity.gpus[device] for device in chosen.order)
    context, cpu = chosen.context, asked.machine.cpu
    cpus = processors.cpus(cpu, asked.instance, placement, alone=asked.alone)
    nodes = processors.numa_nodes(cpu, placement)
    decision = Decision(
        asked.machine, asked.instance, asked.model, asked.capacity, asked.work,
        chosen, weighed, placement, rows, asked.threads, [gpu.link_bytes_per_s for gpu in search.roofline.rates.gpus],
        cpus, nodes,
    )  # fmt: skip
    argv = planned(
        context, placement, backend=asked.backend, gpus=len(gpus), threads=asked.threads,
        prompt_cache_mib=asked.instance.prompt_cache_mib, checkpoints=asked.checkpoints(context),
        is_moe=asked.model.is_moe,
    )  # fmt: skip
    return Plan(
        instance=asked.instance.name,
        backend=asked.backend,
        argv=tuple(argv),
        gpus=gpus,
        context_tokens=context.tokens,
        slots=context.slots,
        kv_type=context.kv_type,
        ubatch_tokens=context.ubatch_tokens,
        threads=asked.threads,
        prompt_cache_mib=asked.instance.prompt_cache_mib,
        checkpoints=asked.checkpoints(context),
        placement=placement,
        is_moe=asked.model.is_moe,
        ledger=rows,
        predicted=search.roofline.predict(chosen.order, chosen.segments, context),
        why=tuple(why(decision)),
        host_bytes=sum(row.used_bytes for row in (rows if asked.capacity.unified else rows[-1:])),
        environment=environment(asked.backend, gpus),
        cpus=cpus,
        numa_nodes=nodes,
    )


def _refuse(asked: _Asked, search: Search, refined: Refined) -> Refusal:
    capacity, rows, context = asked.capacity, refined.ledger(), refined.candidate.context
    worst = min(rows, key=lambda row: row.free_bytes)
    needed, available = worst.used_bytes, max(0, worst.used_bytes + worst.free_bytes)
    ram = "RAM and swap" if capacity.swap_bytes else "RAM"
    where = ram if worst.device == HOST else worst.device
    if capacity.unified:  # one pool: what is missing is missing for both
        needed, where = sum(row.used_bytes for row in rows), "the memory that GPU and CPU share"
        available = max(0, needed + worst.free_bytes)
    tokens, slots = context.tokens, context.slots
    total = sum(row.used_bytes + row.free_bytes for row in rows)
    name, host = asked.model.header.name, asked.machine.hostname
    return Refusal(
        f"{asked.instance.name}: {name} with {tokens} tokens for each of {slots} slot(s) does not"
        f" fit on {host}: {needed // MIB} MiB of {where} needed, {available // MIB} MiB available"
        " under the reserve",
        device=worst.device,
        needed_bytes=needed,
        available_bytes=available,
        suggestions=suggestions(
            asked.model,
            context,
            asked.instance,
            available=total,
            fits=partial(fits, search, certain=True),
            maybe=partial(fits, search, certain=False),
        ),
        ledger=rows,
        instance=asked.instance.name,
    )
