"""The locks that a run holds: refreshed while it lives, whatever it does meanwhile; leases of a second here. The lock's
own program runs, on files of this machine."""

import json
import types

import gevent
import pytest

from llamafleet.remote import lock
from tasks.lib import host_lock, jobs, remote, sending
from tasks.lib.this_run import this_run

LEASE = 1.0


class Host:
    """A host with a lock file of its own. `away` is raised by what runs there."""

    def __init__(self, folder, name):
        self.path, self.name, self.lines = str(folder / f"{name}.json"), name, []
        self.away, self.connected, self.print_prefix, self.refreshed = None, True, f"[{name}] ", 0

    def log(self, text, *_):
        self.lines.append(text)

    log_styled = lambda self, text, **_: self.log(text)  # noqa: E731

    @property
    def holder(self):
        return lock.read(self.path)


@pytest.fixture
def state():
    handlers = []
    return types.SimpleNamespace(callback_handlers=handlers, add_callback_handler=handlers.append)


@pytest.fixture
def host(tmp_path, monkeypatch):
    monkeypatch.setattr(host_lock, "LEASE_SECONDS", LEASE)
    monkeypatch.setattr(host_lock, "_held", {})

    def run_helper(host, name, verb, what, *over, **_):
        if host.away:
            raise host.away
        if verb == "take":
            other = lock.take(json.loads(what), over[1] if over else None, host.path)
            last = None if other else lock.last_run(host.path)
        elif verb == "refresh":
            host.refreshed += 1
            other, last = lock.refresh(what, host.path), None
        else:
            other, last = lock.release(what, host.path), None
        return not other, [json.dumps(other or last)] if other or last else [], []

    monkeypatch.setattr(sending, "run_helper", run_helper)
    monkeypatch.setattr(remote, "connect_again", lambda host: None)
    yield Host(tmp_path, "box1")
    for held in host_lock._held.values():
        held.ended.set()


def test_the_lease_is_as_long_as_the_host_s():
    assert host_lock.LEASE_SECONDS == lock.LEASE_SECONDS == 900


def test_a_lock_outlives_many_leases_while_the_run_does_something_else(host, state):
    """pyinfra waits for another host: nothing of this one's runs."""
    host_lock.take(state, host)
    for _ in range(6):
        gevent.sleep(LEASE / 2)
        assert host.holder["run"] == this_run()["run"]
        assert host.holder["age_seconds"] < LEASE / 2
    host_lock.check(host)


def test_a_released_lock_is_not_refreshed_any_more(host, state):
    host_lock.take(state, host)
    host_lock.release(host)
    assert host.holder is None
    lock.take({"run": "other", "who": "bob@desk"}, path=host.path)
    gevent.sleep(LEASE / 2)
    assert host.refreshed == 0 and host.holder["run"] == "other"


def test_the_second_run_is_told_who_the_first_is(host, state):
    lock.take({"run": "other", "who": "bob@desk", "machine": "desk", "pid": 1, "began": "noon"}, path=host.path)
    with pytest.raises(remote.RemoteError, match=r"bob@desk \(pid 1\) is deploying to this host since noon"):
        host_lock.take(state, host)
    assert not host_lock.is_held(host)


def test_a_dead_run_of_this_machine_is_taken_over(host, state):
    dead = {**this_run(), "run": "other", "pid_began": 0.0}
    lock.take(dead, path=host.path)
    host_lock.take(state, host)
    assert host.holder["run"] == this_run()["run"]


def test_who_had_the_lock_before_is_known(host, state):
    assert host_lock.take(state, host) is None
    host_lock.release(host)
    assert host_lock.take(state, host).who == this_run()["who"]


def test_a_host_that_is_away_for_less_than_a_lease_keeps_its_lock(host, state):
    host_lock.take(state, host)
    host.away = remote.NoAnswerError("silent")
    gevent.sleep(LEASE * 0.7)
    host.away = None
    gevent.sleep(LEASE * 0.7)
    assert host.holder["run"] == this_run()["run"]
    host_lock.check(host)


def test_a_lock_that_another_run_took_fails_the_host_before_its_next_change(host, state):
    host_lock.take(state, host)
    host.away = remote.LostError("away")
    gevent.sleep(LEASE * 1.2)
    assert lock.take({"run": "other", "who": "bob@desk"}, path=host.path) is None
    host.away = None
    with pytest.raises(remote.RemoteError, match="lost the host's lock to bob@desk"):
        jobs.hold(state, host)
    host_lock.release(host)
    assert host.holder["run"] == "other"


def test_a_machine_that_slept_asks_before_the_next_change(host, state, monkeypatch):
    """Its refreshing had stopped as well; the lease has ended, and nobody has taken the lock."""
    monkeypatch.setattr(host_lock, "_keep", lambda *_: None)
    host_lock.take(state, host)
    gevent.sleep(LEASE * 1.2)
    assert host.holder is None
    host_lock.check(host)
    assert host.holder["run"] == this_run()["run"]


@pytest.mark.parametrize("callback", ["operation_host_error", "host_disconnect"])
def test_a_host_that_fails_and_a_run_that_ends_release_it_at_once(host, state, callback):
    host_lock.take(state, host)
    [handler] = state.callback_handlers
    getattr(handler, callback)(state, host, *([""] if callback == "operation_host_error" else []))
    assert host.holder is None and not host_lock.is_held(host)


def test_while_a_job_goes_on_without_us_its_host_stays_locked(host, state):
    host_lock.take(state, host)
    host_lock.working(host, "build-1")
    state.callback_handlers[0].host_disconnect(state, host)
    assert host.holder["run"] == this_run()["run"] and "build-1 goes on there" in host.lines[0]
    gevent.sleep(LEASE * 1.2)
    assert host.holder is None


def test_a_lock_that_cannot_be_released_ends_no_run(host, state):
    host_lock.take(state, host)
    host.away = ValueError("odd")
    state.callback_handlers[0].host_disconnect(state, host)
    assert "could not be released (ValueError: odd); it expires by itself" in host.lines[0]


def test_a_host_that_is_gone_does_not_keep_a_run_from_ending(host, state, monkeypatch):
    monkeypatch.setattr(host_lock, "RELEASE_SECONDS", 0.2)
    host_lock.take(state, host)
    monkeypatch.setattr(sending, "run_helper", lambda *_, **__: gevent.sleep(60))
    state.callback_handlers[0].host_disconnect(state, host)
    assert "the host does not answer); it expires by itself" in host.lines[0]


def test_before_a_change_the_lock_is_taken_and_what_was_decided_looked_at(host, state, monkeypatch):
    looked = []
    monkeypatch.setattr(jobs.decision, "check_unchanged", lambda host, last: looked.append(host.holder["run"]))
    assert jobs.hold(state, host) and jobs.hold(state, host)
    assert looked == [this_run()["run"]]  # once, under the lock


def test_a_host_that_changed_meanwhile_is_released_again(host, state, monkeypatch):
    def changed(host, last):
        raise remote.RemoteError("somebody changed it")

    monkeypatch.setattr(jobs.decision, "check_unchanged", changed)
    with pytest.raises(remote.RemoteError, match="somebody changed it"):
        jobs.hold(state, host)
    assert host.holder is None
