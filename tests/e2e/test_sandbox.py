"""The disposable hosts themselves: two real ones, in a sandbox of their own beside any that is up already.

Roots are the checkout's (made once); everything else lies in a state folder that must be empty again at the end. All of
it is in `make test-long`: every other test with hosts uses them.
"""

import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sandbox import cgroups, machine, roots, state
from sandbox import hosts as sandbox

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
# 127.0.1.200 and up, clear of hosts that the operator has up; of two checkouts each its own.
FIRST = 200 + int(os.environ.get("E2E_FIRST_ADDRESS") or 1) % 50
NAMES = ["t1", "t2"]


def up(n=2, **options):
    return sandbox.up(n, prefix="t", first_address=FIRST, **options)


@pytest.fixture(scope="module")
def shared_roots():
    """The folder with the checkout's roots, made if need be."""
    sandbox.prepare()
    return state.current().directory


@pytest.fixture(scope="module")
def own(shared_roots):
    """An own state folder with the checkout's roots, current for this module."""
    folder = shared_roots.with_name("sandbox-test")
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SANDBOX_DIR", str(folder))
        sandbox.down()  # what a test before this one left when it was killed
        for root in shared_roots.glob("root-*"):
            if not root.suffix and not (folder / root.name).exists():
                (folder / root.name).symlink_to(root)
        try:
            yield state.current()
        finally:
            sandbox.down()
            subprocess.run(["rm", "-rf", str(folder)], check=True)


@pytest.fixture
def pair(own):
    """Two hosts that are up, whatever the test before did to them."""
    try:
        return up()
    except sandbox.SandboxError:
        sandbox.down()
        return up()


def cli(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "sandbox", *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True, **options
    )


def assert_nothing_is_left(own):
    assert not cgroups.top(own).path.exists()
    assert str(own.directory) not in Path("/proc/mounts").read_text()
    assert list(own.hosts.iterdir()) == []
    assert [p.name for p in own.directory.glob("*.part")] == []
    # Every supervisor, nspawn and mmdebstrap names the state folder in its arguments.
    assert [line for line in command_lines() if f"{own.directory}/" in line] == []
    for i in (0, 1):
        machine.check_address(f"127.0.1.{FIRST + i}", 22)


def command_lines():
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended
            yield (folder / "cmdline").read_text(errors="replace").replace("\0", " ")


def wait_for(what, seconds=60):
    deadline = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < deadline, f"{what} stayed false for {seconds} s"
        time.sleep(0.01)
    return value


def test_systemd_runs_and_nothing_failed(pair):
    for host in pair:
        failed = host.run(["systemctl", "--failed", "--plain", "--no-legend"]).stdout
        assert (host.run(["systemctl", "is-system-running"]).stdout.strip(), failed) == ("running", "")
        assert host.run(["cat", "/proc/1/comm"]).stdout == "systemd\n"
        assert "VERSION_CODENAME=trixie" in host.run(["cat", "/etc/os-release"]).stdout


def test_each_has_its_own_name_identity_and_address(pair):
    assert [h.run(["hostname"]).stdout.strip() for h in pair] == NAMES
    assert len({h.run(["cat", "/etc/machine-id"]).stdout for h in pair}) == 2
    for host in pair:
        listening = host.run(["ss", "-ltnpH"]).stdout.splitlines()
        own = [line.split()[3] for line in listening if "users:" in line]  # only its own processes have names
        assert own == [f"{host.address}:22"]


def test_a_host_is_bare(pair):
    tools = ["curl", "wget", "git", "gcc", "make", "cmake", "gpg", "pip", "rsync"]
    script = f"for tool in {' '.join(tools)} python3; do command -v $tool; done"
    found = pair[0].run(["sh", "-c", script]).stdout.split()
    assert found == ["/usr/bin/python3"]


def test_a_host_with_anothers_key_is_refused(pair, tmp_path):
    one, two = pair
    known = dict(line.split(" ", 1) for line in one.known_hosts.read_text().splitlines())
    (swapped := tmp_path / "known_hosts").write_text(f"{one.address} {known[two.address]}\n")
    command = [part.replace(str(one.known_hosts), str(swapped)) for part in one.ssh()]
    result = subprocess.run([*command, "true"], capture_output=True, text=True, check=False)
    assert (result.returncode, "Host key verification failed" in result.stderr) == (255, True)


