"""Power cuts in a switch and in an installation of helpers, on real file systems, after every single step.

The programs' own code works on ext4 and XFS in a loop device; the file system's shutdown ioctl, without a flush of its
log, is the power cut: what was not synced is lost. systemd and the gate are stand-ins. After the next mount comes what
the next boot does, then the next run.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import random
import struct
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import common
import helpers
import instance_files
import pytest
import switch

from tests.e2e import deploying
from tests.remote import switching
from tests.remote.switching import NAME, TIMER, UNIT, PowerCut

SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN, XFS_IOC_GOINGDOWN: _IOR('X', 125, __u32)
NO_LOG_FLUSH = 2
CLONE_NEWNS = 0x00020000
# The smallest that each makes, MiB.
KINDS = {"ext4": (32, ["mkfs.ext4", "-q", "-F"]), "xfs": (300, ["mkfs.xfs", "-q", "-f"])}


libc = ctypes.CDLL(None, use_errno=True)


def done(result):
    """Of a function of libc's."""
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class Disk:
    """A file system in a file, mounted in a folder."""

    def __init__(self, kind, image, folder):
        mebibytes, make = KINDS[kind]
        self.kind, self.folder = kind, folder
        with open(image, "wb") as file:
            file.truncate(mebibytes << 20)
        subprocess.run([*make, image], check=True)
        self.device = subprocess.check_output(["losetup", "--find", "--show", image], text=True).strip()
        self.mount()

    def mount(self):
        done(libc.mount(self.device.encode(), self.folder.encode(), self.kind.encode(), 0, None))

    def unmount(self):
        done(libc.umount2(self.folder.encode(), 0))

    def close(self):
        self.unmount()
        subprocess.run(["losetup", "--detach", self.device], check=True)

    def cut(self):
        """Everything that is not on the disk is lost."""
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.ioctl(folder, SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        finally:
            os.close(folder)

    def again(self):
        self.unmount()
        self.mount()


@contextlib.contextmanager
def own_mounts():
    """A mount namespace of our own: one that is made beside us would keep what we unmount, and its damage."""
    folder = os.getcwd()
    before = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY)
    try:
        done(libc.unshare(CLONE_NEWNS))
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        yield
    finally:
        done(libc.setns(before, CLONE_NEWNS))
        os.close(before)
        os.chdir(folder)


@pytest.fixture(params=["ext4", pytest.param("xfs", marks=pytest.mark.long)])
def disk(request):
    if os.geteuid() != 0:
        pytest.skip("file systems are mounted by root")
    where = "/dev/shm" if os.path.isdir("/dev/shm") else None  # in memory: it is synced some thousand times
    with tempfile.TemporaryDirectory(dir=where) as folder:
        Path(folder, "mnt").mkdir()
        with own_mounts():
            one = Disk(request.param, f"{folder}/image", f"{folder}/mnt")
            try:
                yield one
            finally:
                one.close()


@pytest.fixture
def host(disk, monkeypatch):
    """Our folders on that disk; the steps are counted."""
    switching.place(monkeypatch, disk.folder)
    os.sync()
    systemd = switching.Systemd(monkeypatch)
    systemd.steps = switching.Steps(monkeypatch, disk.folder)
    return systemd


def cut_at(host, disk, number, act):
    """Act up to this step and lose power there. Whether it came that far."""

    def at(count, name):
        if count == number:
            disk.cut()
            raise PowerCut

    host.steps.count, host.steps.at = 0, at
    try:
        with contextlib.suppress(PowerCut):
            act()
    finally:
        host.steps.at = None
    disk.again()
    return host.steps.count >= number


def boot(host):
    """What the next boot does: our recovery where it is enabled, then the services."""
    host.boot()
    check_keys()
    unit = common.transient_unit("recover", NAME)
    if os.path.islink(f"{common.UNITS}/multi-user.target.wants/{unit}"):
        text = (common.read_file(f"{common.UNITS}/{unit}") or b"").decode()
        assert f"switch.py recover {NAME}\n" in text and "\0" not in text, "the unit that leads back is not whole"
        switch.recover(NAME)
    check_keys()
    host.start_enabled()


def check_keys():
    """Whatever else is: no installed unit may start without the keys that it should have."""
    files = instance_files.installed(NAME)
    if UNIT in files:
        assert files[UNIT].startswith(common.MADE_BY.encode()), "the unit is damaged"
        assert b"LoadCredential=" in files[UNIT] and files.get("api-keys", b"").startswith(b"key-of-")


def check_serves(host, *wanted):
    assert host.serving in wanted, f"{host.serving} serves"
    assert instance_files.installed(NAME) == host.serving
    assert switching.is_enabled(UNIT) and switching.is_enabled(TIMER) and host.watching


def deploy(host, version):
    """The next run: it ends with the wanted service, which has passed the gate."""
    new = switching.stage(version)
    switch.install([NAME])
    check_serves(host, new)
    assert instance_files.last_good(NAME) == new and switching.leftovers() == []
    return new


