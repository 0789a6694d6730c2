"""The best plan with whole layers on each device: candidates of the search, refined and checked with the ledger."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from llamafleet.memory.context import Context
from llamafleet.planner import processors
from llamafleet.planner.at_gate import GATE_WORK, expected
from llamafleet.planner.reasons import Decision, why
from llamafleet.planner.refine import HOPELESS_BYTES, Refined, refine, with_spilled
from llamafleet.planner.result import Plan
from llamafleet.planner.roofline import Prediction
from llamafleet.planner.search import Candidate, Search
from llamafleet.planner.situation import Situation, Timed
from llamafleet.settings.workload import Workload
from llamafleet.units import MIB

ESTIMATE_ERROR_BYTES = 32 * MIB  # of RAM, by which the search's estimate may be too high
NEARLY_FITTING = 2  # candidates within that error that are checked first
REFINED_AT_MOST = 6  # further candidates that are checked with the ledger before a model is refused


def plan_by_layers(case: Situation) -> Timed | tuple[Search, Refined]:
    """The best plan with whole layers on each device; if no candidate fits, the search and its best candidate."""
    weighted_contexts = case.contexts or case.weighted_contexts(case.besides)
    search = case.search([context for context, _ in weighted_contexts])
    handicaps = {replace(context, flash_attention=True): handicap for context, handicap in weighted_contexts}
    candidates = case.where_needed(search.candidates(weighted_contexts))
    plans: list[tuple[float, int, Plan]] = []
    refused: Refined | None = None
    for rank, candidate in enumerate(_worth_refining(candidates)):
        refined = _refined(case, search, candidate, handicaps[replace(candidate.context, flash_attention=True)])
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


def _refined(case: Situation, search: Search, candidate: Candidate, handicap: float) -> Refined:
    if case.instance.spilled_layers is None:
        return refine(search, candidate, handicap)
    return with_spilled(search, candidate, case.instance.spilled_layers, handicap)


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
    case: Situation,
    search: Search,
    refined: Refined,
    candidates: Sequence[Candidate],
    laid_out: Callable[[Candidate], tuple[Candidate, bool]],
) -> Plan:
    candidate, placement, rows = refined.candidate, refined.candidate.placement, refined.ledger()
    context, cpu = candidate.context, case.machine.cpu
    decision = Decision(
        case.machine, case.backend, case.instance, case.model, case.capacity, case.work,
        candidate, candidates, laid_out, placement, rows, case.threads,
        [gpu.link_bytes_per_s for gpu in search.roofline.rates.gpus],
        processors.cpus(cpu, case.instance, placement, alone=case.alone),
        processors.numa_nodes(cpu, case.instance, placement),
    )  # fmt: skip
    # What is beyond the RAM, less the reserve.
    swap_bytes = max(0, case.capacity.swap_bytes - rows[-1].free_bytes) if case.capacity.swap_bytes else 0
    gpus, at_gate, at_work = case.gpus_of(candidate.order), None, None
    if not context.pooling:
        at_gate, at_work = (
            expected(case.roofline(work, case.measured, by_type=True), candidate, gpus[: len(candidate.order)])
            for work in (GATE_WORK, case.work)
        )
    return case.plan(
        context, placement, candidate.order, case.ledger(refined), why(decision),
        predicted=case.predicted(candidate, swap_bytes), reported_beside=case.reported(gpus),
        chosen_for=search.roofline.predict(candidate.order, candidate.segments, context), at_gate=at_gate,
        at_work=at_work,
    )  # fmt: skip
