"""Which models that start on demand may be up together: each is planned for what the others of its kind leave it."""

import dataclasses
import itertools

import pytest

from llamafleet.memory.demand import Demand, fit
from llamafleet.planner.result import Plan, Refusal
from llamafleet.planner.together import beside, sentence
from tests import planning

MIB = 2**20


def demand(needs, room=10):
    return Demand({"host": needs}, {"host": room})


@pytest.mark.parametrize(
    ("needs", "sets"),
    [
        ({"a": 4, "b": 4, "c": 4}, [("b",), ("c",)]),
        ({"a": 3, "b": 3, "c": 3}, [("b", "c")]),
        ({"a": 6, "b": 4, "c": 5}, [("b",)]),
        ({"a": 7, "b": 4, "c": 5}, [()]),
        ({"a": 2, "b": 3, "c": 5, "d": 6}, [("b", "c"), ("d",)]),
    ],
)
def test_the_largest_sets_are_named(needs, sets):
    assert beside("a", {name: demand(size) for name, size in needs.items()}) == sets


def test_a_device_counts_by_itself():
    first, second = (
        Demand({"GPU0": 5, "host": 1}, {"GPU0": 8, "host": 9}),
        Demand({"GPU1": 5, "host": 1}, {"GPU1": 8, "host": 9}),
    )
    assert fit([first, second]) and not fit([first, first])


def test_sentences():
    assert sentence([("b", "c"), ("d",)]).endswith("there may be up with it b and c, or d")
    assert "no other model" in sentence([()])


def plans(*starts, ram_gib=24, gpus=(), **asked):
    settings = planning.settings(
        *({"context_tokens": 8192, "prompt_cache_mib": 0, "start": start, **asked} for start in starts)
    )
    return planning.plans(planning.machine(gpus, ram_gib=ram_gib), [("Qwen3-8B",)] * len(starts), settings)


def test_models_on_demand_share_what_those_of_the_boot_leave():
    boot, *others = plans("boot", "demand", "demand", "demand")
    assert all(isinstance(one, Plan) for one in (boot, *others))
    assert boot.demand is None
    used, capacity = boot.ledger[-1].used_bytes, boot.ledger[-1].capacity_bytes
    for one in others:
        row = one.ledger[-1]
        assert row.capacity_bytes == capacity - used, "the others of its kind take nothing"
        assert one.demand.room_bytes == {"host": row.capacity_bytes - row.reserve_bytes}
        assert one.demand.needs_bytes == {"host": row.used_bytes}
    names = [one.instance for one in others]
    fitting = [len(each) for size in (3, 2, 1) for each in itertools.combinations(others, size)
               if fit([one.demand for one in each])]  # fmt: skip
    assert fitting[0] == 2
    assert f"there may be up with it {names[1]}, or {names[2]}" in others[0].why[-1]


def test_order_does_not_give_a_model_on_demand_the_memory_of_one_of_the_boot():
    first, boot = plans("demand", "boot")
    again = plans("boot")[0]
    assert boot.ledger == again.ledger
    assert first.ledger[-1].capacity_bytes == boot.ledger[-1].capacity_bytes - boot.ledger[-1].used_bytes


def test_one_that_does_not_fit_alone_is_refused():
    boot, refused = plans("boot", "demand", ram_gib=10)
    assert isinstance(boot, Plan) and isinstance(refused, Refusal)


def test_gpus_are_shared_too():
    [one, two] = plans("demand", "demand", gpus=[12282])
    assert set(one.demand.needs_bytes) == {"GPU0", "host"}
    assert one.demand == two.demand and not fit([one.demand, two.demand])


def test_shared_memory_is_one_room():
    [plan] = plans("demand", gpus=[24564])
    ledger = [
        dataclasses.replace(row, free_bytes=free * MIB) for row, free in zip(plan.ledger, (700, 300), strict=True)
    ]
    unified = Demand.of(ledger, unified=True)
    needs = sum(row.used_bytes for row in ledger)
    assert unified == Demand({"host": needs}, {"host": needs + 300 * MIB})