def test_power_cuts_in_a_switch_end_with_the_old_service_or_the_new_one(disk, host):
    old, number, seen = deploy(host, "0"), 0, []
    while True:
        number += 1
        if number % 2:  # as 39f1a14 kept them
            os.unlink(f"{common.GOOD}/{NAME}/manifest.json")
        new = switching.stage(f"{number}")
        os.sync()
        came_so_far = cut_at(host, disk, number, lambda: switch.install([NAME]))
        boot(host)
        check_serves(host, old, new)
        seen.append(host.serving == new)
        old = deploy(host, f"{number}-again")
        if not came_so_far:
            break
    assert number > 60 and seen.count(False) > 30 and seen.count(True) > 5
    assert seen == sorted(seen), "once the gate has passed, no later cut leads back"


def test_power_cuts_in_a_first_installation(disk, host):
    number, passed = 0, 0
    while True:
        number += 4
        new = switching.stage("first")
        os.sync()
        came_so_far = cut_at(host, disk, number, lambda: switch.install([NAME]))
        boot(host)
        if switching.is_enabled(UNIT):
            passed += 1
            check_serves(host, new)
        else:
            assert host.serving is None
        deploy(host, "first")
        switch.remove(NAME)
        if not came_so_far:
            break
    assert number > 60 and passed


def test_power_cuts_in_a_switch_that_goes_back(disk, host):
    old, number = deploy(host, "0"), 0
    while True:
        number += 4
        switching.stage("bad", serves=False)
        os.sync()

        def switch_back():
            with pytest.raises(switch.Failed, match="put back and serves"):
                switch.install([NAME])

        came_so_far = cut_at(host, disk, number, switch_back)
        boot(host)
        check_serves(host, old)
        if not came_so_far:
            break
    assert number > 60
    deploy(host, "1")


def test_power_cuts_in_a_refresh_never_leave_an_unproven_unit(disk, host):
    deploy(host, "0")
    keys, number = instance_files.installed(NAME)["api-keys"], 0
    while True:
        number += 4
        old = instance_files.installed(NAME)
        new = {**switching.stage(f"{number}"), "api-keys": keys}
        os.unlink(f"{common.STAGED}/{NAME}/api-keys")
        os.sync()
        came_so_far = cut_at(host, disk, number, lambda: switch.refresh(NAME))
        boot(host)
        check_serves(host, old, new)
        assert instance_files.last_good(NAME) == host.serving
        if not came_so_far:
            break
    assert number > 50


@pytest.fixture
def sent(tmp_path):
    """Makes copies of helpers, as they were sent; of one version they have the same content."""

    def make(version):
        folder = tmp_path / version
        if not folder.exists():
            (folder / "psutil").mkdir(parents=True)
            files = {name: f"version = {version!r}\n" * 300 for name in ("common.py", "gate.py", "psutil/__init__.py")}
            for name, text in files.items():
                (folder / name).write_text(text)
            sums = [f"{common.sha256(text.encode())}  {name}\n" for name, text in files.items()]
            (folder / common.SUMS).write_text("".join(sums))
        return str(folder)

    return make


@pytest.mark.parametrize("before", ["another version", "damaged"])
def test_power_cuts_in_an_installation_of_helpers_leave_whole_ones(disk, host, sent, monkeypatch, before):
    for module in (helpers, helpers.survey):
        for name in ("HELPERS", "UNITS", "GOOD"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, getattr(common, name))

    def install(version):
        helpers.install(version, sent(version))
        helpers.prune(version)

    def damage():
        for name in ("gate.py", common.SUMS):
            with open(f"{common.HELPERS}/new{number}/{name}", "w"):
                pass

    install("first")
    # A unit calls them, whatever is installed later.
    with open(f"{common.UNITS}/{UNIT}", "w") as file:
        file.write(f"{common.MADE_BY}\nExecStartPost={common.HELPERS}/first/gate.py\n")
    number = 0
    while True:
        number += 1
        new = f"new{number}"
        sent(new)
        if before == "damaged":
            install(new)
            damage()
        os.sync()
        came_so_far = cut_at(host, disk, number, lambda new=new: install(new))
        assert helpers.survey.current_helpers() in (new, "first", f"new{number - 1}", None)
        assert before == "damaged" or helpers.survey.current_helpers() is not None
        assert common.helpers_damage(f"{common.HELPERS}/first") is None
        install(new)  # the next run, which sees either that they are not of its version or that they are damaged
        assert helpers.survey.current_helpers() == new
        assert sorted(os.listdir(common.HELPERS)) == sorted(["current", "first", new])
        if not came_so_far:
            break
    assert number > 15


# --- on a host --------------------------------------------------------------------------------------

UNIT_FILE = "/etc/systemd/system/llama-server-tiny.service"
GOOD = "/var/lib/llamafleet/good"
# Until the new server is active and the gate asks it.
IN_MID_GATE = (
    f"until test -d {GOOD}/.switching/tiny && ! cmp -s {UNIT_FILE} {GOOD}/tiny/llama-server-tiny.service "
    "&& systemctl is-active --quiet llama-server-tiny; do sleep 0.02; done"
)
KILL = "systemctl kill --signal=KILL 'llamafleet-job-switch-tiny-*'"
LIVENESS = {"liveness_seconds": 30, "liveness_interval_seconds": 10}


