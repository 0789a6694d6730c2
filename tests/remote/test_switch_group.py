"""Several instances that are switched together: they swap their ports, or one takes the place of another.

All are as before or all are new, whichever call fails, and wherever the power is cut.
"""

from __future__ import annotations

import errno
import os
import subprocess

import common
import instance_files
import pytest
import switch
import switch_back
import transaction
from switch_back import Failed

from tests.remote import switching

ONE, TWO, OLD = "one", "two", "old"
A, B, C = 1, 2, 3


@pytest.fixture
def host(memory_folder, monkeypatch):
    """A host whose instances `one` and `two` serve at ports A and B, and `old` at C."""
    switching.place(monkeypatch, memory_folder)
    systemd = switching.Systemd(monkeypatch)
    for name, port in ((ONE, A), (TWO, B), (OLD, C)):
        install(name, port)
    systemd.steps = switching.Steps(monkeypatch, memory_folder)
    return systemd


def install(name, port):
    switching.stage("0", name=name, port=port)
    switch.install([name])


def swap(version, ports=(B, A), serves=(True, True)):
    """Stage `one` and `two` at these ports; their files."""
    return {name: switching.stage(version, name=name, port=port, serves=ok)
            for name, port, ok in zip((ONE, TWO), ports, serves, strict=True)}  # fmt: skip


def installed(*names):
    return {name: instance_files.installed(name) for name in names}


def check(host, files, stopped=()):
    """These instances serve these files, with their liveness checks, and are the last good ones; those are stopped."""
    for name, wanted in files.items():
        unit, timer = common.unit_of(name), common.liveness_units(name)[1]
        assert instance_files.installed(name) == wanted, name
        assert host.running.get(name, (None,))[0] == wanted, f"{name} does not serve"
        assert instance_files.last_good(name) == wanted and name in host.watched
        assert switching.is_enabled(unit) and switching.is_enabled(timer)
    for name in stopped:
        assert name not in host.running and not switching.is_enabled(common.unit_of(name)) and name not in host.watched
        assert instance_files.damage(name, instance_files.installed(name)) is None


def test_two_swap_their_ports(host):
    new = swap("1")
    switch.install([ONE, TWO])
    check(host, {**new, **installed(OLD)})
    assert switching.leftovers() == []


def test_one_after_the_other_they_could_not(host):
    swap("1")
    with pytest.raises(Failed, match="the previous one was put back and serves"):
        switch.install([ONE])


@pytest.mark.parametrize("bad", [ONE, TWO])
def test_where_one_does_not_serve_all_go_back(host, bad):
    old = installed(ONE, TWO, OLD)
    swap("1", serves=(bad != ONE, bad != TWO))
    with pytest.raises(Failed, match=f"{common.unit_of(bad)}: health.*; the previous ones were put back and serve"):
        switch.install([ONE, TWO])
    check(host, old)
    assert switching.leftovers() == []


def test_a_successor_takes_the_port_and_the_old_one_is_stopped_with_its_files(host):
    old = installed(OLD)
    new = switching.stage("1", name="new", port=C)
    switch.install(["new"], [OLD])
    check(host, {"new": new}, stopped=[OLD])
    assert installed(OLD) == old and switching.leftovers() == []
    switch.remove(OLD, ["new"])
    assert installed(OLD) == {OLD: {}}
    check(host, {"new": new})


def test_a_successor_that_does_not_serve_gives_the_place_back(host):
    old = installed(ONE, TWO, OLD)
    switching.stage("1", name="new", port=C, serves=False)
    with pytest.raises(Failed, match=r"health.*the previous ones were put back and serve"):
        switch.install(["new"], [OLD])
    check(host, old)
    assert "new" not in host.running and not switching.is_enabled(common.unit_of("new"))


def test_a_switch_that_passed_can_be_taken_back(host):
    old = installed(ONE, OLD)
    switching.stage("1", name=ONE, port=C)
    switching.stage("1", name="new", port=A)
    switch.install([ONE, "new"], [OLD], keep=True)
    assert set(host.running) == {ONE, TWO, "new"}
    switch.undo([ONE, "new"], [OLD])
    check(host, old)
    assert installed("new") == {"new": {}} and set(host.running) == {ONE, TWO, OLD}
    assert switching.leftovers() == []


def test_a_switch_that_was_not_kept_is_not_taken_back(host):
    """Nothing says that `one` is new: it must not be removed as such."""
    switching.stage("1", name=ONE, port=C)
    switch.install([ONE], [OLD])
    now = installed(ONE, TWO)
    with pytest.raises(transaction.Lost, match="the files of one from before were not kept"):
        switch.undo([ONE], [OLD])
    check(host, now, stopped=[OLD])