def test_admin_may_sudo_and_nosudo_may_not(pair):
    assert pair[0].run(["sudo", "-n", "id", "-u"], user=roots.ADMIN).stdout == "0\n"
    assert pair[0].run(["id", "-un"], user=roots.NOSUDO).stdout == "nosudo\n"
    refused = pair[0].run(["sudo", "-n", "id", "-u"], user=roots.NOSUDO)
    assert (refused.returncode, refused.stdout) == (1, "")


def test_arguments_reach_the_host_unchanged(pair):
    arguments = ["a b", "$HOME", "'\"", "*", "", "-n", "ü"]
    sent = pair[0].run(["python3", "-c", "import json, sys; print(json.dumps(sys.argv[1:]))", *arguments])
    assert json.loads(sent.stdout) == arguments
    assert pair[0].run(["cat"], input="on stdin").stdout == "on stdin"
    executed = cli("exec", "t1", "--", "sh", "-c", "exit 7")
    executed.communicate()
    assert executed.returncode == 7


def test_apt_installs_and_the_next_host_does_not_download_again(pair):
    install = "apt-get -q update && apt-get -qy install hello && hello"
    first = pair[0].run(["sh", "-c", install], timeout=300)
    assert first.stdout.endswith("Hello, world!\n"), first.stderr
    sandbox.down(["t1"])
    again = up()[0]
    assert again.run(["hello"]).returncode == 127  # a new disk
    second = again.run(["sh", "-c", install], timeout=300)
    assert second.stdout.endswith("Hello, world!\n"), second.stderr
    assert "Need to get 0 B/" in second.stdout


def test_up_again_leaves_running_hosts_alone(pair):
    before = [h.pid for h in pair]
    assert [h.pid for h in up()] == before
    pair[1].kill()
    after = [h.pid for h in up()]
    assert (after[0], after[1] in (None, before[1])) == (before[0], False)


def test_a_reboot_starts_systemd_anew_on_the_same_disk(pair):
    host = pair[0]
    host.run(["sh", "-c", "echo kept > /var/lib/kept; touch /run/gone; systemctl reset-failed"], check=True)
    before = host.pid
    host.reboot()
    assert host.pid not in (None, before)
    assert host.run(["sh", "-c", "cat /var/lib/kept; ls /run/gone"]).stdout == "kept\n"
    assert host.run(["hostname"]).stdout == "t1\n"
    host.reboot()  # the loop goes on
    assert host.run(["cat", "/var/lib/kept"]).stdout == "kept\n"


def test_a_power_cut_ends_all_processes_and_keeps_the_disk(pair):
    host = pair[0]
    host.run(["sh", "-c", "echo kept > /var/lib/cut; setsid sleep 7654321 >/dev/null 2>&1 &"], check=True)
    inside = host.cgroup.pids()
    host.kill()
    # A process has left its cgroup a moment before it is dead.
    wait_for(lambda: all(_state(pid) in (None, "Z") for pid in inside), seconds=5)
    assert (host.is_running, host.pid) == (False, None)
    assert host.run(["true"]).returncode == 255
    assert (host.root / "var/lib/cut").read_text() == "kept\n"  # reachable while it is off
    host.start()
    assert host.run(["cat", "/var/lib/cut"]).stdout == "kept\n"
    assert (host.root / "var/lib/cut").read_text() == "kept\n"


def test_a_host_that_powers_off_is_off(pair):
    pair[0].run(["systemctl", "poweroff"])
    wait_for(lambda: not pair[0].is_running)
    pair[0].start()
    assert pair[0].run(["systemctl", "is-system-running"]).stdout == "running\n"


def test_the_inventory_lists_running_hosts_and_pyinfra_reaches_them(pair):
    pair[1].kill()
    listed = runpy.run_path(str(ROOT / "inventory" / "sandbox.py"))["sandbox"]
    assert [name for name, _ in listed] == ["t1"]
    argv = [sys.executable, "-m", "pyinfra", "-y", "inventory/sandbox.py", "exec", "--", "cat", "/etc/hostname"]
    result = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert (result.returncode, "[t1] t1" in result.stdout + result.stderr) == (0, True), result.stderr


