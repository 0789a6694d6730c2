"""From bare hosts to running servers; the order of the tests is the story of a first deployment."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sandbox import compiler_cache
from tests.e2e.deploying import ROOT, ask, command, environment, on, pyinfra, serves, shipped_checks


@pytest.fixture(scope="module")
def pair(hosts):
    return hosts[:2]


def changes(run, hosts):
    return {host.name: run.changed(host.name) for host in hosts}


@pytest.fixture(scope="module")
def story():
    """What one test leaves for the next."""
    return {}


def both(inventory, settings, pair):
    return inventory((pair[0], settings(pair[0], "dense")), (pair[1], settings(pair[1], "moe")))


def test_dry_run_of_bare_hosts_shows_the_whole_way_and_changes_nothing(inventory, settings, pair, story):
    run = pyinfra(both(inventory, settings, pair), "--dry")
    assert run.code == 0, run.text
    story["forecast"] = changes(run, pair)
    for name in ("Install packages", "Build llama.cpp", "Fetch tiny-", "Start and check", "current release"):
        assert any(name in one for one in story["forecast"][pair[0].name]), (name, story["forecast"])
    for host in pair:
        assert on(host, "sh", "-c", "ls -d /opt/llamafleet /var/lib/llamafleet /etc/llamafleet 2>/dev/null; true") == ""
        assert on(host, "sh", "-c", "ls -d /tmp/llamafleet* /tmp/pyinfra* 2>/dev/null; true") == ""
    # The plan is there before anything is compiled or downloaded.
    assert all(f"tiny on {host.name}" in run.text for host in pair)


def test_the_plan_of_bare_hosts_is_shown_by_the_command_too(inventory, settings, pair):
    written = both(inventory, settings, pair)
    program = Path(sys.executable).with_name("llamafleet")
    words = [program, "plan", "--inventory", str(written), "--json"]
    done = subprocess.run(words, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert {name: host["models"]["tiny"]["fits"] for name, host in told.items()} == {one.name: True for one in pair}


@pytest.mark.parametrize("stage", ["tasks.build.build", "tasks.model.model", "tasks.service.service"])
def test_a_stage_alone_on_a_bare_host_says_what_comes_first(inventory, settings, pair, stage):
    done = pyinfra(inventory((pair[0], settings(pair[0]))), deploy=stage)
    assert done.code != 0 and "run deploy.py first" in done.text and "FileNotFound" not in done.text, done.text


@pytest.fixture
def compiled_anew(pair, turn):
    """A compilation as users have it: the compiler cache gives nothing, and takes what comes out for others."""
    cache = ["env", f"CCACHE_DIR={compiler_cache.OBJECTS}", "ccache"]
    with turn:
        on(pair[0], *cache, "--zero-stats")
        for host in pair:
            on(host, "systemctl", "set-environment", "CCACHE_RECACHE=1")
        yield
        for host in pair:
            on(host, "systemctl", "unset-environment", "CCACHE_RECACHE")
        counts = dict(line.split("\t") for line in on(pair[0], *cache, "--print-stats").splitlines())
    assert int(counts["recache"]) > 60, "the deploy did not compile"


@pytest.mark.usefixtures("compiled_anew")
def test_killed_in_mid_build_the_build_goes_on_and_the_next_run_ends_green(inventory, settings, pair, story):
    written = both(inventory, settings, pair)
    process = subprocess.Popen(
        [*command(written, "-y")], cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    for line in process.stdout:
        if "] [" in line and "/" in line.split("] [")[1][:9]:  # Ninja: [17/180] Building ...
            break
    else:
        pytest.fail("the build never showed progress")
    process.send_signal(signal.SIGKILL)
    process.wait()
    states = [on(host, "sh", "-c", "systemctl list-units --no-legend 'llamafleet-job-build-*'") for host in pair]
    # One of them; the other one waits for its build.
    assert [state for state in states if "running" in state], states

    began = time.monotonic()
    run = pyinfra(written)
    assert run.code == 0, run.text
    print(f"the run after the kill took {time.monotonic() - began:.0f} s")
    story["inventory"] = written
    for host in pair:
        assert f"[{host.name}] tiny serves at http://{host.address}:8080" in run.text, run.text
        assert f"[{host.name}] tiny, measured: " in run.text and "curl" in run.text
    # What was forecast is what was done, by both runs together.
    for host in pair:
        assert set(run.changed(host.name)) <= set(story["forecast"][host.name])
        missing = set(story["forecast"][host.name]) - set(run.changed(host.name))
        # Done by the run that was killed, which could not report it.
        first = ("helpers", "files and folders", "user llamafleet", "Install packages", "Check out")
        assert all(any(part in name for part in first) for name in missing), missing


def test_both_hosts_answer(pair):
    for host in pair:
        assert serves(host), ask(host, "/health")


def test_only_one_host_compiled(pair):
    # The other took the result from the shared cache: the same key is the same artefact.
    built_on = {on(host, "sh", "-c", "grep -h built_on /opt/llamafleet/releases/*/release.json") for host in pair}
    assert len(built_on) == 1


def test_a_second_run_changes_nothing(pair, story):
    pids = [on(host, "systemctl", "show", "--property=MainPID", "llama-server-tiny.service") for host in pair]
    dry = pyinfra(story["inventory"], "--dry")
    assert dry.code == 0 and changes(dry, pair) == {host.name: [] for host in pair}
    run = pyinfra(story["inventory"], forks=False)
    assert run.code == 0 and changes(run, pair) == {host.name: [] for host in pair}, run.text
    # A line for each host, with what its gate has measured, and no plan.
    for host in pair:
        begin = f"[{host.name}] nothing to do: everything is as planned: tiny at http://{host.address}:8080 ("
        [line] = [line for line in run.text.splitlines() if begin in line]
        assert " written, " in line and line.rstrip().endswith(" read, measured)"), line
    assert "flags: " not in run.text and "predicted" not in run.text
    assert pids == [on(h, "systemctl", "show", "--property=MainPID", "llama-server-tiny.service") for h in pair]


def test_the_shipped_checks_pass(story):
    done = shipped_checks(story["inventory"])
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


def test_after_a_reboot_the_service_is_back_without_help(pair):
    host = pair[0]
    before = host.pid
    host.reboot()
    deadline = time.monotonic() + 60
    while not serves(host) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert serves(host)
    assert host.pid != before


def test_a_run_after_the_reboot_changes_nothing(pair, story):
    assert pyinfra(story["inventory"]).changed(pair[0].name) == []