# --- faults ---------------------------------------------------------------------------------------


def act(host, version):
    """What these tests do: `one` takes the place of `old`, and `two` that of `one`. The new files."""
    return {ONE: switching.stage(version, name=ONE, port=C), TWO: switching.stage(version, name=TWO, port=A)}


def again(host):
    """Back to the first state, whatever was before."""
    for name in (ONE, TWO, OLD):
        switch_back.settle(name)
    host.systemctl("stop", *(common.unit_of(name) for name in (ONE, TWO, OLD)))
    for name, port in ((ONE, A), (TWO, B), (OLD, C)):
        install(name, port)
    assert switching.leftovers() == []
    return installed(ONE, TWO, OLD)


def fails_at(host, number, code, onwards=False):
    host.steps.count = 0

    def at(count, name):
        if count >= number if onwards else count == number:
            raise switching.error(code)

    host.steps.at = at


def steps_of(host):
    act(host, "count")
    host.steps.count, host.calls = 0, []
    switch.install([ONE, TWO], [OLD])
    counted = host.steps.count, len(host.calls)
    again(host)
    return counted


def outcome(host, old, new):
    """Whether all is new; else all is old."""
    if instance_files.installed(ONE) == new[ONE]:
        for name in (ONE, TWO, OLD):
            switch_back.recover(name)
        check(host, new, stopped=[OLD])
        return True
    check(host, old)
    return False


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_a_call_that_fails_leaves_all_old_or_all_new(host, code):
    steps, _ = steps_of(host)
    assert steps > 150
    old, seen = installed(ONE, TWO, OLD), []
    for number in range(1, steps + 1, 2 if code == errno.EIO else 3):
        new = act(host, f"{code}-{number}")
        fails_at(host, number, code)
        try:
            switch.install([ONE, TWO], [OLD])
        except (Failed, OSError) as error:
            assert os.strerror(code) in str(error)
        finally:
            host.steps.at = None
        seen.append(outcome(host, old, new))
        old = again(host)
    assert seen.count(False) > 20 and seen.count(True) > 5 and seen == sorted(seen)


@pytest.mark.parametrize("onwards", [False, True], ids=["once", "from then on"])
def test_a_systemctl_that_fails_leaves_all_old_or_all_new(host, onwards):
    _, calls = steps_of(host)
    assert calls >= 12
    old = installed(ONE, TWO, OLD)
    for number in range(1, calls + 1):
        new = act(host, f"systemctl-{number}")
        host.calls = []
        host.at = lambda count, verb, number=number: count >= number if onwards else count == number
        try:
            switch.install([ONE, TWO], [OLD])
        except (Failed, OSError, subprocess.SubprocessError) as error:
            assert str(error)
        host.at = None
        if onwards:  # nothing could be started or enabled: the files are whole, and the next run does the rest
            assert installed(ONE, TWO, OLD) in (old, {**new, OLD: old[OLD]})
        else:
            outcome(host, old, new)
        old = again(host)


def boot(host):
    """What the next boot does: our recovery where it is enabled, then the services."""
    host.boot()
    for name in (ONE, TWO, OLD):
        unit = common.transient_unit("recover", name)
        if os.path.islink(f"{common.UNITS}/multi-user.target.wants/{unit}"):
            text = (common.read_file(f"{common.UNITS}/{unit}") or b"").decode()
            assert f"switch.py recover {name}\n" in text
            [before] = [line for line in text.splitlines() if line.startswith("Before=")]
            assert set(before.removeprefix("Before=").split()) == {common.unit_of(one) for one in (ONE, TWO, OLD)}
            switch_back.recover(name)
    enabled = [name for name in (ONE, TWO, OLD) if switching.is_enabled(common.unit_of(name))]
    host.start_enabled(*(name for name in enabled if name not in host.running))


def test_a_power_cut_at_any_step_ends_at_the_next_boot_with_all_old_or_all_new(host):
    """What was written is there; tests/e2e/test_11_power.py has file systems that lose what was not synced."""
    steps, _ = steps_of(host)
    old, seen = installed(ONE, TWO, OLD), []
    for number in range(1, steps + 1):
        new = act(host, f"cut-{number}")
        host.steps.count = 0

        def at(count, name, number=number):
            if count >= number:
                raise switching.PowerCut

        host.steps.at = at
        try:
            switch.install([ONE, TWO], [OLD])
        except switching.PowerCut:
            pass
        finally:
            host.steps.at = None
        boot(host)
        seen.append(outcome(host, old, new))
        old = again(host)
    assert seen.count(False) > 50 and seen.count(True) > 20 and seen == sorted(seen)
