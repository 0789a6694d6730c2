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
import struct
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import common
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


class Disk:
    """A file system in a file, mounted in a folder."""

    def __init__(self, kind, image, folder):
        mebibytes, make = KINDS[kind]
        self.image, self.folder = image, folder
        with open(image, "wb") as file:
            file.truncate(mebibytes << 20)
        subprocess.run([*make, image], check=True)
        self.mount()

    def mount(self):
        subprocess.run(["mount", "-o", "loop", self.image, self.folder], check=True)

    def cut(self):
        """Everything that is not on the disk is lost."""
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.ioctl(folder, SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        finally:
            os.close(folder)

    def again(self):
        subprocess.run(["umount", self.folder], check=True)
        self.mount()


@contextlib.contextmanager
def own_mounts():
    """A mount namespace of our own: one that is made beside us would keep what we unmount, and its damage."""
    libc, folder = ctypes.CDLL(None, use_errno=True), os.getcwd()
    before = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY)
    try:
        assert libc.unshare(CLONE_NEWNS) == 0, os.strerror(ctypes.get_errno())
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        yield
    finally:
        assert libc.setns(before, CLONE_NEWNS) == 0, os.strerror(ctypes.get_errno())
        os.close(before)
        os.chdir(folder)


@pytest.fixture(params=KINDS)
def disk(request):
    if os.geteuid() != 0:
        pytest.skip("file systems are mounted by root")
    where = "/dev/shm" if os.path.isdir("/dev/shm") else None  # in memory: it is synced some thousand times
    with tempfile.TemporaryDirectory(dir=where) as folder:
        Path(folder, "mnt").mkdir()
        with own_mounts():
            one = Disk(request.param, f"{folder}/image", f"{folder}/mnt")
            yield one
            subprocess.run(["umount", one.folder], check=True)


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
    switch.install(NAME)
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
        came_so_far = cut_at(host, disk, number, lambda: switch.install(NAME))
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
        number += 3
        new = switching.stage("first")
        os.sync()
        came_so_far = cut_at(host, disk, number, lambda: switch.install(NAME))
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
        number += 3
        switching.stage("bad", serves=False)
        os.sync()

        def switch_back():
            with pytest.raises(switch.Failed, match="put back and serves"):
                switch.install(NAME)

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
        number += 3
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
def switching_to(asked, context_tokens, host, inventory):
    """A run that switches to another context; in the block the gate is asking. The run has ended after it."""
    runs = []
    model = {**asked["models"][0], "context_tokens": context_tokens}
    written = inventory((host, {**asked, "models": [model]}))
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


@pytest.mark.parametrize("how", ["killed", "power cut"])
def test_a_switch_that_ends_in_mid_gate_leaves_the_old_service_without_another_run(settings, inventory, builder, how):
    host, on = builder, deploying.on
    asked = settings(host, **LIVENESS)
    done = deploying.pyinfra(inventory((host, asked)))
    assert done.code == 0, done.text
    before = on(host, "cat", UNIT_FILE)
    with switching_to(asked, 768, host, inventory) as runs:
        if how == "killed":
            on(host, "sh", "-c", KILL)
        else:
            host.kill()
            host.start()
    assert runs[0].code != 0
    until(lambda: deploying.serves(host), 60)
    assert on(host, "cat", UNIT_FILE) == before == on(host, "cat", f"{GOOD}/tiny/llama-server-tiny.service")
    assert deploying.ask(host, "/props")[1]["default_generation_settings"]["n_ctx"] == 1024
    timer = ["llama-server-tiny-liveness.timer"]
    until(lambda: on(host, "systemctl", "show", "--property=ActiveState", "--value", *timer) == "active", 20)
    assert on(host, "systemctl", "is-enabled", *timer, "llama-server-tiny") == "enabled\nenabled"
    left = on(
        host, "sh", "-c", f"ls -A {GOOD}/.switching {GOOD}/.passed; find /etc -name '.*.old' -o -name '*recover-tiny*'"
    )
    assert left.split() == [f"{GOOD}/.passed:", f"{GOOD}/.switching:"]
    assert deploying.pyinfra(inventory((host, asked)), "--dry").changed() == []
