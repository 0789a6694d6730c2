"""The roofline: it orders placements as published measurements do, with a range for its uncertainty."""

import time

import pytest

from bench import published_cases
from llamafleet.host.learned import MeasuredSpeeds, measurements
from llamafleet.host.machine import Cpu
from llamafleet.host.speeds import Measurements, host_bandwidth, rates
from llamafleet.planner.plan import plan_host
from tests import planning
from tests.planning import machine


def predicted(host, layout, measured=None, **instance):
    [answer] = planning.plans(host, [(layout,)], planning.settings(instance), measurements=measured)
    assert answer.fits, answer
    return answer


def test_published_cases_are_planned_and_met():
    """Every machine of a published case gets a plan that fits; the median error of the speeds stays small."""
    data = published_cases.read()
    rows = [published_cases.row(case, data["numbers"]) for case in data["cases"]]
    for line, case in zip(rows, data["cases"], strict=True):
        assert published_cases.as_expected(line, case), line
    assert published_cases.median(rows, data["cases"], "decode", usual=True) < 0.25
    assert published_cases.median(rows, data["cases"], "prefill", usual=True) < 0.30


def test_a_larger_ubatch_reads_faster_where_experts_are_in_ram():
    # Published on an RTX 3090: 380, 1113 and 1682 tokens/s at 512, 2048 and 4096.
    host = machine([{"name": "NVIDIA GeForce RTX 3090", "total_mib": 24576}])
    speeds = [
        predicted(
            host, "gpt-oss-120b", context_tokens=8192, prompt_tokens=4096, ubatch_tokens=size
        ).predicted.prefill_tokens_per_s
        for size in (512, 2048, 4096)
    ]
    assert speeds == sorted(speeds)
    assert speeds[2] > 3 * speeds[0]


def test_requests_at_once_gain_little_where_experts_are_in_ram():
    # Published on an RTX 4090: 12.2 + 13.0 tokens/s with two slots, 22.0 with one: each slot uses other experts.
    two = predicted(machine([24564]), "gpt-oss-120b", context_tokens=8192, slots=2).predicted
    assert 1.0 < two.all_slots_tokens_per_s / two.decode_tokens_per_s < 1.4
    dense = predicted(machine([24564]), "Llama-3.1-8B", context_tokens=8192, slots=2).predicted
    assert dense.all_slots_tokens_per_s / dense.decode_tokens_per_s > 1.6


def test_a_longer_live_context_is_slower():
    speeds = [
        predicted(
            machine([24564]), "Llama-3.1-8B", context_tokens=65536, live_tokens=live
        ).predicted.decode_tokens_per_s
        for live in (512, 16384, 65536)
    ]
    assert speeds == sorted(speeds, reverse=True)


@pytest.mark.parametrize("layout", ["gpt-oss-120b", "Llama-3.1-8B"])
def test_the_range_is_wider_where_less_is_known(layout):
    known = predicted(machine([24564]), layout, context_tokens=8192).predicted
    cpu = {**machine([24564]).to_json()["cpu"], "model": "a processor of 2031"}
    strange = machine([{"name": "a GPU of 2031"}], cpu=cpu)
    unknown = predicted(strange, layout, context_tokens=8192).predicted

    def width(predicted_speed):
        assert (
            predicted_speed.decode_low_tokens_per_s
            < predicted_speed.decode_tokens_per_s
            < predicted_speed.decode_high_tokens_per_s
        )
        assert (
            predicted_speed.prefill_low_tokens_per_s
            < predicted_speed.prefill_tokens_per_s
            < predicted_speed.prefill_high_tokens_per_s
        )
        return predicted_speed.decode_high_tokens_per_s / predicted_speed.decode_low_tokens_per_s

    assert width(unknown) > width(known)


def test_measured_rates_replace_the_catalogue_s():
    host, instance = machine([24564]), {"context_tokens": 8192}
    guess = predicted(host, "gpt-oss-120b", **instance).predicted
    faster = predicted(host, "gpt-oss-120b", Measurements(host_bytes_per_s=200e9), **instance).predicted
    assert faster.decode_tokens_per_s > 1.5 * guess.decode_tokens_per_s
    slow_link = Measurements(link_bytes_per_s={"GPU-0": 1e9})
    assert (
        predicted(host, "gpt-oss-120b", slow_link, **instance).predicted.prefill_tokens_per_s
        < guess.prefill_tokens_per_s
    )


def test_a_measured_trial_decides_against_the_prediction():
    """The second best by prediction was measured faster: it is chosen, and its speeds are the measured speeds."""
    host, instance = machine([24564]), {"context_tokens": 32768}
    best = predicted(host, "gpt-oss-120b", **instance)
    other = predicted(host, "gpt-oss-120b", **instance, ubatch_tokens=512)
    assert best.ubatch_tokens != 512
    trials = Measurements(trials={best.argv: (20.0, 500.0), other.argv: (60.0, 2000.0)})
    taken = predicted(host, "gpt-oss-120b", trials, **instance)
    assert taken.argv == other.argv
    assert taken.predicted.measured
    assert (taken.predicted.decode_tokens_per_s, taken.predicted.prefill_tokens_per_s) == (60.0, 2000.0)


