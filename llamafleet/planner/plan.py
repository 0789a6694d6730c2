"""Make a plan, or a refusal, for each model of a host from the machine, the models' headers and the settings.

Everything here is a pure function: the same inputs give the same plan. A GPU's capacity is its total memory less the
memory of other processes. The RAM's capacity is the total, not the memory that is available now: otherwise the running
llama-server would shrink its own next plan.

Decision 1: docs/decisions/0001-one-decision-for-each-host-and-run.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType

from llamafleet.host.backends import TRAITS
from llamafleet.host.machine import Gpu, Machine
from llamafleet.host.speeds import NOT_MEASURED, Measurements, rates
from llamafleet.memory.adapters import adapters_of, merged
from llamafleet.memory.beside import Beside, apart, reduced, taken, with_besides
from llamafleet.memory.capacity import Capacity
from llamafleet.memory.checkpoints import checkpoint_bytes
from llamafleet.memory.context import Context
from llamafleet.memory.demand import Demand
from llamafleet.memory.flash_attention import is_used, takes_cache_on
from llamafleet.memory.ledger import NO_CORRECTION, Correction, LedgerRow
from llamafleet.memory.placement import HOST
from llamafleet.memory.weights import Model
from llamafleet.model.gguf import Header
from llamafleet.model.shape import Shape
from llamafleet.planner import beside, processors, projector, speculation, tensor, vectors
from llamafleet.planner.asked import Asked
from llamafleet.planner.at_gate import GATE_WORK, expected_at_gate, host_cost
from llamafleet.planner.backend import capacity_of, environment, no_gpu, resolve_backend
from llamafleet.planner.beside import Weighted
from llamafleet.planner.devices import gpus_for, is_one_of, left_out, withheld
from llamafleet.planner.flags import device_names, planned_flags
from llamafleet.planner.pools import in_words, slot_tokens
from llamafleet.planner.reasons import Decision, why
from llamafleet.planner.refine import HOPELESS_BYTES, Refined, fits, refine
from llamafleet.planner.result import BESIDE, Plan, Refusal
from llamafleet.planner.roofline import Prediction, Roofline
from llamafleet.planner.search import Candidate, Search, contexts
from llamafleet.planner.suggestions import Change, Short, suggestions
from llamafleet.planner.together import with_sentences
from llamafleet.planner.unplannable import beyond, no_cache, not_a_model
from llamafleet.settings.schema import DEMAND, Instance, Settings
from llamafleet.settings.workload import Workload
from llamafleet.units import MIB

MOST_CHECKPOINTS = 32  # of a slot: llama.cpp's own limit (common/common.h, n_ctx_checkpoints)
ESTIMATE_ERROR_BYTES = 32 * MIB  # of RAM, by which the search's estimate may be too high
NEARLY_FITTING = 2  # candidates within that error that are checked first
REFINED_AT_MOST = 6  # further candidates that are checked with the ledger before a model is refused


def plan_host(
    machine: Machine,
    requests: Sequence[tuple[Instance, Header]],
    settings: Settings,
    corrections: Mapping[str, Correction] = MappingProxyType({}),
    measurements: Measurements = NOT_MEASURED,
    known: Measurements | None = None,
    companions: Mapping[str, Mapping[str, Header]] = MappingProxyType({}),
) -> tuple[Plan | Refusal, ...]:
    """A plan or a refusal for each instance, in the order of `requests`.

    Instances that start with the host get memory by priority, then in the order of `requests`. Each of those that start
    on demand is planned for all that is left then: which of them may be up together, the host decides when one is asked
    for (`Plan.demand`). `corrections`, by instance name, correct the
    ledger by what the built llama-server reported for earlier plans. `measurements` are of this host. `known`: what the
    speeds are predicted with, where that is not what plans are chosen with: later measurements change no plan.
    `companions`: by instance name, the headers of what is loaded beside its model, by their parts.
    """
    backend = resolve_backend(machine, settings)
    if isinstance(backend, Refusal):
        return tuple(replace(backend, instance=instance.name, problems=machine.problems) for instance, _ in requests)
    gpus = gpus_for(machine, backend, settings)
    if backend != "cpu" and not gpus:
        refusal = no_gpu(machine, backend, settings)
        return tuple(replace(refusal, instance=instance.name, problems=machine.problems) for instance, _ in requests)
    capacity = capacity_of(machine, gpus, settings)
    results: dict[int, Plan | Refusal] = {}
    earlier: tuple[Plan, ...] = ()
    notes = (*left_out(machine, backend, settings), *machine.notes)
    for position, (instance, header) in sorted(enumerate(requests), key=_turn):
        own = [number for number, gpu in enumerate(capacity.gpus) if is_one_of(gpu, instance.gpus)]
        if wrong := withheld(instance, gpus, machine, backend, settings):
            refusal = Refusal(f"{instance.name}: {wrong}", instance=instance.name, problems=machine.problems)
            results[position] = replace(refusal, suggestions=("name another one, or leave it out",))
            continue
        correction = corrections.get(instance.name, NO_CORRECTION)
        alone, later = len(requests) == 1, known or measurements
        result = _plan_instance(
            machine, backend, _only(capacity, own), instance, header, correction, measurements, later, alone, earlier,
            companions.get(instance.name, {}),
        )  # fmt: skip
        if isinstance(result, Plan) and instance.start == DEMAND:
            result = replace(result, demand=Demand.of(result.ledger, unified=_only(capacity, own).unified))
        elif isinstance(result, Plan):
            capacity = capacity.without(result.ledger)
            earlier = (*earlier, result)
        results[position] = replace(result, why=(*result.why, *notes), problems=machine.problems)
    return with_sentences([results[position] for position in range(len(requests))])


def _turn(item: tuple[int, tuple[Instance, Header]]) -> tuple[bool, int, int]:
    position, (instance, _) = item
    return instance.start == DEMAND, -instance.priority, position


def _only(capacity: Capacity, own: Sequence[int]) -> Capacity:
    """The capacity with the GPUs that an instance may use; without any, the host's memory is the processor's alone."""
    return replace(capacity.only(own), unified=capacity.unified and bool(own))


def _plan_instance(
    machine: Machine,
    backend: str,
    capacity: Capacity,
    instance: Instance,
    header: Header,
    correction: Correction,
    measured: Measurements,
    known: Measurements,
    alone: bool,
    earlier: tuple[Plan, ...],
    companions: Mapping[str, Header],
) -> Plan | Refusal:
    shape = Shape.of(header)
    if refusal := not_a_model(header, shape) or vectors.unsuited(instance, header, shape):
        return replace(refusal, instance=instance.name)
    trained = shape.context_tokens
    tokens = slot_tokens(instance, trained)
    if trained and tokens > trained:
        return Refusal(
            f"{instance.name}: context_tokens is {tokens}, but {header.name} was trained for {trained} tokens"
            " and llama-server limits a slot to that",
            instance=instance.name,
            suggestions=(f"set context_tokens to {trained} or less",),
        )
    if wrong := beyond(instance, machine, tokens) or vectors.too_small(instance, shape, tokens):
        return Refusal(f"{instance.name}: {wrong}", instance=instance.name)
    usable = tuple(kv_type for kv_type in instance.kv_types if takes_cache_on(shape, kv_type, backend))
    if not usable:
        return no_cache(instance, header, shape, backend)
    instance = vectors.as_planned(replace(instance, kv_types=usable))
    model = Model.of(header, head=speculation.uses_head(instance))
    asked = Asked(backend, capacity, instance, model, tokens, companions)
    case = _Case(
        machine, backend, capacity, instance, model, tokens, correction, measured, known, alone, earlier,
        served=partial(speculation.served, asked),
    )  # fmt: skip
    return _with_companions(case, asked)


def _with_companions(case: _Case, asked: Asked) -> Plan | Refusal:
    """The best plan among the places of what is loaded beside the model."""
    if wrong := beside.unfit(asked):
        return Refusal(f"{case.instance.name}: {wrong}", instance=case.instance.name)
    case = case.with_adapters(adapters_of(asked.companions))
    cases, found, plan = _tried(case, asked)
    if plan is not None:
        return plan
    refused = found[-1]
    assert not isinstance(refused, Timed), "none of the cases has a plan"
    refusal = refused if isinstance(refused, Refusal) else _refuse(cases[-1], *refused)
    less = next((text for text, other in projector.less(asked)
                 if _tried(replace(case, instance=other.instance), other)[2] is not None), None)  # fmt: skip
    return replace(refusal, suggestions=(less, *refusal.suggestions)) if less else refusal


@dataclass(frozen=True)
class Timed:
    """A plan with the seconds that it was chosen by."""

    seconds: float
    plan: Plan


Found = Timed | Refusal | tuple[Search, Refined]  # what came of planning a case


def _tried(case: _Case, asked: Asked) -> tuple[list[_Case], list[Found], Plan | None]:
    """Every combination of places, what came of each, and the best plan, if there is one."""
    cases = [
        case.with_besides(besides, contexts)
        for option in beside.options(asked)
        for besides, contexts in beside.by_context(option, case.weighted_contexts(option))
    ]
    found = [_where_needed(one, _best_plan(one)) for one in cases]
    plans = [(best.seconds * one.handicap, n, best.plan) for n, (one, best) in enumerate(zip(cases, found, strict=True))
             if isinstance(best, Timed)]  # fmt: skip
    return cases, found, min(plans, key=lambda item: item[:2])[2] if plans else None


def _where_needed(case: _Case, found: Found) -> Found:
    """A refusal in place of a plan whose output matrix lies where a companion cannot read it."""
    if not isinstance(found, Timed):
        return found
    device, plan = found.plan.placement.layer_devices[-1], found.plan
    place = HOST if device is None else f"GPU{plan.gpus[device].index}"
    wrong = next((one for one in case.besides if one.output_on not in (None, place)), None)
    if wrong is None:
        return found
    return Refusal(
        f"{plan.instance}: {wrong.part}: it has no output matrix of its own, and could not read the model's on {place} "
        f"from {wrong.output_on}",
        instance=plan.instance,
        suggestions=("choose a file with an output matrix of its own, or fewer gpus",),
    )


@dataclass(frozen=True)
class _Case:
    """One instance, and everything that its plan depends on."""

    machine: Machine
    backend: str
    capacity: Capacity
    instance: Instance
    model: Model
    context_tokens: int
    correction: Correction
    measured: Measurements  # that the plan is chosen with
    known: Measurements  # that its speed is predicted with
    alone: bool  # no other model is served by this host
    earlier: tuple[Plan, ...] = ()  # of models that were planned before, and took their memory
    besides: tuple[Beside, ...] = ()  # what is loaded beside the model; the capacity is what it leaves
    whole: Capacity | None = None  # with what is beside the model; None: the same
    contexts: tuple[Weighted, ...] = ()  # that the besides are for; empty: all
    served: Callable[[Context], Context] = field(default=lambda context: context, compare=False)
    bare: Model | None = None  # the model without its adapters, where it has some

    def with_adapters(self, headers: Mapping[int, Header]) -> _Case:
        """The case with these adapters, by their numbers, among the model's tensors."""
        if not headers:
            return self
        head = speculation.uses_head(self.instance)
        return replace(self, model=Model.of(merged(self.model.header, headers), head=head), bare=self.model)

    def with_besides(self, besides: tuple[Beside, ...], contexts: Sequence[Weighted]) -> _Case:
        """The case with this beside the model, for contexts that it takes the same memory with."""
        capacity = reduced(self.capacity, besides)
        return replace(self, besides=besides, whole=self.capacity, capacity=capacity, contexts=tuple(contexts))

    def weighted_contexts(self, besides: Sequence[Beside]) -> Sequence[Weighted]:
        """Every context worth a try with its handicap, the preferred first."""
        shape = self.model.shape
        pooling = vectors.pooling_of(self.instance, shape)
        every = contexts(
            self.instance, self.context_tokens, self.work, flash_attention=is_used(shape, self.backend),
            trained=shape.context_tokens, pooling=pooling,
            least_ubatch=max((one.least_ubatch for one in besides), default=0),
            whole_inputs=vectors.needs_whole_inputs(shape, pooling),
        )  # fmt: skip
        return [(self.served(context), handicap) for context, handicap in every]

    def where_needed(self, candidates: list[Candidate]) -> list[Candidate]:
        """The candidates with the output matrix where companions read it; all of them where none has it there."""
        needed = {one.output_on for one in self.besides} - {None}
        near = [one for one in candidates if needed <= {self._output_on(one)}]
        return near or candidates

    def _output_on(self, candidate: Candidate) -> str:
        device = candidate.placement.layer_devices[-1]
        return HOST if device is None else f"GPU{self.capacity.gpus[candidate.order[device]].index}"

    def checkpoint(self, context: Context) -> int:
        """Bytes of a context checkpoint, with what companions add to it; 0 where llama-server makes none."""
        own = checkpoint_bytes(self.model.shape, context)
        return own + sum(one.checkpoint_bytes for one in self.besides) if own else 0

    @property
    def handicap(self) -> float:
        """Factor on the seconds for what the prediction does not have of the companions."""
        return math.prod(one.handicap for one in self.besides)

    def ledger(self, refined: Refined) -> tuple[LedgerRow, ...]:
        """The model's rows and what is beside it."""
        rows = refined.ledger()
        if self.bare:
            rows = apart(rows, replace(refined.case, model=self.bare).rows(refined.candidate.placement))
        return self.with_rows(rows)

    def with_rows(self, rows: Sequence[LedgerRow]) -> tuple[LedgerRow, ...]:
        """The rows of the model alone, with what is beside it."""
        return with_besides(rows, self.besides, self.whole or self.capacity, TRAITS[self.backend].overhead_bytes)

    def gpus_of(self, order: Sequence[int]) -> tuple[Gpu, ...]:
        """The model's GPUs, and those that only its companions use."""
        own = tuple(self.capacity.gpus[device] for device in order)
        others, _ = taken(self.besides)
        return (*own, *(gpu for gpu in self.capacity.gpus if others.get(gpu.index) and gpu not in own))

    @property
    def work(self) -> Workload:
        return Workload.of(self.instance, self.context_tokens)

    @property
    def threads(self) -> int:
        return processors.threads(self.machine.cpu, self.instance)

    def checkpoints(self, context: Context) -> int:
        """Context checkpoints of each slot: as many as fit into `context_checkpoints_mib` for all slots together."""
        if context.pooling:
            return 0
        each = self.checkpoint(context) * context.slots
        return min(MOST_CHECKPOINTS, self.instance.context_checkpoints_mib * MIB // each) if each else MOST_CHECKPOINTS

    def checkpoints_bytes(self, contexts: Sequence[Context]) -> int:
        """RAM of all slots' checkpoints together, the largest of these contexts; 0 if the model makes none."""
        different = {(context.kv_type, context.slots): context for context in contexts}.values()
        return max(self.checkpoints(each) * each.slots * self.checkpoint(each) for each in different)

    def roofline(self, work: Workload, measured: Measurements, *, by_type: bool = False) -> Roofline:
        """The speed of this model with these measurements. `by_type`: with what its types of weights cost a processor,
        which choosing a plan leaves out."""
        machine_rates = rates(self.machine.cpu, self.capacity.gpus, self.threads, measured)
        if by_type:
            machine_rates = replace(machine_rates, host_flops=machine_rates.host_flops / host_cost(self.model))
        return Roofline(self.model, work, machine_rates, op_offload=TRAITS[self.backend].op_offload)

    def predicted(self, candidate: Candidate, swap_bytes: int) -> Prediction:
        """The speed by all that is known of the host; none for a plan that swaps, since no disk was measured."""
        if swap_bytes:
            return Prediction(0.0, 0.0, swap_bytes=swap_bytes)
        roofline = self.roofline(self.work, self.known, by_type=True)
        return roofline.predict(candidate.order, candidate.segments, candidate.context)

    def search(self, contexts: Sequence[Context]) -> Search:
        roofline = self.roofline(self.work, self.measured)
        extra = self.instance.prompt_cache_mib * MIB + self.checkpoints_bytes(contexts)
        return Search(self.model, self.capacity, self.backend, extra, self.correction, roofline)


def _best_plan(case: _Case) -> Found:
    """The best plan with its seconds, by the instance's `split_mode`; if no candidate fits, the refusal, or the search
    and its best candidate."""
    if case.instance.split_mode == "layer":
        return _by_layers(case)
    if case.instance.split_mode == "tensor":
        return _by_tensors(case, None)
    by_layers = _by_layers(case)
    guesses = case.instance.speculation not in ("none", "ngram")  # drafts and heads beside split tensors are not known
    if guesses or not tensor.is_tried(case.model.shape, case.backend) or case.measured.trials:
        return by_layers
    other = _by_tensors(case, by_layers if isinstance(by_layers, Timed) else None)
    if isinstance(other, Refusal) or not tensor.is_proven(case.model.shape, len(other.plan.gpus)):
        return by_layers
    slower = isinstance(by_layers, Timed) and by_layers.seconds < other.seconds * tensor.AUTO_GAIN
    return by_layers if slower else other


def _by_tensors(case: _Case, by_layers: Timed | None) -> Timed | Refusal:
    """The best plan in which each GPU computes a part of every layer. `by_layers`: the one with whole layers."""
    name, shape = case.instance.name, case.model.shape
    why_not = tensor.impossible(shape, case.backend, case.capacity, case.instance.kv_types)
    if case.bare or case.instance.serves != "chat" or case.instance.speculation not in ("none", "ngram"):
        why_not = "it is planned for chat alone, without adapters and drafts"
    if why_not:
        return Refusal(
            f'{name}: split_mode "tensor": {why_not}',
            instance=name,
            suggestions=('set split_mode to "layer" or "auto"',),
        )
    weighted_contexts = case.contexts or case.weighted_contexts(case.besides)
    search = case.search([context for context, _ in weighted_contexts])
    chosen = tensor.best(search, weighted_contexts)
    plan = _tensor_plan(case, chosen, by_layers)
    worst = min(plan.ledger, key=lambda row: row.free_bytes)
    if worst.free_bytes >= 0:
        return Timed(chosen.score, plan)
    needed, available = worst.used_bytes, max(0, worst.used_bytes + worst.free_bytes)
    return Refusal(
        f'{name}: {case.model.header.name} with {in_words(chosen.context)} and split_mode "tensor" does not fit on '
        f"{case.machine.hostname}: {needed // MIB} MiB of {worst.device} needed, {available // MIB} MiB available"
        " besides the reserve",
        device=worst.device, needed_bytes=needed, available_bytes=available, ledger=plan.ledger, instance=name,
        suggestions=('set split_mode to "layer" or "auto": then weights may be on the host', "set a smaller context"),
    )  # fmt: skip


def _tensor_plan(case: _Case, chosen: tensor.Tensors, by_layers: Timed | None) -> Plan:
    context, model, placement = chosen.context, case.model, tensor.placement(case.model)
    gpus, cpu = case.gpus_of(chosen.order), case.machine.cpu
    rows = case.with_rows(chosen.rows)
    argv = planned_flags(
        context, placement, backend=case.backend, gpus=len(chosen.order), threads=case.threads,
        prompt_cache_mib=case.instance.prompt_cache_mib, checkpoints=case.checkpoints(context), is_moe=model.is_moe,
        tensors=True,
    )  # fmt: skip
    seconds = by_layers.plan.chosen_for.workload_seconds if by_layers else None
    return Plan(
        instance=case.instance.name, backend=case.backend, argv=(*argv, *_beside_flags(case, gpus)), gpus=gpus,
        context_tokens=context.tokens, slots=context.slots, kv_type=context.kv_type,
        ubatch_tokens=context.ubatch_tokens, threads=case.threads,
        prompt_cache_mib=case.instance.prompt_cache_mib, checkpoints=case.checkpoints(context),
        placement=placement, is_moe=model.is_moe, mapped_bytes=model.mapped_bytes, ledger=rows,
        predicted=tensor.predict(chosen.order, context, case.roofline(case.work, case.known)),
        why=(
            *tensor.why(chosen, case.capacity, model.shape, case.work, seconds),
            *(one.why for one in case.besides if one.why),
        ),
        host_bytes=rows[-1].used_bytes + model.mapped_bytes,
        environment=environment(case.backend, gpus, case.machine),
        cpus=processors.cpus(cpu, case.instance, placement, alone=case.alone),
        numa_nodes=processors.numa_nodes(cpu, placement), chosen_for=chosen.predicted,
    )  # fmt: skip


def _by_layers(case: _Case) -> Timed | tuple[Search, Refined]:
    """The best plan with whole layers on each device; if no candidate fits, the search and its best candidate."""
    weighted_contexts = case.contexts or case.weighted_contexts(case.besides)
    search = case.search([context for context, _ in weighted_contexts])
    handicaps = {replace(context, flash_attention=True): handicap for context, handicap in weighted_contexts}
    candidates = case.where_needed(search.candidates(weighted_contexts))
    plans: list[tuple[float, int, Plan]] = []
    refused: Refined | None = None
    for rank, candidate in enumerate(_worth_refining(candidates)):
        refined = refine(search, candidate, handicaps[replace(candidate.context, flash_attention=True)])
        if any(row.free_bytes < 0 for row in refined.rows):
            refused = refused or refined
            if candidate.host_short_bytes > HOPELESS_BYTES:
                break
            continue
        plan = _plan(case, search, refined, candidates, partial(_laid_out, search, handicaps))
        trial = case.measured.trials.get(plan.argv)
        seconds = _measured_seconds(case.work, trial) if trial else refined.candidate.score
        plans.append((seconds, rank, replace(plan, predicted=_measured(plan.predicted, trial))))
        if not case.measured.trials:
            break
    if plans:
        seconds, _, plan = min(plans, key=lambda item: item[:2])
        return Timed(seconds, plan)
    assert refused is not None, "the search returns at least one candidate, and each was refused"
    return search, refused


def _is_planned(case: _Case, change: Change) -> bool:
    """Does the model fit if this is changed?"""
    capacity = case.capacity
    if change.ram_reserve_mib is not None:
        reserve = change.ram_reserve_mib * MIB
        gpu_reserves = (reserve,) * len(capacity.gpus) if capacity.unified else capacity.gpu_reserves_bytes
        capacity = replace(capacity, host_reserve_bytes=reserve, gpu_reserves_bytes=gpu_reserves)
    instance = case.instance
    if change.prompt_cache_mib is not None:
        instance = replace(instance, prompt_cache_mib=change.prompt_cache_mib)
    model = case.model if change.header is None else Model.of(change.header, head=speculation.uses_head(instance))
    return isinstance(_best_plan(replace(case, capacity=capacity, instance=instance, model=model)), Timed)


def _worth_refining(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates to check with the ledger, in order.

    First those that are faster than the best, but lack so little RAM by the estimate that only the ledger can decide.
    """
    faster = [candidate for candidate in candidates if candidate.score < candidates[0].score]
    near = [candidate for candidate in faster if 0 < candidate.host_short_bytes <= ESTIMATE_ERROR_BYTES]
    near = sorted(near, key=lambda candidate: candidate.score)[:NEARLY_FITTING]
    return [*near, *(candidate for candidate in candidates[:REFINED_AT_MOST] if candidate not in near)]


def _measured(predicted: Prediction, trial: tuple[float, float] | None) -> Prediction:
    return Prediction.of_trial(*trial) if trial else predicted


def _measured_seconds(work: Workload, trial: tuple[float, float]) -> float:
    decode, prefill = trial
    return work.concurrency * (work.prompt_tokens / prefill + work.reply_tokens / decode)


def _laid_out(search: Search, handicaps: Mapping[Context, float], candidate: Candidate) -> tuple[Candidate, bool]:
    """The candidate once its buffers are laid out, and whether it fits."""
    refined = refine(search, candidate, handicaps[replace(candidate.context, flash_attention=True)])
    return refined.candidate, all(row.free_bytes >= 0 for row in refined.rows)


def _plan(
    case: _Case,
    search: Search,
    refined: Refined,
    candidates: Sequence[Candidate],
    laid_out: Callable[[Candidate], tuple[Candidate, bool]],
) -> Plan:
    candidate, placement, rows = refined.candidate, refined.candidate.placement, refined.ledger()
    gpus = case.gpus_of(candidate.order)
    context, cpu = candidate.context, case.machine.cpu
    cpus = processors.cpus(cpu, case.instance, placement, alone=case.alone)
    nodes = processors.numa_nodes(cpu, placement)
    decision = Decision(
        case.machine, case.backend, case.instance, case.model, case.capacity, case.work,
        candidate, candidates, laid_out, placement, rows, case.threads,
        [gpu.link_bytes_per_s for gpu in search.roofline.rates.gpus], cpus, nodes,
    )  # fmt: skip
    mapped = 0 if case.capacity.unified else case.model.mapped_bytes
    # What is beyond the RAM, less the reserve.
    swap_bytes = max(0, case.capacity.swap_bytes - rows[-1].free_bytes) if case.capacity.swap_bytes else 0
    argv = planned_flags(
        context, placement, backend=case.backend, gpus=len(candidate.order), threads=case.threads,
        prompt_cache_mib=case.instance.prompt_cache_mib, checkpoints=case.checkpoints(context),
        is_moe=case.model.is_moe,
    )  # fmt: skip
    rows = case.ledger(refined)
    return Plan(
        instance=case.instance.name,
        backend=case.backend,
        argv=(*argv, *_beside_flags(case, gpus)),
        gpus=gpus,
        context_tokens=context.tokens,
        slots=context.slots,
        kv_type=context.kv_type,
        pooling=context.pooling,
        vector_elements=case.model.shape.embedding_out if context.pooling else 0,
        ubatch_tokens=context.ubatch_tokens,
        threads=case.threads,
        prompt_cache_mib=case.instance.prompt_cache_mib,
        checkpoints=case.checkpoints(context),
        placement=placement,
        is_moe=case.model.is_moe,
        mapped_bytes=mapped,
        ledger=rows,
        predicted=case.predicted(candidate, swap_bytes),
        why=(*why(decision), *(one.why for one in case.besides if one.why)),
        # With room for the pages of mapped tensors, which count as the service's.
        host_bytes=sum(row.used_bytes for row in (rows if case.capacity.unified else rows[-1:])) + mapped,
        environment=environment(case.backend, gpus, case.machine),
        cpus=cpus,
        numa_nodes=nodes,
        reported_beside=_reported(case, gpus),
        chosen_for=search.roofline.predict(candidate.order, candidate.segments, context),
        at_gate=None
        if context.pooling
        else expected_at_gate(
            case.roofline(GATE_WORK, case.measured, by_type=True), candidate, gpus[: len(candidate.order)]
        ),
    )


def _reported(case: _Case, gpus: Sequence[Gpu]) -> dict[str, tuple[str, int]]:
    """What llama-server reports of what is beside the model, by its own names: the ledger's device, and bytes."""
    names = {f"GPU{gpu.index}": name for gpu, name in zip(gpus, device_names(case.backend, len(gpus)), strict=True)}
    whole = {one.part: one.reported for one in case.besides if one.reported}
    rows = {BESIDE + names.get(device, "Host"): (device, size)
            for one in case.besides for device, size in one.reported_rows.items()}  # fmt: skip
    return {**whole, **rows}


def _beside_flags(case: _Case, gpus: Sequence[Gpu]) -> Iterator[str]:
    """The flags of what is beside the model, with llama.cpp's names of the GPUs."""
    names = {f"GPU{gpu.index}": name for gpu, name in zip(gpus, device_names(case.backend, len(gpus)), strict=True)}
    for one in case.besides:
        yield from (flag.format(**names) for flag in one.flags)


def _refuse(case: _Case, search: Search, refined: Refined) -> Refusal:
    capacity, rows, context = case.capacity, case.ledger(refined), refined.candidate.context
    worst = min(rows, key=lambda row: row.free_bytes)
    needed, available = worst.used_bytes, max(0, worst.used_bytes + worst.free_bytes)
    ram = "RAM and swap" if capacity.swap_bytes else "RAM"
    where = ram if worst.device == HOST else worst.device
    if capacity.unified:  # GPU and host use the same memory: add up the rows
        needed, where = sum(row.used_bytes for row in rows), "the memory that GPU and CPU share"
        available = max(0, needed + worst.free_bytes)
    name, host = case.model.header.name, case.machine.hostname
    described = name if name == case.instance.name else f"{case.instance.name}: {name}"
    short = Short(
        row=worst,
        missing_bytes=needed - available,
        total_bytes=sum(row.used_bytes + row.free_bytes for row in rows),
        reserve_bytes=capacity.host_reserve_bytes,
        memory_bytes=case.machine.memory.total_bytes,
        earlier=case.earlier,
    )
    return Refusal(
        f"{described} with {in_words(context)} does not"
        f" fit on {host}: {needed // MIB} MiB of {where} needed, {available // MIB} MiB available"
        f" besides the reserve, {-(-short.missing_bytes // MIB)} MiB missing",
        device=worst.device,
        needed_bytes=needed,
        available_bytes=available,
        suggestions=suggestions(
            case.model,
            context,
            case.instance,
            short,
            backend=case.backend,
            fits=partial(fits, search, certain=True),
            fits_by_estimate=partial(fits, search, certain=False),
            is_planned=partial(_is_planned, case),
        ),
        ledger=rows,
        instance=case.instance.name,
    )
