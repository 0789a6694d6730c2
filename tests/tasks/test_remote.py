"""Commands on a host: deadlines, broken connections, failures that are this host's alone; on this machine, by pyinfra's
own connector."""

import getpass
import hashlib
import io
import os
import re
import subprocess
import sys
import time
import types

import gevent
import pytest
from paramiko import SSHException
from pyinfra.api import Config, Inventory, State
from pyinfra.api.exceptions import ConnectError
from pyinfra.connectors import util

from llamafleet.host import answers
from llamafleet.remote import receive
from tasks.lib import remote, sending
from tasks.lib.remote import HostCommand


@pytest.fixture
def host(monkeypatch):
    """This machine; its log lines are in `lines`."""
    inventory = Inventory((["@local"], {}))
    state = State(inventory, Config())
    one = inventory.get_host("@local")
    one.connect()
    one.lines = []
    monkeypatch.setattr(type(one), "log_styled", lambda self, text, **_: self.lines.append(text))
    monkeypatch.setattr(type(one), "log", lambda self, text, *_: self.lines.append(text))
    assert one.state is state
    return one


@pytest.fixture
def quick(monkeypatch):
    """What comes after a deadline, scaled down."""
    monkeypatch.setattr(remote, "KILL_SECONDS", 0.3)
    monkeypatch.setattr(remote, "SILENT_SECONDS", 0.5)


@pytest.mark.parametrize(("data", "python"), [
    ({}, "python3"), ({"python": "/usr/bin/python3.11"}, "/usr/bin/python3.11"), ({"python": 3}, "python3"),
])  # fmt: skip
def test_our_programs_run_with_the_host_s_own_python(data, python):
    """RHEL 8 and Ubuntu 20.04: another one is named. Also where one of our programs starts another, and in no word of
    somebody else's."""
    inventory = Inventory((["@local"], data))
    State(inventory, Config())
    job = remote.program("job.py", "start", "build-1", "--", *remote.words("build.py", "python3"))
    sent = remote.for_host(inventory.get_host("@local"), job)
    helpers = "/opt/llamafleet/helpers/current"
    assert sent.words == [python, "-s", "-E", "-B", f"{helpers}/job.py", "start", "build-1", "--",
                          python, "-s", "-E", "-B", f"{helpers}/build.py", "python3"]  # fmt: skip
    assert str(sent) == " ".join(sent.words) and sent.seconds == job.seconds


def sh(script, *arguments, seconds=60.0, stdin=None, purpose="the test"):
    return HostCommand(["sh", "-c", script, "sh", *arguments], purpose=purpose, seconds=seconds, stdin=stdin)


def test_words_arrive_as_they_are(host):
    odd = ["a b", "$(touch /tmp/no)", "m;touch${IFS}x;.gguf", "'\"", "-rf", "*", ""]
    ok, out, err = remote.run(host, HostCommand(["printf", "%s\\n", *odd], purpose="printf"))
    assert (ok, out, err) == (True, odd, [])


def test_what_a_command_prints_and_how_it_ends(host):
    assert remote.run(host, sh("echo out; echo err >&2; exit 3")) == (False, ["out"], ["err"])


@pytest.mark.parametrize(
    "script",
    ["sleep 60", "trap '' TERM; sleep 60", "kill -STOP $$", "exec >/dev/null 2>&1; sleep 60", "while :; do :; done"],
    ids=["silent", "deaf", "stopped", "closed", "busy"],
)
def test_a_command_that_does_not_end_is_ended_at_its_deadline(host, quick, script, tmp_path):
    mark = tmp_path / "pid"
    began = time.monotonic()
    with pytest.raises(remote.RemoteError, match=r"^reading the host: it did not end within 3 s"):
        remote.run(host, sh(f"echo $$ > {mark}; {script}", seconds=3, purpose="reading the host"))
    assert time.monotonic() - began < 30
    gevent.sleep(0.1)
    # Nothing of it is left: on a real host, too, `timeout` ends it.
    state = subprocess.run(["ps", "-o", "stat=", "-p", mark.read_text().strip()], capture_output=True, text=True).stdout
    assert state.strip()[:1] in ("", "Z")