@pytest.mark.parametrize(
    ("name", "gb_per_s"),
    [
        ("13th Gen Intel(R) Core(TM) i5-13400F", 76.8),
        ("Intel(R) Core(TM) i9-14900K", 89.6),
        ("AMD Ryzen 9 5900X 12-Core Processor", 51.2),
        ("AMD Ryzen 7 9800X3D 8-Core Processor", 89.6),
        ("AMD EPYC 9354 32-Core Processor", 460.8),
        ("AMD EPYC 7763 64-Core Processor", 204.8),
        ("AMD Ryzen Threadripper PRO 5995WX 64-Cores", 204.8),
        ("Intel(R) Xeon(R) Platinum 8480+", 307.2),
        ("Intel(R) Xeon(R) CPU E5-2680 v4 @ 2.40GHz", 76.8),
    ],
)
def test_a_processor_s_memory_is_known_by_its_name(name, gb_per_s):
    cpu = Cpu(name, 1, 8, 16, 8, 1, ("avx2",))
    assert host_bandwidth(cpu) == (gb_per_s * 1e9, True)
    assert rates(cpu, (), 8).host_bytes_per_s <= gb_per_s * 1e9


def test_few_cores_cannot_use_all_channels():
    cpu = Cpu("AMD EPYC 9354 32-Core Processor", 1, 32, 64, 32, 1, ("avx2",))
    assert rates(cpu, (), 2).host_bytes_per_s < rates(cpu, (), 32).host_bytes_per_s / 4


ZOO = [("RTX 4090", 24564, 16), ("RTX 3060", 12288, 4), ("RTX 4060 Ti", 16380, 8), ("RTX 3050", 8192, 1),
       ("RTX 3090", 24576, 16), ("Tesla P40", 24576, 16), ("RTX 2080 Ti", 11264, 8), ("RTX 5090", 32607, 16)]  # fmt: skip


@pytest.mark.parametrize("layout", ["gpt-oss-120b", "Qwen3-235B-A22B", "Llama-3.3-70B", "DeepSeek-R1", "Gemma-3-27B"])
def test_planning_is_quick_with_eight_different_gpus(layout):
    """50 ms of processor time on an idle machine; the limit is twice that, since other processes share the caches."""
    cards = [{"name": name, "total_mib": mib, "pcie_width": width} for name, mib, width in ZOO]
    host = machine(cards, ram_gib=1024)
    settings = planning.settings({"context_tokens": 32768, "concurrency": 4, "kv_types": ["f16", "q8_0"]})

    def seconds():
        start = time.process_time()
        [answer] = planning.plans(host, [(layout,)], settings)
        assert answer.fits
        return time.process_time() - start

    assert min(seconds() for _ in range(4)) < 0.1


def test_what_is_known_later_changes_the_predicted_speed_and_no_plan():
    host, [instance] = machine([24564]), planning.settings({"context_tokens": 32768}).models
    requests = [(instance, planning.header("gpt-oss-120b"))]
    settings = planning.settings({"context_tokens": 32768})
    slow = Measurements(host_bytes_per_s=4e9, host_flops=1e10)
    [before] = plan_host(host, requests, settings)
    [after] = plan_host(host, requests, settings, known=slow)
    assert (after.argv, after.chosen_for, after.at_gate) == (before.argv, before.chosen_for, before.at_gate)
    assert after.chosen_for == before.predicted != after.predicted
    assert after.predicted.decode_tokens_per_s < 0.5 * before.predicted.decode_tokens_per_s
    assert (before.predicted.decode_source, after.predicted.decode_source) == ("estimated", "measured on this host")


@pytest.mark.parametrize(("gpus", "layout", "where"), [
    ([], "Qwen3-8B", "host"), ([24564], "Qwen3-8B", "gpus"), ([24564], "gpt-oss-120b", "both"),
])  # fmt: skip
def test_the_gate_s_own_request_is_expected_at_its_own_speed(gpus, layout, where):
    """Measured at exactly the expected speed, the rates are those that the plan was chosen with."""
    plan = predicted(machine(gpus), layout, context_tokens=32768)
    assert plan.at_gate.computed_on == where
    gate = MeasuredSpeeds("a", plan.at_gate.decode_tokens_per_s, plan.at_gate.prompt_tokens_per_s, plan.at_gate)
    learned = measurements(None, [gate])
    if where == "host":
        assert plan.at_gate.decode_tokens_per_s > plan.predicted.decode_tokens_per_s  # a shorter cache
        assert learned.host_bytes_per_s == pytest.approx(plan.at_gate.host_bytes_per_s)
        again = predicted(machine(gpus), layout, learned, context_tokens=32768).predicted
        assert again.decode_tokens_per_s == plan.predicted.decode_tokens_per_s
    assert learned.gpu_bytes_per_s.keys() == ({"GPU-0"} if where == "gpus" else set())


def test_a_plan_that_swaps_has_no_predicted_speed():
    host, instance = machine([], ram_gib=32, swap_gib=64), {"context_tokens": 8192}
    settings = planning.settings(instance, allow_swap=True)
    [plan] = planning.plans(host, [("gpt-oss-120b",)], settings)
    assert plan.predicted.decode_tokens_per_s == plan.predicted.prefill_tokens_per_s == 0.0
    row = plan.ledger[-1]
    assert plan.predicted.swap_bytes == row.used_bytes + row.reserve_bytes - 32 * 2**30 > 0
    [fits] = planning.plans(machine([], ram_gib=128, swap_gib=64), [("gpt-oss-120b",)], settings)
    assert fits.predicted.swap_bytes == 0 < fits.predicted.decode_tokens_per_s
