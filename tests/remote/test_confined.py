"""Running a command in a transient unit: what systemd-run is told, and what is made of its end. The unit itself is tried
on a sandbox host by every deploy."""

from __future__ import annotations

import pytest

from llamafleet.remote import confined

RUN_IT = 'while [ "$1" != -- ]; do shift; done; shift; exec "$@"'


@pytest.fixture
def host(tmp_path, monkeypatch):
    """Sets what systemd-run does; `calls` are the command lines that were run."""
    monkeypatch.setattr(confined, "_unknown", set())
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    (tmp_path / "bin").mkdir()

    class Host:
        @staticmethod
        def program(name, script):
            path = tmp_path / "bin" / name
            path.write_text(f'#!/bin/sh\necho "{name} $*" >>{tmp_path}/calls\n{script}\n')
            path.chmod(0o755)

        @staticmethod
        def calls(name):
            lines = (tmp_path / "calls").read_text().splitlines()
            return [line for line in lines if line.startswith(name + " ")]

    Host.program("systemctl", "echo ActiveEnterTimestampMonotonic=5")
    Host.program("systemd-run", RUN_IT)
    return Host


def run(*command, directives=(), seconds=20):
    return confined.run("llamafleet-test-x.service", command, directives, seconds)


def test_output_and_exit_status_come_back(host):
    done = run("sh", "-c", "echo out; echo err >&2; exit 3")
    assert (done.code, done.stdout, done.stderr) == (3, b"out\n", "err\n")


def test_a_dollar_stays_one_in_a_units_command(host):
    run("true", "$HOME")
    assert host.calls("systemd-run")[0].endswith("-- true $$HOME")


def test_a_leftover_of_that_name_is_stopped_first_and_every_run_has_an_end(host):
    run("true", directives=["PrivateTmp=yes"], seconds=7)
    ended = [
        "systemctl --quiet stop llamafleet-test-x.service",
        "systemctl --quiet reset-failed llamafleet-test-x.service",
    ]
    assert host.calls("systemctl") == [*ended, *ended]
    [called] = host.calls("systemd-run")
    assert "--property=RuntimeMaxSec=7" in called and "--property=PrivateTmp=yes" in called


def test_a_directive_that_this_systemd_does_not_know_is_left_out(host, tmp_path):
    host.program("systemctl", "echo ActiveEnterTimestampMonotonic=0")
    refuse = 'case "$*" in *PrivateIPC*) echo "Unknown assignment: PrivateIPC=yes" >&2; exit 1;; esac\n'
    host.program("systemd-run", refuse + RUN_IT)
    assert run("echo", "fine", directives=["PrivateIPC=yes", "PrivateTmp=yes"]).stdout == b"fine\n"
    assert "PrivateIPC" not in host.calls("systemd-run")[-1] and "PrivateTmp" in host.calls("systemd-run")[-1]


@pytest.mark.parametrize("script", ["exit 226", "echo 'Failed to connect to bus: No such file' >&2; exit 1"])
def test_a_unit_that_systemd_cannot_start_is_told(host, script):
    host.program("systemctl", "echo ActiveEnterTimestampMonotonic=0")
    host.program("systemd-run", script)
    with pytest.raises(confined.NotStarted):
        run("true")


def test_where_systemd_hangs_the_command_counts_as_failed(host, monkeypatch):
    monkeypatch.setattr(confined, "STOP_SECONDS", 0)
    host.program("systemd-run", "exec sleep 60")
    assert run("true", seconds=0.3).code == confined.TIMED_OUT


def test_without_systemd_run_it_is_told_too(host, tmp_path, monkeypatch):
    (tmp_path / "bin/systemd-run").unlink()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")
    with pytest.raises(confined.NotStarted):
        run("true")


def test_a_commands_own_failure_is_none_of_the_unit(host):
    """Else what a server makes a program of ours say could take its hardening away."""
    for code in (1, 226):
        script = f"echo 'Failed to start transient service unit' >&2; echo 'Unknown assignment: PrivateTmp=yes' >&2; exit {code}"
        assert run("sh", "-c", script).code == code
    assert len(host.calls("systemd-run")) == 2


def test_output_is_read_within_a_bound(host, monkeypatch):
    monkeypatch.setattr(confined, "MOST_OUTPUT", 1000)
    assert len(run("sh", "-c", "yes | head -c 100000").stdout) == 1000


def test_the_version_is_asked_as_a_user_of_its_own(host, tmp_path):
    server = tmp_path / "llama-server"
    server.write_text("#!/bin/sh\necho version: 1 $HOME\necho built with gcc >&2\n")
    server.chmod(0o755)
    assert confined.version_of(str(server))[0] == 0
    assert "version: 1" in confined.version_of(str(server))[1]
    called = host.calls("systemd-run")[0]
    for wanted in ("DynamicUser=yes", "CapabilityBoundingSet= ", "PrivateNetwork=yes", "NoNewPrivileges=yes"):
        assert f"--property={wanted}" in called


def test_where_there_is_no_unit_the_version_is_asked_as_nobody(host, tmp_path, capsys):
    host.program("systemd-run", "exit 226")
    host.program("systemctl", "echo ActiveEnterTimestampMonotonic=0")
    host.program("setpriv", "exit 0")
    assert confined.version_of("/opt/x/llama-server") == (0, "")
    assert host.calls("setpriv")[0].startswith("setpriv --reuid=65534 --regid=65534 --clear-groups --no-new-privs")
    assert "note: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("nsswitch", "user"),
    [("passwd: files systemd\n", "DynamicUser=yes"), ("passwd:         files\ngroup: files systemd\n", "User=nobody"),
     ("", "User=nobody"), (None, "User=nobody")],
)  # fmt: skip
def test_a_user_without_a_name_cannot_ask_the_bus(tmp_path, nsswitch, user):
    if nsswitch is not None:
        (tmp_path / "nsswitch.conf").write_text(nsswitch)
    assert confined.user(str(tmp_path / "nsswitch.conf")) == user