@contextlib.contextmanager
def switching_to(asked, host, inventory):
    """A run that switches to these settings; in the block the gate is asking. The run has ended after it."""
    runs, written = [], inventory((host, asked))
    running = threading.Thread(target=lambda: runs.append(deploying.pyinfra(written)))
    running.start()
    try:
        deploying.on(host, "timeout", "120", "sh", "-c", IN_MID_GATE)
        yield runs
    finally:
        running.join()


def until(true, seconds):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)


def with_context(asked, context_tokens):
    return {**asked, "models": [{**asked["models"][0], "context_tokens": context_tokens}]}


def check_whole(host, *contexts):
    """Without another run: one of the two services serves, with its liveness check, and is the good one."""
    on, timer = deploying.on, "llama-server-tiny-liveness.timer"
    until(lambda: deploying.serves(host), 60)
    assert deploying.ask(host, "/props")[1]["default_generation_settings"]["n_ctx"] in contexts
    assert on(host, "cat", UNIT_FILE) == on(host, "cat", f"{GOOD}/tiny/llama-server-tiny.service")
    until(lambda: on(host, "systemctl", "show", "--property=ActiveState", "--value", timer) == "active", 20)
    assert on(host, "systemctl", "is-enabled", timer, "llama-server-tiny") == "enabled\nenabled"
    left = on(
        host, "sh", "-c", f"ls -A {GOOD}/.switching {GOOD}/.passed; find /etc -name '.*.old' -o -name '*recover-tiny*'"
    )
    assert left.split() == [f"{GOOD}/.passed:", f"{GOOD}/.switching:"]


@pytest.mark.parametrize("how", [pytest.param("killed", marks=pytest.mark.long), "power cut"])
def test_a_switch_that_ends_in_mid_gate_leaves_the_old_service_without_another_run(settings, inventory, deployed, how):
    host, on = deployed[0], deploying.on
    asked = settings(host, **LIVENESS)
    done = deploying.pyinfra(inventory((host, asked)))
    assert done.code == 0, done.text
    before = on(host, "cat", UNIT_FILE)
    with switching_to(with_context(asked, 768), host, inventory) as runs:
        if how == "killed":
            on(host, "sh", "-c", KILL)
        else:
            host.kill()
            host.start()
    assert runs[0].code != 0
    check_whole(host, 1024)
    assert on(host, "cat", UNIT_FILE) == before
    assert deploying.pyinfra(inventory((host, asked)), "--dry").changed() == []


EMPTY = (
    f"for file in {UNIT_FILE} /etc/systemd/system/llama-server-tiny-liveness.* /etc/llamafleet/instances/tiny/* "
    f"{GOOD}/tiny/* /opt/llamafleet/helpers/current/gate*.py /opt/llamafleet/helpers/current/survey.py; do : > $file; done"
)


def test_files_that_a_power_cut_emptied_are_made_anew(settings, inventory, deployed):
    """As on XFS, when nobody had synced them: all of an instance's files, the last good ones too, and helpers."""
    host, on = deployed[0], deploying.on
    written = inventory((host, settings(host, **LIVENESS)))
    done = deploying.pyinfra(written)
    assert done.code == 0, done.text
    on(host, "sh", "-c", EMPTY)
    host.kill()
    host.start()
    assert not deploying.serves(host)
    run = deploying.pyinfra(written)
    assert run.code == 0, run.text
    check_whole(host, 1024)
    assert (
        on(host, "sh", "-c", "cd /opt/llamafleet/helpers/current && sha256sum --status -c helpers.sha256 && echo whole")
        == "whole"
    )
    assert deploying.pyinfra(written, "--dry").changed() == []


@pytest.mark.long
def test_power_cuts_at_random_points_of_deploys_that_change_a_service(settings, inventory, deployed):
    host, seed = deployed[0], int(os.environ.get("E2E_SEED") or time.time())
    chance, contexts = random.Random(seed), (1024, 768)
    print(f"E2E_SEED={seed}")
    asked = settings(host, **LIVENESS)
    assert deploying.pyinfra(inventory((host, asked))).code == 0
    began = time.monotonic()
    assert deploying.pyinfra(inventory((host, with_context(asked, contexts[1])))).code == 0
    usual = time.monotonic() - began
    for number in range(10):
        written = inventory((host, with_context(asked, contexts[number % 2])))
        after = chance.uniform(0.1, 1.0) * usual
        cut = threading.Timer(after, lambda: (host.kill(), host.start()))
        cut.start()
        broken = deploying.pyinfra(written)
        cut.join()
        print(
            f"round {number} of E2E_SEED={seed}: cut after {after:.1f} s of {usual:.1f} s; the run ended with {broken.code}"
        )
        check_whole(host, *contexts)
        run = deploying.pyinfra(written)
        assert run.code == 0, run.text
        check_whole(host, contexts[number % 2])
