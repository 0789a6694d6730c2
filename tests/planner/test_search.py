"""The search: nothing more fits on the GPUs, and no other placement found by brute force is faster."""

from dataclasses import replace

import pytest

from llamafleet.host.backends import TRAITS
from llamafleet.host.speeds import rates
from llamafleet.memory.ledger import NO_CORRECTION, usage
from llamafleet.memory.placement import Placement, Segment
from llamafleet.memory.weights import Model
from llamafleet.planner.backend import capacity_of
from llamafleet.planner.refine import refine
from llamafleet.planner.result import Plan
from llamafleet.planner.roofline import Roofline
from llamafleet.planner.search import Search, contexts
from llamafleet.settings.workload import Workload
from llamafleet.units import MIB
from tests import planning
from tests.planning import machine

MOE = ["gpt-oss-20b", "gpt-oss-120b", "Qwen3-30B-A3B", "Qwen3-235B-A22B", "GLM-4.5-Air", "Mixtral-8x7B",
       "Qwen3.6-35B-A3B", "Llama-4-Scout", "DeepSeek-R1"]  # fmt: skip
DENSE = ["Llama-3.3-70B", "Qwen3-32B", "Gemma-3-27B", "Mistral-Small-24B"]
GIB = 1024**3


def planned(layout, gpus, **instance):
    host = machine(gpus, ram_gib=1024)
    [answer] = planning.plans(host, [(layout,)], planning.settings(instance))
    assert isinstance(answer, Plan), answer
    return answer


def free_bytes(answer, layout, placement):
    """Free bytes above the reserve on the plan's first GPU, with this placement instead."""
    context = contexts(planning.settings({}).models[0], answer.context_tokens, work(answer))[0][0]
    context = replace(context, kv_type=answer.kv_type, ubatch_tokens=answer.ubatch_tokens, slots=answer.slots)
    used, _ = usage(Model.of(planning.header(layout)), context, placement, answer.backend, 1024 * MIB)
    return answer.ledger[0].capacity_bytes - 1024 * MIB - used[0].total_bytes


def work(answer):
    return Workload.of(planning.settings({}).models[0], answer.context_tokens)


@pytest.mark.parametrize("gib", [12, 24, 48, *(pytest.param(size, marks=pytest.mark.long) for size in (8, 16, 32, 80))])
@pytest.mark.parametrize("layout", MOE + DENSE)
def test_nothing_more_fits_on_one_gpu(layout, gib):
    answer = planned(layout, [gib * 1024], context_tokens=8192)
    placement = answer.placement
    model = Model.of(planning.header(layout))
    assert abs(free_bytes(answer, layout, placement) - answer.ledger[0].free_bytes) <= MIB
    if None in placement.layer_devices:  # one more layer, or, of a mixture of experts, its attention alone
        front = placement.layer_devices.index(0)
        holders = tuple(0 if layer >= front - 1 else None for layer in range(model.layers + 1))
        more = {front - 1} if model.is_moe and model.spill_bytes[front - 1] else set()
        fuller = Placement.of(holders, placement.spilled | more, dict(placement.partly))
    elif placement.partly:  # the other part of the layer that is shared
        fuller = Placement.of(placement.layer_devices, placement.spilled)
    elif placement.spilled:
        first = min(placement.spilled)
        down = model.down_bytes[first]
        part = "up" if down <= model.spill_bytes[first] - down else "down"  # the smaller part comes to the GPU
        fuller = Placement.of(placement.layer_devices, placement.spilled - {first}, {first: part})
    else:
        return
    assert free_bytes(answer, layout, fuller) < 0


@pytest.mark.parametrize("live", [100, 3000, 20000])
@pytest.mark.parametrize("gib", [16, 24, 32])
@pytest.mark.parametrize("layout", ["Llama-3.3-70B", "Qwen3-32B"])
def test_no_other_split_of_a_dense_model_is_faster(layout, gib, live):
    """Every number of whole front layers with every number of spilled feed-forward parts."""
    instance = {"context_tokens": 32768, "live_tokens": live, "ubatch_tokens": 512}
    answer = planned(layout, [gib * 1024], **instance)
    search, context = searching(layout, [gib * 1024], instance)
    layers = search.model.layers
    best = min(
        search.roofline.workload((0,), segments, context)
        for front in range(layers + 1)
        for keep in range(front, layers + 1, 2)
        if fits(search, context, segments := ([Segment(None, 0, front, front)] if front else [])
                + [Segment(0, front, layers, keep)])
    )  # fmt: skip
    assert answer.predicted.workload_seconds <= best * 1.001 + 0.01


