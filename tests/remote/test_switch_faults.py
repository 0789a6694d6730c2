"""A switch in which a call of the file system, or systemctl, fails: each call once, and from each call on.

Before the gate's yes the old service serves, whole, and the first cause is named; afterwards the new one does.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess

import instance_files
import pytest
import starting
import switch
from switch_back import Failed

from tests.remote import switching
from tests.remote.switching import NAME, TIMER, UNIT


@pytest.fixture
def host(memory_folder, monkeypatch):
    """A host that serves version 1, with its liveness check; the steps are counted from here on."""
    switching.place(monkeypatch, memory_folder)
    systemd = switching.Systemd(monkeypatch)
    switching.stage("one")
    switch.install([NAME])
    systemd.steps = switching.Steps(monkeypatch, memory_folder)
    return systemd


def steps_of(host, act):
    """How many steps and calls of systemctl something takes."""
    host.steps.count, host.calls = 0, []
    act()
    return host.steps.count, len(host.calls)


def fails_at(host, number, code, onwards=False, changing=()):
    """Let this step fail, and with `onwards` all later ones; of `changing` calls alone, where some are named."""
    host.steps.count = 0

    def at(count, name):
        if (count >= number if onwards else count == number) and (not changing or name in changing):
            raise switching.error(code)

    host.steps.at = at


def heal(host):
    host.steps.at = host.at = None


def check_old(host, old):
    assert instance_files.installed(NAME) == old == host.serving
    assert instance_files.last_good(NAME) == old
    assert switching.is_enabled(UNIT) and switching.is_enabled(TIMER) and host.watching


def check_new(host, new):
    """Whole, at the latest after `recover`, which the job's unit runs at its end."""
    assert instance_files.installed(NAME) == new == host.serving
    switch.recover(NAME)
    assert instance_files.last_good(NAME) == new
    assert switching.is_enabled(UNIT) and switching.is_enabled(TIMER) and host.watching


def install(host, new):
    """The error of an installation, None where it succeeded."""
    try:
        switch.install([NAME])
    except (Failed, OSError, subprocess.SubprocessError) as error:
        return str(error)
    finally:
        heal(host)
    assert instance_files.installed(NAME) == new
    return None


def next_run(host, version):
    """Whatever was before, it ends with the wanted service and nothing else."""
    new = switching.stage(version)
    switch.install([NAME])
    check_new(host, new)
    assert switching.leftovers() == []


@pytest.mark.parametrize("code", switching.ERRORS, ids=errno.errorcode.get)
def test_a_call_that_fails_leaves_the_old_service_or_the_new_one(host, code):
    switching.stage("two")
    steps, _ = steps_of(host, lambda: switch.install([NAME]))
    assert steps > 60
    seen = {"old": 0, "new": 0}
    for number in range(1, steps + 1):
        old = instance_files.installed(NAME)
        new = switching.stage(f"{code}-{number}")
        fails_at(host, number, code)
        said = install(host, new)
        if instance_files.installed(NAME) == old:
            assert said is not None and os.strerror(code) in said
            check_old(host, old)
            seen["old"] += 1
        else:
            check_new(host, new)
            seen["new"] += 1
        next_run(host, f"{code}-{number}-again")
    assert seen["old"] > 30 and seen["new"] > 5


def test_a_disk_that_is_full_from_any_call_on_leaves_the_old_service(host):
    """Renaming and removing still work on it."""
    switching.stage("two")
    steps, _ = steps_of(host, lambda: switch.install([NAME]))
    refused = 0
    for number in range(1, steps + 1):
        old = instance_files.installed(NAME)
        new = switching.stage(f"full-{number}")
        fails_at(host, number, errno.ENOSPC, onwards=True, changing=("open", "write", "mkdir", "symlink"))
        said = install(host, new)
        if said is not None:
            refused += 1
            assert "No space left on device" in said
            check_old(host, old)
        else:
            check_new(host, new)
        next_run(host, f"full-{number}-again")
    assert refused > 20


def test_a_disk_that_is_read_only_from_any_call_on_is_mended_once_it_can_be_written(host):
    switching.stage("two")
    steps, _ = steps_of(host, lambda: switch.install([NAME]))
    refused = 0
    for number in range(1, steps + 1):
        old = instance_files.installed(NAME)
        new = switching.stage(f"ro-{number}")
        fails_at(host, number, errno.EROFS, onwards=True)
        said = install(host, new)
        switch.recover(NAME)
        if instance_files.installed(NAME) == old:
            refused += 1
            assert said is not None and "Read-only file system" in said
            check_old(host, old)
        else:
            check_new(host, new)
        next_run(host, f"ro-{number}-again")
    assert refused > 20


