"""A host's rates from its own measurements: the survey's probe, and the gates of other models."""

import pytest

from llamafleet.host.learned import Bandwidth, Expected, MeasuredSpeeds, measurements
from llamafleet.host.speeds import ESTIMATED, MEASURED, PROBED, rates
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