def fits(search, context, segments):
    budget = search.budgets(context, (0,), "layers" if segments[0].device is None else "spill")[0]
    base, spill, part = search.base_costs(context), search.roofline.spill, segments[-1]
    return base[-1] - base[part.lo] + spill[part.keep] - spill[part.lo] <= budget


def searching(layout, gpus, requested):
    host, settings = machine(gpus, ram_gib=1024), planning.settings(requested)
    instance = settings.models[0]
    model, capacity = Model.of(planning.header(layout)), capacity_of(host, host.gpus, settings)
    workload = Workload.of(instance, instance.context_tokens)
    roofline = Roofline(model, workload, rates(host.cpu, host.gpus, 6), op_offload=TRAITS["cuda"].op_offload)
    search = Search(model, capacity, "cuda", 1024 * MIB, NO_CORRECTION, roofline)
    return search, contexts(instance, instance.context_tokens, workload)[0][0]


TWO = [
    [{"total_mib": 12288}, {"total_mib": 8192, "name": "NVIDIA GeForce RTX 3060"}],
    [{"total_mib": 16384}, {"total_mib": 16384}],
    [{"total_mib": 24576, "name": "NVIDIA GeForce RTX 3060", "pcie_width": 4}, {"total_mib": 8192}],
]


@pytest.mark.parametrize("gpus", TWO)
@pytest.mark.parametrize("layout", ["gpt-oss-120b", "Qwen3-30B-A3B", "Llama-3.3-70B"])
def test_no_other_cut_between_two_gpus_is_faster(layout, gpus):
    """Try every cut in both GPU orders, with as many experts on each GPU as fit."""
    instance = {"context_tokens": 16384, "ubatch_tokens": 512}
    answer = planned(layout, gpus, **instance)
    search, context = searching(layout, gpus, instance)
    seconds = []
    for order in ((0, 1), (1, 0)):
        budgets, base = search.budgets(context, order, "spill"), search.base_costs(context)
        for cut in range(1, search.model.layers):
            ends = (cut, search.model.layers + 1)
            if base[cut] <= budgets[0] and base[-1] - base[cut] <= budgets[1]:
                segments = search.segments(0, ends, (context, budgets))
                seconds.append(search.roofline.workload(order, segments, context))
    assert answer.predicted.workload_seconds <= min(seconds) * 1.001


def test_the_ledger_corrects_an_estimate_that_was_too_low():
    """A GPU that is fuller by the ledger than by the search's estimate loses layers until the rest fits."""
    search, context = searching("gpt-oss-120b", [24564], {"context_tokens": 8192})
    [best, *_] = search.candidates([(context, 1.0)])
    too_full = tuple(replace(segment, keep=segment.keep + 3) for segment in best.segments)
    refined = refine(search, replace(best, placement=Placement(too_full)), 1.0)
    assert refined.rows[0].free_bytes >= 0
    assert refined.candidate.segments[0].keep == refine(search, best, 1.0).candidate.segments[0].keep


def test_every_gpu_of_an_order_keeps_a_layer():
    """An order whose small GPU holds no layer does not fit; the order without that GPU is another candidate."""
    search, context = searching("Llama-3.3-70B", [1700, 24576], {"context_tokens": 32768})
    pieces = (Segment(None, 0, 40, 40), Segment(0, 40, 42, 42), Segment(1, 42, 80, 42))
    refined = refine(search, search.evaluate(context, (0, 1), pieces, 1.0), 1.0)
    assert [segment.device for segment in refined.candidate.segments] == [None, 0, 1]
    assert all(segment.lo < segment.hi for segment in refined.candidate.segments)
    assert len(refined.rows) == 3 and refined.rows[0].free_bytes < 0


def test_gpt_oss_120b_on_24_gb_holds_more_than_hand_tuned():
    """At 131072 tokens, under our reserve: the hand-tuned --n-cpu-moe 28 leaves experts of 8 layers on the GPU."""
    answer = planned("gpt-oss-120b", [24564], context_tokens=131072)
    assert len(answer.placement.spilled) + len(answer.placement.partly) <= 28
    assert answer.ledger[0].free_bytes >= 0
    assert answer.ledger[0].capacity_bytes - answer.ledger[0].used_bytes >= 1 * GIB
    longest = planned("gpt-oss-120b", [24564], context_tokens=131072, ubatch_tokens=512)
    assert len(longest.placement.spilled) <= 27
