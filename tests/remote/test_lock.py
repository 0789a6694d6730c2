"""The host's lock: two runs at once cannot meet, and a dead one does not lock a host for ever."""

import json
import os
import time

import pytest

from llamafleet.remote import lock

ONE = {"run": "one", "who": "ann@desk", "pid": 1}
TWO = {"run": "two", "who": "bob@desk", "pid": 2}


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "lock.json")


def test_first_takes_it_and_second_is_told_who_has_it(path):
    assert lock.take(ONE, path=path) is None
    assert lock.take(TWO, path=path)["who"] == "ann@desk"


def test_the_same_run_takes_it_twice(path):
    lock.take(ONE, path=path)
    assert lock.take(ONE, path=path) is None


def test_a_run_known_to_be_dead_is_taken_over(path):
    lock.take(ONE, path=path)
    assert lock.take(TWO, over="one", path=path) is None
    assert lock.read(path)["run"] == "two"


def test_only_the_named_dead_run_is_taken_over(path):
    # Between our look and our try a third run may have taken it.
    lock.take(ONE, path=path)
    assert lock.take(TWO, over="zero", path=path)["run"] == "one"


def test_a_lease_that_was_not_refreshed_ends(path):
    lock.take(ONE, path=path)
    old = time.time() - lock.LEASE_SECONDS - 1
    os.utime(path, (old, old))
    assert lock.take(TWO, path=path) is None


def test_refreshing_keeps_the_lease(path):
    lock.take(ONE, path=path)
    old = time.time() - lock.LEASE_SECONDS + 60
    os.utime(path, (old, old))
    assert lock.refresh("one", path) is None
    assert lock.read(path)["age_seconds"] < 60


def test_a_run_that_lost_the_lock_is_told(path):
    lock.take(TWO, path=path)
    assert lock.refresh("one", path)["run"] == "two"


def test_release_frees_only_ones_own(path):
    lock.take(ONE, path=path)
    lock.release("two", path)
    assert lock.read(path)["run"] == "one"
    lock.release("one", path)
    assert lock.read(path) is None


def test_a_damaged_file_is_nobodys_lock(path):
    with open(path, "w") as file:
        file.write(json.dumps(["not", "a", "holder"]))
    assert lock.take(ONE, path=path) is None
