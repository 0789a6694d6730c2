"""Which instances are switched together, and which of those that leave must stay."""

import dataclasses

import pytest

from llamafleet.host.installed import Listener
from llamafleet.host.recorded import PlanRecord
from llamafleet.service.changes import changes_needed
from llamafleet.service.desired import Desired, desire
from llamafleet.service.plan_inputs import plan_inputs
from llamafleet.service.succession import Handover, handovers, kept
from tests.service.test_changes import INSTANCE
from tests.service.test_desired import RUN, reading, survey

GIB = 2**30


def installed(port, gib=1, record=True):
    """An instance that listens there, whose plan takes that much of the host's memory."""
    argv = ("/opt/llama-server", "--port", str(port))
    row = dict.fromkeys([f"{part}_bytes" for part in ("kv", "compute", "staging", "overhead")], 0)
    raw = {"schema": 1, "gate": {"context_tokens": 1, "slots": 1, "argv": list(argv)},
           "plan": {"argv": [], "ledger": [{"device": "host", "weights_bytes": gib * GIB, **row}]}}  # fmt: skip
    return dataclasses.replace(INSTANCE, argv=argv, record=PlanRecord.of(raw) if record else None)


def order(there, wanted, ram_gib=64, listeners=()):
    """The handovers of a host that has `there`, {name: instance}, and shall have `wanted`, {name: port}."""
    host = survey(machine={"ram_gib": ram_gib}, instances=there, listeners=tuple(listeners))
    models = [{"name": name, "port": port} for name, port in wanted.items()]
    desired = desire(plan_inputs(*reading(host, models=models)), RUN, lambda template, values: template)
    assert isinstance(desired, Desired), desired
    return handovers(desired, changes_needed(desired, host.installed))


def test_what_needs_no_place_of_another_is_switched_alone_and_what_leaves_goes_afterwards():
    assert order({"a": installed(1), "old": installed(9)}, {"a": 1, "b": 2}) == (Handover(("a",)), Handover(("b",)))


@pytest.mark.parametrize(
    ("there", "wanted", "together"),
    [
        ({"a": 1, "b": 2}, {"a": 2, "b": 1}, Handover(("a", "b"))),
        ({"a": 1, "b": 2}, {"a": 2, "b": 3}, Handover(("a", "b"))),
        ({"a": 1, "b": 2, "c": 3}, {"a": 2, "b": 3, "c": 1}, Handover(("a", "b", "c"))),
        ({"old": 1}, {"new": 1}, Handover(("new",), ("old",))),
        ({"old": 1, "b": 2}, {"new": 2, "b": 1}, Handover(("new", "b"), ("old",))),
        ({"a": 1, "b": 2}, {"b": 1}, Handover(("b",), ("a",))),
    ],
)
def test_what_takes_another_one_s_port_is_switched_with_it(there, wanted, together):
    assert order({name: installed(port) for name, port in there.items()}, wanted) == (together,)


def test_a_port_counts_that_the_host_says_or_that_the_record_says():
    listener = Listener("127.0.0.1", 5, 9, "llama-server", "llama-server-old.service")
    silent = dataclasses.replace(installed(1, record=False), argv=())
    assert order({"old": silent}, {"new": 5}, listeners=[listener]) == (Handover(("new",), ("old",)),)
    stopped = dataclasses.replace(installed(5), active="failed", argv=(), pid=0)
    assert order({"old": stopped}, {"new": 5}) == (Handover(("new",), ("old",)),)


def test_what_has_no_room_beside_another_one_is_switched_with_it():
    """Each of the new ones takes 6.6 GiB, and 2 are kept free."""
    assert order({"old": installed(1, gib=16)}, {"new": 2}, ram_gib=64) == (Handover(("new",)),)
    assert order({"old": installed(1, gib=16)}, {"new": 2}, ram_gib=20) == (Handover(("new",), ("old",)),)
    # It shrinks, and gives its memory to the other.
    assert order({"a": installed(1, gib=40)}, {"a": 1, "b": 2}, ram_gib=48) == (Handover(("a", "b")),)


def test_an_instance_that_leaves_and_whose_size_is_not_known_gives_its_place_first():
    unknown = installed(1, record=False)
    assert order({"old": unknown}, {"new": 2}, ram_gib=64) == (Handover(("new",), ("old",)),)


# --- over hosts -----------------------------------------------------------------------------------

A, B, C = ("a", "x"), ("b", "x"), ("c", "x")


def test_what_moved_to_a_host_that_serves_it_leaves():
    assert kept({A: [B]}, {B}, {}) == {}


def test_what_moved_to_a_host_that_failed_stays():
    assert kept({A: [B], C: []}, set(), {}) == {A: B}


def test_of_a_chain_of_handovers_all_before_the_one_that_failed_are_taken_back():
    """x goes from a to b, y from b to c, z from c to a, each in the place of another; c failed."""
    places = {("a", "x"): [("b", "x")], ("b", "y"): [("c", "y")], ("c", "z"): [("a", "z")]}
    together = {("a", "z"): frozenset([("a", "x")]), ("b", "x"): frozenset([("b", "y")])}
    passed = {("a", "z"), ("b", "x")}
    assert set(kept(places, passed, together)) == set(places)
    all_three = {**together, ("c", "y"): frozenset([("c", "z")])}
    assert kept(places, {*passed, ("c", "y")}, all_three) == {}
