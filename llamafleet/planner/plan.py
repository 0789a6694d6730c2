"""Make a plan, or a refusal, for each model of a host from the machine, the models' headers and the settings.

Everything here is a pure function: the same inputs give the same plan. A GPU's capacity is its total memory less the
memory of other processes. The RAM's capacity is the total, not the memory that is available now: otherwise the running
llama-server would shrink its own next plan.

Decision 1: docs/decisions/0001-one-decision-for-each-host-and-run.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType

from llamafleet.host.machine import Machine
from llamafleet.host.speeds import NOT_MEASURED, Measurements
from llamafleet.memory.adapters import adapters_of
from llamafleet.memory.capacity import Capacity
from llamafleet.memory.demand import Demand
from llamafleet.memory.flash_attention import takes_cache_on
from llamafleet.memory.ledger import NO_CORRECTION, Correction
from llamafleet.memory.placement import HOST
from llamafleet.memory.weights import Model
from llamafleet.model.gguf import Header
from llamafleet.model.shape import Shape
from llamafleet.planner import beside, projector, speculation, tensor, vectors
from llamafleet.planner.asked import Asked
from llamafleet.planner.backend import capacity_of, no_gpu, resolve_backend
from llamafleet.planner.by_layers import plan_by_layers
from llamafleet.planner.by_tensors import plan_by_tensors
from llamafleet.planner.devices import gpus_for, is_one_of, left_out, withheld
from llamafleet.planner.pools import in_words, slot_tokens
from llamafleet.planner.refine import Refined, fits
from llamafleet.planner.result import Plan, Refusal
from llamafleet.planner.search import Search
from llamafleet.planner.situation import Situation, Timed
from llamafleet.planner.suggestions import Change, Short, suggestions
from llamafleet.planner.together import with_sentences
from llamafleet.planner.unplannable import beyond, no_cache, not_a_model, nothing_to_spill
from llamafleet.settings.schema import DEMAND, Instance, Settings
from llamafleet.units import MIB


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
    for (`Plan.demand`). `corrections`, by instance name, correct the ledger by what the built llama-server reported for
    earlier plans. `measurements` are of this host. `known`: what the speeds are predicted with, where that is not what
    plans are chosen with: later measurements change no plan. `companions`: by instance name, the headers of what is
    loaded beside its model, by their parts.
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
    if wrong := nothing_to_spill(instance, model, len(capacity.gpus)):
        return Refusal(f"{instance.name}: {wrong}", instance=instance.name)
    asked = Asked(backend, capacity, instance, model, tokens, companions)
    case = Situation(
        machine, backend, capacity, instance, model, tokens, correction, measured, known, alone, earlier,
        served=partial(speculation.served, asked),
    )  # fmt: skip
    return _with_companions(case, asked)


def _with_companions(case: Situation, asked: Asked) -> Plan | Refusal:
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


Found = Timed | Refusal | tuple[Search, Refined]  # what came of planning a case


def _tried(case: Situation, asked: Asked) -> tuple[list[Situation], list[Found], Plan | None]:
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


def _where_needed(case: Situation, found: Found) -> Found:
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


def _best_plan(case: Situation) -> Found:
    """The best plan with its seconds, by the instance's `split_mode`; if no candidate fits, the refusal, or the search
    and its best candidate."""
    if case.instance.split_mode == "layer":
        return plan_by_layers(case)
    if case.instance.split_mode == "tensor":
        return plan_by_tensors(case, None)
    by_layers = plan_by_layers(case)
    if not tensor.is_tried(case.model.shape, case.backend) or case.measured.trials:
        return by_layers
    other = plan_by_tensors(case, by_layers if isinstance(by_layers, Timed) else None)
    if isinstance(other, Refusal) or not tensor.is_proven(case.model.shape, len(other.plan.gpus)):
        return by_layers
    slower = isinstance(by_layers, Timed) and by_layers.seconds < other.seconds * tensor.AUTO_GAIN
    return by_layers if slower else other


def _is_planned(case: Situation, change: Change) -> bool:
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


def _refuse(case: Situation, search: Search, refined: Refined) -> Refusal:
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
