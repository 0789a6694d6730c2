"""The best plan in which each GPU computes a part of every layer (`--split-mode tensor`)."""

from __future__ import annotations

from llamafleet.planner import tensor
from llamafleet.planner.pools import in_words
from llamafleet.planner.result import Plan, Refusal
from llamafleet.planner.situation import Situation, Timed
from llamafleet.settings.speculation import WITHOUT_MEMORY
from llamafleet.units import MIB


def plan_by_tensors(case: Situation, by_layers: Timed | None) -> Timed | Refusal:
    """The best plan in which each GPU computes a part of every layer. `by_layers`: the one with whole layers."""
    name, shape = case.instance.name, case.model.shape
    why_not = tensor.impossible(shape, case.backend, case.capacity, case.instance.kv_types)
    if case.bare or case.instance.serves != "chat" or case.instance.speculation not in WITHOUT_MEMORY:
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


def _tensor_plan(case: Situation, chosen: tensor.Tensors, by_layers: Timed | None) -> Plan:
    seconds = by_layers.plan.chosen_for.workload_seconds if by_layers else None
    return case.plan(
        chosen.context, tensor.placement(case.model), chosen.order, case.with_rows(chosen.rows),
        tensor.why(chosen, case.capacity, case.model.shape, case.work, seconds), tensors=True,
        predicted=tensor.predict(chosen.order, chosen.context, case.roofline(case.work, case.known)),
        chosen_for=chosen.predicted,
    )  # fmt: skip
