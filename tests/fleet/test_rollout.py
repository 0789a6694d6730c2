"""Which hosts a rollout changes, by what was read of them, and what it says."""

import dataclasses

import pytest

from llamafleet.fleet.rollout import End, HostState, Rollout
from llamafleet.fleet.waves import USUAL, Member, sizes
from llamafleet.service.changes import Changes
from tests.service.test_changes import INSTANCE
from tests.service.test_desired import decided

NOTHING = Changes(helpers=False, user=False, packages=(), toolkit=False, build=False, models={}, services={}, refreshed={},
                  liveness={}, removed=(), current=False, paths={})  # fmt: skip


def state(wanted=("x",), installed=("x",), active="active", changes=NOTHING, names=None, **settings):
    """A host that has instances of these names installed, and is to have others; `names`: the models of its data."""
    instances = {one: dataclasses.replace(INSTANCE, active=active, record=None) for one in installed}
    desired = decided(models=[{"name": one, "port": 9000 + number} for number, one in enumerate(wanted)], **settings)
    there = dataclasses.replace(desired.installed, instances=instances)
    read = dataclasses.replace(desired.inputs, survey=dataclasses.replace(desired.inputs.survey, installed=there))
    return HostState.of("h", dataclasses.replace(desired, inputs=read), changes, names or wanted)


def changed(**parts):
    return dataclasses.replace(NOTHING, **parts)


def test_a_host_as_planned_has_nothing_to_do():
    one = state()
    assert (one.serving, one.to_do, one.member) == ({"x"}, (), Member("h", frozenset()))


def test_what_is_replaced_is_away_and_what_is_new_is_gained():
    one = state(("x", "y"), ("x",), changes=changed(services={"x": ("its build differs",), "y": ("it is missing",)}))
    assert one.member == Member("h", frozenset("x"), frozenset("y"))
    assert one.to_do == ("serve x: its build differs", "serve y: it is missing")


def test_a_server_that_does_not_run_is_missed_by_nobody():
    one = state(active="failed", changes=changed(services={"x": ("it is failed",)}))
    assert (one.serving, one.member) == (frozenset(), Member("h", frozenset(), frozenset("x")))


def test_what_changes_beside_the_servers_takes_none_away():
    one = state(changes=changed(helpers=True, liveness={"x": ("its timer is off",)}))
    assert one.member.models == frozenset() and len(one.to_do) == 2


def test_what_is_removed_is_lost():
    one = state(("y",), ("x", "y"), changes=changed(removed=("x",)))
    assert one.member == Member("h", frozenset("x"), frozenset(), frozenset("x"))
    assert one.to_do == ("remove x, which models no longer has",)


def test_what_is_measured_is_to_do_and_may_take_its_server_away():
    """What serves, and may not be stopped, is not measured."""
    tuned = state(tune="missing", tune_stops_service=True, tune_minutes=7)
    assert tuned.to_do == ("measure x: it was not measured yet; for 7 minutes at most, its service stopped",)
    assert tuned.member == Member("h", frozenset("x"))
    assert state(tune="missing").to_do == state(tune_stops_service=True).to_do == ()


def test_copies_are_their_model_and_one_copy_less_loses_none():
    one = state(("x",), ("x-1", "x-2"), changes=changed(services={"x-1": ("its build differs",)}), names=("x",))
    assert one.member == Member("h", frozenset("x"))
    fewer = state(("x-1",), ("x-1", "x-2"), changes=changed(removed=("x-2",)), names=("x",))
    assert fewer.member == Member("h", frozenset())


def test_a_server_on_demand_serves_by_its_socket():
    demand = {"demand_sha256": {"a.socket": "a" * 64}, "active": "inactive"}
    assert dataclasses.replace(INSTANCE, **demand, socket="active").serves
    assert not dataclasses.replace(INSTANCE, **demand, socket="failed").serves


def host(models="x", gains="", to_do=("serve x: its build differs",)):
    return lambda name: HostState(frozenset(models), Member(name, frozenset(models), frozenset(gains)), tuple(to_do))


def rollout(**hosts):
    return Rollout.of({name: make(name) for name, make in hosts.items()}, sizes(USUAL))


def test_hosts_that_are_as_planned_count_as_hosts_of_their_models():
    """So both that are left may go together after the two that are done."""
    one = rollout(a=host(to_do=()), b=host(to_do=()), c=host(), d=host())
    assert one.waves == (("c",), ("d",)) and one.alone == ()
    assert Rollout.of({name: host()(name) for name in "cd"} | {name: host(to_do=())(name) for name in "ab"},
                      sizes("100%")).waves == (("c", "d"),)  # fmt: skip


def test_a_model_of_one_host_is_told():
    one = rollout(a=host("x"), b=host("y"))
    assert [line for line in one.lines() if line.startswith("note:")] == [
        "note: x is served by a alone: it is away while a switches",
        "note: y is served by b alone: it is away while b switches",
    ]
    assert one.to_json()["alone"] == [{"host": "a", "model": "x"}, {"host": "b", "model": "y"}]


def test_a_host_s_text_is_one_line():
    one = rollout(a=host(to_do=("serve x: evil\nwave 2 of 2: z\x1b[2J",)))
    assert len(list(one.lines())) == 3 and all("\n" not in line and "\x1b" not in line for line in one.lines())
    [_, failed, *_] = End(one, 1, {"a": "bad\nrolled out: a"}).lines("again")
    assert failed == "    a failed: bad\\nrolled out: a"


@pytest.mark.parametrize(
    ("was_executed", "done", "untouched"), [(True, ("a", "b"), ("d",)), (False, ("a",), ("b", "d"))]
)
def test_what_is_done_and_not_touched_after_a_failure(was_executed, done, untouched):
    one = Rollout((("a",), ("b", "c"), ("d",)), dict.fromkeys("abcd", ("x",)), (), ())
    end = End(one, 2, {"c": "the gate"}, was_executed)
    assert (end.done, end.untouched) == (done, untouched)
    assert end.to_json()["failed"] == {"c": "the gate"}