@pytest.mark.parametrize("onwards", [False, True], ids=["once", "from then on"])
def test_a_systemctl_that_fails_leads_back(host, onwards):
    switching.stage("two")
    _, calls = steps_of(host, lambda: switch.install([NAME]))
    assert calls >= 6
    named = 0
    for number in range(1, calls + 1):
        old = instance_files.installed(NAME)
        new = switching.stage(f"systemctl-{number}")
        host.calls = []
        host.at = lambda count, verb, number=number: count >= number if onwards else count == number
        said = install(host, new)
        if instance_files.installed(NAME) == old:
            assert said is not None
            named += "returned non-zero exit status 1" in said
            switch.recover(NAME)
            if not onwards:
                check_old(host, old)
        else:
            host.start(UNIT) if host.serving is None else None
            check_new(host, new)
        next_run(host, f"systemctl-{number}-again")
    assert named >= 4


def test_a_first_installation_that_fails_leaves_nothing_that_serves(host):
    switch.remove(NAME)
    switching.stage("first")
    steps, _ = steps_of(host, lambda: switch.install([NAME]))
    for number in range(1, steps + 1):
        switch.remove(NAME)
        assert instance_files.installed(NAME) == {}
        new = switching.stage("first")
        fails_at(host, number, errno.EIO)
        said = install(host, new)
        if said is not None and instance_files.last_good(NAME) is None:
            assert os.strerror(errno.EIO) in said
            assert host.serving is None and not switching.is_enabled(UNIT)
            left = instance_files.installed(NAME)
            assert left == {} or UNIT in left  # without its unit nothing stays, above all no keys
        next_run(host, "first")


@pytest.mark.parametrize("code", switching.ERRORS, ids=errno.errorcode.get)
def test_a_refresh_that_fails_never_touches_the_server(host, code):
    def refresh(version):
        new = switching.stage(version, serves=False)  # which nobody asks
        os.unlink(f"{switch.common.STAGED}/{NAME}/api-keys")
        return new

    refresh("two")
    steps, _ = steps_of(host, lambda: switch.refresh(NAME))
    starts, keys = host.starts, instance_files.installed(NAME)["api-keys"]
    for number in range(1, steps + 1):
        old = instance_files.installed(NAME)
        new = {**refresh(f"{code}-{number}"), "api-keys": keys}
        fails_at(host, number, code)
        try:
            switch.refresh(NAME)
        except (Failed, OSError) as error:
            assert os.strerror(code) in str(error)
        finally:
            heal(host)
        switch.recover(NAME)
        assert instance_files.installed(NAME) in (old, new)
        assert instance_files.last_good(NAME) == instance_files.installed(NAME)
        assert host.starts == starts and host.watching and switching.is_enabled(TIMER)
        assert switching.leftovers() == []


# --- what a switch and a refresh do beside the files ----------------------------------------------


def drop_in(unit, name):
    folder = f"{switch.common.UNITS}/{unit}.d"
    os.makedirs(folder, exist_ok=True)
    path = f"{folder}/{name}"
    with open(path, "w") as file:
        file.write("[Service]\n")
    return path


@pytest.mark.parametrize("verb", ["install", "refresh"])
def test_drop_ins_go_but_for_those_that_the_plan_allows(host, verb):
    ours, allowed, timers = drop_in(UNIT, "port.conf"), drop_in(UNIT, "nice.conf"), drop_in(TIMER, "x.conf")
    staged = switching.stage("two")
    plan = staged["plan.json"].replace(b"{", b'{"allowed_drop_ins": ["nice.conf", "x.conf"], ', 1)
    with open(f"{switch.common.STAGED}/{NAME}/plan.json", "wb") as file:
        file.write(plan)
    switch.act(switch.parsed([verb, NAME]))
    assert not os.path.exists(ours) and os.path.exists(allowed)
    assert not os.path.exists(os.path.dirname(timers))


def test_a_disabled_unit_is_enabled_while_it_runs(host):
    host.link(UNIT, False)
    starts = host.starts
    switching.stage("two")
    switch.refresh(NAME)
    assert switching.is_enabled(UNIT) and host.starts == starts


@pytest.mark.parametrize("passes", [True, False])
def test_without_good_files_a_refresh_asks_the_running_server(host, monkeypatch, passes):
    shutil.rmtree(f"{switch.common.GOOD}/{NAME}")
    starts, asked = host.starts, []
    monkeypatch.setattr(
        starting, "gate", lambda name, *options: (asked.append(name), None if passes else "speed: slow")[1]
    )
    old, new = instance_files.installed(NAME), switching.stage("two")
    if passes:
        switch.refresh(NAME)
        assert instance_files.last_good(NAME) == new
    else:
        with pytest.raises(
            Failed, match="does not pass the gate: speed: slow; the previous one was put back and serves on"
        ):
            switch.refresh(NAME)
        assert instance_files.installed(NAME) == old and instance_files.last_good(NAME) is None
    assert asked == [NAME] and host.starts == starts and switching.leftovers() == []


@pytest.mark.parametrize("file", ["plan.json", UNIT, TIMER, "api-keys"])
def test_a_folder_in_a_file_s_place_makes_way(host, file):
    path, _ = instance_files.places(NAME)[file]
    os.unlink(path)
    os.mkdir(path)
    new = switching.stage("two")
    switch.install([NAME])
    assert instance_files.installed(NAME) == new == instance_files.last_good(NAME)
