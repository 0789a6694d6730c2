"""When a pace is slower than another: differences that are certain and not small, on a host that is as quiet as before."""

from __future__ import annotations

import math
import random

import gate_slower
import pytest

CPUS = 8
QUIET = gate_slower.QUIET_SHARE * CPUS


def pace(decode, prompt=None, others=0.0, **more):
    values = [others] * len(decode) if not isinstance(others, list) else others
    return {"key": "k", "release": "r1", "commit": "a" * 40, "driver": "", "kernel": "1", "time": 1000.0,
            "tokens": [100, 20], "prompt": prompt or [100.0] * len(decode), "decode": decode, "others": values,
            **more}  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "slower"),
    [
        ([20.0] * 5, [18.0] * 5, True),
        ([20.0] * 5, [19.2] * 5, False),  # 4 %
        ([20.0] * 5, [25.0] * 5, False),
        ([20.0, 20.1, 19.9, 20.0, 5.0], [20.0, 19.9, 20.1, 4.0, 20.0], False),  # a spike on both sides
        ([20.0, 14.0, 26.0, 17.0, 23.0], [17.0, 12.0, 22.0, 15.0, 20.0], False),  # 15 %, within the spread
        ([20.0, 14.0, 26.0, 17.0, 23.0], [5.0, 5.2, 4.8, 5.1, 4.9], True),
    ],
)
def test_slower_is_what_is_slower_by_more_than_the_spread(old, new, slower):
    assert gate_slower.slower(pace(old), pace(new), CPUS) == (["decode"] if slower else [])


def test_reading_counts_like_writing():
    assert gate_slower.slower(pace([20.0] * 5), pace([20.0] * 5, prompt=[80.0] * 5), CPUS) == ["prompt"]


@pytest.mark.parametrize("others", [QUIET + 0.1, None])
def test_where_others_compute_or_may_do_so_a_small_difference_does_not_count(others):
    old, new = pace([20.0] * 5), pace([16.0] * 5)
    assert gate_slower.slower(old, new, CPUS) == ["decode"]
    for one, two in ((pace([20.0] * 5, others=others), new), (old, pace([16.0] * 5, others=others))):
        assert gate_slower.slower(one, two, CPUS) == []
        assert gate_slower.slower({**one, "decode": [40.0] * 5}, two, CPUS) == ["decode"]


def test_others_may_compute_as_much_as_beside_the_old_server_or_a_little():
    assert gate_slower.most_others(None, CPUS) == math.inf
    assert gate_slower.most_others(pace([1.0] * 3, others=None), CPUS) == math.inf
    assert gate_slower.most_others(pace([1.0] * 3, others=[0.0, 0.01, 2.0]), CPUS) == QUIET
    assert gate_slower.most_others(pace([1.0] * 3, others=[1.0, 3.0, 2.0]), CPUS) == 2.0


@pytest.mark.parametrize(
    ("more", "pair"),
    [({}, True), ({"kernel": "2"}, False), ({"driver": "570"}, False), ({"key": "other flags"}, False),
     ({"release": "r1"}, False), ({"time": 9000.0}, False), ({"time": 500.0}, False)],
)  # fmt: skip
def test_only_what_was_measured_in_one_switch_is_a_pair(more, pair):
    assert gate_slower.is_pair(pace([1.0]), pace([1.0], **{"release": "r2", "time": 1100.0, **more})) is pair


def speeds(chance, true, noise, count=8):
    """Of a host with noise of this share, and now and then something that takes half the speed."""
    return [true * math.exp(chance.gauss(0, noise)) * (0.5 if chance.random() < 0.1 else 1.0) for _ in range(count)]


def alarms(chance, noise, ratio, runs):
    """In how many switches of so many the new build fails: it is slower in each of three rounds."""
    found = 0
    for _ in range(runs):
        old = pace(speeds(chance, 50.0, noise), speeds(chance, 500.0, noise))
        found += all(
            gate_slower.slower(old, pace(speeds(chance, 50.0 * ratio, noise), speeds(chance, 500.0, noise)), CPUS)
            for _ in range(3)
        )
    return found


@pytest.mark.parametrize("noise", [0.01, 0.03, 0.1])
def test_a_build_of_the_same_speed_hardly_ever_fails_and_one_of_half_the_speed_does(noise):
    chance = random.Random(3)
    assert alarms(chance, noise, 1.0, 2000) <= 10  # 0.5 %
    assert alarms(chance, noise, 0.5, 200) >= 190