def test_packages_are_installed_once_and_binds_are_seen(own, tmp_path):
    sandbox.down()
    (tmp_path / "note").write_text("from outside")
    binds = [f"{tmp_path}:/srv/shared", f"{tmp_path / 'note'}:/opt/deep/note:ro"]
    one, two = up(packages=["hello"], binds=binds)
    for host in (one, two):
        assert host.run(["hello"]).stdout == "Hello, world!\n"
        assert host.run(["cat", "/opt/deep/note"]).stdout == "from outside"
    assert one.run(["sh", "-c", "echo x > /opt/deep/note"]).returncode != 0
    two.run(["sh", "-c", "echo inside > /srv/shared/reply"], check=True)
    assert (tmp_path / "reply").read_text() == "inside\n"
    (layer,) = own.directory.glob("layer-*")
    made = layer.stat().st_mtime_ns
    with pytest.raises(sandbox.SandboxError, match="t1 is there already, without curl; remove it first"):
        up(packages=["hello", "curl"])
    sandbox.down()
    assert (tmp_path / "reply").exists()  # a bind is never deleted with the host
    up(1, packages=["hello"])
    assert layer.stat().st_mtime_ns == made
    sandbox.down()


def test_a_package_that_does_not_exist_is_named(own):
    sandbox.down()
    with pytest.raises(sandbox.SandboxError, match="Unable to locate package no-such-package"):
        up(1, packages=["no-such-package"])
    assert not cgroups.top(own).path.exists()
    sandbox.down()
    assert_nothing_is_left(own)


def test_down_leaves_nothing(pair, own):
    assert sandbox.down() == NAMES
    assert_nothing_is_left(own)
    assert sandbox.down() == []  # and a second one has nothing to do


def test_a_limit_of_the_machine_is_raised_for_the_hosts_and_restored(own, monkeypatch, tmp_path):
    sandbox.down()
    (limit := tmp_path / "max_user_instances").write_text("128")
    monkeypatch.setattr(machine, "INOTIFY", limit)
    up(1)
    assert int(limit.read_text()) == 140
    up(2)
    assert int(limit.read_text()) == 152
    sandbox.down(["t1"])
    assert int(limit.read_text()) == 152
    sandbox.down(["t2"])
    assert limit.read_text() == "128"


def test_down_of_an_unknown_host_names_those_there_are(pair):
    with pytest.raises(sandbox.SandboxError, match=r"no host is named x; there are: t1, t2"):
        sandbox.down(["x"])
    assert all(h.is_running for h in pair)


def test_an_up_that_dies_while_hosts_boot_is_cleaned_up(own):
    sandbox.down()
    process = cli("up", "--hosts", "2", "--name-prefix", "t", "--first-address", str(FIRST))
    wait_for(lambda: cgroups.of_host(own, "t1").populated)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert wait_for(lambda: cgroups.of_host(own, "t1").pids())
    sandbox.down()
    assert_nothing_is_left(own)


def test_an_up_that_dies_while_it_makes_the_root_is_cleaned_up(own, monkeypatch):
    sandbox.down()
    links = [path for path in own.directory.glob("root-*") if path.is_symlink()]
    kept = [(path, path.readlink()) for path in links]
    for path in links:
        path.unlink()
    try:
        process = cli("up", "--hosts", "1", "--name-prefix", "t", "--first-address", str(FIRST))
        wait_for(lambda: list(own.directory.glob("root-*.part/tree/var/lib/dpkg")))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert cgroups.of_build(own).pids()  # mmdebstrap goes on without its parent
        sandbox.down()
        assert_nothing_is_left(own)
    finally:
        for path, target in kept:
            path.symlink_to(target)


def test_a_host_whose_supervisor_was_killed_is_cleaned_up(pair, own):
    (loop,) = cgroups.Cgroup(pair[0].cgroup.path / "loop").pids()
    os.kill(loop, signal.SIGKILL)
    assert pair[0].is_running
    sandbox.down()
    assert_nothing_is_left(own)


def test_hosts_half_written_by_a_crash_are_finished_by_the_next_up(own):
    sandbox.down()
    (own.hosts / "t1").mkdir(parents=True)  # died before spec.json
    host = up(1)[0]
    host.kill()
    (host.disk / "job.json").unlink()  # died before the job was complete
    assert up(1)[0].run(["hostname"]).stdout == "t1\n"
    sandbox.down()


