"""A fleet is rolled out wave by wave: its model answers at every moment, and a bad change ends with the first wave."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.e2e.deploying import ROOT, ask, environment, main_pid, on, pyinfra, serves

# llama-server takes the argument, loads, and computes what is no number: the gate's completion fails.
BAD = {"extra_flags": ["--rope-freq-base nan"]}


def command(inventory, *options):
    return [sys.executable, "-m", "llamafleet.cli", "rollout", "--inventory", str(inventory), *options]


def roll_out(inventory, *options):
    return subprocess.run(command(inventory, *options), cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=900)  # fmt: skip


@pytest.fixture(scope="module")
def contexts():
    """Numbers of tokens that no test before has asked for."""
    return iter(range(768, 4096, 64))


@pytest.fixture
def fleet(hosts, deployed, settings, inventory, contexts):
    """The inventory of three hosts of one model, which serve it; `changed` is one with a change for all."""

    def changed(**model):
        asked = {"context_tokens": next(contexts), **model}
        return inventory(*((host, settings(host, drain_seconds=5, model=asked)) for host in hosts))

    done = pyinfra(changed(context_tokens=512))
    assert done.code == 0, done.text
    return changed


class Watch:
    """In a thread of its own: how many of the hosts answer, several times a second."""

    def __init__(self, hosts):
        self.hosts, self.counts, self._end = hosts, [], threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self):
        while not self._end.wait(0.2):
            self.counts.append(sum(ask(host, "/health")[0] == 200 for host in self.hosts))

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        self._thread.join()


def test_a_change_reaches_one_host_after_the_other_and_a_second_run_does_nothing(fleet, hosts):
    asked = fleet()
    dry = roll_out(asked, "--dry")
    names = [host.name for host in hosts]
    assert dry.returncode == 0 and dry.stdout.count("wave ") == 3 and all(serves(host) for host in hosts), dry.stderr
    assert all(f"    {name}: serve tiny: " in dry.stdout for name in names), dry.stdout
    with Watch(hosts) as watch:
        run = roll_out(asked)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.splitlines()[-1].startswith("rolled out: ") and "this is no rollout" not in run.stderr
    assert min(watch.counts) == len(hosts) - 1, watch.counts
    assert all(serves(host) for host in hosts)
    again = roll_out(asked)
    assert (again.returncode, again.stdout) == (0, f"nothing to do: all {len(hosts)} hosts are as planned\n")
    assert pyinfra(asked, "--dry").changed() == []


def test_a_change_that_does_not_pass_the_gate_ends_with_the_first_wave(fleet, hosts):
    before = {host.name: main_pid(host, "tiny") for host in hosts}
    bad = fleet(**BAD)
    with Watch(hosts) as watch:
        run = roll_out(bad, "--json")
    told = json.loads(run.stdout)
    assert run.returncode == 1 and len(told["failed"]) == 1, run.stderr
    [(failed, why)] = told["failed"].items()
    assert "did not pass the gate" in why and "the previous one was put back and serves" in why
    assert told["done"] == [] and set(told["untouched"]) == set(before) - {failed}
    assert {name for name, pid in before.items() if main_pid(_named(hosts, name), "tiny") == pid} == set(
        told["untouched"]
    )
    assert all(serves(host) for host in hosts) and min(watch.counts) == len(hosts) - 1
    good = roll_out(fleet())
    assert good.returncode == 0 and all(serves(host) for host in hosts), good.stderr


def _named(hosts, name):
    return next(host for host in hosts if host.name == name)


def test_a_plain_deploy_takes_turns_and_says_that_it_is_no_rollout(fleet, hosts):
    with Watch(hosts) as watch:
        run = pyinfra(fleet())
    assert run.code == 0 and min(watch.counts) == len(hosts) - 1, run.text
    assert run.text.count("this is no rollout: 3 hosts of this run serve tiny") == 1


@pytest.mark.long
def test_killed_at_any_moment_the_next_rollout_ends_well(fleet, hosts):
    chance = random.Random(14)
    for _ in range(5):
        asked = fleet()
        with subprocess.Popen(command(asked), cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, process_group=0,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:  # fmt: skip
            time.sleep(chance.uniform(2, 40))
            os.killpg(process.pid, signal.SIGKILL)
        again = roll_out(asked)
        assert again.returncode == 0, again.stdout + again.stderr
        assert all(serves(host) for host in hosts)
        assert pyinfra(asked, "--dry").changed() == []


def test_what_runs_is_what_the_inventory_says(fleet, hosts):
    asked = fleet()
    assert roll_out(asked, "--limit", hosts[0].name).returncode == 0
    plans = [json.loads(on(host, "cat", "/etc/llamafleet/instances/tiny/plan.json")) for host in hosts]
    assert plans[0]["plan"]["argv"] != plans[1]["plan"]["argv"] == plans[2]["plan"]["argv"]
