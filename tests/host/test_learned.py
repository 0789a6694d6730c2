"""A host's rates from its own measurements: the survey's probe, and the gates of other models."""

import dataclasses

import pytest

from llamafleet.host.learned import Bandwidth, ChosenRates, Expected, MeasuredSpeeds, RecordedRates, measurements
from llamafleet.host.speeds import CORE_STEPS_PER_S, ESTIMATED, MEASURED, PROBED, rates
from tests import planning

CPU = planning.machine().cpu


def gate(decode, prompt, on="host", gpus=()):
    """A gate of which 10 tokens/s written and 100 read were expected, by 20 GB/s and 1 TFLOPS."""
    expected = Expected(10.0, 100.0, on, 20e9, 1e12, dict(gpus))
    return MeasuredSpeeds("a", decode, prompt, expected)


def test_measured_and_expected_speed_give_the_rate():
    found = measurements(None, [gate(15.0, 50.0)])
    assert (found.host_bytes_per_s, found.host_flops) == (30e9, 0.5e12)


def test_of_several_gates_the_median_counts():
    found = measurements(None, [gate(5.0, None), gate(20.0, 300.0), gate(15.0, 100.0)])
    assert (found.host_bytes_per_s, found.host_flops) == (30e9, 2e12)


def test_a_gate_tells_of_gpus_only_where_they_compute_everything():
    found = measurements(None, [gate(20.0, 100.0, "gpus", {"GPU-0": 900e9}), gate(40.0, 1.0, "both", {"GPU-1": 1e9})])
    assert found.gpu_bytes_per_s == {"GPU-0": 1800e9}
    assert found.host_bytes_per_s is None and found.host_flops is None


def test_a_rate_says_where_it_comes_from():
    probe = Bandwidth(40e9, "a box")
    sources = [rates(CPU, [], 6, measurements(*found)).host_source for found in [
        (None, []), (Bandwidth(None, "a box", "busy"), []), (probe, []), (probe, [gate(15.0, None)]),
    ]]  # fmt: skip
    assert sources == [ESTIMATED, ESTIMATED, PROBED, MEASURED]


def test_what_memory_gives_is_shared_by_sockets_and_limited_by_cores():
    def by_probe(bytes_per_s, threads=6, **cpu):
        machine = planning.machine(cpu=cpu)
        return rates(machine.cpu, [], threads, measurements(Bandwidth(bytes_per_s, "x"), [])).host_bytes_per_s

    assert by_probe(20e9) < by_probe(40e9) < by_probe(40e9, sockets=1, flags=["amx_int8"]) + 1
    assert by_probe(40e9, sockets=2) == pytest.approx(by_probe(20e9))
    assert by_probe(500e9, threads=1) == by_probe(900e9, threads=1)


def test_cores_with_fewer_cycles_a_second_multiply_as_much_more_slowly():
    def by_probe(steps, found=(), **cpu):
        bandwidth = Bandwidth(500e9, "x", core_steps_per_s=steps)
        return rates(planning.machine(cpu=cpu).cpu, [], 6, measurements(bandwidth, found))

    full, half, quarter = (by_probe(share * CORE_STEPS_PER_S) for share in (1, 0.5, 0.25))
    for name in ("host_flops", "host_attention_macs", "host_read_attention_macs"):
        assert getattr(half, name) == pytest.approx(getattr(full, name) / 2), name
    assert quarter.host_bytes_per_s == pytest.approx(half.host_bytes_per_s / 2)
    assert by_probe(2 * CORE_STEPS_PER_S).host_flops == full.host_flops and full.host_flops_source == PROBED
    unknown = by_probe(None)
    assert (unknown.host_flops, unknown.host_flops_source) == (full.host_flops, ESTIMATED)
    assert unknown.host_bytes_per_s > half.host_bytes_per_s
    measured = by_probe(CORE_STEPS_PER_S / 2, [gate(15.0, 50.0)])
    assert (measured.host_bytes_per_s, measured.host_flops) == (30e9, 0.5e12)


def test_what_cores_with_amx_reach_was_measured_without_steps():
    cpu = planning.machine(cpu={"flags": ["amx_int8", "amx_tile"]}).cpu
    slow, unknown = (rates(cpu, [], 6, measurements(Bandwidth(500e9, "x", core_steps_per_s=steps), []))
                     for steps in (1e6, None))  # fmt: skip
    assert (slow.host_bytes_per_s, slow.host_flops) == (unknown.host_bytes_per_s, unknown.host_flops)
    assert slow.host_flops_source == ESTIMATED  # and does not say that it was probed


def test_plan_json_is_as_earlier_releases_wrote_it_where_no_steps_are_known():
    earlier = {"chosen": {"host_bytes_per_s": None, "host_flops": None, "probe_bytes_per_s": 1e9, "gpu_bytes_per_s": {}},
               "probe": {"bytes_per_s": 1e9, "hardware": "a box", "why": ""}}  # fmt: skip
    probe = Bandwidth(1e9, "a box")
    assert RecordedRates(ChosenRates.of(measurements(probe, [])), probe).to_json() == earlier
    probe = dataclasses.replace(probe, core_steps_per_s=5e8)
    told = RecordedRates(ChosenRates.of(measurements(probe, [])), probe).to_json()
    assert (told["probe"]["core_steps_per_s"], told["chosen"]["probe_core_steps_per_s"]) == (5e8, 5e8)
    assert ChosenRates.of(measurements(probe, [])).measurements() == measurements(probe, [])
