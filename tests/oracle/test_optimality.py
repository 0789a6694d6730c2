"""Does a plan put as much on the GPU as it can hold? Compare the plan and its nearest neighbours in llama-server.

By llama-server's figures, the plan must fit beside the reserve. With one more unit on the GPU (the experts or the
feed-forward part of a layer, or a whole layer if some are on the CPU) it must not fit.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest

from llamafleet.memory.context import Context
from llamafleet.memory.ledger import usage
from llamafleet.memory.placement import Placement
from llamafleet.memory.weights import Model
from llamafleet.planner.flags import planned_flags
from llamafleet.planner.result import Plan
from sandbox import models
from sandbox.oracle import ask
from tests import planning

pytestmark = pytest.mark.oracle

MIB = 2**20
# Card size in GB: MiB that NVML reports, for RTX 4060, 3060, 4080, 4090, 5090, 6000 Ada, A100.
CARDS = {8: 8188, 12: 12288, 16: 16376, 24: 24564, 32: 32607, 48: 49140, 80: 81920}
# Each layout on one card; `make test-long` takes all.
ONE_CARD = (24,)
CONTEXT_TOKENS = 16384
ROUNDING_MIB = 3  # llama-server rounds model, context and compute down to whole MiB
WORKERS = 2  # llama-servers that run at once: the cores of a small machine

MOE = [name for name, layout in models.PUBLISHED.items() if layout.experts]
DENSE = ["Llama-3.3-70B", "Qwen3-32B", "Gemma-3-27B"]


@dataclass(frozen=True)
class Question:
    """A plan or a neighbour of it, and whether it must fit on a card of `gb` GB."""

    gb: int
    plan: Plan
    description: str
    must_fit: bool


@pytest.mark.parametrize("cards", [ONE_CARD, pytest.param(tuple(CARDS), marks=pytest.mark.long, id="all cards")])
@pytest.mark.parametrize("name", [*MOE, *DENSE])
def test_one_more_unit_on_the_gpu_would_break_the_reserve(name, cards, tmp_path_factory):
    path = models.weightless(tmp_path_factory.mktemp("models"), name)
    model = Model.of(planning.header(name))
    to_ask = {}
    for gb in cards:
        for question in questions(name, model, gb):
            # A plan that is wholly on the GPU does not change on larger cards: ask for it once.
            to_ask.setdefault((question.plan.argv, question.must_fit), question)
    with ThreadPoolExecutor(WORKERS) as pool:
        answers = list(pool.map(lambda question: needed_mib(path, model, question), to_ask.values()))
    assert answers, "no card leads to a plan with a GPU"
    wrong = []
    for question, mib in zip(to_ask.values(), answers, strict=True):
        limit = CARDS[question.gb]
        fits = mib <= limit if question.must_fit else mib + ROUNDING_MIB <= limit
        if fits != question.must_fit:
            wrong.append(f"{question.gb} GB, {question.description}: {mib:.0f} MiB needed with reserve, {limit} there")
    assert not wrong


def questions(name, model, gb):
    machine = planning.machine([CARDS[gb]], ram_gib=2048)
    tokens = min(CONTEXT_TOKENS, models.PUBLISHED[name].context)
    [plan] = planning.plans(machine, [(name,)], planning.settings({"context_tokens": tokens}))
    assert plan.fits
    if not plan.gpus:
        return
    yield Question(gb, plan, "the plan", True)
    for description, placement in neighbours(model, plan.placement):
        yield Question(gb, with_placement(plan, placement), description, False)


def context_of(plan):
    flash = planning.argument(plan.argv, "--flash-attn") == "on"
    return Context(plan.context_tokens, plan.slots, plan.kv_type, plan.ubatch_tokens, flash)


def with_placement(plan, placement):
    """The plan with another placement, and with the flags for it."""
    context = context_of(plan)
    argv = tuple(planned_flags(
        context, placement, backend=plan.backend, gpus=len(plan.gpus), threads=(plan.threads, plan.threads),
        load_mode="none", prompt_cache_mib=plan.prompt_cache_mib, checkpoints=plan.checkpoints,
        is_moe=plan.is_moe,
    ))  # fmt: skip
    assert argv != plan.argv
    return replace(plan, placement=placement, argv=argv)


def neighbours(model, placement):
    """Placements with the smallest spilled part back on the GPU, and with one more layer on the GPU."""
    back = [
        (
            model.spill_bytes[layer],
            f"the spilled part of layer {layer} more",
            (placement.spilled - {layer}, dict(placement.partly)),
        )
        for layer in placement.spilled
        if model.spill_bytes[layer]  # a block for multi-token prediction is not loaded
    ]
    back += [
        (model.part_bytes(layer, part), f"{part} of layer {layer} more",
         (placement.spilled, {other: kept for other, kept in placement.partly if other != layer}))
        for layer, part in placement.partly
    ]  # fmt: skip
    if back:
        _, description, changes = min(back, key=lambda candidate: candidate[0])
        yield description, Placement.of(placement.layer_devices, *changes)
    host = [layer for layer, device in enumerate(placement.layer_devices) if device is None]
    if host:
        holders = tuple(0 if layer == host[-1] else device for layer, device in enumerate(placement.layer_devices))
        spilled = placement.spilled | ({host[-1]} if placement.spilled and model.spill_bytes[host[-1]] else set())
        yield f"layer {host[-1]} more", Placement.of(holders, spilled, dict(placement.partly))


def needed_mib(path, model, question):
    """MiB needed on the GPU: llama-server's figure, the memory that it does not count, and the reserve."""
    flags = list(question.plan.argv)
    at = flags.index("--fit")
    del flags[at : at + 2]
    flags[flags.index("--device") + 1] = "RPC0"
    plan = question.plan
    context = context_of(plan)
    used, _ = usage(model, context, plan.placement, plan.backend)
    uncounted = used[0].staging_bytes + used[0].overhead_bytes
    reserve_mib = planning.settings().gpu_reserve_mib
    return ask(path, flags, 1).devices[0].total + uncounted / MIB + reserve_mib
