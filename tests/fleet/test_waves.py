"""The waves of a rollout: their sizes, and that no model with several hosts goes away as a whole."""

import random
from collections import Counter

import pytest

from llamafleet.fleet.waves import USUAL, Member, WavesError, alone, sizes, waves


def fleet(**models):
    """Hosts by the letters of the models that they serve: fleet(a="x", b="xy")."""
    return [Member(name, frozenset(letters)) for name, letters in models.items()]


def alike(count, model="x"):
    return [Member(f"h{number}", frozenset(model)) for number in range(count)]


@pytest.mark.parametrize(
    ("count", "text", "lengths"),
    [
        (1, USUAL, [1]),
        (2, USUAL, [1, 1]),
        (5, USUAL, [1, 1, 2, 1]),
        (8, USUAL, [1, 1, 4, 2]),
        (100, USUAL, [1, 24, 50, 25]),
        (10, "3", [3, 5, 2]),
        (10, "50%", [5, 5]),
        (10, "1,1,10%,100%", [1, 1, 1, 5, 2]),
    ],
)
def test_sizes_are_those_asked_for_as_far_as_half_of_a_model_s_hosts(count, text, lengths):
    made = waves(alike(count), sizes(text))
    assert [len(wave) for wave in made] == lengths
    assert sorted(name for wave in made for name in wave) == sorted(f"h{number}" for number in range(count))


def test_two_hosts_of_a_model_are_never_in_one_wave():
    hosts = fleet(a="x", b="x", c="y", d="y")
    made = waves(hosts, sizes("100%"))
    assert made == (("a", "c"), ("b", "d"))


def test_the_first_host_is_one_whose_model_others_serve_too():
    assert waves(fleet(a="x", b="y", c="yz", d="zy"), sizes("1,100%"))[0] == ("b",)


def test_hosts_without_a_model_and_with_one_of_their_own_are_rolled_out_too():
    hosts = [Member("gateway", frozenset()), *fleet(a="x", b="y")]
    assert sorted(name for wave in waves(hosts, sizes(USUAL)) for name in wave) == ["a", "b", "gateway"]
    assert list(alone(hosts)) == [("a", "x"), ("b", "y")]


@pytest.mark.parametrize("seed", range(200))
def test_of_a_model_with_several_hosts_some_always_stay(seed):
    """Any fleet, any sizes: every host once, and in no wave more than half of a model's hosts."""
    chance = random.Random(seed)
    hosts = [Member(f"h{number}", frozenset(chance.sample("uvwxyz", chance.randint(0, 3))))
             for number in range(chance.randint(1, 40))]  # fmt: skip
    made = waves(hosts, sizes(chance.choice([USUAL, "1", "100%", "5,50%", "1%,2%,3%"])))
    assert sorted(name for wave in made for name in wave) == sorted(host.name for host in hosts)
    of = {host.name: host.models for host in hosts}
    replicas = Counter(model for host in hosts for model in host.models)
    for wave in made:
        away = Counter(model for name in wave for model in of[name])
        assert all(count <= max(1, replicas[model] // 2) for model, count in away.items()), wave


def member(name, models="", gains="", loses=""):
    return Member(name, frozenset(models), frozenset(gains), frozenset(loses))


def test_hosts_that_are_done_count_as_hosts_of_their_models():
    left = fleet(c="x", d="x")
    assert waves(left, sizes("100%")) == (("c",), ("d",))
    assert waves(left, sizes("100%"), {"x": 4}) == (("c", "d"),)
    assert list(alone(fleet(a="x"), {"x": 2})) == []


def test_the_last_server_of_a_model_waits_for_those_that_will_serve_it():
    """A host whose server does not run comes first, and so does one that gets its first model."""
    assert waves([member("a", "x"), member("b", gains="x")], sizes("100%")) == (("b",), ("a",))
    assert list(alone([member("a", "x"), member("b", gains="x")])) == []


def test_what_a_wave_brings_counts_in_the_next_one_and_what_it_takes_does_not():
    brought = [member("a", gains="x"), member("b", gains="x"), member("c", gains="x"), *fleet(d="x", e="x")]
    assert waves(brought, sizes("3,100%")) == (("a", "b", "c"), ("d", "e"))
    taken = [member("a", "x", loses="x"), member("b", "x", loses="x"), *fleet(c="x", d="x")]
    assert waves(taken, sizes("2,100%")) == (("a", "b"), ("c",), ("d",))


def test_a_model_moves_after_its_successor_serves():
    assert waves([member("a", "x", loses="x"), member("b", gains="x")], sizes("100%")) == (("b",), ("a",))


def test_hosts_that_exchange_their_models_change_in_one_wave():
    """Within a run each model leaves after it serves on the other host; whoever has nothing to do with it waits."""
    exchange = [member("a", "x", "y", "x"), member("b", "y", "z", "y"), member("c", "z", "x", "z")]
    assert waves(exchange, sizes("1"))[0] == ("a", "c", "b")
    assert waves([*exchange, *fleet(d="w", e="w")], sizes("1"))[-1] == ("a", "c", "b")


@pytest.mark.parametrize("seed", range(200))
def test_with_moves_every_host_changes_once_and_a_model_goes_away_only_with_its_last_host(seed):
    chance = random.Random(seed)
    hosts = []
    for number in range(chance.randint(1, 20)):
        models, gains = (frozenset(chance.sample("uvwxyz", chance.randint(0, 2))) for _ in range(2))
        loses = frozenset(model for model in models if chance.random() < 0.3)
        hosts.append(Member(f"h{number}", models, gains - models, loses))
    made = waves(hosts, sizes(chance.choice([USUAL, "1", "100%", "3,50%"])))
    assert sorted(name for wave in made for name in wave) == sorted(host.name for host in hosts)
    of, serving = {host.name: host for host in hosts}, Counter(model for host in hosts for model in host.models)
    for wave in made:
        away = Counter(model for name in wave for model in of[name].models)
        for model, count in away.items():
            exchanged = any(model in of[name].gains for name in wave)
            assert count < serving[model] or serving[model] == 1 or exchanged, (wave, model)
        serving.update(model for name in wave for model in of[name].gains)
        serving.subtract(model for name in wave for model in of[name].loses)


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "''"), ("0", "'0'"), ("101%", "'101%'"), ("1,x", "'x'"), ("-1", "'-1'"), ("50%,25%", "25% should be more"),
     ("1.5", "'1.5'"), ("10%,10%", "10% should be more")],
)  # fmt: skip
def test_what_cannot_be_read_is_told(text, said):
    with pytest.raises(WavesError, match="--waves") as told:
        sizes(text)
    assert said in str(told.value)