def test_an_address_that_is_taken_is_named_and_nothing_is_made(own):
    sandbox.down()
    with socket.create_server((f"127.0.1.{FIRST + 1}", 22)):
        process = cli("up", "--hosts", "2", "--name-prefix", "t", "--first-address", str(FIRST))
        _, error = process.communicate()
    assert process.returncode == 2
    assert f"127.0.1.{FIRST + 1} port 22 is taken" in error
    assert "another checkout" in error and "--first-address" in error
    assert sandbox.listed() == []


def test_a_machine_that_cannot_start_a_host_is_quoted(own, monkeypatch):
    sandbox.down()
    monkeypatch.setattr(cgroups.Cgroup, "enter", lambda group, argv: ["sh", "-c", "echo no room >&2; exit 1"])
    with pytest.raises(sandbox.SandboxError, match=r"(?s)t1 cannot be started; .*/t1/log ends with:.*no room"):
        up(1)


def test_another_checkouts_sandbox_is_told_apart(pair, own, tmp_path):
    """A second state folder sees neither the hosts nor the processes of the first, and is refused its addresses."""
    environment = {**os.environ, "SANDBOX_DIR": str(own.directory.with_name("sandbox-other"))}
    other = own.directory.with_name("sandbox-other")
    other.mkdir()
    try:
        for root in own.directory.glob("root-*"):
            (other / root.name).symlink_to(root.resolve())
        process = cli("up", "--name-prefix", "t", "--first-address", str(FIRST), env=environment)
        assert f"127.0.1.{FIRST} port 22 is taken" in process.communicate()[1]
        process = cli("down", env=environment)
        assert "nothing was there" in process.communicate()[1]
        assert all(h.is_running for h in pair)
    finally:
        subprocess.run(["rm", "-rf", str(other)], check=True)


@pytest.mark.parametrize("command", [["up"], ["down"], ["prepare"]])
def test_without_root_the_command_says_so(own, command):
    # A user namespace without a map: the process is user 65534, and can still read the checkout.
    argv = ["unshare", "--user", sys.executable, "-m", "sandbox", *command]
    result = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, "hosts need root" in result.stderr) == (2, True), result.stderr
    assert "Traceback" not in result.stderr and "65534" in result.stderr


def test_missing_programs_are_named_with_the_packages_that_hold_them(own, monkeypatch, tmp_path):
    for tool in set(machine.TOOLS) - {"mmdebstrap", "systemd-nspawn"}:
        (tmp_path / tool).symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(sandbox.SandboxError) as error:
        sandbox.up(1)
    assert str(error.value) == (
        "mmdebstrap, systemd-nspawn not found. Install: apt-get install mmdebstrap systemd-container "
        "(or: python -m sandbox prepare)"
    )


def test_where_nothing_may_be_mounted_the_error_says_so(own):
    """As in a container without --privileged: root, but without the capability to mount."""
    argv = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", sys.executable, "-m", "sandbox", "up"]
    result = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, "systemd-nspawn cannot run" in result.stderr) == (2, True), result.stderr


@pytest.mark.parametrize(
    ("bind", "message"),
    [
        ("/etc", "should be SRC:DST"),
        ("/etc:relative", "DST an absolute path"),
        ("/no/such/path:/srv", "/no/such/path should be an existing"),
        ("/etc:/srv:rw", "no other colons"),
    ],
)
def test_a_bind_that_cannot_be_is_refused(own, bind, message):
    with pytest.raises(sandbox.SandboxError, match=message):
        up(1, binds=[bind])


def test_beside_a_machines_own_sshd_hosts_take_another_port(own):
    """In a network of its own, where something listens on port 22 of all addresses.

    Mounts are shared there, as they are wherever systemd runs: none of the hosts' may come out.
    """
    sandbox.down()
    script = """
import fcntl, socket, struct
from sandbox import hosts
control = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
fcntl.ioctl(control, 0x8914, struct.pack("16sh", b"lo", 1))  # SIOCSIFFLAGS, IFF_UP
with socket.create_server(("0.0.0.0", 22)):
    host = hosts.up(1, prefix="t", first_address=200)[0]
    print(host.port, host.run(["hostname"]).stdout, end="")
    print(str(host.disk) in open("/proc/mounts").read())
    hosts.down()
"""
    argv = ["unshare", "--net", "--mount", "--propagation", "shared", sys.executable, "-c", script]
    result = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert result.stdout == "2222 t1\nFalse\n", result.stderr
    assert_nothing_is_left(own)


def _state(pid):
    """The kernel's letter for it; None where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return None