def test_a_host_that_says_nothing_at_all_is_given_up(host, quick, monkeypatch):
    """Not even that the command was ended there: `timeout` hangs as well."""
    monkeypatch.setattr(host.connector, "run_shell_command", lambda *_, **__: gevent.sleep(60))
    began = time.monotonic()
    with pytest.raises(
        remote.NoAnswerError, match=r"the survey: it did not end within 0\.2 s: the host does not answer"
    ):
        remote.run(host, sh("true", seconds=0.2, purpose="the survey"))
    assert time.monotonic() - began < 30


def test_pyinfra_s_own_limit_is_no_broken_connection(host, quick, monkeypatch):
    def hang(*_, _timeout, **__):
        gevent.sleep(_timeout)
        raise TimeoutError

    monkeypatch.setattr(host.connector, "run_shell_command", hang)
    with pytest.raises(remote.NoAnswerError):
        remote.run(host, sh("true", seconds=0.2))


def test_a_password_that_sudo_wants_is_no_broken_connection(host, monkeypatch):
    """Where nobody can be asked for it: getpass raises EOFError, as paramiko does on a broken connection."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    monkeypatch.setattr(os, "open", lambda *_, **__: (_ for _ in ()).throw(OSError("no terminal")))

    def ask(*_, **__):
        getpass.getpass("sudo password: ")

    monkeypatch.setattr(host.connector, "run_shell_command", ask)
    began = time.monotonic()
    with pytest.raises(remote.RemoteError, match=r"sudo does not work for this user .*connect as root"):
        remote.run(host, sh("true"))
    assert time.monotonic() - began < 20


def test_four_commands_run_side_by_side(host, tmp_path):
    """As a lock is refreshed beside a build. Each ends once all have begun."""
    script = 'touch "$1/$2"; until [ "$(ls "$1" | wc -l)" = 4 ]; do sleep 0.05; done; echo done'
    jobs = [gevent.spawn(remote.run, host, sh(script, str(tmp_path), str(number))) for number in range(4)]
    gevent.joinall(jobs, raise_error=True)
    assert [job.value[1] for job in jobs] == [["done"]] * 4


@pytest.mark.parametrize("error", [ValueError("odd"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), KeyError("x")])
def test_in_an_operation_whatever_is_raised_is_a_failed_command(host, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(host.connector, "run_shell_command", fail)
    ok, output = sh("true").execute(host.state, host, {})
    assert not ok and output.stderr_lines[0].startswith(type(error).__name__)


def test_in_a_function_whatever_is_raised_fails_the_host_with_one_line(host):
    @remote.guarded
    def act(state, host, why):
        raise why

    assert act(host.state, host, RecursionError("too deep")) is False
    assert act(host.state, host, remote.RemoteError("the disk is full")) is False
    assert host.lines == ["RecursionError: too deep", "the disk is full"]


@pytest.mark.parametrize("answer", ["", "not JSON", "{", "[" * 100_000])
def test_an_unusable_answer_is_a_remote_error(host, answer, tmp_path):
    (tmp_path / "answer").write_text(answer + "\n")
    with pytest.raises(remote.RemoteError, match=r"on the host: answer|it printed nothing"):
        remote.run_json(host, HostCommand(["cat", str(tmp_path / "answer")], purpose="cat"), answers.job)


def test_bytes_that_are_no_text_are_an_unusable_answer_without_a_traceback(host, capfd):
    with pytest.raises(remote.RemoteError):
        remote.run_json(host, sh("printf '{\\377\\n'"), answers.job)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("said", "way_out"),
    [
        ("sh: 1: python3: not found", "apt-get install python3"),
        ("timeout: failed to run command ‘python3’: No such file or directory", "apt-get install python3"),  # noqa: RUF001 -- as coreutils writes it
        ("llamafleet: python3 not found", "apt-get install python3"),
        (
            "python3: can't open file '/opt/llamafleet/helpers/current/job.py': [Errno 2] No such file or directory",
            "tasks.bootstrap.bootstrap",
        ),
        ("sudo: a password is required", "connect as root"),
        ("nosudo is not in the sudoers file.  sudo", "connect as root"),
        ("disk on fire", "disk on fire"),
    ],
)
def test_known_failures_say_the_way_out(said, way_out):
    assert way_out in remote.explain([], [said])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="not Linux")
def test_where_a_disk_is_full_its_free_bytes_are_told(host):
    """By a command and in an operation; /dev/full answers as a full disk."""
    full = sh("head -c 9 /dev/zero >/dev/full", purpose="writing")
    ok, _, err = remote.run(host, full)
    assert not ok and re.search(r"\d+ of \d+ bytes are free where /\S* is, on the file system at /", err[-1])
    ok, output = full.execute(host.state, host, {})
    assert not ok and output.stderr_lines[0].endswith("No space left on device")
    assert "bytes are free where /" in output.stderr_lines[-1]


def test_in_an_operation_a_known_failure_says_the_way_out(host):
    ok, output = sh("echo 'ops is not in the sudoers file' >&2; exit 1").execute(host.state, host, {})
    assert not ok and "/etc/sudoers.d" in output.stderr


@pytest.mark.parametrize("error", [EOFError(), OSError("reading from stdin")])
def test_a_password_that_nobody_can_give_is_no_broken_connection(host, monkeypatch, error):
    """pyinfra asks for it where sudo wants one."""

    def nobody(*_, **__):
        raise error

    monkeypatch.setattr(util, "getpass", getpass.fallback_getpass)
    monkeypatch.setattr(getpass, "_raw_input", nobody)
    with pytest.raises(remote.RemoteError, match=r"^sudo does not work for this user without a password"):
        remote.run(host, sh("echo 'sudo: a password is required' >&2; exit 1"))


# --- what is sent -------------------------------------------------------------------------------


def test_files_arrive_byte_for_byte_through_standard_input(host, tmp_path):
    files = {str(tmp_path / "a"): (0o600, bytes(range(256)) * 4000), str(tmp_path / "b"): (0o644, b"")}
    command = HostCommand([sys.executable, receive.__file__, *files], purpose="receive.py",
                          stdin=sending.packed(list(files.values())))  # fmt: skip
    assert remote.run(host, command) == (True, [], [])
    for path, (mode, data) in files.items():
        with open(path, "rb") as file:
            assert (os.stat(path).st_mode & 0o777, file.read()) == (mode, data)


def test_what_is_sent_is_in_no_word_of_the_command():
    command = sending.received({"/staged/a/api-keys": (0o600, b"secret-key")}, "--fresh", "/staged/a")
    assert "secret" not in str(command) and hashlib.sha256(b"secret-key").hexdigest() not in str(command)
    assert "/staged/a/api-keys" in str(command)


def test_su_s_password_does_not_take_what_is_sent(host, monkeypatch):
    """su reads its password from standard input: the command reads what was sent from a private file instead."""
    calls = []
    plain = host.connector.run_shell_command

    def run(command, **arguments):
        calls.append((str(command), arguments))
        arguments = {key: value for key, value in arguments.items() if not key.startswith("_su")}
        return plain(command, **arguments)

    monkeypatch.setattr(host.connector, "run_shell_command", run)
    monkeypatch.setattr(remote, "_arguments", lambda host: {"_su_user": "root", "_su_password": "x"})
    assert remote.run(host, sh("cat", stdin="what is sent")) == (True, ["what is sent"], [])
    (_, parked), (with_su, arguments), (removed, _) = calls
    assert "_su_user" not in parked and parked["_stdin"] == "what is sent"
    assert arguments["_su_user"] == "root" and "_stdin" not in arguments
    path = removed.split()[-1]
    assert path in with_su and not os.path.exists(path)


# --- connections ---------------------------------------------------------------------------------


class Flaky:
    """A host whose connection breaks a number of times."""

    print_prefix = "[box1] "

    def __init__(self, breaks):
        self.breaks, self.connected, self.connections = breaks, True, 0
        self.connector, self.connector_data = self, {}

    def act(self):
        if self.breaks:
            self.breaks -= 1
            raise OSError("Socket is closed")
        return "done"

    def disconnect(self):
        raise EOFError  # closing what is broken may fail too

    def connect(self, **_):
        self.connections += 1
        self.connected = True


def test_a_broken_connection_is_made_again(monkeypatch):
    monkeypatch.setattr(remote, "RECONNECT_SECONDS", 0.0)
    host = Flaky(breaks=3)
    assert remote.reconnecting(host, host.act) == "done"
    assert host.connections == 3


def test_a_connection_that_stays_away_ends_with_a_sentence(monkeypatch):
    monkeypatch.setattr(remote, "RECONNECT_SECONDS", 0.0)
    host = Flaky(breaks=10**6)
    with pytest.raises(
        remote.LostError, match=r"does not come back: .*run again when it is up \(OSError: Socket is closed\)"
    ):
        remote.reconnecting(host, host.act)
    assert host.connections == remote.RECONNECTS - 1


def test_of_two_commands_on_one_broken_connection_the_first_makes_it_again(monkeypatch):
    monkeypatch.setattr(remote, "RECONNECT_SECONDS", 0.0)
    host = Flaky(breaks=0)
    broken = [True]

    def act():
        was_broken = broken[0]
        gevent.sleep(0.05)
        if was_broken:
            raise OSError("Socket is closed")
        return "done"

    def connect(**_):
        host.connections += 1
        host.connected = True
        broken[0] = False

    host.connect = connect
    jobs = [gevent.spawn(remote.reconnecting, host, act) for _ in range(5)]
    gevent.joinall(jobs, raise_error=True)
    assert [job.value for job in jobs] == ["done"] * 5 and host.connections == 1


def test_while_it_cannot_be_connected_to_nothing_is_asked_and_the_cause_is_told_once(monkeypatch, caplog):
    """After a power cut the connector has a connection without a transport."""
    monkeypatch.setattr(remote, "RECONNECT_SECONDS", 0.0)
    monkeypatch.setattr(remote, "RECONNECTS", 5)
    host = Flaky(breaks=10**6)
    asked = []

    def connect(**_):
        raise ConnectError("nothing answers at its SSH port")

    def act():
        asked.append(1)
        return remote._in_time(host, sh("true"), {})

    def without_transport(*_, **__):
        raise AttributeError("'NoneType' object has no attribute 'open_session'")

    host.connect, host.run_shell_command = connect, without_transport
    with pytest.raises(remote.LostError, match=r"and does not come back: nothing answers at its SSH port$"):
        remote.reconnecting(host, act)
    assert asked == [1]
    assert [one.message for one in caplog.records] == [
        "[box1] the connection broke (the connection is closed); connecting again"
    ]


@pytest.mark.parametrize(("active", "broken"), [(True, False), (False, True)])
def test_a_command_without_an_exit_status_on_a_dead_connection_has_not_failed_but_broken(
    host, monkeypatch, active, broken
):
    """After a power cut paramiko says -1 for the exit status, with nothing printed."""
    transport = types.SimpleNamespace(is_active=lambda: active)
    monkeypatch.setattr(host.connector, "client", types.SimpleNamespace(get_transport=lambda: transport), raising=False)
    monkeypatch.setattr(host, "run_shell_command", lambda *_, **__: (False, util.CommandOutput([])))
    if broken:
        with pytest.raises(SSHException, match="the connection is closed"):
            remote._in_time(host, sh("true"), {})
    else:
        assert remote._in_time(host, sh("true"), {})[0] is False
