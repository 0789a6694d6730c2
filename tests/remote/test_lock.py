"""The host's lock: who gets it, who is told, and that it cannot be lost but by its holder's silence."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llamafleet.remote import lock

ONE = {"run": "one", "who": "ann@desk", "machine": "desk", "pid": 1}
TWO = {"run": "two", "who": "bob@desk", "machine": "desk", "pid": 2}
PROGRAM = Path(lock.__file__)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "lock.json")


@pytest.fixture
def clock(monkeypatch):
    """The clock of the boot, at 1000 s, and the boot; both can be set."""

    class Clock:
        seconds, boot = 1000.0, "boot-a"

    monkeypatch.setattr(lock, "now", lambda: Clock.seconds)
    monkeypatch.setattr(lock, "boot", lambda: Clock.boot)
    return Clock


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


def test_a_lease_that_was_not_refreshed_ends(path, clock):
    lock.take(ONE, path=path)
    clock.seconds += lock.LEASE_SECONDS - 1
    assert lock.take(TWO, path=path)["age_seconds"] == lock.LEASE_SECONDS - 1
    clock.seconds += 2
    assert lock.take(TWO, path=path) is None


def test_refreshing_keeps_the_lease(path, clock):
    lock.take(ONE, path=path)
    for _ in range(5):
        clock.seconds += lock.LEASE_SECONDS - 1
        assert lock.refresh("one", path) is None
        assert lock.read(path)["age_seconds"] == 0
    assert lock.read(path)["who"] == "ann@desk"


def test_an_ended_lease_is_kept_by_its_holder_where_nobody_took_it(path, clock):
    """A laptop that slept: nothing was changed on the host meanwhile."""
    lock.take(ONE, path=path)
    clock.seconds += 10 * lock.LEASE_SECONDS
    assert lock.read(path) is None
    assert lock.refresh("one", path) is None
    assert lock.read(path)["run"] == "one"


def test_an_ended_lease_that_another_run_had_meanwhile_is_lost(path, clock):
    lock.take(ONE, path=path)
    clock.seconds += 10 * lock.LEASE_SECONDS
    lock.take(TWO, path=path)
    assert lock.refresh("one", path)["run"] == "two"
    lock.release("two", path)
    assert lock.refresh("one", path)["who"] == "nobody: the lock was lost"


@pytest.mark.parametrize("jump", [-(10**7), -3600, 3600, 10**7])
def test_no_change_of_the_time_of_day_ends_a_lease_or_makes_it_longer(path, clock, jump):
    lock.take(ONE, path=path)
    os.utime(path, (time.time() - jump, time.time() - jump))  # as if the clock had jumped since
    assert lock.take(TWO, path=path)["run"] == "one"
    clock.seconds += lock.LEASE_SECONDS + 1
    assert lock.take(TWO, path=path) is None


def test_a_lock_of_another_boot_is_nobody_s(path, clock):
    lock.take(ONE, path=path)
    clock.boot = "boot-b"
    assert lock.read(path) is None
    assert lock.take(TWO, path=path) is None


@pytest.mark.parametrize(
    ("asked", "lease"), [(6, 6), (0, 1), (-5, 1), (10**9, 900), ("6", 900), (None, 900), (True, 900)]
)
def test_a_holder_s_lease_has_bounds(path, clock, asked, lease):
    lock.take({**ONE, "lease_seconds": asked}, path=path)
    clock.seconds += lease - 0.5
    assert lock.read(path)["run"] == "one"
    clock.seconds += 1
    assert lock.read(path) is None


def early(path, age):
    """A lock as llamafleet 0.1.0 wrote it."""
    Path(path).write_text(json.dumps(ONE))
    os.utime(path, (time.time() - age, time.time() - age))


@pytest.mark.parametrize(("age", "held"), [(0, True), (800, True), (-800, True), (1000, False), (-1000, False)])
def test_a_lock_of_the_earlier_form_has_the_age_of_its_file(path, age, held):
    early(path, age)
    other = lock.take(TWO, path=path)
    assert (other is not None) == held
    if held:
        assert other["run"] == "one" and abs(other["age_seconds"] - abs(age)) < 5


def test_the_earlier_version_sees_a_refreshed_lock_as_held(path):
    """It takes the age of the file."""
    lock.take(ONE, path=path)
    os.utime(path, (time.time() - 800, time.time() - 800))
    assert lock.refresh("one", path) is None
    assert time.time() - os.stat(path).st_mtime < 5
    assert json.loads(Path(path).read_text())["run"] == "one"


def test_a_run_that_lost_the_lock_is_told(path):
    lock.take(TWO, path=path)
    assert lock.refresh("one", path)["run"] == "two"


def test_release_frees_only_ones_own(path):
    lock.take(ONE, path=path)
    lock.release("two", path)
    assert lock.read(path)["run"] == "one"
    lock.release("one", path)
    assert lock.read(path) is None


@pytest.mark.parametrize("text", ['["not", "a", "holder"]', '{"run": 5}', '{"run": null}', "", "{", '{"who": "x"}'])
def test_a_damaged_file_is_nobodys_lock(path, text):
    Path(path).write_text(text)
    assert lock.refresh("one", path)["who"] == "nobody: the lock was lost"
    assert lock.take(ONE, path=path) is None


@pytest.mark.parametrize("refreshed", ["soon", None, [], True])
def test_a_damaged_time_is_read_as_the_earlier_form(path, refreshed):
    Path(path).write_text(json.dumps({**ONE, "refreshed_seconds": refreshed, "host_boot": lock.boot()}))
    assert lock.read(path)["run"] == "one"


def test_of_eight_at_once_one_gets_it(tmp_path):
    """The program itself, each a process of its own."""
    code = (
        f"import sys; sys.path.insert(0, {str(PROGRAM.parent)!r}); import lock; lock.PATH = {str(tmp_path)!r} + '/l';"
        "d = lock.take.__defaults__; lock.take.__defaults__ = (d[0], lock.PATH); sys.exit(lock.main(sys.argv[1:]))"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code, "take", json.dumps({**ONE, "run": str(number)})],
                         stdout=subprocess.PIPE, text=True)
        for number in range(8)
    ]  # fmt: skip
    told = [process.communicate()[0] for process in started]
    assert sorted(process.returncode for process in started) == [0, *[1] * 7]
    winner = str(next(number for number, process in enumerate(started) if process.returncode == 0))
    # The others ask after it has the lock, and are told its name.
    assert {json.loads(text)["run"] for text in told if text} == {winner}
